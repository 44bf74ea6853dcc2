"""--part and scripts/merge_scores.py: one matrix from jobs that know nothing of each other."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, Error, Run, error_line, run_here, write_split
from safetensors.numpy import load_file, save_file

import evaluation
from common.errors import InputError
from common.score_files import ROW_BLOCK, ScorePart, parse_part, write_part
from common.world import World
from evaluate_models import evaluate
from evaluation import rows_of_part
from scripts import merge_scores

IMAGES = 10  # of 1 to 3 captions; four a tile
MODELS = {name: GOLDEN / name / "checkpoint.pth.tar" for name in ("i2t", "t2i")}


@pytest.fixture
def data(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(evaluation, "TILE", 4)
    monkeypatch.setattr(evaluation, "IMAGE_BLOCK", 4)
    counts = [1 + i % 3 for i in range(IMAGES)]
    write_split(tmp_path / "own", "test", IMAGES, counts=counts, width=20)
    return tmp_path


def options(data: Path, *models: str) -> list[object]:
    paths = ["--data_path", data, "--data_name", "own", "--bert_path", GOLDEN / "i2t/bert"]
    return ["--model_path", *(MODELS[name] for name in models), *paths, "--workers", 0]


@pytest.fixture
def part(data: Path, run_evaluate: Run) -> Callable[..., Path]:
    """Writes a part of the scores of some models; returns its file."""

    def write(which: str, *models: str, name: str = "") -> Path:
        path = data / f"{name}{which[0]}.safetensors"
        argv = [*options(data, *(models or ("i2t",))), "--part", which, "--save_scores", path]
        assert run_evaluate(*argv) == 0
        return path

    return write


@pytest.fixture
def merge(monkeypatch) -> Run:
    return lambda *argv: run_here(monkeypatch, merge_scores.main, argv)


@pytest.fixture
def merge_error(merge: Run, capsys) -> Error:
    return lambda *argv: error_line(merge(*argv), capsys)


@pytest.mark.parametrize("models", [["i2t"], ["t2i"], ["i2t", "t2i"]])
def test_merged_parts_are_the_matrix_of_one_process(
    data: Path, models: list[str], part, merge: Run, run_evaluate: Run
) -> None:
    assert run_evaluate(*options(data, *models), "--save_scores", data / "one.npy") == 0
    parts = [part(f"{number}/3", *models) for number in (3, 1, 2)]
    assert merge(*parts, "--out", data / "merged.npy") == 0
    one, merged = np.load(data / "one.npy"), np.load(data / "merged.npy")
    assert merged.dtype == np.float32 and np.array_equal(merged, one)
    assert [len(load_file(path)["scores"]) for path in parts] == [2, 4, 4]


def test_a_part_may_have_no_rows(data: Path, part, merge: Run) -> None:
    parts = [part(f"{number}/4") for number in range(1, 5)]  # of three tiles
    assert [len(load_file(path)["scores"]) for path in parts] == [0, 4, 4, 2]
    assert merge(*parts, "--out", data / "merged.npy") == 0
    assert np.load(data / "merged.npy").shape == (IMAGES, 19)


@pytest.mark.parametrize("images", [0, 1, 128, 129, 1000])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_parts_share_out_all_rows_by_whole_tiles(images: int, count: int) -> None:
    shares = [rows_of_part(images, World(number, count)) for number in range(count)]
    assert [row for share in shares for row in share] == list(range(images))
    assert all(share.start % evaluation.TILE == 0 for share in shares if share)


def test_a_part_is_no_matrix_and_no_model(data: Path, part, evaluate_error: Error) -> None:
    path = part("1/2")
    line = evaluate_error("--scores", path)
    assert f"{path}: " in line and "scripts/merge_scores.py" in line
    assert "1.json" in evaluate_error("--model_path", path)


PARTS: dict[str, tuple[Callable, str]] = {
    "missing": (lambda one, part: [one], "2/2"),
    "twice": (lambda one, part: [one, part("1/2", name="again"), part("2/2")], "again1"),
    "other model": (lambda one, part: [one, part("2/2", "t2i")], "2.safetensors: models"),
    "ensemble": (lambda one, part: [one, part("2/2", "i2t", "t2i")], "2.safetensors: models"),
    "other count": (lambda one, part: [one, part("2/3")], "2.safetensors: count 3"),
    "a matrix": (lambda one, part: [one, one.with_name("one.npy")], "one.npy"),
    "no file": (lambda one, part: [one, one.with_name("no")], "no: not found"),
    "other file": (lambda one, part: [one, tensors(one)], "tensors.safetensors"),
    "cut off": (lambda one, part: [one, truncated(part("2/2"))], "2.safetensors"),
}


def tensors(beside: Path) -> Path:
    path = beside.with_name("tensors.safetensors")
    save_file({"scores": np.zeros((2, 19), np.float32)}, path)
    return path


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-1])
    return path


@pytest.mark.parametrize("problem", PARTS)
def test_parts_that_are_no_matrix_together_are_one_line(
    data: Path, problem: str, part, merge_error: Error
) -> None:
    change, named = PARTS[problem]
    np.save(data / "one.npy", np.zeros((2, 19), np.float32))
    paths = change(part("1/2"), part)
    assert named in merge_error(*paths, "--out", data / "merged.npy")
    assert not (data / "merged.npy").exists()


def test_parts_of_other_data_are_refused(data: Path, part, merge_error: Error) -> None:
    first = part("1/2")
    write_split(data / "own", "test", IMAGES, counts=[2] * IMAGES, width=20)
    assert "2.safetensors: data" in merge_error(first, part("2/2"), "--out", data / "merged.npy")


def test_merging_does_not_overwrite_a_part(part, merge_error: Error) -> None:
    path = part("1/1")
    before = path.read_bytes()
    assert f"{path}: " in merge_error(path, "--out", path)
    assert path.read_bytes() == before


def about(**changes: object) -> dict[str, object]:
    common = {"models": "m", "berts": "b", "data": "d", "directions": "i2t", "precisions": "fp32"}
    return common | {"count": 1, "images": 3, "captions": 7, "number": 1, "first": 0} | changes


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        *(({"first": 1}, "first row 1"), ({"images": 4}, "last row 2"), ({"captions": 8}, "7")),
        *(({"count": "x"}, "damaged"), ({"number": ""}, "damaged"), ({"format": "z"}, "expected")),
    ],
)
def test_a_part_whose_figures_do_not_fit_is_one_line(
    tmp_path: Path, changes: dict, named: str, merge_error: Error
) -> None:
    path = tmp_path / "1.safetensors"
    write_part(path, np.zeros((3, 7), np.float32), about(**changes))
    line = merge_error(path, "--out", tmp_path / "merged.npy")
    assert f"{path}: " in line and named in line


def test_rows_are_read_in_blocks(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).random((ROW_BLOCK + 3, 2), "float32")
    write_part(tmp_path / "p", rows, about(captions=2))
    blocks = list(ScorePart.open(tmp_path / "p").blocks())
    assert [len(block) for block in blocks] == [ROW_BLOCK, 3]
    assert np.array_equal(np.concatenate(blocks), rows)


def test_the_function_has_no_result_of_a_part() -> None:
    with pytest.raises(InputError, match="part"):
        evaluate(MODELS["i2t"], part="1/2", save_scores="p.safetensors")


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "-1/2", "1/2/3", "x/2", "1.0/2"])
def test_a_part_is_i_of_n(text: str) -> None:
    with pytest.raises(InputError, match=f"--part {text}: "):
        parse_part(text)
    assert parse_part("2/8") == World(1, 8)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--part", "1/2"], "--save_scores"),
        (["--part", "1/2", "--save_scores", "a.npy"], "--save_scores a.npy"),
        (["--part", "3/2", "--save_scores", "a.safetensors"], "--part 3/2"),
        *((["--part", "1/2", *which], which[0]) for which in (["--fold5"], ["--json", "a"])),
        *((["--part", "1/2", f"--{n}", "100"], f"--{n}") for n in ("bootstrap", "shortlist")),
    ],
)
def test_what_needs_all_rows_is_refused_with_a_part(
    data: Path, more: list[str], named: str, evaluate_error: Error, monkeypatch
) -> None:
    monkeypatch.setattr("evaluation.encode_split", pytest.fail)
    assert named in evaluate_error(*options(data, "i2t"), *more)
