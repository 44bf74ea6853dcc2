"""extract_regions.py: features of TSV files and of .npz and .npy files."""

import base64
import codecs
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TSV_WIDTH, tsv_row, write_rows

from common.errors import InputError
from data import Split
from scripts.parts.array_files import ArrayFiles
from scripts.parts.tsv import OtherType, Tsv, parse_row


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
    damaged = [rows[3][:50] + b"\n", tsv_row(6, 99), tsv_row(77, 0, width=5)]
    damaged += [b"77\t60\t48\t35\t\t\n", rows[1].replace(rows[1][-20:-10], b"!" * 10)]
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
    """A name may have any letters, in any Unicode form, and belongs to one image."""
    names = {str(key): f"p/é {key}.png" for key in range(10)}
    (drawn / "id_mapping.json").write_text(json.dumps(names))
    how = ["--model", "tsv", "--tsv", drawn / "rows.tsv", "--tsv_key", "name"]
    rows = [tsv_row(unicodedata.normalize("NFD", f"é {key}"), key) for key in range(10)]
    (drawn / "rows.tsv").write_bytes(codecs.BOM_UTF8 + b"".join(rows))
    extract(*how)
    assert np.load(drawn / "train_ims.npy").shape == (6, 36, 6)
    error = extract(*how[:4], "--overwrite", status=2)  # by id
    assert "rows.tsv" in error and "é 0" in error and "--key" in error
    (drawn / "id_mapping.json").write_text(json.dumps(names | {"1": "q/é 0.jpg"}))
    assert "--key" in extract(*how, "--overwrite", status=2)


def code(key: object, boxes: np.ndarray, features: np.ndarray, kind: str = "") -> bytes:
    """Code a row as bottom-up attention, its ports to Python 3 or LXMERT do."""
    texts = [base64.b64encode(array.tobytes()) for array in (boxes, features)]
    if kind == "python3":
        texts = [str(text).encode() for text in texts]
    head = [key, 48, 60, "aa", "bb", "cc", "dd"] if kind == "lxmert" else [key, 60, 48]
    return b"\t".join([*(str(x).encode() for x in (*head, len(boxes))), *texts]) + b"\n"


def draw_features(seed: int, width: int = 64) -> np.ndarray:
    """Draw features of 36 regions as networks have them: dense, sparse, tiny or rounded."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(36, width)) * 10 ** rng.uniform(-2, 1)
    sparse, unit = np.maximum(x - x.std(), 0), x / np.linalg.norm(x, axis=1, keepdims=True)
    return [x, np.maximum(x, 0), sparse, unit, x.astype("f2"), np.exp(x / x.std())][seed % 6]


@pytest.mark.parametrize("seed", range(24))
def test_the_type_of_features_is_never_guessed_wrongly(seed: int) -> None:
    features, boxes = draw_features(seed), np.ones((36, 4), "<f4")
    for written in ("float16", "float32", "float64"):
        line = code(0, boxes, features.astype(written))
        for wanted in ("float16", "float32", "float64"):
            if wanted == written:
                read = parse_row(line, wanted).features
                assert np.array_equal(read, features.astype(written).astype(np.float32))
                continue
            with pytest.raises(OtherType, match=f"--tsv_dtype {written}"):
                parse_row(line, wanted)


def test_other_types_are_refused_and_read_with_the_option(
    drawn: Path, extract: Callable[..., str]
) -> None:
    rows = [(key, np.ones((36, 4), "f4"), draw_features(key).astype("f2")) for key in range(10)]
    path = drawn / "rows.tsv"
    path.write_bytes(b"".join(code(*row) for row in rows))
    how = ["--model", "tsv", "--tsv", path]
    error = extract(*how, status=2)
    assert "rows.tsv: line 1: " in error and "--tsv_dtype float16" in error
    extract(*how, "--tsv_dtype", "float16")
    assert np.array_equal(np.load(drawn / "dev_ims.npy")[0], rows[3][2].astype("f4"))
    widths = [draw_features(0, width).astype("f4") for width in (64, 32)]
    path.write_bytes(b"".join(code(key, rows[0][1], widths[key]) for key in (0, 1)))
    assert "line 2: its features are 32 wide, others 64" in extract(*how, status=2)
    nan = np.full((36, 6), np.nan, "f4")
    path.write_bytes(b"".join(code(*row[:2], nan) for row in rows))
    assert "none of 10 rows" in extract(*how, status=2)


@pytest.mark.parametrize("kind", ["", "python3", "lxmert"])
def test_rows_of_all_extractors(kind: str) -> None:
    boxes, features = np.full((7, 4), 2.5), draw_features(0)[:7].astype("f4")
    line = code("a b", boxes, features, kind)
    for other in (
        line,
        b"\xef\xbb\xbf" + line[:-1] + b"\r\n",
        line.translate(bytes.maketrans(b"+/", b"-_")),
        line.replace(b"'", b'"'),
        line[:-2] + b"\\n" + line[-2:] if kind == "python3" else line,
    ):
        row = parse_row(other)
        assert row.image_id == "a b" and np.array_equal(row.features, features)
        assert row.boxes.dtype == np.float32 and np.array_equal(row.boxes, boxes)
    with pytest.raises(ValueError, match="bytes of 7 boxes"):
        parse_row(code("a b", boxes[:, :3], features, kind))


def test_any_one_number_of_boxes(drawn: Path, extract: Callable[..., str]) -> None:
    path = drawn / "rows.tsv"

    def write(*counts: int) -> None:
        rows = [(np.ones((n, 4), "f4"), np.full((n, 5), key, "f4")) for key, n in enumerate(counts)]
        path.write_bytes(b"".join(code(key, *row) for key, row in enumerate(rows)))

    write(*[100] * 10)
    extract("--model", "tsv", "--tsv", path)
    assert np.load(drawn / "train_boxes.npy").shape == (6, 100, 4)
    assert np.load(drawn / "train_ims.npy")[:, 99, 4].tolist() == [0, 1, 2, 5, 6, 7]
    write(36, 12, 100, *[36] * 7)
    assert "12 to 100 boxes" in extract("--model", "tsv", "--tsv", path, "--overwrite", status=2)


def test_left_out_images_take_their_captions_along(
    drawn: Path, extract: Callable[..., str]
) -> None:
    """Training images have one to three captions, so their ids file has a line for each of them."""
    counts = {"0": 2, "1": 3, "2": 1, "5": 1, "6": 3}
    ids = [key for key, count in counts.items() for _ in range(count)]
    (drawn / "train_ids.txt").write_text("\n".join(ids))
    (drawn / "train_caps.txt").write_text("\n".join(f"{key} {n}" for n, key in enumerate(ids)))
    how = write_rows(drawn, 1, 3, 5)
    assert "1: no complete row" in extract(*how, status=2)
    assert "ids 1, 5" in extract(*how, "--skip_broken")
    assert_rows_of_ids(drawn, [0, 2, 6])
    assert (drawn / "train_ids.txt").read_text().split() == ["0", "0", "2", "6", "6", "6"]
    captions = (drawn / "train_caps.txt").read_text().splitlines()
    assert captions == ["0 0", "0 1", "2 5", "6 7", "6 8", "6 9"]
    assert Split.open(drawn, "train", TSV_WIDTH).groups.counts.tolist() == [2, 1, 3]
    assert (drawn / "dev_ids.txt").read_text().split() == ["8"]  # five captions each
    captions = (drawn / "dev_caps.txt").read_text().splitlines()
    assert len(captions) == 5 and captions[0] == "a man in red 8"
    assert not list(drawn.glob("*.new")) and "complete" in extract(*how, "--skip_broken")


# Files of arrays


def save_arrays(folder: Path, key: object, regions: int = 5) -> np.ndarray:
    """Save an image's features, which show its key, and boxes, all with two rows of padding."""
    folder.mkdir(exist_ok=True)
    features, boxes = np.full((regions + 2, 3), int(key) / 2, "f8"), np.full((regions + 2, 4), 9)
    info = np.array({"a": 1}, dtype=object)
    np.savez(folder / f"{key}.npz", x=features, bbox=boxes, num_bbox=[regions], info=info)
    return features[:regions].astype("f4")


def test_features_of_npz_and_npy_files(
    drawn: Path, tmp_path: Path, extract: Callable[..., str]
) -> None:
    """An image's file is called by its id, or by its file's name in either Unicode form."""
    expected = [save_arrays(tmp_path / "npz", key) for key in range(10)]
    how = ["--model", "npz", "--features", tmp_path / "npz"]
    extract(*how)
    features, boxes = np.load(drawn / "train_ims.npy"), np.load(drawn / "train_boxes.npy")
    assert np.array_equal(features, np.stack([expected[key] for key in (0, 1, 2, 5, 6, 7)]))
    assert features.dtype == np.float32 and boxes.shape == (6, 5, 4) and (boxes == 9).all()
    names = {str(key): f"train/\u00e9{key}.v2.jpg" for key in range(10)}
    (drawn / "id_mapping.json").write_text(json.dumps(names))
    (tmp_path / "npy").mkdir()
    for key in range(10):
        np.save(tmp_path / f"npy/e\u0301{key}.v2.npy", expected[key].astype("f2"))
    how = ["--model", "npz", "--features", tmp_path / "npy", "--key", "name"]
    extract(*how, "--overwrite")
    assert np.load(drawn / "dev_ims.npy").shape == (2, 5, 3)
    assert not (drawn / "dev_boxes.npy").exists()  # those of other features
    assert "complete" in extract(*how)


def test_arrays_that_are_refused(drawn: Path, tmp_path: Path, extract: Callable[..., str]) -> None:
    folder = tmp_path / "npz"
    for key in range(10):
        save_arrays(folder, key, regions=5 + (key == 6))
    how = ["--model", "npz", "--features", folder]
    error = extract(*how, "--skip_broken", status=2)  # other numbers of regions are not broken
    assert "6.npz" in error and "(6, 3)" in error and "0.npz" in error
    floats, boxes = np.ones((5, 3), "f4"), np.ones((5, 4), "f4")
    for arrays in (
        {"y": floats},
        {"x": floats[0], "bbox": boxes},
        {"x": floats.astype(int), "bbox": boxes},
        {"x": floats, "bbox": boxes[:3]},
        {"x": floats * np.nan, "bbox": boxes},
        {"x": np.array([[{}]], dtype=object)},
        {"x": np.ones((1024, 5), "f4")},  # saved the other way round
        {"x": floats, "bbox": boxes, "num_bbox": 6},
        {"x": floats, "bbox": boxes, "num_bbox": -1},
    ):
        np.savez(folder / "6.npz", **arrays)
        assert "6.npz" in extract(*how, "--overwrite", status=2), arrays
    np.savez(folder / "6.npz", x=floats[:4].T, num_bbox=4)  # as openvqa has them
    assert ArrayFiles(folder, {"6": "6"}).shapes == [(4, 3)]
    np.save(folder / "6.npy", floats)
    error = extract(*how, "--overwrite", status=2)
    assert "6.npy" in error and "6.npz" in error
    (folder / "6.npy").unlink()
    (folder / "6.npz").write_bytes((folder / "5.npz").read_bytes()[:-40])
    assert "6.npz" in extract(*how, "--overwrite", status=2)
    assert "ids 6" in extract(*how, "--overwrite", "--skip_broken")
    assert "--key" in extract("--model", "npz", "--features", drawn, "--overwrite", status=2)
