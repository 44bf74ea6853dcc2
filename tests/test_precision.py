"""precision.py: TF32 is on for a model that asks for it while it computes, and for no other."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, Error, tiny_train
from test_model import SMALL, small_batch, small_model

from checkpoint import load_model
from common.cli import pick_device
from common.config import Precision
from common.errors import InputError
from common.precision import (
    has_fast_bf16,
    has_tf32,
    product_precision,
    warn_if_bf16_is_slow,
)
from common.torch_files import read_torch, write_torch
from data import Batch
from evaluate_models import evaluate
from training.config import TrainConfig
from training.step import TrainStep

CPU = torch.device("cpu")
FLAGS = (torch.backends.cuda.matmul, torch.backends.cudnn)


def allowed() -> list[bool]:
    return [flag.allow_tf32 for flag in FLAGS]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = allowed()
    yield
    for flag, value in zip(FLAGS, before, strict=True):
        flag.allow_tf32 = value


@pytest.mark.parametrize("outside", [[False, True], [True, False]])
def test_tf32_is_allowed_for_tf32_alone(outside: list[bool]) -> None:
    for flag, value in zip(FLAGS, outside, strict=True):
        flag.allow_tf32 = value
    for precision, expected in (("fp32", False), ("tf32", True), ("bf16", False)):
        with product_precision(precision):
            assert allowed() == [expected, expected]
        assert allowed() == outside
    with pytest.raises(ZeroDivisionError), product_precision("tf32"):
        raise ZeroDivisionError
    assert allowed() == outside


@pytest.mark.parametrize(("precision", "expected"), [("fp32", False), ("tf32", True)])
def test_forward_and_backward_passes_are_in_the_models_precision(
    precision: Precision, expected: bool
) -> None:
    model = small_model("i2t")
    train_step = TrainStep(TrainConfig(**SMALL, precision=precision), model, CPU)
    seen = []
    model.space.path_mapping.register_forward_pre_hook(lambda *_: seen.append(allowed()))
    model.image.fc.weight.register_hook(lambda _: seen.append(allowed()))
    regions, ids, mask = small_batch(captions=3)
    train_step.step(Batch(regions, ids, mask, torch.arange(3), 3))
    with model.evaluating():
        seen.append(allowed())
    assert seen == [[expected] * 2] * 3


def test_convolutions_on_a_gpu_are_float32() -> None:
    torch.backends.cudnn.allow_tf32 = True
    assert pick_device("cpu") == torch.device("cpu")
    assert not torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    load_model(GOLDEN / "i2t/checkpoint.pth.tar", GOLDEN / "i2t/bert")  # by itself, too
    assert not torch.backends.cudnn.allow_tf32


def test_tf32_is_refused_without_a_cuda_gpu(tiny: Path, train_error: Error) -> None:
    assert has_tf32(torch.device("cuda")) and not has_tf32(CPU)
    assert "--precision tf32" in train_error(*tiny_train(tiny, "--precision", "tf32"))
    assert not list((tiny / "runs").rglob("*.json"))


def test_a_tf32_model_is_evaluated_in_fp32_elsewhere(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = trained / "runs/i2t/model_best.pth.tar"
    state = read_torch(path)
    state["options"]["precision"] = "tf32"
    write_torch(path, state)
    matrices = []
    for precision in (None, "fp32"):
        evaluate(path, precision=precision, save_scores=trained / "scores.npy")
        matrices.append(np.load(trained / "scores.npy"))
    assert np.array_equal(*matrices)
    assert (
        len([line for line in caplog.messages if str(path) in line and "precision tf32" in line])
        == 1
    )
    with pytest.raises(InputError, match="--precision tf32: expected a CUDA GPU"):
        evaluate(path, precision="tf32")


def test_emulated_bfloat16_is_warned_of(tmp_path: Path, monkeypatch, caplog) -> None:
    cpu = torch.device("cpu")
    for flags, fast in (("sse4_2 avx512f", False), ("fp asimd bf16", True), ("amx_bf16", True)):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : fpu {flags}\n")
        assert has_fast_bf16(cpu, tmp_path / "cpuinfo") == fast
    assert has_fast_bf16(cpu, tmp_path / "absent") and has_fast_bf16(torch.device("cuda"))
    monkeypatch.setattr("common.precision.has_fast_bf16", lambda device: False)
    warn_if_bf16_is_slow("fp32", cpu)
    assert not caplog.records
    warn_if_bf16_is_slow("bf16", cpu)
    assert "--precision bf16" in caplog.text
