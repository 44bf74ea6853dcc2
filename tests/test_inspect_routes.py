"""scripts/inspect_routes.py: tables that fit the model, drawings that are there, refusals."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_here, tiny_train
from PIL import Image
from test_train import last_line

from checkpoint import bert_of, build_model, read_checkpoint
from data import Split
from scoring import encode_split
from scripts import inspect_routes
from scripts.inspect_routes import entropies, most_different
from scripts.route_figures import _heat


@pytest.fixture(params=["i2t", "t2i"])
def model(request: pytest.FixtureRequest, tiny: Path, run_train: Callable[..., int]) -> Path:
    assert run_train(*tiny_train(tiny, "--max_steps", "2", direction=request.param)) == 0
    return tiny / "runs" / request.param / "model_best.pth.tar"


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pictures(tiny: Path, images: int, regions: int) -> Path:
    """Pictures of a split, named by its ids, and the boxes of their regions."""
    data, folder = tiny / "data/tiny", tiny / "pictures"
    folder.mkdir()
    names = {str(100 + i): f"{i}.png" for i in range(images)}
    for i, name in enumerate(names.values()):
        Image.new("RGB", (40, 30), (9 * i, 0, 0)).save(folder / name)
    (data / "id_mapping.json").write_text(json.dumps(names))
    (data / "test_ids.txt").write_text("\n".join(names) + "\n")
    boxes = np.tile(np.array([0, 0, 20, 15], np.float32), (images, regions, 1))
    np.save(data / "test_boxes.npy", boxes)
    return folder


def test_tables_and_drawings(
    model: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = read_checkpoint(model)
    bert = bert_of(checkpoint, None)
    split = Split.open(tiny / "data/tiny", "test", checkpoint.config.img_dim)
    folder, out = pictures(tiny, split.images, split.regions_per_image), tiny / "routes"
    argv = ["--model_path", model, "--out", out, "--images", folder, "--pair", "2", "11"]
    assert run_here(monkeypatch, inspect_routes.main, [*argv, "--clusters", "3"]) == 0
    assert f"{5 * split.images} pairs of" in capsys.readouterr().out
    tables = {"gates.csv", "entropy.csv", "routes.csv"}
    drawn = {"space.png", "different.png", "clusters.png", "pair.png", "words.png"}
    assert {path.name for path in out.iterdir()} == tables | drawn
    for name in drawn:
        assert np.asarray(Image.open(out / name).convert("L")).std() > 5, name  # no blank sheet

    # the path vectors are those of the pairs, whatever else is scored with them
    space = build_model(checkpoint, bert)
    words = checkpoint.config.max_words
    encoded = encode_split(space, split, bert.vocabulary, words, device=torch.device("cpu"))
    with torch.no_grad():
        captions = encoded.captions[torch.as_tensor(encoded.text)]
        _, paths = space.score(encoded.images, captions)
    if checkpoint.config.direction == "t2i":
        paths = paths.transpose(0, 1)
    own = paths[torch.arange(5 * split.images) // 5, torch.arange(5 * split.images)]
    routes = table(out / "routes.csv")
    found = np.array([list(row.values())[6:] for row in routes], dtype=float)
    np.testing.assert_allclose(found, own.numpy(), atol=1e-6)
    assert {row["cluster"] for row in routes} == {"0", "1", "2"}
    assert routes[11]["text"] == split.captions[11] and routes[11]["image"] == "2"
    gates = table(out / "gates.csv")
    assert len(gates) == own.shape[1] == 36
    np.testing.assert_allclose([float(r["mean gate"]) for r in gates], own.mean(0), atol=1e-6)
    closed = (own == 0).float().mean(0)
    np.testing.assert_allclose([float(r["share closed"]) for r in gates], closed, atol=1e-6)
    assert [r["path"] for r in gates[:8]] == ["RIC"] * 4 + ["GLGC"] * 4
    assert gates[-1]["path"] == "score" and gates[-1]["cell"] == "CMRC"


def test_entropy_is_zero_for_one_cell_and_two_bits_for_four() -> None:
    gates = torch.tensor([[[0, 0.7, 0, 0], [0.3] * 4, [0.0] * 4, [0.5, 0, 0.5, 0]]])
    torch.testing.assert_close(entropies(gates), torch.tensor([[0.0, 2, 0, 1]]))


def test_the_most_different_pairs_are_far_apart() -> None:
    paths = torch.tensor([[0.0, 0], [0.1, 0], [9, 0], [0, 8], [9.1, 0]])
    assert set(most_different(paths, 3)) == {4, 3, 0} or set(most_different(paths, 3)) == {4, 3, 1}
    assert len(most_different(paths, 10)) == 5


def test_a_words_heat_is_the_largest_of_its_boxes() -> None:
    boxes = np.array([[0, 0, 2, 2], [1, 1, 3, 3]])
    heat = _heat(np.array([0.2, 0.7]), boxes, (3, 4))
    expected = [[0.2, 0.2, 0, 0], [0.2, 0.7, 0.7, 0], [0, 0.7, 0.7, 0]]
    np.testing.assert_allclose(heat, expected, rtol=1e-6)


def test_attention_of_a_pair_sums_to_one(
    model: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}

    def kept(weights: np.ndarray, words: list[str], boxes: np.ndarray, picture: np.ndarray):
        found.update(weights=weights, words=words)
        return inspect_routes.__dict__  # never saved

    from scripts import route_figures

    monkeypatch.setattr(route_figures, "attention_figure", kept)
    monkeypatch.setattr(route_figures, "save", lambda figure, path: None)
    folder = pictures(tiny, 10, 7)
    argv = ["--model_path", model, "--out", tiny / "out", "--images", folder, "--pair", "0", "3"]
    assert run_here(monkeypatch, inspect_routes.main, argv) == 0
    weights, words = found["weights"], found["words"]
    assert weights.shape == (len(words), 7) and words and words[0] not in ("[CLS]", "[PAD]")
    assert (weights >= 0).all()
    if "t2i" in str(model):
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    else:  # over all words, [CLS] and [SEP] included, which are left out
        assert (weights.sum(0) < 1).all()


FAULTS = {
    "pair": (["--pair", "2", "999"], "--pair 2 999: "),
    "one number": (["--pair", "2"], "--pair: expected an image and a caption"),
    "clusters": (["--clusters", "9"], "--clusters 9: expected 1 to 8"),
    "few": (["--count", "1"], "--clusters 5: 5 pairs are too few"),
    "no ids": (["--images", "."], "test_ids.txt: not found"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_done_is_one_line(
    fault: str,
    tiny: Path,
    run_train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert run_train(*tiny_train(tiny, "--max_steps", "1")) == 0
    more, said = FAULTS[fault]
    argv = ["--model_path", tiny / "runs/i2t/model_best.pth.tar", "--out", tiny / "out", *more]
    assert run_here(monkeypatch, inspect_routes.main, argv) == 2
    assert said in last_line(capsys)


def test_a_missing_package_is_named_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(inspect_routes.importlib.util, "find_spec", lambda name: None)
    argv = ["--model_path", "nowhere", "--out", tmp_path / "out"]
    assert run_here(monkeypatch, inspect_routes.main, argv) == 2
    assert "pip install scikit-learn" in last_line(capsys)
    assert not (tmp_path / "out").exists()
