"""The golden scores on a device: float32, bfloat16, compiled.

    DIME_DEVICE=cuda python -m pytest -m "slow or not slow" tests/test_devices.py

In the suite it is the CPU; `scripts/check_gpu.sh` asks for a GPU.
"""

import os

import numpy as np
import pytest
import torch
from conftest import Case

from checkpoint import bert_of, build_model, read_checkpoint
from options import pick_device
from scoring import score_split

EXACT = 1e-5
ROUNDED = 0.02  # of mean difference in bfloat16: cells of 16 channels round more than those of 256


def scores(case: Case, precision: str = "fp32", compiled: bool = False) -> np.ndarray:
    device = pick_device(os.environ.get("DIME_DEVICE", "cpu"))
    checkpoint = read_checkpoint(case.model_path)
    bert = bert_of(checkpoint, case.bert_path)
    model = build_model(checkpoint, bert, device)
    model.precision = precision
    if compiled:
        model.space.compile_routes()
    words = checkpoint.config.max_words
    found = score_split(model, case.split(), bert.vocabulary, words, device=device)
    assert model.space.is_compiled == compiled, "the compiler has failed"
    return found


def test_float32_equals_the_golden_scores(case: Case) -> None:
    np.testing.assert_allclose(scores(case), case.expected("eval")["sims"], rtol=0, atol=EXACT)


def test_bfloat16_is_close_to_the_golden_scores(case: Case) -> None:
    gap = abs(scores(case, "bf16") - case.expected("eval")["sims"]).mean()
    assert 0 < gap < ROUNDED


@pytest.mark.slow
@pytest.mark.parametrize("case", ["i2t", "t2i"], indirect=True)
def test_compiled_equals_the_golden_scores(case: Case) -> None:
    torch._dynamo.reset()
    found = scores(case, compiled=True)
    np.testing.assert_allclose(found, case.expected("eval")["sims"], rtol=0, atol=EXACT)
