"""The golden scores and steps in other precisions and compiled, on the CPU.

test_golden.py has float32, and `bash scripts/check_gpu.sh` does the same on a GPU.
"""

import pytest
import torch
from test_golden import beyond

from common.config import Precision
from scripts.parts.golden import CPU, Case, score_deviations, step_deviations


@pytest.mark.slow
def test_float32_equals_the_golden_scores(case: Case) -> None:
    assert beyond(score_deviations(case, CPU)) == []


def test_bfloat16_is_close_to_the_golden_scores(case: Case) -> None:
    deviations = score_deviations(case, CPU, "bf16")
    assert beyond(deviations) == []
    assert all(each.gap > 1e-4 for each in deviations)  # it is bfloat16


@pytest.mark.parametrize("case", ["i2t", "t2i"], indirect=True)
def test_steps_in_bfloat16_are_finite(case: Case) -> None:
    deviations = step_deviations(case, CPU, "bf16")
    assert beyond(deviations) == []
    assert max(each.gap for each in deviations) > 1e-4


# What the compiler generates; the suite compiles without it (test_chunks.py).


@pytest.mark.slow
@pytest.mark.parametrize("case", ["i2t", "t2i"], indirect=True)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_is_as_close_to_the_golden_scores(precision: Precision, case: Case) -> None:
    torch._dynamo.reset()
    assert beyond(score_deviations(case, CPU, precision, compiled=True)) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", ["i2t", "t2i"], indirect=True)
def test_compiled_steps_are_the_golden_ones(case: Case) -> None:
    torch._dynamo.reset()
    assert beyond(step_deviations(case, CPU, compiled=True)) == []
