"""evaluate_models.py as a user runs it: single models, ensembles, fold5, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    GOLDEN,
    Case,
    Error,
    Run,
    image_of_caption,
    run_program,
    tiny_train,
    write_split,
)
from test_files import largest_file

import evaluate_models
from common import results
from common.torch_files import read_torch
from evaluate_models import evaluate
from evaluation import retrieval
from model import DIME

NAMES = ("r1", "r5", "r10", "medr", "meanr")
OFFICIAL = Case(GOLDEN / "i2t")


def golden_args(case: Case = OFFICIAL) -> list[object]:
    model, data, bert = case.model_path, case.data_path, case.bert_path
    return ["--model_path", model, "--data_path", data, "--bert_path", bert]


def train_one(run_train: Run, tiny: Path, *more: str, direction: str = "i2t") -> Path:
    """Train for one step; returns the best model."""
    argv = tiny_train(tiny, "--max_steps", "1", *more, direction=direction)
    assert run_train(*argv) == 0
    return tiny / "runs" / direction / "model_best.pth.tar"


def test_official_checkpoints_give_the_golden_metrics(
    case: Case, tmp_path: Path, run_evaluate: Run, capsys
) -> None:
    """The official files and metrics, through the program."""
    outputs = ["--save_scores", tmp_path / "scores.npy", "--json", tmp_path / "result.json"]
    assert run_evaluate(*golden_args(case), *outputs) == 0
    expected, result = case.expected("eval"), json.loads((tmp_path / "result.json").read_text())
    scores, metrics = np.load(tmp_path / "scores.npy"), result["whole"]["metrics"]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected["sims"], rtol=0, atol=1e-5)
    i2t, t2i = expected["i2t"], expected["t2i"]
    for side, values in (("i2t", i2t), ("t2i", t2i)):
        np.testing.assert_allclose([metrics[side][n] for n in NAMES], values, rtol=0, atol=1e-9)
    assert metrics["rsum"] == pytest.approx(i2t[:3].sum() + t2i[:3].sum())
    data, bert = case.split().fingerprint, case.load()[1].fingerprint
    assert result["fingerprints"] == [{"data": data, "bert": bert, "training": None}]
    assert all(result[name] is None for name in ("shortlist", "scores", "fold5"))
    assert result["data_name"] == "f30k_precomp" and result["split"] == "test"
    assert (result["images"], result["captions"]) == scores.shape
    assert capsys.readouterr().out == (
        f"rsum: {i2t[:3].sum() + t2i[:3].sum():.1f}\n"
        f"Average i2t Recall: {i2t[:3].mean():.1f}\nImage to text: {rounded(i2t)}\n"
        f"Average t2i Recall: {t2i[:3].mean():.1f}\nText to image: {rounded(t2i)}\n"
    )


def rounded(values: np.ndarray) -> str:
    return " ".join(f"{value:.1f}" for value in values)


def test_train_evaluate_and_ensemble_with_folds(tiny: Path, tmp_path: Path) -> None:
    """Native checkpoints of both directions, which also name data and BERT."""
    models, files = [], []
    for direction, extra in (("i2t", "--extra_stc"), ("t2i", "--extra_img")):
        argv = tiny_train(tiny, extra, "1", "--max_steps", "2", direction=direction)
        assert run_program("train.py", *argv).returncode == 0
        models.append(tiny / "runs" / direction / "model_best.pth.tar")
        files.append(tmp_path / f"{direction}.npy")
        argv = ["--model_path", models[-1], "--save_scores", files[-1]]
        done = run_program("evaluate_models.py", *argv)
        assert done.returncode == 0, done.stderr
    outputs = ["--save_scores", tmp_path / "both.npy", "--json", tmp_path / "both.json"]
    argv = ["--model_path", *models, "--fold5", "--workers", "1", *outputs]
    done = run_program("evaluate_models.py", *argv)
    assert done.returncode == 0, done.stderr
    both = np.load(tmp_path / "both.npy")
    np.testing.assert_allclose(both, sum(map(np.load, files)) / 2, rtol=0, atol=1e-6)
    result = json.loads((tmp_path / "both.json").read_text())
    assert result["models"] == [str(model) for model in models]
    folds = result["fold5"]["folds"]
    for number, fold in enumerate(folds):
        block = both[2 * number : 2 * number + 2, 10 * number : 10 * number + 10]
        assert fold == retrieval(block, image_of_caption(10)).to_json()
    titles = [line for line in done.stdout.splitlines() if ":" not in line]
    assert titles == [*(f"Fold {number}" for number in range(1, 6)), "Mean of 5 folds"]
    assert done.stdout.count("rsum: ") == 6
    saved = run_program("evaluate_models.py", "--scores", *files, "--fold5")
    assert saved.stdout == done.stdout


@pytest.mark.parametrize("case", ["i2t_no_extra"], indirect=True)
def test_the_function_is_the_program(case: Case, tmp_path: Path) -> None:
    path, folders = case.model_path, {"data_path": case.data_path, "bert_path": case.bert_path}
    whole, folded = evaluate(str(path), **folders), evaluate([path], **folders, fold5=True)
    assert whole.fold5 is None and folded.fold5 and len(folded.fold5.folds) == 5
    assert whole.images == folded.images == 10
    assert whole.metrics == folded.whole.metrics != folded.metrics == folded.fold5.metrics
    alike = [path, shutil.copy(path, tmp_path)]
    ensemble, single = (evaluate(paths, **folders, split="dev") for paths in (alike, alike[:1]))
    assert ensemble.metrics == single.metrics and single.split == "dev"


def test_precision_comes_from_the_checkpoint(tiny: Path, run_train: Run) -> None:
    model, matrices = train_one(run_train, tiny, "--precision", "bf16"), []
    for precision in (None, "bf16", "fp32"):
        evaluate(model, precision=precision, save_scores=tiny / "scores.npy")
        matrices.append(np.load(tiny / "scores.npy"))
    assert np.array_equal(matrices[0], matrices[1])
    assert not np.array_equal(matrices[0], matrices[2])


def test_fold5_takes_testall_if_it_exists(tiny: Path, run_train: Run) -> None:
    model = train_one(run_train, tiny)
    assert evaluate(model, fold5=True).split == "test"
    write_split(tiny / "data/tiny", "testall", 15, repeat=True)
    assert evaluate(model, fold5=True).images == 15
    assert evaluate(model).split == "test"
    assert evaluate(model, split="test", fold5=True).images == 10


@pytest.mark.parametrize(
    ("options", "choice", "counted"),
    [
        ({}, None, True),
        ({"compile": True}, True, True),
        ({"shortlist": 1000}, False, False),  # only if asked for
        ({"shortlist": 1000, "compile": True}, True, False),
    ],
)
def test_compiling_is_decided_by_the_option_and_the_number_of_pairs(
    options: dict[str, Any], choice: bool | None, counted: bool, monkeypatch
) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(DIME, "compile_if_it_pays", lambda self, *given: asked.append(given))
    evaluate(OFFICIAL.model_path, OFFICIAL.data_path, bert_path=OFFICIAL.bert_path, **options)
    assert asked == [(choice, OFFICIAL.expected("eval")["sims"].size if counted else 0)]


@pytest.mark.parametrize("fold5", [False, True])
def test_a_shortlist_of_all_changes_nothing(tiny: Path, run_train: Run, fold5: bool) -> None:
    models = [train_one(run_train, tiny, direction=direction) for direction in ("i2t", "t2i")]
    whole = evaluate(models, fold5=fold5, save_scores=tiny / "whole.npy")
    listed = evaluate(models, fold5=fold5, save_scores=tiny / "listed.npy", shortlist=50)
    scores = [np.load(tiny / name) for name in ("whole.npy", "listed.npy")]
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-6)
    assert whole.metrics == listed.metrics
    assert listed.shortlist is not None and listed.shortlist["share"] == 1
    assert listed.shortlist["recall_upper_bound"] == {"i2t": 100.0, "t2i": 100.0}


def test_results_of_a_shortlist_are_called_approximate(
    tiny: Path, run_train: Run, run_evaluate: Run, capsys, caplog
) -> None:
    model = train_one(run_train, tiny)
    capsys.readouterr()
    path, matrix = tiny / "result.json", tiny / "scores.npy"
    files = ["--json", path, "--save_scores", matrix]
    assert run_evaluate("--model_path", model, "--shortlist", 1, *files) == 0
    line = capsys.readouterr().out.splitlines()[0]
    limits, scores = json.loads(path.read_text())["shortlist"], np.load(matrix)
    known = scores > -2
    assert limits["share"] == known.mean() < 0.5
    own = known[np.arange(50) // 5, np.arange(50)]
    bound = limits["recall_upper_bound"]
    assert bound["t2i"] == pytest.approx(100 * own.mean())
    assert bound["i2t"] == pytest.approx(100 * own.reshape(10, 5).any(1).mean())
    assert line.startswith("Approximate") and f"{bound['i2t']:.1f} %" in line
    np.save(tiny / "whole.npy", np.where(known, scores, -1))
    for name, approximate in (("scores.npy", True), ("whole.npy", False)):
        caplog.clear()
        assert run_evaluate("--scores", tiny / name) == 0
        assert (f"{name}: " in caplog.text and "shortlist" in caplog.text) == approximate


def truncated(tmp_path: Path) -> list[object]:
    path = tmp_path / "cut.pth.tar"
    path.write_bytes(OFFICIAL.model_path.read_bytes()[:9000])
    return ["--model_path", path]


def ensemble(change: Callable[[dict], object]) -> Callable[[Path], list[object]]:
    """Options of the official model and, as `second.pth.tar`, another that is changed."""

    def make(tmp_path: Path) -> list[object]:
        content = read_torch(OFFICIAL.model_path)
        change(content)
        torch.save(content, tmp_path / "second.pth.tar")
        return ["--model_path", OFFICIAL.model_path, tmp_path / "second.pth.tar"]

    return make


def in_a_loop(tmp_path: Path) -> list[object]:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return ["--save_scores", tmp_path / "loop/b"]


REFUSED: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "no model": (lambda t: ["--model_path", t / "none.pth.tar"], "none.pth.tar: not found"),
    "truncated": (truncated, "cut.pth.tar"),
    "two data sets": (
        ensemble(lambda c: setattr(c["opt"], "data_name", "coco_precomp")),
        "--save_scores",
    ),
    "two widths": (ensemble(lambda c: setattr(c["opt"], "img_dim", 7)), "[7, 20] wide"),
    "second model": (ensemble(lambda c: c["model"][2].pop("bn.weight")), "second.pth.tar: "),
    "no fold": (lambda t: ["--fold5"], "test_ims.npy: 12 images"),
    "no split": (lambda t: ["--split", "testall"], "testall_caps.txt: not found"),
    "no data": (lambda t: ["--data_path", t], "test_caps.txt: not found"),
    "shortlist": (lambda t: ["--shortlist", "0"], "--shortlist 0"),
    "training split": (lambda t: ["--split", "train"], "'train'"),
    "a folder to write": (lambda t: ["--json", t], "Is a directory"),
    "no folder": (lambda t: ["--save_scores", t / "no/a.npy"], "no/a.npy"),
    "long name": (lambda t: ["--save_scores", t / ("a" * 252)], "a" * 252),
    "a loop of links": (in_a_loop, "loop/b"),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_bad_input_is_one_line_before_any_model_runs(
    tmp_path: Path, evaluate_error: Error, monkeypatch, problem: str
) -> None:
    """Encoding a split may take an hour; the second model's problem is known before it."""
    monkeypatch.setattr("evaluation.encode_split", pytest.fail)
    change, named = REFUSED[problem]
    assert named in evaluate_error(*golden_args(), *change(tmp_path))


def test_an_output_does_not_overwrite_an_input_or_output(
    tmp_path: Path, evaluate_error: Error
) -> None:
    model = shutil.copy(OFFICIAL.model_path, tmp_path / "model.pth.tar")
    data = shutil.copytree(OFFICIAL.data_path, tmp_path / "data") / "f30k_precomp"
    bert, other = shutil.copytree(OFFICIAL.bert_path, tmp_path / "bert"), tmp_path / "x"
    inputs = contents(tmp_path)
    paths = ["--model_path", model, "--data_path", data.parent, "--bert_path", bert]
    for option, path in (
        ("--json", model),
        ("--json", tmp_path / "model.pth.json"),  # a .safetensors checkpoint has its options there
        ("--save_scores", data / "test_ims.npy"),
        ("--json", data / "test_ids.txt"),
        ("--json", bert / "vocab.txt"),
    ):
        assert f"{path}: " in evaluate_error(*paths, option, path)
    assert f"{other}: " in evaluate_error(*paths, "--json", other, "--save_scores", other)
    assert contents(tmp_path) == inputs


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failed_output_loses_no_other(tmp_path: Path, run_evaluate: Run, capsys) -> None:
    """A matrix that cannot be written loses neither the printed results nor the others."""
    outputs = ["--save_scores", tmp_path / "s.npy", "--json", tmp_path / "s.json"]
    with largest_file(2000):  # the results have some 1,400 bytes, the matrix 3,000
        assert run_evaluate(*golden_args(), "--workers", "0", *outputs) == 2
    captured = capsys.readouterr()
    assert "s.npy: File too large" in captured.err.splitlines()[-1]
    assert "rsum: " in captured.out and "s.json" not in captured.err
    assert json.loads((tmp_path / "s.json").read_text())["whole"]["metrics"]["rsum"] > 0
    assert not (tmp_path / "s.npy").exists()


def array(folder: Path, values: np.ndarray, name: str = "array") -> Path:
    np.save(folder / f"{name}.npy", values)
    return folder / f"{name}.npy"


def saved(folder: Path, name: str, images: int = 10) -> Path:
    return array(folder, np.random.default_rng(0).random((images, 5 * images), "f"), name)


def test_five_thousand_images_are_reported_as_1k_and_5k(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    path = str(saved(tmp_path, "a"))

    def printed(*more: str) -> str:
        evaluate_models.main(["--scores", path, *more])
        return capsys.readouterr().out

    whole, folds = printed(), printed("--fold5")
    for module in (evaluate_models, results):
        monkeypatch.setattr(module, "MSCOCO_IMAGES", 10)
    assert printed() == f"{folds}All images\n{whole}"
    assert (result := evaluate(scores=path)).fold5 and result.metrics == result.whole.metrics


def test_intervals_hold_their_metrics(tmp_path: Path, capsys) -> None:
    path = saved(tmp_path, "a", 40)
    result = evaluate(scores=[path], bootstrap=200).to_json()["whole"]
    for side in ("i2t", "t2i"):
        for name, (low, high) in result["intervals"][side].items():
            assert low <= result["metrics"][side][name] <= high
    low, high = result["intervals"]["rsum"]
    assert low < result["metrics"]["rsum"] < high
    evaluate_models.main(["--scores", str(path), "--bootstrap", "200"])
    assert f"rsum: {low:.1f}-{high:.1f}" in capsys.readouterr().out


BAD_SCORES: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "nothing": (lambda t: [], "--model_path or --scores"),
    "both": (lambda t: ["--scores", "a", "--model_path", "b"], "--model_path or --scores"),
    "one file twice": (lambda t: ["--scores", saved(t, "a"), t / "." / "a.npy"], "a.npy"),
    "samples": (lambda t: ["--scores", "a", "--bootstrap", "-1"], "--bootstrap -1"),
    "few samples": (lambda t: ["--scores", "a", "--bootstrap", "1"], "--bootstrap 1"),
    "shortlist": (lambda t: ["--scores", "a", "--shortlist", "3"], "--shortlist"),
    "device": (lambda t: ["--scores", "a", "--device", "cpu"], "--device"),
    "no file": (lambda t: ["--scores", t / "no.npy"], "no.npy"),
    "shapes": (lambda t: ["--scores", saved(t, "a"), saved(t, "b", 5)], "b.npy: shape (5, 25)"),
    "flat": (lambda t: ["--scores", array(t, np.zeros(5, np.float32))], "shape (5,)"),
    "wide": (lambda t: ["--scores", array(t, np.zeros((2, 9), np.float32))], "shape (2, 9)"),
    "empty": (lambda t: ["--scores", array(t, np.zeros((0, 0), np.float32))], "shape (0, 0)"),
    "integers": (lambda t: ["--scores", array(t, np.zeros((1, 5), int))], "int64"),
    "NaN": (lambda t: ["--scores", array(t, np.full((1, 5), np.nan, np.float32))], "array.npy"),
    "byte order": (lambda t: ["--scores", array(t, np.zeros((1, 5), ">f4"))], ">f4"),
    "folds": (lambda t: ["--scores", saved(t, "a", 4), "--fold5"], "a.npy: 4 images"),
    "other data": (
        lambda t: [
            *("--scores", saved(t, "a"), "--data_path", t.parent, "--data_name", captions(t, 45)),
            *("--split", "test"),
        ],
        "a.npy: shape (10, 50); expected (9, 45)",
    ),
    "half of the data": (
        lambda t: ["--scores", saved(t, "a"), "--data_path", t, "--split", "test"],
        "--data_name",
    ),
    "over itself": (lambda t: ["--scores", saved(t, "a"), "--save_scores", t / "a.npy"], "a.npy"),
}


def captions(folder: Path, count: int) -> str:
    """Make the folder a data set of that many captions, without features; its name."""
    (folder / "test_caps.txt").write_text("a\n" * count)
    return folder.name


@pytest.mark.parametrize("problem", BAD_SCORES)
def test_bad_matrices_are_one_line(problem: str, tmp_path: Path, evaluate_error: Error) -> None:
    make, named = BAD_SCORES[problem]
    argv = make(tmp_path)
    before = contents(tmp_path)
    assert named in evaluate_error(*argv)
    assert contents(tmp_path) == before


def test_the_split_that_selected_the_model_is_warned_of(tiny: Path, run_train: Run, caplog) -> None:
    """By the data for certain, else by its name."""
    model, data = train_one(run_train, tiny), tiny / "data/tiny"

    def warnings(split: str) -> list[str]:
        caplog.clear()
        evaluate(model, split=split, workers=0)
        return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]

    assert not warnings("test")
    (certain,) = warnings("dev")
    for kind in ("ims.npy", "caps.txt"):  # each split under the other's name
        (data / f"dev_{kind}").rename(tiny / kind)
        (data / f"test_{kind}").rename(data / f"dev_{kind}")
        (tiny / kind).rename(data / f"test_{kind}")
    (by_name,) = warnings("dev")
    assert warnings("test") == [certain] and by_name != certain
    assert "model_best.pth.tar" in certain and "model_best.pth.tar" in by_name


def test_saved_scores_of_a_dev_split_are_warned_of(tmp_path: Path, caplog) -> None:
    paths = [saved(tmp_path, "a"), array(tmp_path, np.eye(10, 50, dtype="f"), "b")]
    caplog.set_level("WARNING")
    for split in (None, "test"):
        evaluate(scores=paths, split=split)
    assert not caplog.records
    evaluate(scores=paths, split="dev")
    assert [str(path) in r.getMessage() for path, r in zip(paths, caplog.records, strict=True)]


def test_float64_scores_stay_float64(tmp_path: Path) -> None:
    """Scores that float32 cannot tell apart, of one file and of a mean of files."""
    values = 1 + np.random.default_rng(0).random((50, 250)) * 1e-9
    paths = [array(tmp_path, values, name) for name in "ab"]
    one, two = (evaluate(scores=paths[:count]).metrics for count in (1, 2))
    assert one == two and one.rsum > 0
