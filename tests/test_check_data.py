"""check_data.py: every kind of problem is made and named; a large file takes little memory."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, IMG_DIM, REGIONS, ROOT, run_here, write_split

from common.layout import images_digest
from scripts import check_data
from scripts.check_data import Options, Report

BERT = GOLDEN / "i2t/bert"
GROWTH = 500e6  # bytes
SCAN = (113_287, 36, 2048)  # MSCOCO's training features: 31 GiB


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete data set in both row ratios, with ids."""
    folder = tmp_path / "tiny"
    for name, images, repeat in (("train", 11, False), ("dev", 7, True), ("test", 10, False)):
        write_split(folder, name, images, repeat=repeat)
        write_ids(folder, name, *(f"{name}{i}.jpg" for i in range(images)))
    return folder


def write_ids(folder: Path, name: str, *ids: str) -> None:
    (folder / f"{name}_ids.txt").write_text("\n".join(ids) + "\n")


def check(folder: Path, **options: object) -> Report:
    return check_data.check(Options(str(folder), **options))


def test_complete_data_set(folder: Path) -> None:
    report = check(folder)
    assert not report.problems and not report.warnings
    shape = f"{REGIONS} x {IMG_DIM}"
    assert [row[:5] for row in report.rows] == [
        [name, count, "5", count, shape]
        for name, count in (("train", "11"), ("dev", "7"), ("test", "10"))
    ]
    assert " | ".join(report.rows[1]) in report.text()


def change(name: str, work: Callable[[np.ndarray], object]) -> Callable[[Path], None]:
    """Change a split's features, in place or by returning new ones."""

    def changed(folder: Path) -> None:
        features = np.load(folder / f"{name}_ims.npy")
        new = work(features)
        np.save(folder / f"{name}_ims.npy", features if new is None else new)

    return changed


def put(index: object, value: float) -> Callable[[np.ndarray], None]:
    return lambda features: features.__setitem__(index, value)


def resize(more: int) -> Callable[[Path], None]:
    """Cut or lengthen the training features."""
    path = "train_ims.npy"
    return lambda folder: os.truncate(folder / path, (folder / path).stat().st_size + more)


def captions(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / f"{name}_caps.txt").write_text(text)


def ids(name: str, *lines: str) -> Callable[[Path], None]:
    return lambda folder: write_ids(folder, name, *lines)


NAMES = {f"{split}{i}.jpg": "a.jpg" for split in ("train", "dev", "test") for i in range(11)}


def named(names: dict[str, object]) -> Callable[[Path], object]:
    return lambda folder: (folder / "id_mapping.json").write_text(json.dumps(names))


def several(folder: Path) -> None:
    resize(-100)(folder)
    change("dev", put((2, 0, 0), np.nan))(folder)
    write_ids(folder, "test", "a")


FIVE = [f"{i}.jpg" for i in range(7) for _ in range(5)]
PROBLEMS = {
    "too long": (resize(5), ["train_ims.npy: 5 bytes more"]),
    "width": (change("dev", lambda a: a[..., :5]), ["13 in train, 5 in dev"]),
    "same id": (ids("test", *"abcdefghb", "j"), ["test_ids.txt: line 9 repeats 'b'"]),
    "shared images": (ids("test", "train4.jpg", *"abcdefghi"), ["train4.jpg is in train_ids.txt"]),
    "empty id": (ids("test", *"abc", "", *"efghij"), ["test_ids.txt: line 4 is empty"]),
    **{
        f"file {name}": (named(NAMES | {"dev3.jpg": name}), [f"'dev3.jpg' is {name!r}"])
        for name in ("/a.jpg", "a/../../b.jpg", "..\\a.jpg", "a\nb", ".", None)
    },
    "no file of an id": (
        named({key: name for key, name in NAMES.items() if key != "dev3.jpg"}),
        ["id_mapping.json: lacks dev3.jpg of dev_ids.txt"],
    ),
    "several": (several, ["train_ims.npy", "dev_ims.npy: row 2", "test_ids.txt: ends at line 1"]),
}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_problems_are_named(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, expected = PROBLEMS[kind]
    make(folder)
    assert run_here(monkeypatch, check_data.main, [folder]) == 1
    problems = check(folder).problems
    printed = capsys.readouterr().out
    for text, problem in zip(expected, problems, strict=True):
        assert text in problem and problem in printed


def test_ids_of_captions_and_repeated_ids_are_read(folder: Path) -> None:
    write_ids(folder, "dev", *FIVE)
    write_ids(folder, "test", *map(str, range(50)))
    report = check(folder)
    assert report.problems == []
    assert [row[3] for row in report.rows] == ["11", "7", "0"]


def test_full_reads_rows_between_the_samples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_data, "SAMPLED_IMAGES", 3)
    monkeypatch.setattr("data.SMALL_FILE", 0)
    monkeypatch.setattr("data.SAMPLED_ROWS", 3)
    change("dev", put((8, 0, 0), 7))(folder)
    assert not check(folder).problems
    (problem,) = check(folder, full=True).problems
    assert "rows 5 to 9 differ" in problem


def test_warnings_are_not_problems(folder: Path) -> None:
    captions("test", "a\n" * 49 + "\n")(folder)
    change("test", lambda a: a * 0)(folder)
    (folder / "train_ids.txt").unlink()
    report = check(folder)
    empty, zeros = report.warnings
    assert not report.problems and "1 captions of test" in empty and "10 of the 10 rows" in zeros


def test_captions_are_compared_with_the_vocabulary(folder: Path) -> None:
    captions("dev", "a man\n" * 34 + "a man and a dog " * 4 + "\n")(folder)
    report = check(folder, bert_path=str(BERT), max_words=12)
    assert not report.problems and report.rows[1][-2:] == ["22", "1"]
    assert any("fingerprint" in line for line in report.bert)
    captions("dev", "собака\n" * 35)(folder)
    (problem,) = check(folder, bert_path=str(BERT)).problems
    assert "vocab.txt" in problem and "dev" in problem


def test_damaged_bert_is_a_problem(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    shutil.copy(BERT / "vocab.txt", tmp_path / "bert")
    report = check(folder, bert_path=str(tmp_path / "bert"))
    assert len(report.problems) == 1 and int(report.rows[0][-2]) > 2


def test_folder_without_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / "missing", tmp_path):
        assert run_here(monkeypatch, check_data.main, [path]) == 2
        assert path.name in capsys.readouterr().err


def test_features_of_other_images(folder: Path) -> None:
    """The record of extract_regions is compared with the ids and file names of today."""
    named(NAMES)(folder)
    test_ids = (folder / "test_ids.txt").read_text().split()
    about = {"about": {"ids": images_digest(test_ids, NAMES)}}
    for names, more, count in (
        (NAMES, {}, 0),
        (NAMES, {"renaming": True}, 1),
        (NAMES | {test_ids[4]: "b.jpg"}, {}, 1),
    ):
        named(names)(folder)
        (folder / "test_regions.json").write_text(json.dumps(about | more))
        problems = check(folder).problems
        assert len(problems) == count and all("test_regions.json" in p for p in problems)


PROGRAM = """
import sys
sys.path.insert(0, "tests")
import torch
from conftest import Path, run_here
from pytest import MonkeyPatch
from common.config import DataConfig
from common.memory import peak_memory
from data import ImageBlocks, Split, TrainingBatches
from scripts import check_data
from vocab import Vocabulary

folder, bert = Path(sys.argv[1]), sys.argv[2]
before = peak_memory(torch.device("cpu"))
assert run_here(MonkeyPatch(), check_data.main, [folder]) == 0
split = Split.open(folder, "train", 2048, training=True)
batches = TrainingBatches(split, Vocabulary.load(bert), DataConfig(batch_size=64), 32, False)
rows = sum(len(batches[0, place].regions) for place in range(24))
for first in range(0, split.images, 128):
    rows += len(ImageBlocks(split)[first, min(first + 128, split.images)])
print(rows, peak_memory(torch.device("cpu")) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux")
def test_file_of_31_gib_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "train_ims.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(1, *SCAN[1:]))
    header = path.read_bytes()[:128].replace(b"(1, 36, 2048), }     ", b"(113287, 36, 2048), }")
    path.write_bytes(header)
    os.truncate(path, 128 + int(np.prod(SCAN, dtype=np.int64)) * 4)
    assert path.stat().st_size > 31 * 2**30 and path.stat().st_blocks * 512 < 2**20
    text = "".join(f"a man and a dog run {i}\n" for i in range(5 * SCAN[0]))
    (tmp_path / "train_caps.txt").write_text(text)
    command = [sys.executable, "-c", PROGRAM, tmp_path, BERT]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, growth = map(int, done.stdout.splitlines()[-1].split())
    assert rows == 24 * 64 + SCAN[0]
    assert growth < GROWTH
    assert "200 of the 200 rows" in done.stdout
