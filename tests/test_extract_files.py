"""extract_regions.py: features of TSV files and of .npz and .npy files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TSV_WIDTH, tsv_row, write_rows

from common.errors import InputError
from data import Split
from scripts.parts.tsv import Tsv


def assert_rows_of_ids(folder: Path, ids: list[int]) -> None:
    """Assert that the training features and boxes are those that `tsv_row` drew for these ids."""
    features, boxes = np.load(folder / "train_ims.npy"), np.load(folder / "train_boxes.npy")
    assert features.dtype == np.float32 and len(features) == len(boxes) == len(ids)
    for row, key in enumerate(ids):
        rng = np.random.default_rng(key)
        assert np.array_equal(boxes[row], rng.random((36, 4), "float32"))
        assert np.array_equal(features[row], rng.random((36, TSV_WIDTH), "float32"))


def test_rows_of_a_tsv_file(
    drawn: Path, extract: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [tsv_row(key, key) for key in reversed(range(10))]
    damaged = [
        rows[3][:50] + b"\n",
        tsv_row(6, 99),
        tsv_row(77, 0, width=5),
        b"77\t60\t48\t35\t\t\n",
    ]
    damaged += [rows[1].replace(rows[1][-20:-10], b"!" * 10)]
    path = drawn / "rows.tsv"
    path.write_bytes(b"".join([*rows, *damaged]))
    extract("--model", "tsv", "--tsv", path)
    assert_rows_of_ids(drawn, [0, 1, 2, 5, 6, 7])
    (skipped,) = (record.args for record in caplog.records if "skipped" in record.message)
    assert skipped[0] == 5 and "line 12 (image_id 6 again)" in skipped[1]
    with pytest.raises(InputError, match=r"line 1 .* 35"):
        (drawn / "rows.tsv").write_bytes(b"".join(damaged[3:]))
        Tsv([drawn / "rows.tsv"], {})


def test_rows_by_name(drawn: Path, extract: Callable[..., str]) -> None:
    """A name may have any letters and belongs to one image."""
    names = {str(key): f"p/é {key}.png" for key in range(10)}
    (drawn / "id_mapping.json").write_text(json.dumps(names))
    how = ["--model", "tsv", "--tsv", drawn / "rows.tsv", "--tsv_key", "name"]
    (drawn / "rows.tsv").write_bytes(b"".join(tsv_row(f"é {key}", key) for key in range(10)))
    extract(*how)
    assert np.load(drawn / "train_ims.npy").shape == (6, 36, 6)
    (drawn / "id_mapping.json").write_text(json.dumps(names | {"1": "q/é 0.jpg"}))
    assert "--key" in extract(*how, "--overwrite", status=2)


def test_missing_rows_are_left_out(drawn: Path, extract: Callable[..., str]) -> None:
    how = write_rows(drawn, 1, 5)
    assert "1: no complete row" in extract(*how, status=2)
    assert "ids 1, 5" in extract(*how, "--skip_broken")
    assert (drawn / "train_ids.txt").read_text().split() == ["0", "2", "6", "7"]
    captions = (drawn / "train_caps.txt").read_text().splitlines()
    assert len(captions) == 20 and captions[5] == "a man in red 2"
    assert_rows_of_ids(drawn, [0, 2, 6, 7])
    assert not list(drawn.glob("*.new"))
    assert "complete" in extract(*how, "--skip_broken")


def test_captions_of_left_out_images_go_with_them(drawn: Path, extract: Callable[..., str]) -> None:
    """Images have one to three captions, so the ids file has a line for each of them."""
    counts = {"0": 2, "1": 3, "2": 1, "5": 1, "6": 3}
    ids = [key for key, count in counts.items() for _ in range(count)]
    (drawn / "train_ids.txt").write_text("\n".join(ids))
    (drawn / "train_caps.txt").write_text("\n".join(f"{key} {n}" for n, key in enumerate(ids)))
    extract(*write_rows(drawn, 1, 5), "--skip_broken")
    assert_rows_of_ids(drawn, [0, 2, 6])
    assert (drawn / "train_ids.txt").read_text().split() == ["0", "0", "2", "6", "6", "6"]
    captions = (drawn / "train_caps.txt").read_text().splitlines()
    assert captions == ["0 0", "0 1", "2 5", "6 7", "6 8", "6 9"]
    assert Split.open(drawn, "train", TSV_WIDTH).groups.counts.tolist() == [2, 1, 3]
