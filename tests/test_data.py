"""data.py: SCAN's layout in all its forms, bad files, and batches as a function."""

import os
import pickle
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, IMG_DIM, write_split

from common.config import DataConfig
from common.errors import InputError
from common.layout import read_captions
from common.workers import load
from data import Batch, ImageBlocks, Split, TrainingBatches, copied_ahead
from vocab import Vocabulary

WIDTH = 12
CPU = torch.device("cpu")


def batches(split: Split, skip_single: bool = False, **options: int) -> TrainingBatches:
    config = DataConfig(**{"batch_size": 6, "workers": 0} | options)
    return TrainingBatches(split, Vocabulary.load(GOLDEN / "i2t/bert"), config, WIDTH, skip_single)


def equal(a: Batch, b: Batch) -> bool:
    return a.pairs == b.pairs and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("regions", "ids", "mask", "captions")
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f4"])
def test_features_are_read_as_stored_and_become_float32_on_the_device(
    tmp_path: Path, dtype: type
) -> None:
    write_split(tmp_path, "dev", 3, dtype=dtype)
    split = Split.open(tmp_path, "dev", IMG_DIM)
    regions = split.regions(np.array([2, 0]))
    assert regions.dtype == (torch.float16 if dtype == np.float16 else torch.float32)
    stored = np.load(tmp_path / "dev_ims.npy")
    np.testing.assert_array_equal(regions.numpy(), stored[[2, 0]])
    batch, moved = batches(split)[0, 0], batches(split)[0, 0].to(CPU)
    assert batch.regions.dtype == regions.dtype and moved.regions.dtype == torch.float32
    expected = stored[split.groups.image_of_caption[batch.captions]].astype(np.float32)
    np.testing.assert_array_equal(moved.regions.numpy(), expected)


def test_only_a_line_feed_ends_a_caption(tmp_path: Path) -> None:
    path = tmp_path / "caps.txt"
    path.write_bytes("\ta b\x0cc \r\nd\u2028e\x85f\x1cg\n  \nh".encode())
    assert read_captions(path) == ("a b\x0cc", "d\u2028e\x85f\x1cg", "", "h")


def test_pickled_split_holds_no_features(tmp_path: Path) -> None:
    write_split(tmp_path, "dev", 200)
    split = Split.open(tmp_path, "dev", IMG_DIM)
    split.regions(np.array([1]))
    pickled = pickle.dumps(split)  # what a spawned worker is sent
    assert len(pickled) < split.path.stat().st_size / 2
    row = np.array([7])
    assert torch.equal(pickle.loads(pickled).regions(row), split.regions(row))


def save(path: Path, array: np.ndarray) -> None:
    np.save(path / "dev_ims.npy", array, allow_pickle=True)


def raw(data: bytes) -> Callable[[Path], object]:
    """Replace the features' file by these bytes."""
    return lambda path: (path / "dev_ims.npy").write_bytes(data)


def header(text: bytes) -> Callable[[Path], object]:
    """Replace the features by an .npy file with this header and 20 bytes of data."""
    return raw(b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + bytes(20))


def captions(text: str) -> Callable[[Path], object]:
    return lambda path: (path / "dev_caps.txt").write_text(text)


def truncate(path: Path) -> None:
    os.truncate(path / "dev_ims.npy", (path / "dev_ims.npy").stat().st_size - 1)


def spoil(value: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        features = np.load(path / "dev_ims.npy")
        features[2, 3, 1] = value
        save(path, features)

    return change


HUGE = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 7, 13)}\n"
BAD = {
    "missing": (lambda p: (p / "dev_ims.npy").unlink(), "dev_ims.npy: not found"),
    "no captions": (lambda p: (p / "dev_caps.txt").unlink(), "dev_caps.txt: not found"),
    "truncated": (truncate, "dev_ims.npy: not a complete .npy"),
    "empty": (raw(b""), "not a complete .npy"),
    "an expression": (header(b"{'descr': __import__('os').getcwd()}"), "not a complete .npy"),
    "huge header": (raw(b"\x93NUMPY\x02\0" + b"\xff" * 4), "not a complete .npy"),
    "huge shape": (header(HUGE), "not a complete .npy"),
    "objects": (lambda p: save(p, np.array([[[{}]]], dtype=object)), "not a complete .npy"),
    "integers": (lambda p: save(p, np.zeros((4, 7, 13), dtype=np.int32)), "int32"),
    "flat": (lambda p: save(p, np.zeros((4, 13), dtype=np.float32)), "shape (4, 13)"),
    "rows": (lambda p: save(p, np.zeros((9, 7, 13), np.float32)), "9 rows for 20 captions"),
    "width": (lambda p: save(p, np.zeros((4, 7, 12), np.float32)), "12 wide; expected 13"),
    "infinite": (spoil(-np.inf), "row 2"),
    "latin": (lambda p: (p / "dev_caps.txt").write_bytes(b"a\n\xe9\n" * 10), "line 2"),
    "no lines": (captions(""), "dev_caps.txt: is empty"),
    "empty caption": (captions("a\n" * 6 + " \n" + "a\n" * 13), "line 7"),
    "long caption": (captions("a" * 10_001), "line 1 has 10001 char"),
    "uneven": (captions("a\n" * 19), "4 rows for 19 captions"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named(tmp_path: Path, kind: str) -> None:
    change, expected = BAD[kind]
    write_split(tmp_path, "dev", 4)
    change(tmp_path)
    with pytest.raises(InputError, match="dev_") as error:
        Split.open(tmp_path, "dev", IMG_DIM, training=True)
    assert expected in str(error.value)


def test_small_file_is_searched_for_nan_when_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.CHECKED_AT_ONCE", 6000)
    write_split(tmp_path, "dev", 101, repeat=True)
    features = np.load(tmp_path / "dev_ims.npy")
    features[504, 0, 0] = np.nan
    save(tmp_path, features)
    with pytest.raises(InputError, match="row 504"):
        Split.open(tmp_path, "dev", IMG_DIM)


def test_empty_caption_is_allowed_in_evaluation(tmp_path: Path) -> None:
    write_split(tmp_path, "dev", 4)
    captions("a\n" * 6 + "\n" + "a\n" * 13)(tmp_path)
    assert Split.open(tmp_path, "dev", IMG_DIM).captions[6] == ""


@pytest.mark.parametrize("workers", [0, 2])
def test_nan_in_a_large_file_is_found_in_its_batch(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.SMALL_FILE", 0)
    monkeypatch.setattr("data.SAMPLED_ROWS", 2)  # images 0 and 3
    write_split(tmp_path, "dev", 4)
    spoil(np.nan)(tmp_path)
    split = Split.open(tmp_path, "dev", IMG_DIM)
    with pytest.raises(InputError, match=r"dev_ims\.npy: row 2 holds NaN"):
        list(load(ImageBlocks(split), [(0, 2), (2, 4)], workers))


@pytest.fixture
def split(tmp_path: Path) -> Split:
    write_split(tmp_path, "train", 11)
    return Split.open(tmp_path, "train", IMG_DIM, training=True)


@pytest.mark.parametrize("extra", [{"extra_stc": 2}, {"extra_img": 3}])
def test_batch_is_a_function_of_seed_epoch_and_position(
    split: Split, extra: dict[str, int]
) -> None:
    some = batches(split, **extra)
    whole = list(some.epoch(1, 0, CPU))
    for workers in (0, 1, 2):
        again = replace(some, config=replace(some.config, workers=workers))
        before = torch.get_rng_state()
        for start in (0, 4):
            rest = list(again.epoch(1, start, CPU))
            assert all(equal(a, b) for a, b in zip(rest, whole[start:], strict=True))
        assert torch.equal(torch.get_rng_state(), before)  # the global generator is not used
    assert not equal(some[0, 2], some[1, 2])
    other = replace(some, config=replace(some.config, seed=1))
    assert not equal(some[0, 2], other[0, 2])


def test_a_gpu_copies_the_next_batch_while_it_computes(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in notes the order in which a GPU would be given its work."""
    calls: list[str] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            pass

        def synchronize(self) -> None:
            calls.append("wait for copies")

        def wait_stream(self, other: str) -> None:
            calls.append(f"copies wait for {other}")

    def to(self: Batch, device: torch.device) -> Batch:
        calls.append(f"copy {place[self.captions[0].item()]}")
        return self

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "steps")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Batch, "to", to)
    some = [batches(split)[0, position] for position in range(3)]
    place = {batch.captions[0].item(): position for position, batch in enumerate(some)}
    for position, batch in enumerate(copied_ahead(iter(some), torch.device("cuda"))):
        assert batch is some[position]
        calls.append(f"step {position}")
    wait = ["wait for copies", "copies wait for steps"]
    copied = [*wait, "copy 0", *wait, "copy 1", "step 0", *wait, "copy 2", "step 1"]
    assert calls == [*copied, "wait for copies", "step 2"]


def test_captions_are_encoded_once(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = Vocabulary.encode

    def noted(self: Vocabulary, captions: Sequence[str], max_words: int) -> tuple:
        encoded.extend(captions)
        return encode(self, captions, max_words)

    monkeypatch.setattr(Vocabulary, "encode", noted)
    some = batches(split)
    for epoch in range(2):
        assert len(list(some.epoch(epoch, 0, CPU))) == 10
    assert encoded == list(split.captions)


def test_a_spawned_worker_gets_the_encoded_captions(split: Split) -> None:
    some = batches(split)
    expected = some[0, 3]
    sent = pickle.loads(pickle.dumps(some))
    assert "_encoded" in vars(sent) and equal(sent[0, 3], expected)


def test_extras_are_drawn_from_the_whole_split(split: Split) -> None:
    """An item's own caption or image may be drawn, too (SPEC §7)."""
    captions, images = torch.zeros(55), torch.zeros(11)
    every = split.regions(np.arange(split.images))
    own_captions = own_images = 0
    for epoch in range(300):
        drawn = batches(split, extra_stc=1)[epoch, 0].captions
        captions += torch.bincount(drawn[6:], minlength=55)
        own_captions += int((drawn[6:] == drawn[:6]).sum())
        rows = batches(split, extra_img=1)[epoch, 0].regions
        own_images += int((rows[6:] == rows[:6]).all(2).all(1).sum())
        for row in rows[6:]:
            images += (row == every).all(2).all(1)
    assert own_captions > 10 and own_images > 80  # about 33 and 164 of 1,800
    for counts in (captions, images):
        mean = 300 * 6 / len(counts)
        assert counts.sum() == 300 * 6
        assert counts.min() > mean / 2 and counts.max() < mean * 2


def test_extras_depend_on_the_seed(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data._order", lambda seed, epoch, captions: np.arange(captions))
    first, second = (batches(split, extra_stc=3, seed=seed)[0, 0] for seed in (0, 1))
    assert torch.equal(first.captions[:6], second.captions[:6])
    assert not torch.equal(first.captions[6:], second.captions[6:])


@pytest.mark.parametrize(
    ("skip", "size", "count"),
    [(False, 6, 10), (True, 6, 9), (True, 7, 8), (True, 100, 1), (True, 1, 0), (False, 1, 55)],
)
def test_last_batch_of_one_is_kept_or_skipped(
    split: Split, skip: bool, size: int, count: int
) -> None:
    assert len(batches(split, skip_single=skip, batch_size=size)) == count  # of 55 captions


@pytest.mark.parametrize("option", ["batch_size", "extra_stc", "extra_img", "workers", "seed"])
def test_negative_numbers_are_refused(option: str) -> None:
    with pytest.raises(InputError, match=f"--{option} -1"):
        DataConfig(**{option: -1})
