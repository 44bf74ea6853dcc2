"""step.py: one training step, beside the golden steps of test_golden.py."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import same
from test_model import SMALL, small_batch, small_model

from data import Batch
from training.config import TrainConfig
from training.step import TrainStep, gradient_norm

CPU = torch.device("cpu")


def training_step(**options: object) -> tuple[TrainStep, Batch]:
    """Return a small model's step and a batch with BERT's output, which dropout leaves alone."""
    regions, ids, mask = small_batch(captions=3)
    batch = Batch(regions, ids, mask, torch.arange(3), 3, torch.randn(3, 10, 12))
    return TrainStep(TrainConfig(**SMALL, batch_size=3, **options), small_model("i2t"), CPU), batch


@pytest.mark.parametrize("asks", [False, True])
def test_bad_batch_changes_neither_model_nor_optimiser(asks: bool, monkeypatch) -> None:
    """Also on a device type whose Adam does not leave it out by itself."""
    if asks:
        monkeypatch.setattr("training.step.SKIPPING_ADAM", {"cuda"})
    train_step, batch = training_step()
    assert train_step.step(batch)["finite"] == 1
    before = copy.deepcopy([train_step.model.state_dict(), train_step.optimizer.state_dict()])
    figures = train_step.step(replace(batch, regions=batch.regions * torch.nan))
    assert figures["finite"] == 0 and figures["Le"].isnan()
    assert same([train_step.model.state_dict(), train_step.optimizer.state_dict()], before)
    assert train_step.step(batch)["finite"] == 1
    assert not same(train_step.model.state_dict(), before[0])


def test_path_regulariser_is_divided_by_the_batch_size_option() -> None:
    """Also for a smaller last batch (SPEC §7)."""
    model = small_model("i2t")
    regions, ids, mask = small_batch(captions=3)
    states = torch.randn(3, 10, 12)  # instead of BERT, whose dropout differs between the two
    batch = Batch(regions, ids, mask, torch.arange(3), 3, states)
    whole, part = (
        TrainStep(TrainConfig(**SMALL, batch_size=size), copy.deepcopy(model), CPU).step(batch)
        for size in (3, 8)
    )
    assert part["Path"].item() * 8 == pytest.approx(whole["Path"].item() * 3, rel=1e-6)
    assert part["Rank"] == whole["Rank"] and whole["Path"] > 0
    for figures in (whole, part):
        assert figures["Le"].item() == pytest.approx((figures["Rank"] + figures["Path"] / 2).item())


@pytest.mark.parametrize("has_float64", [True, False])
def test_gradient_norm_of_squares_beyond_float32(
    has_float64: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device without float64, which is the CPU here, the sum is made on the CPU."""
    moved: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(self) or self)
    monkeypatch.setattr("training.step.WITHOUT_FLOAT64", set() if has_float64 else {"cpu"})
    weights = [torch.zeros(3, requires_grad=True) for _ in range(3)]
    for weight, value in zip(weights, (3e20, 4e20), strict=False):  # the last one has no gradient
        weight.grad = torch.tensor([value, 0, 0])
    norm = gradient_norm(weights)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(5e20)
    assert len(moved) == (0 if has_float64 else 2)
