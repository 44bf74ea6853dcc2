"""The backbone of the training data: from extract_regions' record into every form of checkpoint."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Error, Run, run_here, state, tiny_train

from checkpoint import read_checkpoint
from common.errors import InputError
from scripts import convert_checkpoint

ABOUT = {"model": "hf", "weights": {"model.safetensors": "0f"}, "processor": {"mean": [0.5, 0.1]}}
NEWEST = "runs/i2t/checkpoint.pth.tar"


def record(tiny: Path, about: object = ABOUT, **more: object) -> Path:
    """Write the record that extract_regions leaves beside the training features."""
    path = tiny / "data/tiny/train_regions.json"
    path.write_text(json.dumps({"about": about, "rows": 11, "complete": True} | more))
    return path


def test_a_training_stores_it_and_a_conversion_keeps_it(
    tiny: Path, run_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tiny)
    assert run_train(*tiny_train(tiny, "--max_steps", "1")) == 0
    names = ["runs/i2t/model_best.pth.tar", "arrays.safetensors", "native.tar"]
    for source, out in pairwise(names):
        argv = ["--checkpoint", tiny / source, "--out", tiny / out]
        assert run_here(monkeypatch, convert_checkpoint.main, argv) == 0
    for name in (*names, NEWEST):
        assert read_checkpoint(tiny / name).backbone == ABOUT


def test_without_a_complete_record_it_is_not_known(tiny: Path, run_train: Run) -> None:
    argv = tiny_train(tiny, "--max_steps")
    assert run_train(*argv, "1") == 0
    assert read_checkpoint(tiny / NEWEST).backbone is None
    record(tiny, complete=False)  # of features that have not replaced these
    assert run_train(*argv, "2", "--resume", "auto") == 0
    assert read_checkpoint(tiny / NEWEST).backbone is None


def test_a_checkpoint_of_an_earlier_version_gets_it_when_it_is_resumed(
    trained: Path, run_train: Run
) -> None:
    content = state(trained / NEWEST)
    del content["backbone"]
    torch.save(content, trained / NEWEST)
    assert read_checkpoint(trained / NEWEST).backbone is None
    record(trained)
    assert run_train(*tiny_train(trained, "--max_steps", "3", "--resume", "auto")) == 0
    assert read_checkpoint(trained / NEWEST).backbone == ABOUT


@pytest.mark.parametrize("about", [None, "hf", {}, {"model": 3}, {"weights": "0f"}])
def test_a_damaged_record_is_refused(about: object, tiny: Path, train_error: Error) -> None:
    path = record(tiny, about)
    assert f"{path}: " in train_error(*tiny_train(tiny, "--max_steps", "1"))
    assert not list((tiny / "runs").rglob("*.tar"))


@pytest.mark.parametrize(
    "value", [3, {"model": None}, ABOUT | {"weights": torch.ones(2)}, ABOUT | {"a": [{1: 2}]}]
)
def test_a_damaged_backbone_of_a_checkpoint_is_refused(
    value: Any, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = trained / NEWEST
    torch.save(state(path) | {"backbone": value}, path)
    checkpoint = read_checkpoint(path)
    with pytest.raises(InputError, match=r"checkpoint\.pth\.tar: .*backbone"):
        _ = checkpoint.backbone
    argv = ["--checkpoint", path, "--out", trained / "x.safetensors"]
    assert run_here(monkeypatch, convert_checkpoint.main, argv) == 2
    assert str(path) in capsys.readouterr().err and not (trained / "x.safetensors").exists()
