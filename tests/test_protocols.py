"""evaluate_models.py on saved matrices: ensembles, protocols, intervals, ranks, MSCOCO."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, run_here, run_program, tiny_train
from test_train import last_line

import evaluate_models
from common.errors import InputError
from common.files import write_array
from evaluate_models import evaluate
from evaluation import image_of_caption, ranks, retrieval


def saved(folder: Path, name: str, images: int = 10, seed: int = 0) -> Path:
    scores = np.random.default_rng(seed).random((images, 5 * images), dtype=np.float32)
    write_array(folder / name, scores)
    return folder / name


def captions(folder: Path, count: int) -> str:
    """Make the folder a data set of that many captions, and no features; its name."""
    (folder / "test_caps.txt").write_text("a\n" * count)
    return folder.name


def test_an_ensemble_of_files_is_that_of_models(
    tiny: Path, tmp_path: Path, run_train: Callable[..., int]
) -> None:
    """Two models and their saved scores, through the program."""
    models, files = [], []
    for way in ("i2t", "t2i"):
        assert run_train(*tiny_train(tiny, "--max_steps", "1", direction=way)) == 0
        models.append(tiny / "runs" / way / "model_best.pth.tar")
        files.append(tmp_path / f"{way}.npy")
        evaluate(models[-1], save_scores=files[-1], workers=0)
    both = run_program("evaluate_models.py", "--model_path", *models)
    done = run_program("evaluate_models.py", "--scores", *files, "--json", tmp_path / "r.json")
    assert done.returncode == both.returncode == 0, done.stderr + both.stderr
    assert done.stdout == both.stdout
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["scores"] == [str(path) for path in files]
    unknown = ("models", "data_name", "split", "seconds", "closed", "shortlist", "extended")
    assert all(result[name] is None for name in unknown)


def test_both_protocols_are_two_evaluations(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = saved(tmp_path, "a.npy")
    both = evaluate(scores=[path], protocols=["1k5", "5k"])
    whole, five = evaluate(scores=[path]), evaluate(scores=[path], fold5=True)
    assert both["protocols"] == whole["protocols"] | five["protocols"]
    assert both["metrics"] == five["metrics"] and both["folds"] == five["folds"] != []
    evaluate_models.main(["--scores", str(path), "--protocols", "1k5", "5k"])
    text = capsys.readouterr().out
    evaluate_models.main(["--scores", str(path), "--fold5"])
    evaluate_models.main(["--scores", str(path)])
    first, second = capsys.readouterr().out.split("Mean of 5 folds\n")[1].split("rsum")[1:]
    assert text.endswith(f"Mean of 5 folds\nrsum{first}All images\nrsum{second}")


def test_what_python_may_give(tmp_path: Path) -> None:
    """One path in place of a list; words that are no choice are told by their option."""
    path = saved(tmp_path, "a.npy")
    assert evaluate(scores=str(path)) == evaluate(scores=[path])
    for protocols in ("1k5", ["1k"]):
        with pytest.raises(InputError, match=r"--protocols .*: expected one of 1k5, 5k"):
            evaluate(scores=path, protocols=protocols)
    with pytest.raises(InputError, match="--split train: expected one of dev, test, testall"):
        evaluate("model.pth.tar", split="train")
    with pytest.raises(InputError, match="--precision fp16: expected one of fp32, bf16"):
        evaluate("model.pth.tar", precision="fp16")


def test_ranks_of_every_query_are_written(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.npy")
    evaluate(scores=[path], protocols=["5k", "1k5"], ranks=str(tmp_path / "r.npz"))
    of_images, of_captions = ranks(np.load(path), image_of_caption(50))
    with np.load(tmp_path / "r.npz") as found:
        assert set(found) == {"5k.i2t", "5k.t2i", "1k5.i2t", "1k5.t2i"}
        assert np.array_equal(found["5k.i2t"], of_images)
        assert np.array_equal(found["5k.t2i"], of_captions)
        block = retrieval(np.load(path)[2:4, 10:20], image_of_caption(10))
        assert 100 * np.mean(found["1k5.t2i"][10:20] < 1) == pytest.approx(block.t2i.r1)
        assert 1 + np.mean(found["1k5.i2t"][2:4]) == pytest.approx(block.i2t.meanr)
        several = {name: np.array(found[name]) for name in found}
    for protocol in ("5k", "1k5"):
        evaluate(scores=[path], protocols=[protocol], ranks=str(tmp_path / "r.npz"))
        with np.load(tmp_path / "r.npz") as found:
            assert set(found) == {"i2t", "t2i"}
            for way in found:
                assert np.array_equal(found[way], several[f"{protocol}.{way}"])


def test_protocols_of_other_images_than_mscocos_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(tmp_path, "a.npy")
    evaluate(scores=[path])
    assert "MSCOCO" not in caplog.text
    for asked in ({"fold5": True}, {"protocols": ["5k"]}):
        caplog.clear()
        evaluate(scores=[path], **asked)
        assert "10 images: the protocols 1k5 and 5k are MSCOCO's, of 5000 images" in caplog.text


def test_intervals_hold_their_figures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = saved(tmp_path, "a.npy", 40)
    result = evaluate(scores=[path], bootstrap=200)
    for side in ("i2t", "t2i"):
        for name, (low, high) in result["intervals"][side].items():
            assert low <= result["metrics"][side][name] <= high
    low, high = result["intervals"]["rsum"]
    assert low < result["metrics"]["rsum"] < high
    evaluate_models.main(["--scores", str(path), "--bootstrap", "200"])
    assert f"95 % interval of rsum: {low:.1f}-{high:.1f}" in capsys.readouterr().out


FAULTS: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "nothing": (lambda t: [], "no --model_path and no --scores: expected one"),
    "both": (lambda t: ["--scores", "a", "--model_path", "b"], "--model_path and --scores exclude"),
    "twice": (
        lambda t: ["--scores", saved(t, "a.npy"), "--fold5", "--protocols", "5k"],
        "--fold5 and --protocols exclude each other",
    ),
    "one file twice": (
        lambda t: ["--scores", saved(t, "a.npy"), t / "." / "a.npy"],
        "a.npy: is the same file as ",
    ),
    "beyond": (
        lambda t: ["--scores", *(array(t, np.full((1, 5), 3e38, "f"), k) for k in "ab")],
        "b.npy: their sum is beyond float32; expected smaller scores",
    ),
    "protocol": (lambda t: ["--scores", "a", "--protocols", "1k"], "invalid choice: '1k'"),
    "samples": (lambda t: ["--scores", "a", "--bootstrap", "-1"], "--bootstrap -1"),
    "shortlist": (
        lambda t: ["--scores", saved(t, "a.npy"), "--shortlist", "3"],
        "--shortlist goes with --model_path",
    ),
    "no file": (lambda t: ["--scores", t / "no.npy"], "no.npy: not found"),
    "shapes": (
        lambda t: ["--scores", saved(t, "a.npy"), saved(t, "b.npy", 5)],
        "b.npy: scores of shape (5, 25)",
    ),
    "flat": (
        lambda t: ["--scores", array(t, np.zeros(5, np.float32))],
        "shape (5,); expected floats",
    ),
    "wide": (lambda t: ["--scores", array(t, np.zeros((2, 9), np.float32))], "shape (2, 9)"),
    "empty": (lambda t: ["--scores", array(t, np.zeros((0, 0), np.float32))], "shape (0, 0)"),
    "whole": (lambda t: ["--scores", array(t, np.zeros((1, 5), int))], "int64, shape (1, 5)"),
    "no number": (
        lambda t: ["--scores", array(t, np.full((1, 5), np.nan, np.float32))],
        "array.npy: the scores hold NaN",
    ),
    "foreign": (lambda t: ["--scores", array(t, np.zeros((1, 5), ">f4"))], ">f4, shape (1, 5)"),
    "long": (lambda t: ["--scores", array(t, np.zeros((1, 5), "g"))], ", shape (1, 5); expected"),
    "few samples": (lambda t: ["--scores", saved(t, "a.npy"), "--bootstrap", "1"], "100 or more"),
    **{
        f"no {option}": (
            lambda t, option=option: ["--scores", saved(t, "a.npy"), *option.split()],
            f"{option.split()[0].replace('no-', '')} goes with --model_path",
        )
        for option in ("--device cpu", "--workers 1", "--no-skip")
    },
    "folds": (lambda t: ["--scores", saved(t, "a.npy", 4), "--fold5"], "a.npy: 4 images"),
    "other data": (
        lambda t: [
            *(
                "--scores",
                saved(t, "a.npy"),
                "--data_path",
                t.parent,
                "--data_name",
                captions(t, 45),
            ),
            *("--split", "test"),
        ],
        "a.npy: scores of 10 images; ",
    ),
    "half of the data": (
        lambda t: ["--scores", saved(t, "a.npy"), "--data_path", t, "--split", "test"],
        "--data_path, --data_name and --split together",
    ),
    "no such data": (
        lambda t: [
            *("--scores", saved(t, "a.npy"), "--data_path", t, "--data_name", "none"),
            *("--split", "test"),
        ],
        "none/test_caps.txt: not found",
    ),
    "over itself": (
        lambda t: ["--scores", saved(t, "a.npy"), "--save_scores", t / "a.npy"],
        "another output",
    ),
    "over ids": (
        lambda t: [
            *("--scores", saved(t, "a.npy"), "--data_path", t, "--data_name", "d"),
            *("--split", "testall", "--json", t / "d/testall_ids.txt"),
        ],
        "another output",
    ),
    "same": (
        lambda t: ["--scores", saved(t, "a.npy"), "--ranks", t / "r", "--json", t / "r"],
        "another output",
    ),
}


def array(folder: Path, values: np.ndarray, name: str = "array") -> Path:
    np.save(folder / f"{name}.npy", values)
    return folder / f"{name}.npy"


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_matrices_are_one_line(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    make, said = FAULTS[fault]
    argv = make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert run_here(monkeypatch, evaluate_models.main, argv) == 2
    assert said in last_line(capsys)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_split_that_selected_the_model_is_told(
    tiny: Path, run_train: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    assert run_train(*tiny_train(tiny, "--max_steps", "1")) == 0
    model = tiny / "runs/i2t/model_best.pth.tar"
    evaluate(model, split="test", workers=0)
    assert "too good" not in caplog.text
    evaluate(model, split="dev", workers=0)
    assert "model_best.pth.tar: the model was selected on this split" in caplog.text


def test_it_is_told_by_the_data_and_for_certain_or_by_the_name(
    tiny: Path, run_train: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    """The same pictures may be stored in another way, which nobody can tell."""
    assert run_train(*tiny_train(tiny, "--max_steps", "1")) == 0
    model, data = tiny / "runs/i2t/model_best.pth.tar", tiny / "data/tiny"
    for kind in ("ims.npy", "caps.txt"):  # each split under the other's name
        (data / f"dev_{kind}").rename(tiny / kind)
        (data / f"test_{kind}").rename(data / f"dev_{kind}")
        (tiny / kind).rename(data / f"test_{kind}")
    evaluate(model, split="dev", workers=0)
    assert "if the model was selected on this dev split, its" in caplog.text
    caplog.clear()
    evaluate(model, split="test", workers=0)
    assert "was selected on this split, so its figures are too good" in caplog.text
    published = GOLDEN / "i2t/checkpoint.pth.tar"
    for kind in ("ims.npy", "caps.txt"):
        shutil.copy(GOLDEN / f"i2t/data/f30k_precomp/test_{kind}", data / f"dev_{kind}")
    where = {"data_path": tiny / "data", "data_name": "tiny", "bert_path": GOLDEN / "i2t/bert"}
    caplog.clear()
    evaluate(published, split="dev", workers=0, **where)
    assert "if the model was selected on this dev split, its" in caplog.text
    caplog.clear()
    features = np.load(data / "test_ims.npy").astype(np.float16)
    np.save(data / "dev_ims.npy", features)
    shutil.copy(data / "test_caps.txt", data / "dev_caps.txt")
    evaluate(model, split="dev", workers=0)
    assert "if the model was selected on this dev split" in caplog.text


def test_saved_scores_of_a_dev_split_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody knows which model they are of."""
    paths = [saved(tmp_path, name) for name in ("a.npy", "b.npy")]
    for split in (None, "test"):
        evaluate(scores=paths, split=split)
    assert "too good" not in caplog.text
    evaluate(scores=paths, split="dev")
    for path in paths:
        assert f"{path}: if the model was selected on this dev split, its" in caplog.text


def test_doubles_stay_doubles(tmp_path: Path) -> None:
    """Scores that float32 cannot tell apart, of one file, and of a mean of files."""
    values = 1 + np.random.default_rng(0).random((50, 250)) * 1e-9
    paths = [array(tmp_path, values, name) for name in "ab"]
    one, two = (evaluate(scores=paths[:count])["metrics"] for count in (1, 2))
    assert one == two and one["rsum"] > 0
