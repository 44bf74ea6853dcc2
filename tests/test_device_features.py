"""training/device_features.py: all features on a device; a CPU stands in for a GPU."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, IMG_DIM, REGIONS, Error, Run, same, state, tiny_train, write_split

from common import memory
from common.config import DataConfig
from common.errors import InputError
from common.memory import free_memory
from data import Split, TrainingBatches
from training import device_features
from training.device_features import load_features
from training.resume import NEWEST
from vocab import Vocabulary

CPU, GPU = torch.device("cpu"), torch.device("cuda")
IMAGES = 11
SIZE = IMAGES * REGIONS * IMG_DIM * 2  # bytes, in float16


@pytest.fixture(params=[False, True])
def split(request: pytest.FixtureRequest, tmp_path: Path) -> Split:
    write_split(tmp_path, "train", IMAGES, dtype=np.float16, repeat=request.param)
    return Split.open(tmp_path, "train", IMG_DIM, training=True)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_features, "BLOCK", SIZE // 4)


def test_batches_are_those_of_the_workers(split: Split, small_blocks: None, monkeypatch) -> None:
    config = DataConfig(batch_size=6, extra_img=2, workers=1)
    read = TrainingBatches(split, Vocabulary.load(GOLDEN / "i2t/bert"), config, 12, False)
    features = load_features(split, CPU, True)
    assert features.dtype == torch.float16 and features.nbytes == SIZE  # each image once
    gathered = replace(read, features=features)
    for epoch, start in ((0, 0), (1, 7)):
        expected = list(read.epoch(epoch, start, CPU))
        with monkeypatch.context() as patch:
            patch.setattr("data.load", None)  # no worker is needed
            batches = list(gathered.epoch(epoch, start, CPU))
        assert len(batches) == len(expected) == 10 - start
        for a, b in zip(batches, expected, strict=True):
            assert all(same(value, getattr(b, name)) for name, value in vars(a).items())


def test_by_default_features_take_half_of_the_free_memory_of_a_gpu(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **more: empty(*size, **more))
    for device, free, loaded in (
        *((GPU, 2 * SIZE, True), (GPU, 2 * SIZE - 1, False)),
        (CPU, 100 * SIZE, False),
    ):
        for module in (memory, device_features):
            monkeypatch.setattr(module, "free_memory", lambda device, free=free: free)
        assert (load_features(split, device, None) is not None) == loaded
        assert load_features(split, device, False) is None
        assert load_features(split, device, True) is not None


def test_features_that_do_not_fit_are_refused_and_an_earlier_run_is_kept(
    trained: Path, train_error: Error, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_features, "free_memory", lambda device: 2000)
    line = train_error(*tiny_train(trained, "--overwrite", "--features_on_device"))
    assert re.search(r"--features_on_device: .*train_ims\.npy .*4e-06 GB.*2e-06 GB", line)
    assert state(trained / "runs/i2t" / NEWEST)["step"] == 2


def test_nan_is_found_while_features_are_loaded(
    tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.SMALL_FILE", 0)
    monkeypatch.setattr("data.SAMPLED_ROWS", 2)
    write_split(tmp_path, "train", IMAGES)
    features = np.load(tmp_path / "train_ims.npy")
    features[7, 2, 1] = np.nan
    np.save(tmp_path / "train_ims.npy", features)
    with pytest.raises(InputError, match=r"train_ims\.npy: row 7 holds NaN"):
        load_features(Split.open(tmp_path, "train", IMG_DIM), CPU, True)


def test_a_resumed_run_may_load_features_to_the_device(tiny: Path, run_train: Run) -> None:
    argv, path = tiny_train(tiny, "--extra_stc", "1"), tiny / "runs/i2t" / NEWEST
    assert run_train(*argv, "--max_steps", "4", "--val_step", "2") == 0
    expected = state(path)["weights"]
    assert run_train(*argv, "--max_steps", "2", "--overwrite") == 0
    more = ("--features_on_device", "--resume", "auto")
    assert run_train(*argv, "--max_steps", "4", *more) == 0
    assert same(state(path)["weights"], expected)


def test_free_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1e8 < free_memory(CPU) < 1e14
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 9))
    assert free_memory(GPU) == 5
