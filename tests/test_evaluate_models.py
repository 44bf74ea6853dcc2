"""evaluate_models.py as a user runs it: single models, ensembles, fold5, and what is refused."""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    CASES,
    GOLDEN,
    ROOT,
    Case,
    image_of_caption,
    run_program,
    tiny_train,
    write_split,
)
from test_files import largest_file

import evaluate_models
from common.errors import InputError
from data import Split
from evaluate_models import evaluate
from evaluation import retrieval
from model import DIME

NAMES = ("r1", "r5", "r10", "medr", "meanr")


def golden_args(case: Case) -> list[object]:
    paths = {
        "model_path": case.model_path,
        "data_path": case.data_path,
        "bert_path": case.bert_path,
    }
    return [x for name, value in paths.items() for x in (f"--{name}", value)]


def test_official_checkpoints_give_the_golden_metrics(case: Case, tmp_path: Path) -> None:
    """The official files and metrics, through the program."""
    outputs = ["--save_scores", tmp_path / "scores.npy", "--json", tmp_path / "result.json"]
    done = run_program("evaluate_models.py", *golden_args(case), *outputs)
    assert done.returncode == 0, done.stderr
    expected, result = case.expected("eval"), json.loads((tmp_path / "result.json").read_text())
    scores = np.load(tmp_path / "scores.npy")
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected["sims"], rtol=0, atol=1e-5)
    metrics = result["whole"]["metrics"]
    for side in ("i2t", "t2i"):
        values = [metrics[side][name] for name in NAMES]
        np.testing.assert_allclose(values, expected[side], rtol=0, atol=1e-9)
    data = Split.open(case.data_path / "f30k_precomp", "test", None).fingerprint
    bert = case.load()[1].fingerprint
    assert result["fingerprints"] == [{"data": data, "bert": bert, "training": None}]
    assert all(result[name] is None for name in ("shortlist", "scores", "fold5"))
    assert result["data_name"] == "f30k_precomp" and result["split"] == "test"
    assert (result["images"], result["captions"]) == scores.shape
    recalls = [expected[side][k] for side in ("i2t", "t2i") for k in range(3)]
    assert metrics["rsum"] == pytest.approx(sum(recalls))
    assert done.stdout == family_lines(expected["i2t"], expected["t2i"])


def family_lines(i2t: np.ndarray, t2i: np.ndarray) -> str:
    def figures(values: np.ndarray) -> str:
        return " ".join(f"{value:.1f}" for value in values)

    return (
        f"rsum: {i2t[:3].sum() + t2i[:3].sum():.1f}\n"
        f"Average i2t Recall: {i2t[:3].mean():.1f}\nImage to text: {figures(i2t)}\n"
        f"Average t2i Recall: {t2i[:3].mean():.1f}\nText to image: {figures(t2i)}\n"
    )


def test_train_evaluate_and_ensemble_with_folds(tiny: Path, tmp_path: Path) -> None:
    """Native checkpoints of both directions, which also name data and BERT."""
    models = []
    for direction, extra in (("i2t", "--extra_stc"), ("t2i", "--extra_img")):
        argv = tiny_train(tiny, extra, "1", "--max_steps", "2", direction=direction)
        assert run_program("train.py", *argv).returncode == 0
        models.append(tiny / "runs" / direction / "model_best.pth.tar")
    singles = []
    for number, model in enumerate(models):
        path = tmp_path / f"{number}.npy"
        done = run_program("evaluate_models.py", "--model_path", model, "--save_scores", path)
        assert done.returncode == 0, done.stderr
        singles.append(np.load(path))
    outputs = ["--save_scores", tmp_path / "both.npy", "--json", tmp_path / "both.json"]
    argv = ["--model_path", *models, "--fold5", "--workers", "1", *outputs]
    done = run_program("evaluate_models.py", *argv)
    assert done.returncode == 0, done.stderr
    both = np.load(tmp_path / "both.npy")
    np.testing.assert_allclose(both, (singles[0] + singles[1]) / 2, rtol=0, atol=1e-6)
    result = json.loads((tmp_path / "both.json").read_text())
    assert result["models"] == [str(model) for model in models]
    folds = result["fold5"]["folds"]
    for number, fold in enumerate(folds):
        block = both[2 * number : 2 * number + 2, 10 * number : 10 * number + 10]
        assert fold == retrieval(block, image_of_caption(10)).to_json()
    for side in ("i2t", "t2i"):
        for name in NAMES:
            mean = np.mean([fold[side][name] for fold in folds])
            assert result["fold5"]["metrics"][side][name] == pytest.approx(mean)
    titles = [line for line in done.stdout.splitlines() if ":" not in line]
    assert titles == [*(f"Fold {number}" for number in range(1, 6)), "Mean of 5 folds"]
    assert done.stdout.count("rsum: ") == 6
    files = [tmp_path / "0.npy", tmp_path / "1.npy"]
    saved = run_program("evaluate_models.py", "--scores", *files, "--fold5")
    assert saved.stdout == done.stdout


@pytest.mark.parametrize("case", ["i2t_no_extra"], indirect=True)
def test_the_function_is_the_program(case: Case, tmp_path: Path) -> None:
    whole = evaluate(str(case.model_path), case.data_path, bert_path=case.bert_path)
    folded = evaluate([case.model_path], case.data_path, bert_path=case.bert_path, fold5=True)
    assert whole.fold5 is None and folded.fold5 and len(folded.fold5.folds) == 5
    assert whole.images == folded.images == 10
    assert whole.metrics == folded.whole.metrics != folded.metrics == folded.fold5.metrics
    alike = [case.model_path, shutil.copy(case.model_path, tmp_path)]
    ensemble = evaluate(alike, case.data_path, bert_path=case.bert_path, split="dev")
    single = evaluate(alike[:1], case.data_path, bert_path=case.bert_path, split="dev")
    assert ensemble.metrics == single.metrics and single.split == "dev"


@pytest.mark.parametrize("case", ["i2t_no_extra"], indirect=True)
def test_a_fold_is_the_data_set_of_its_images(case: Case, tmp_path: Path) -> None:
    """Scored by themselves, a fold's images and captions get the diagonal block's scores."""
    options = {"bert_path": case.bert_path, "save_scores": tmp_path / "scores.npy"}
    whole = evaluate(case.model_path, case.data_path, fold5=True, **options)
    scores = np.load(tmp_path / "scores.npy")
    source = case.data_path / "f30k_precomp"
    features = np.load(source / "test_ims.npy")
    captions = (source / "test_caps.txt").read_text().splitlines(keepends=True)
    for number, expected in enumerate(whole.fold5.folds):
        folder = tmp_path / f"fold{number}"
        folder.mkdir()
        np.save(folder / "test_ims.npy", features[2 * number : 2 * number + 2])
        (folder / "test_caps.txt").write_text("".join(captions[10 * number : 10 * number + 10]))
        fold = evaluate(case.model_path, tmp_path, data_name=folder.name, **options)
        assert fold.metrics == expected
        block = scores[2 * number : 2 * number + 2, 10 * number : 10 * number + 10]
        np.testing.assert_allclose(np.load(options["save_scores"]), block, rtol=0, atol=1e-6)


def test_precision_comes_from_the_checkpoint(tiny: Path, run_train: Callable[..., int]) -> None:
    assert run_train(*tiny_train(tiny, "--max_steps", "1", "--precision", "bf16")) == 0
    matrices = []
    for precision in (None, "bf16", "fp32"):
        evaluate(
            tiny / "runs/i2t/model_best.pth.tar",
            precision=precision,
            save_scores=tiny / "scores.npy",
        )
        matrices.append(np.load(tiny / "scores.npy"))
    assert np.array_equal(matrices[0], matrices[1])
    assert not np.array_equal(matrices[0], matrices[2])


def test_fold5_takes_testall_if_it_exists(tiny: Path, run_train: Callable[..., int]) -> None:
    assert run_train(*tiny_train(tiny, "--max_steps", "1")) == 0
    model = tiny / "runs/i2t/model_best.pth.tar"
    assert evaluate(model, fold5=True).split == "test"
    write_split(tiny / "data/tiny", "testall", 15, repeat=True)
    assert evaluate(model, fold5=True).images == 15
    assert evaluate(model).split == "test"
    assert evaluate(model, split="test", fold5=True).images == 10


def test_short_captions_are_evaluated(tiny: Path, run_train: Callable[..., int]) -> None:
    """The published code crashed where the longest caption has fewer than max_words tokens."""
    write_split(tiny / "data/tiny", "test", 3, longest=1)
    for direction in ("i2t", "t2i"):
        assert run_train(*tiny_train(tiny, "--max_steps", "1", direction=direction)) == 0
        assert evaluate(tiny / f"runs/{direction}/model_best.pth.tar").captions == 15


@pytest.mark.parametrize(
    ("options", "choice", "counted"),
    [
        ({}, None, True),
        ({"compile": False}, False, True),
        ({"compile": True}, True, True),
        ({"shortlist": 1000}, False, False),  # only if asked for
        ({"shortlist": 1000, "compile": True}, True, False),
    ],
)
@pytest.mark.parametrize("case", CASES[:1], indirect=True)
def test_compiling_is_decided_by_the_option_and_the_number_of_pairs(
    case: Case,
    options: dict[str, Any],
    choice: bool | None,
    counted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(DIME, "compile_if_it_pays", lambda self, *given: asked.append(given))
    evaluate(case.model_path, case.data_path, bert_path=case.bert_path, **options)
    assert asked == [(choice, case.expected("eval")["sims"].size if counted else 0)]


@pytest.mark.parametrize("fold5", [False, True])
def test_a_shortlist_of_all_changes_nothing(tiny: Path, run_train, fold5: bool) -> None:
    models = []
    for direction in ("i2t", "t2i"):
        assert run_train(*tiny_train(tiny, "--max_steps", "1", direction=direction)) == 0
        models.append(tiny / f"runs/{direction}/model_best.pth.tar")
    found = []
    for options in ({}, {"shortlist": 50}):
        path = tiny / f"{len(found)}.npy"
        result = evaluate(models, fold5=fold5, save_scores=path, **options)
        found.append((np.load(path), result.metrics))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=0, atol=1e-6)
    assert found[0][1] == found[1][1]
    bound = {"i2t": 100.0, "t2i": 100.0}
    assert result.shortlist == {"count": 50, "share": 1.0, "recall_upper_bound": bound}


def test_results_of_a_shortlist_are_called_approximate(
    tiny: Path,
    run_train: Callable[..., int],
    run_evaluate: Callable[..., int],
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert run_train(*tiny_train(tiny, "--max_steps", "1")) == 0
    capsys.readouterr()
    files = {"--json": tiny / "result.json", "--save_scores": tiny / "scores.npy"}
    outputs = [part for option in files.items() for part in option]
    model = tiny / "runs/i2t/model_best.pth.tar"
    assert run_evaluate("--model_path", model, "--shortlist", 1, *outputs) == 0
    line = capsys.readouterr().out.splitlines()[0]
    limits = json.loads(files["--json"].read_text())["shortlist"]
    scores = np.load(files["--save_scores"])
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
        assert (f"{name}: looks like scores of a shortlist" in caplog.text) == approximate


def no_model(tmp_path: Path) -> list[str]:
    return ["--model_path", str(tmp_path / "none.pth.tar")]


def truncated(tmp_path: Path) -> list[str]:
    path = tmp_path / "cut.pth.tar"
    path.write_bytes((GOLDEN / "i2t/checkpoint.pth.tar").read_bytes()[:9000])
    return ["--model_path", str(path)]


def official() -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(GOLDEN / "i2t/checkpoint.pth.tar", weights_only=True)


def beside(tmp_path: Path, **options: object) -> list[str]:
    """An ensemble of the golden model and of one with other options."""
    content = official()
    vars(content["opt"]).update(options)
    torch.save(content, tmp_path / "other.pth.tar")
    first = str(GOLDEN / "i2t/checkpoint.pth.tar")
    return ["--model_path", first, str(tmp_path / "other.pth.tar")]


def nan_scores(tmp_path: Path) -> list[str]:
    content = official()
    content["model"][2]["bn.weight"][0] = torch.nan
    torch.save(content, tmp_path / "nan.pth.tar")
    return ["--model_path", str(tmp_path / "nan.pth.tar")]


REFUSED = {
    "no model": (no_model, "none.pth.tar: not found"),
    "truncated": (truncated, "cut.pth.tar"),
    "two data sets": (lambda t: beside(t, data_name="coco_precomp"), "--save_scores"),
    "two widths": (
        lambda t: beside(t, img_dim=7),
        "[7, 20] wide; expected one width; evaluate each",
    ),
    "NaN scores": (nan_scores, "nan.pth.tar"),
    "no fold": (
        lambda t: ["--fold5"],
        "f30k_precomp/test_ims.npy: 12 images; expected a multiple of 5",
    ),
    "no split": (lambda t: ["--split", "testall"], "testall_caps.txt: not found"),
    "no data": (lambda t: ["--data_path", str(t)], "test_caps.txt: not found"),
    "shortlist": (lambda t: ["--shortlist", "0"], "--shortlist 0"),
    "training split": (lambda t: ["--split", "train"], "'train'"),
    "a folder to write": (lambda t: ["--json", str(t)], "Is a directory; expected a file to write"),
    "no folder": (lambda t: ["--save_scores", str(t / "no/a.npy")], "no/a.npy"),
}


@pytest.mark.parametrize("fault", REFUSED)
@pytest.mark.parametrize("case", CASES[:1], indirect=True)
def test_bad_input_is_one_line(
    case: Case,
    tmp_path: Path,
    run_evaluate: Callable[..., int],
    capsys: pytest.CaptureFixture,
    fault: str,
) -> None:
    change, named = REFUSED[fault]
    assert run_evaluate(*golden_args(case), *change(tmp_path)) == 2
    captured = capsys.readouterr()
    assert named in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err and "usage:" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("case", CASES[:1], indirect=True)
def test_an_output_does_not_overwrite_an_input_or_output(
    case: Case, tmp_path: Path, run_evaluate: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    model = shutil.copy(case.model_path, tmp_path / "model.pth.tar")
    data = shutil.copytree(case.data_path, tmp_path / "data") / "f30k_precomp"
    bert, other = shutil.copytree(case.bert_path, tmp_path / "bert"), tmp_path / "x"
    inputs = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    paths = ["--model_path", model, "--data_path", data.parent, "--bert_path", bert]
    for more in (
        ["--json", model],
        ["--json", tmp_path / "model.pth.json"],  # a .safetensors checkpoint has its options there
        ["--save_scores", data / "test_ims.npy"],
        ["--json", data / "test_ids.txt"],
        ["--json", bert / "vocab.txt"],
        ["--json", other, "--save_scores", other],
    ):
        assert run_evaluate(*paths, *more) == 2
        assert "is an input or another output" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == inputs


@pytest.mark.parametrize("case", CASES[:1], indirect=True)
def test_a_failed_output_loses_no_other(
    case: Case, tmp_path: Path, run_evaluate: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    """A matrix that cannot be written loses neither the printed results nor the others."""
    args = [*golden_args(case), "--workers", "0", "--save_scores", tmp_path / "s.npy"]
    args += ["--json", tmp_path / "s.json"]
    with largest_file(2000):  # the results have some 1,400 bytes, the matrix 3,000
        assert run_evaluate(*args) == 2
    captured = capsys.readouterr()
    assert "s.npy: File too large" in captured.err.splitlines()[-1]
    assert "rsum: " in captured.out and "s.json" not in captured.err
    assert json.loads((tmp_path / "s.json").read_text())["whole"]["metrics"]["rsum"] > 0
    assert not (tmp_path / "s.npy").exists()


@pytest.mark.parametrize("case", CASES[:1], indirect=True)
def test_no_model_runs_before_all_are_opened(
    case: Case,
    tmp_path: Path,
    run_evaluate: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Encoding a split may take an hour; the second model's fault is known before it."""
    content = official()
    del content["model"][2]["bn.weight"]
    torch.save(content, tmp_path / "second.pth.tar")
    monkeypatch.setattr("evaluation.encode_split", pytest.fail)
    both = ["--model_path", case.model_path, tmp_path / "second.pth.tar"]
    assert run_evaluate(*golden_args(case), *both) == 2
    assert "second.pth.tar: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("case", CASES[:1], indirect=True)
@pytest.mark.parametrize("target", [">/dev/full", ">&-", "| true"])
def test_a_closed_standard_output_is_one_line(case: Case, tmp_path: Path, target: str) -> None:
    command = [sys.executable, ROOT / "evaluate_models.py", *golden_args(case)]
    words = shlex.join(map(str, [*command, "--json", tmp_path / "s.json"]))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words} {target}"], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "error: standard output: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert json.loads((tmp_path / "s.json").read_text())["whole"]


@pytest.mark.parametrize("name", ["a" * 252, "loop/b"])
@pytest.mark.parametrize("case", CASES[:1], indirect=True)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setattr("evaluation.encode_split", pytest.fail)
    with pytest.raises(InputError, match=name[:9]):
        evaluate(
            case.model_path,
            case.data_path,
            bert_path=case.bert_path,
            save_scores=str(tmp_path / name),
        )


def array(folder: Path, values: np.ndarray, name: str = "array") -> Path:
    np.save(folder / f"{name}.npy", values)
    return folder / f"{name}.npy"


def saved(folder: Path, name: str, images: int = 10) -> Path:
    scores = np.random.default_rng(0).random((images, 5 * images), dtype=np.float32)
    return array(folder, scores, name.removesuffix(".npy"))


def test_five_thousand_images_are_reported_as_1k_and_5k(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(saved(tmp_path, "a.npy"))
    evaluate_models.main(["--scores", path])
    whole = capsys.readouterr().out
    evaluate_models.main(["--scores", path, "--fold5"])
    folds = capsys.readouterr().out
    monkeypatch.setattr(evaluate_models, "MSCOCO_IMAGES", 10)
    evaluate_models.main(["--scores", path])
    assert capsys.readouterr().out == f"{folds}All images\n{whole}"
    result = evaluate(scores=path)
    assert result.fold5 and result.metrics == result.whole.metrics


def test_intervals_hold_their_metrics(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = saved(tmp_path, "a.npy", 40)
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


@pytest.mark.parametrize("fault", BAD_SCORES)
def test_bad_matrices_are_one_line(
    fault: str, tmp_path: Path, run_evaluate: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    make, named = BAD_SCORES[fault]
    argv = make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert run_evaluate(*argv) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_split_that_selected_the_model_is_warned_of(
    tiny: Path, run_train: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    """By the data for certain, else by its name."""
    assert run_train(*tiny_train(tiny, "--max_steps", "1")) == 0
    model, data = tiny / "runs/i2t/model_best.pth.tar", tiny / "data/tiny"

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


def test_saved_scores_of_a_dev_split_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [saved(tmp_path, "a"), array(tmp_path, np.eye(10, 50, dtype="f"), "b")]
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
