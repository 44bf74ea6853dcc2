"""The golden scores and training steps on a device: float32, bfloat16, compiled.

    DIME_DEVICE=cuda python -m pytest -m "slow or not slow" tests/test_devices.py

In the suite it is the CPU, whose float32 test_golden.py has; `scripts/check_gpu.sh` asks for a GPU.
"""

import os

import numpy as np
import pytest
import torch
from conftest import Case
from test_golden import three_steps

from checkpoint.checkpoint import bert_of, build_model, read_checkpoint
from common.cli import pick_device
from evaluation import score_split

EXACT = 1e-5
ROUNDED = 0.02  # of mean difference in bfloat16: cells of 16 channels round more than those of 256


def device_of_tests() -> torch.device:
    return pick_device(os.environ.get("DIME_DEVICE", "cpu"))


def scores(case: Case, precision: str = "fp32", compiled: bool = False) -> np.ndarray:
    device = device_of_tests()
    checkpoint = read_checkpoint(case.model_path)
    bert = bert_of(checkpoint, case.bert_path)
    model = build_model(checkpoint, bert, device)
    model.precision = precision
    if compiled:
        model.space.compile_routes()
    matrix = score_split(model, case.split(), bert.vocabulary, device=device)
    assert model.space.is_compiled == compiled, "the compiler has failed"
    return matrix


@pytest.mark.slow
def test_float32_equals_the_golden_scores(case: Case) -> None:
    np.testing.assert_allclose(scores(case), case.expected("eval")["sims"], rtol=0, atol=EXACT)


def test_bfloat16_is_close_to_the_golden_scores(case: Case) -> None:
    gap = abs(scores(case, "bf16") - case.expected("eval")["sims"]).mean()
    assert 0 < gap < ROUNDED


# What the compiler generates; the suite compiles without it (test_chunks.py).


@pytest.mark.slow
@pytest.mark.parametrize("case", ["i2t", "t2i"], indirect=True)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_is_as_close_to_the_golden_scores(precision: str, case: Case) -> None:
    torch._dynamo.reset()
    gap = abs(scores(case, precision, compiled=True) - case.expected("eval")["sims"])
    assert gap.max() <= EXACT if precision == "fp32" else 0 < gap.mean() < ROUNDED


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", ["i2t", "t2i"], indirect=True)
def test_training_steps_are_the_golden_ones(compiled: bool, case: Case) -> None:
    torch._dynamo.reset()
    three_steps(case, device_of_tests(), compiled)
