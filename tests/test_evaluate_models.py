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
from conftest import CASES, GOLDEN, ROOT, Case, run_program, tiny_train, write_split
from test_files import largest_file

import evaluate_models
from common.errors import InputError
from data import Split
from evaluate_models import evaluate
from evaluation import image_of_caption, retrieval
from space import RoutingSpace

NAMES = ("r1", "r5", "r10", "medr", "meanr")


def golden_args(case: Case) -> list[object]:
    paths = {
        "model_path": case.model_path,
        "data_path": case.data_path,
        "bert_path": case.bert_path,
    }
    return [x for name, value in paths.items() for x in (f"--{name}", value)]


def test_golden_checkpoints_give_the_published_metrics(case: Case, tmp_path: Path) -> None:
    """The published project's files and its figures, through the program."""
    outputs = ["--save_scores", tmp_path / "scores.npy", "--json", tmp_path / "result.json"]
    done = run_program("evaluate_models.py", *golden_args(case), *outputs)
    assert done.returncode == 0, done.stderr
    expected, result = case.expected("eval"), json.loads((tmp_path / "result.json").read_text())
    scores = np.load(tmp_path / "scores.npy")
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected["sims"], rtol=0, atol=1e-5)
    for side in ("i2t", "t2i"):
        found = [result["metrics"][side][name] for name in NAMES]
        np.testing.assert_allclose(found, expected[side], rtol=0, atol=1e-9)
    assert result.keys() == {
        *("models", "data_name", "split", "images", "captions", "metrics", "folds"),
        *("seconds", "closed", "shortlist", "scores", "extended", "intervals", "protocols"),
        "fingerprints",
    }
    data = Split.open(case.data_path / "f30k_precomp", "test", None).fingerprint
    bert = case.load()[1].fingerprint
    assert result["fingerprints"] == [{"data": data, "bert": bert, "training": None}]
    assert all(result[name] is None for name in ("shortlist", "scores", "extended", "intervals"))
    assert result["data_name"] == "f30k_precomp" and result["split"] == "test"
    assert (result["images"], result["captions"]) == scores.shape and result["folds"] == []
    recalls = [expected[side][k] for side in ("i2t", "t2i") for k in range(3)]
    assert result["metrics"]["rsum"] == pytest.approx(sum(recalls))
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
    """Own checkpoints of both directions; what is not given comes from them."""
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
    assert result["models"] == [str(model) for model in models] and len(result["folds"]) == 5
    for number, fold in enumerate(result["folds"]):
        block = both[2 * number : 2 * number + 2, 10 * number : 10 * number + 10]
        assert fold == retrieval(block, image_of_caption(10)).as_dict()
    for side in ("i2t", "t2i"):
        for name in NAMES:
            mean = np.mean([fold[side][name] for fold in result["folds"]])
            assert result["metrics"][side][name] == pytest.approx(mean)
    titles = [line for line in done.stdout.splitlines() if ":" not in line]
    assert titles == [*(f"Fold {number}" for number in range(1, 6)), "Mean of 5 folds"]
    assert done.stdout.count("rsum: ") == 6


@pytest.mark.parametrize("case", ["i2t_no_extra"], indirect=True)
def test_the_function_is_the_program(case: Case, tmp_path: Path) -> None:
    whole = evaluate(str(case.model_path), case.data_path, bert_path=case.bert_path)
    folded = evaluate([case.model_path], case.data_path, bert_path=case.bert_path, fold5=True)
    assert whole["folds"] == [] and len(folded["folds"]) == 5
    assert whole["images"] == folded["images"] == 10
    alike = [case.model_path, shutil.copy(case.model_path, tmp_path)]
    ensemble = evaluate(alike, case.data_path, bert_path=case.bert_path, split="dev")
    single = evaluate(alike[:1], case.data_path, bert_path=case.bert_path, split="dev")
    assert ensemble["metrics"] == single["metrics"] and single["split"] == "dev"


@pytest.mark.parametrize("case", ["i2t_no_extra"], indirect=True)
def test_a_fold_is_the_data_set_of_its_images(case: Case, tmp_path: Path) -> None:
    """Scored by themselves, a fold's images and captions get the diagonal block's scores."""
    options = {"bert_path": case.bert_path, "save_scores": tmp_path / "scores.npy"}
    whole = evaluate(case.model_path, case.data_path, fold5=True, **options)
    scores = np.load(tmp_path / "scores.npy")
    source = case.data_path / "f30k_precomp"
    features = np.load(source / "test_ims.npy")
    captions = (source / "test_caps.txt").read_text().splitlines(keepends=True)
    for number, expected in enumerate(whole["folds"]):
        folder = tmp_path / f"fold{number}"
        folder.mkdir()
        np.save(folder / "test_ims.npy", features[2 * number : 2 * number + 2])
        (folder / "test_caps.txt").write_text("".join(captions[10 * number : 10 * number + 10]))
        fold = evaluate(case.model_path, tmp_path, data_name=folder.name, **options)
        assert fold["metrics"] == expected
        block = scores[2 * number : 2 * number + 2, 10 * number : 10 * number + 10]
        np.testing.assert_allclose(np.load(options["save_scores"]), block, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["t2i"], indirect=True)
def test_bfloat16_scores_are_close(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "scores.npy"
    options = {"bert_path": case.bert_path, "precision": "bf16", "save_scores": path}
    evaluate(case.model_path, case.data_path, **options)
    scores, exact = np.load(path), case.expected("eval")["sims"]
    assert 0 < abs(scores - exact).mean() < 0.02


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


@pytest.mark.parametrize("asked", [{"fold5": True}, {"protocols": ["5k"]}, {"extended": True}])
def test_mscocos_protocols_take_testall_where_there_is_one(
    asked: dict[str, Any],
    tiny: Path,
    run_train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate_models, "eccv_metrics", lambda: None)  # there are no ids for it
    assert run_train(*tiny_train(tiny, "--max_steps", "1")) == 0
    model = tiny / "runs/i2t/model_best.pth.tar"
    assert evaluate(model, **asked)["split"] == "test"
    write_split(tiny / "data/tiny", "testall", 15, repeat=True)
    assert evaluate(model, **asked)["images"] == 15
    assert evaluate(model)["split"] == "test"
    assert evaluate(model, split="test", **asked)["images"] == 10


def test_short_captions_are_evaluated(tiny: Path, run_train: Callable[..., int]) -> None:
    """The published code crashed where the longest caption has fewer than max_words tokens."""
    write_split(tiny / "data/tiny", "test", 3, longest=1)
    for direction in ("i2t", "t2i"):
        assert run_train(*tiny_train(tiny, "--max_steps", "1", direction=direction)) == 0
        assert evaluate(tiny / f"runs/{direction}/model_best.pth.tar")["captions"] == 15


@pytest.mark.parametrize(
    ("options", "skips", "choice", "paying"),
    [
        ({}, True, None, True),
        ({"skip": False}, False, None, True),
        ({"compile": False}, True, False, True),
        ({"compile": True}, True, True, True),
        ({"shortlist": 1000}, True, False, False),  # on request alone
        ({"shortlist": 1000, "compile": True}, True, True, False),
    ],
)
def test_skipping_and_compiling_are_as_asked_for(
    case: Case,
    tmp_path: Path,
    options: dict[str, Any],
    skips: bool,
    choice: bool | None,
    paying: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And change no score: the golden models have gates open and closed."""
    asked, path = [], tmp_path / "scores.npy"

    def compile_(space: RoutingSpace, *given: object) -> None:
        cells = [cell for layer in (*space.layers, space.merge) for cell in layer.cells.values()]
        asked.append((any(cell.skips for cell in cells), *given))

    monkeypatch.setattr(RoutingSpace, "compile_where_it_pays", compile_)
    found = evaluate(
        case.model_path, case.data_path, bert_path=case.bert_path, save_scores=path, **options
    )
    expected = case.expected("eval")["sims"]
    assert asked == [(skips, choice, expected.size if paying else 0, "fp32")]
    np.testing.assert_allclose(np.load(path), expected, rtol=0, atol=1e-5)
    (closed,) = found["closed"]
    assert np.array(closed).shape == (3, 4) and 0 < np.max(closed) <= 1


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
        found.append((np.load(path), result["metrics"]))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=0, atol=1e-6)
    assert found[0][1] == found[1][1]
    assert result["shortlist"] == {
        "count": 50,
        "share": 1.0,
        "ceiling": {"i2t": 100.0, "t2i": 100.0},
    }


def test_a_shortlist_is_called_approximate(
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
    said = capsys.readouterr().out.splitlines()[0]
    limits = json.loads(files["--json"].read_text())["shortlist"]
    scores = np.load(files["--save_scores"])
    known = scores > -2
    assert limits["share"] == known.mean() < 0.5
    own = known[np.arange(50) // 5, np.arange(50)]
    assert limits["ceiling"]["t2i"] == pytest.approx(100 * own.mean())
    assert limits["ceiling"]["i2t"] == pytest.approx(100 * own.reshape(10, 5).any(1).mean())
    assert said.startswith("Approximate: only the best 1 each way")
    assert f"{limits['ceiling']['i2t']:.1f} % of the images" in said
    for name, told in (("scores.npy", True), ("whole.npy", False)):
        np.save(tiny / "whole.npy", np.where(known, scores, -1))
        caplog.clear()
        assert run_evaluate("--scores", tiny / name) == 0
        assert (f"{name}: if these are scores of a shortlist, the results" in caplog.text) == told


def no_model(tmp_path: Path) -> list[str]:
    return ["--model_path", str(tmp_path / "none.pth.tar")]


def truncated(tmp_path: Path) -> list[str]:
    path = tmp_path / "cut.pth.tar"
    path.write_bytes((GOLDEN / "i2t/checkpoint.pth.tar").read_bytes()[:9000])
    return ["--model_path", str(path)]


def published() -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(GOLDEN / "i2t/checkpoint.pth.tar", weights_only=True)


def two_data_sets(tmp_path: Path) -> list[str]:
    content = published()
    content["opt"].data_name = "coco_precomp"
    torch.save(content, tmp_path / "coco.pth.tar")
    first = str(GOLDEN / "i2t/checkpoint.pth.tar")
    return ["--model_path", first, str(tmp_path / "coco.pth.tar")]


def nan_scores(tmp_path: Path) -> list[str]:
    content = published()
    content["model"][2]["bn.weight"][0] = torch.nan
    torch.save(content, tmp_path / "nan.pth.tar")
    return ["--model_path", str(tmp_path / "nan.pth.tar")]


REFUSED = {
    "no model": (no_model, "none.pth.tar: not found"),
    "truncated": (truncated, "cut.pth.tar: truncated"),
    "two data sets": (two_data_sets, "--data_name is needed"),
    "NaN scores": (nan_scores, "nan.pth.tar gives scores of NaN"),
    "no fold": (
        lambda t: ["--fold5"],
        "f30k_precomp/test_ims.npy: 12 images; expected a multiple of 5",
    ),
    "no split": (lambda t: ["--split", "testall"], "testall_caps.txt: not found"),
    "other split": (lambda t: ["--split", "train2"], "train2"),
    "no data": (lambda t: ["--data_path", str(t)], "test_caps.txt: not found"),
    "workers": (lambda t: ["--workers", "-1"], "--workers -1"),
    "shortlist": (lambda t: ["--shortlist", "0"], "--shortlist 0"),
    "training split": (lambda t: ["--split", "train"], "'train'"),
    "a folder to write": (lambda t: ["--json", str(t)], "Is a directory; expected a file to write"),
    "no folder": (lambda t: ["--save_scores", str(t / "no/a.npy")], "--save_scores"),
    "no report": (lambda t: ["--json", str(t / "no/a.json")], "--json"),
    "other BERT": (lambda t: ["--bert_path", str(GOLDEN / "i2t/data")], "vocab.txt: not found"),
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
    change, said = REFUSED[fault]
    assert run_evaluate(*golden_args(case), *change(tmp_path)) == 2
    captured = capsys.readouterr()
    assert said in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err and "usage:" not in captured.err
    assert captured.out == ""


def test_a_model_is_required(
    run_evaluate: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    assert run_evaluate() == 2
    assert "--model_path" in capsys.readouterr().err.splitlines()[-1]


def test_a_result_takes_no_ones_place(
    tiny: Path, run_evaluate: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    model, other = tiny / "model.pth.tar", tiny / "x"
    model.write_bytes(b"precious")
    for more in (
        ["--json", model],
        ["--json", tiny / "model.pth.json"],  # where the options of other forms are
        ["--save_scores", model],
        ["--json", other, "--save_scores", other],
    ):
        assert run_evaluate("--model_path", model, *more) == 2
        assert "is an input or another output" in capsys.readouterr().err
    assert model.read_bytes() == b"precious"


@pytest.mark.parametrize("option", ["data_path", "bert_path", "json", "save_scores"])
def test_an_empty_option_is_a_slip(
    run_evaluate: Callable[..., int], capsys: pytest.CaptureFixture, option: str
) -> None:
    assert run_evaluate("--model_path", "x", f"--{option}", "") == 2
    assert f"--{option}: invalid text value: ''" in capsys.readouterr().err


@pytest.mark.parametrize("case", CASES[:1], indirect=True)
def test_each_output_is_tried(
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
    assert json.loads((tmp_path / "s.json").read_text())["metrics"]["rsum"] > 0
    assert not (tmp_path / "s.npy").exists()


@pytest.mark.parametrize("case", CASES[:1], indirect=True)
def test_no_model_is_run_where_another_cannot_be(
    case: Case,
    tmp_path: Path,
    run_evaluate: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Encoding a split may take an hour; the second model's fault is known before it."""
    content = published()
    del content["model"][2]["bn.weight"]
    torch.save(content, tmp_path / "second.pth.tar")
    monkeypatch.setattr(evaluate_models, "encode_split", pytest.fail)
    both = ["--model_path", case.model_path, tmp_path / "second.pth.tar"]
    assert run_evaluate(*golden_args(case), *both) == 2
    assert "second.pth.tar: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("case", CASES[:1], indirect=True)
@pytest.mark.parametrize("target", [">/dev/full", ">&-", "| true"])
def test_a_standard_output_that_takes_nothing_is_one_line(
    case: Case, tmp_path: Path, target: str
) -> None:
    command = [sys.executable, ROOT / "evaluate_models.py", *golden_args(case)]
    words = shlex.join(map(str, [*command, "--json", tmp_path / "s.json"]))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words} {target}"], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "error: standard output: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert json.loads((tmp_path / "s.json").read_text())["metrics"]


def test_a_result_does_not_take_the_place_of_its_data_or_a_models_neighbour(
    tiny: Path, run_train: Callable[..., int], run_evaluate, capsys: pytest.CaptureFixture
) -> None:
    assert run_train(*tiny_train(tiny, "--max_steps", "1")) == 0
    model = tiny / "runs/i2t/model_best.pth.tar"
    data = tiny / "data/tiny/test_ims.npy"
    before = data.read_bytes()
    beside = model.rename(tiny / "m.json.partial")
    words, ids = tiny / "bert/vocab.txt", tiny / "data/tiny/test_ids.txt"
    vocabulary = words.read_bytes()
    for more in (
        ["--json", tiny / "m.json"],
        ["--save_scores", data],
        ["--json", data],
        ["--json", ids],
        ["--json", tiny / "data/tiny/id_mapping.json"],
        ["--json", words],
    ):
        assert run_evaluate("--model_path", beside, *more) == 2
        assert "is an input or another output" in capsys.readouterr().err
    assert beside.exists() and data.read_bytes() == before and not ids.exists()
    assert words.read_bytes() == vocabulary


@pytest.mark.parametrize("name", ["a" * 252, "a" * 300 + "/b", "loop/b"])
@pytest.mark.parametrize("case", CASES[:1], indirect=True)
def test_an_output_that_cannot_be_written_is_found_before_the_work(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setattr(evaluate_models, "read_checkpoint", None)
    with pytest.raises(InputError, match="--save_scores"):
        evaluate(case.model_path, save_scores=tmp_path / name)
