"""evaluate_models.py on saved matrices: ensembles, protocols, intervals, ranks, MSCOCO."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, run_here, run_program, tiny_train, write_split
from test_train import last_line

import evaluate_models
from common.errors import InputError
from common.files import write_array
from evaluate_models import evaluate
from evaluation import image_of_caption, ranks, retrieval
from scripts.parts import mscoco


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


@pytest.fixture(scope="module")
def package():
    """MSCOCO's answers, cut down to the first 80 images of the test split."""
    found = mscoco.eccv_metrics()
    found.coco_ids = found.coco_ids[:400]
    captions = {int(c) for c in found.coco_ids}
    images = {found.coco_gts["t2i"][c][0] for c in captions}
    for name in ("coco_gts", "cxc_gts", "eccv_gts"):
        gts = getattr(found, name)
        cut = {}
        for way, queries, items in (("i2t", images, captions), ("t2i", captions, images)):
            kept = {q: [i for i in right if i in items] for q, right in gts[way].items()}
            cut[way] = {q: right for q, right in kept.items() if q in queries and right}
        setattr(found, name, cut)
    return found


def folder_of(package, path: Path, order: np.ndarray, mapped: bool) -> Path:
    """A data folder with the ids of the images in some order."""
    images = [package.coco_gts["t2i"][int(c)][0] for c in package.coco_ids[::5]]
    ids = [images[k] for k in order]
    if mapped:
        files = {str(n): f"val2014/COCO_val2014_{i:012d}.jpg" for n, i in enumerate(ids)}
        (path / "id_mapping.json").write_text(json.dumps(files))
        ids = list(range(len(ids)))
    (path / "testall_ids.txt").write_text("".join(f"{i}\n" for i in ids))
    return path


@pytest.mark.parametrize("mapped", [False, True])
def test_figures_of_eccv_caption(package, mapped: bool, tmp_path: Path) -> None:
    """Against plain loops over the package's answers."""
    order = np.random.default_rng(1).permutation(80)
    scores = np.random.default_rng(0).random((80, 400), dtype=np.float32)
    scores[np.arange(400) // 5, np.arange(400)] += 0.5  # somewhat right
    captions = mscoco.caption_ids(
        package, folder_of(package, tmp_path, order, mapped), "testall", 80
    )
    assert np.array_equal(captions, package.coco_ids.reshape(80, 5)[order])
    found = mscoco.extended(package, scores, captions)
    names = {"eccv_r1", "eccv_map_at_r", "eccv_rprecision", "cxc_r1", "cxc_r5", "cxc_r10"}
    assert found.keys() == names
    flat, image_ids = captions.ravel(), [package.coco_gts["t2i"][int(c[0])][0] for c in captions]
    for way, matrix, queries, items in (
        ("i2t", scores, image_ids, flat.tolist()),
        ("t2i", scores.T, flat.tolist(), image_ids),
    ):
        expected: dict[str, list[float]] = {name: [] for name in names}
        for row, query in zip(matrix, queries, strict=True):
            ranked = [items[k] for k in np.argsort(-row)]
            right = package.cxc_gts[way].get(query)
            for k in (1, 5, 10) if right else ():
                expected[f"cxc_r{k}"].append(float(bool(set(ranked[:k]) & set(right))))
            right = package.eccv_gts[way].get(query)
            if right:
                marks = [item in right for item in ranked[: len(set(right))]]
                precisions = [sum(marks[: r + 1]) / (r + 1) for r in range(len(marks))]
                expected["eccv_r1"].append(marks[0])
                expected["eccv_rprecision"].append(precisions[-1])
                expected["eccv_map_at_r"].append(np.dot(marks, precisions) / len(marks))
        for name, values in expected.items():
            assert len(values) > 10
            assert found[name][way] == pytest.approx(100 * np.mean(values)), (name, way)


def test_ids_of_other_images_are_told(package, tmp_path: Path) -> None:
    folder = folder_of(package, tmp_path, np.arange(79), False)
    told = r"79 ids, 0 of them not .* \(\); expected those of its 80 test images, each once"
    with pytest.raises(InputError, match=rf"testall_ids.txt: {told}"):
        mscoco.caption_ids(package, folder, "testall", 79)
    with pytest.raises(InputError, match=r"test_ids.txt: not found"):
        mscoco.caption_ids(package, folder, "test", 79)


def test_ids_of_captions_are_five_of_an_image_each(package, tmp_path: Path) -> None:
    """Ids that are there five times in a row; others would be figures of other queries."""
    path = folder_of(package, tmp_path, np.arange(80), False) / "testall_ids.txt"
    ids = path.read_text().split()
    path.write_text("".join(f"{key}\n" for key in ids for _ in range(5)))
    found = mscoco.caption_ids(package, tmp_path, "testall", 80)
    assert np.array_equal(found, package.coco_ids.reshape(80, 5))
    zeros = [f"0{ids[1]}"]  # the same number, written otherwise
    for wrong in (ids * 5, ids[:1] * 80, ids[:-1] + zeros, [*ids[:-1], "9" * 5000]):
        path.write_text("".join(f"{key}\n" for key in wrong))
        with pytest.raises(InputError, match=r"testall_ids\.txt: "):
            mscoco.caption_ids(package, tmp_path, "testall", 80)


def test_longest_list_of_right_answers() -> None:
    """So many best answers are looked at as any query has right ones."""
    gts = mscoco.eccv_metrics().eccv_gts
    assert max(len(right) for way in gts.values() for right in way.values()) <= mscoco.LIST


def test_extended_figures_where_they_can_be_had(
    package,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(evaluate_models, "eccv_metrics", lambda: package)
    path = saved(tmp_path, "a.npy", 80)
    assert evaluate(scores=[path], extended=True)["extended"] is None
    assert "no ECCV Caption and CxC figures: --data_path" in caplog.text
    (tmp_path / "coco").mkdir()
    folder_of(package, tmp_path / "coco", np.arange(80), False)
    (tmp_path / "coco/testall_caps.txt").write_text("a man\n" * 400)
    where = ["--data_path", str(tmp_path), "--data_name", "coco", "--split", "testall"]
    evaluate_models.main(["--scores", str(path), "--extended", *where])
    assert "\neccv_map_at_r: i2t " in capsys.readouterr().out


def test_extended_figures_of_a_model(
    package, tiny: Path, run_train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as those of its scores, by the ids of its split."""
    monkeypatch.setattr(evaluate_models, "eccv_metrics", lambda: package)
    assert run_train(*tiny_train(tiny, "--max_steps", "1")) == 0
    write_split(tiny / "data/tiny", "testall", 80)
    order = np.random.default_rng(0).permutation(80)
    folder_of(package, tiny / "data/tiny", order, False)
    model, scores = tiny / "runs/i2t/model_best.pth.tar", tiny / "scores.npy"
    found = evaluate(model, extended=True, save_scores=scores)["extended"]
    captions = package.coco_ids.reshape(80, 5)[order]
    assert found == mscoco.extended(package, np.load(scores), captions)
    assert found["cxc_r10"]["i2t"] > 0


def test_a_missing_package_is_named_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "eccv_caption"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "eccv_caption.py").write_text("import what_it_needs")
    with pytest.raises(InputError, match=r"pip install eccv_caption \(No module named 'what_it"):
        evaluate(scores=["nowhere.npy"], extended=True)
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    with pytest.raises(InputError, match="pip install eccv_caption"):
        evaluate(scores=["nowhere.npy"], extended=True)
