"""scripts/inspect_routes.py: tables against plain loops, weights against the model's, drawings."""

import csv
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from conftest import GOLDEN, Case, Run, run_here, tiny_train
from matplotlib.axes import Axes
from PIL import Image
from test_model import small_model
from torch import Tensor

from cells import CrossModalRefinement
from data import Split
from evaluation import Encoded, encode_split
from model import DIME
from scripts import inspect_routes
from scripts.parts import route_figures
from scripts.parts.regions import grid_boxes
from scripts.parts.route_figures import heat_map
from scripts.parts.routes import Pairs, cluster, write_tables
from vocab import Vocabulary

CELLS = ["RIC", "GLGC", "IMRC", "CMRC"]
IMAGES = 12  # of the golden test splits
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["i2t", "t2i"])
def pairs(request: pytest.FixtureRequest) -> Pairs:
    return golden(request.param)


@cache
def golden(name: str) -> Pairs:
    """The matching pairs of a golden case; some of its gates and paths are closed."""
    case = Case(GOLDEN / name)
    model, bert, _ = case.load()
    encoded = encode_split(model, case.split(), bert.vocabulary, device=CPU)
    return pairs_of(model, case.split(), bert.vocabulary, encoded)


def pairs_of(model: DIME, split: Split, vocabulary: Vocabulary, encoded: Encoded) -> Pairs:
    """All pairs of a split."""
    return Pairs(model, split.captions, split.groups.image_of_caption, vocabulary, encoded)


def command(direction: str, out: Path, *more: object, data: Path | None = None) -> list[object]:
    """A command line for a golden case."""
    case = Case(GOLDEN / direction)
    folder = data or case.data_path / "f30k_precomp"
    where = ["--data_path", folder.parent, "--data_name", folder.name]
    model = ["--model_path", case.model_path, "--bert_path", case.bert_path]
    return [*model, *where, "--out", out, *more]


def table(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set with boxes and images of 40 x 30 in a folder beside it."""
    folder, names = tmp_path / "data/own", {str(100 + i): f"{i}.png" for i in range(IMAGES)}
    folder.mkdir(parents=True)
    for file in (GOLDEN / "t2i/data/f30k_precomp").glob("test_*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "id_mapping.json").write_text(json.dumps(names))
    (folder / "test_ids.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "images").mkdir()
    for i, name in enumerate(names.values()):
        Image.new("RGB", (40, 30), (9 * i, 0, 0)).save(tmp_path / "images" / name)
    np.save(folder / "test_boxes.npy", np.tile(grid_boxes(40, 30), (IMAGES, 1, 1)))
    return folder


def test_the_program_writes_tables_and_drawings_to_a_new_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out, more = tmp_path / "routes", ["--images", tmp_path / "images", "--pair", 2, 11]
    argv = command("t2i", out, *more, "--clusters", 3, "--count", 4, data=data)
    assert run_here(monkeypatch, inspect_routes.main, argv) == 0
    drawings = {"space", "clusters", "pair_2_11", "words_2_11"}
    names = {f"{name}.png" for name in drawings} | {"gates.csv", "routes.csv"}
    assert {path.name for path in out.iterdir()} == names
    for name in drawings:
        with Image.open(out / f"{name}.png") as image:
            assert image.width > 700 and image.height > 300
            assert np.asarray(image.convert("L")).std() > 5, name  # not blank
    head, *rows = table(out / "routes.csv")
    assert head[-3:] == ["cluster", "x", "y"] and {row[-3] for row in rows} == {"0", "1", "2"}
    assert len(rows) == 20 and rows[11][:2] == ["2", "11"]
    assert run_here(monkeypatch, inspect_routes.main, argv) == 2  # nothing is written over
    assert f"--out {out}" in capsys.readouterr().err


def test_routes_follow_the_equations(pairs: Pairs) -> None:
    model, (images, captions) = pairs.model, (pairs.encoded.images, pairs.encoded.captions)
    gates = pairs.routes(3)
    assert gates.shape == (15, 9, 4)
    for k in (0, 7, 14):
        text = pairs.encoded.text[k]
        real = int(captions.mask[text].sum())
        ways = (images, k // 5, captions, text, real), (captions, text, images, k // 5, 36)
        query, q, context, c, seen = ways[model.direction == "t2i"]
        vectors = query.tokens[q], context.tokens[c, :seen], context.pooled[c]
        _, expected = oracle.route(model.space, *vectors, model.config)
        np.testing.assert_allclose(gates[k].ravel(), expected.detach(), atol=1e-4, rtol=1e-4)


def test_tables_equal_plain_loops(pairs: Pairs, tmp_path: Path) -> None:
    gates = pairs.routes(IMAGES)
    labels = np.arange(len(gates)) % 2
    points = np.stack([labels, -labels], 1) / 3
    write_tables(pairs, gates, (points, labels), tmp_path)
    means = []
    ends = [(layer, cell) for layer in (1, 2) for cell in CELLS] + [(3, "score")]
    for p, (layer, end) in enumerate(ends):
        for n, cell in enumerate(CELLS):
            bypass = []
            for path in gates[:, p].tolist():  # a dead path carries the first cell's input
                is_dead = n == 0 and sum(path) < 0.9
                bypass.append(path[n] < 1e-4 / 4 if end == "score" else is_dead)
            own = gates[:, p, n]
            means.append([layer, end, cell, own.mean(), (own == 0).mean(), np.mean(bypass)])
    assert any(0 < row[-2] < 1 for row in means) and sum(row[-1] > 0 for row in means) > 2
    _, *rows = table(tmp_path / "gates.csv")
    for row, wanted in zip(rows, means, strict=True):
        assert row[:3] == [str(x) for x in wanted[:3]]
        assert [float(x) for x in row[3:]] == pytest.approx(wanted[3:], abs=2e-6)
    head, *rows = table(tmp_path / "routes.csv")
    assert head[3:7] == ["1 RIC>RIC", "1 GLGC>RIC", "1 IMRC>RIC", "1 CMRC>RIC"]
    assert head[-4:] == ["3 CMRC>score", "cluster", "x", "y"]
    assert rows[5][:3] == ["1", "5", pairs.captions[5]]
    numbers = np.array([row[3:] for row in rows], dtype=float)
    expected = np.hstack([gates.reshape(len(gates), -1), labels[:, None], points])
    np.testing.assert_allclose(numbers, expected, atol=1e-6)


def test_attention_is_that_of_the_first_layer(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first weights that the model itself computes when it scores the pair."""
    kept: list[Tensor] = []
    attention = CrossModalRefinement.attention

    def keep(cell: CrossModalRefinement, *arguments: Tensor) -> Tensor:
        kept.append(attention(cell, *arguments))
        return kept[-1]

    monkeypatch.setattr(CrossModalRefinement, "attention", keep)
    pairs.route(2, [11])
    weights, i2t = kept[0][0, 0], pairs.model.direction == "i2t"
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
    words = pairs.words(11)
    assert "".join(words).replace("##", "") == pairs.captions[11].lower().replace(" ", "")
    shown = pairs.attention(2, 11)
    assert shown.shape == (len(words), 36) and len(kept) == 4  # one a layer, and this one
    expected = (weights.T if i2t else weights)[1 : len(words) + 1]
    np.testing.assert_allclose(shown, expected, rtol=1e-5)


def test_bypasses_of_closed_gates() -> None:
    """By hand: two cells, a dense layer and the last one, three pairs."""
    first = [[[0.5, 0.5], [0, 0]], [[1, 0], [0.2, 0.8]], [[0, 0], [0, 0]]]
    last = [[0.3, 0], [0, 0], [0.00004, 0.6]]
    gates = np.concatenate([first, np.array(last)[:, None]], 1)
    soft, hard = (Pairs(small_model("i2t", routing=way), *[None] * 4) for way in ("soft", "hard"))
    weights = soft.bypasses(gates)
    assert weights[:, :2].tolist() == [[[0, 0], [1, 0]], [[0, 0], [0, 0]], [[1, 0], [1, 0]]]
    assert weights[:, 2].tolist() == [[0, 1], [1, 1], [1, 0]]
    assert hard.bypasses(gates)[:, 2].tolist() == [[0, 0], [1, 0], [0, 0]]


def lines_of(axes: Axes) -> list[tuple[float, ...]]:
    """Lines between layers: ends, gate by their width, and whether they are dashed."""
    lines = []
    for line in axes.lines:
        (x1, x2), (y1, y2) = line.get_data()
        if x1 >= 0 and line.get_color() != route_figures.GREY:
            gate = (line.get_linewidth() - 0.4) / 5
            lines.append((x1, x2, y1, y2, gate, line.get_linestyle() != "-"))
    return sorted(lines)


def texts_of(panels: list[Axes]) -> list[str]:
    """The texts on the gates, in the order of the path vector."""
    return [text.get_text() for axes in panels for text in axes.texts]


def test_the_space_shows_the_numbers_of_the_tables(pairs: Pairs, tmp_path: Path) -> None:
    gates = pairs.routes(IMAGES)
    write_tables(pairs, gates, None, tmp_path)
    rows = table(tmp_path / "gates.csv")[1:]
    upper, *panels, _ = route_figures.draw_space(pairs, gates, "title").axes
    shown = texts_of(panels)
    assert shown == [f"{float(row[3]):.2f}\n{100 * float(row[4]):.0f} %" for row in rows]
    expected = []
    for layer, path, cell, mean, _, bypass in rows:
        start, x = 3 - CELLS.index(cell), int(layer) - 1
        end = 1.5 if path == "score" else 3 - CELLS.index(path)
        for gate, below in ((float(mean), 0), (float(bypass), 0.1)):
            if gate >= 0.02:
                expected.append((x, x + 1, start - below, end - below, gate, below > 0))
    lines = lines_of(upper)
    assert len(lines) == len(expected) > 25
    for line, wanted in zip(lines, sorted(expected), strict=True):
        assert line == pytest.approx(wanted, abs=2e-4)


def test_drawings_of_a_pair_show_its_route_and_attention(pairs: Pairs, tmp_path: Path) -> None:
    file = tmp_path / "2.png"  # larger than its thumbnail
    Image.new("RGB", (960, 800), "blue").save(file)
    gates, route = pairs.routes(IMAGES), pairs.route(2, [11])[0]
    figure = route_figures.draw_route(pairs, gates, (2, 11), file, "title")
    _, _, *panels, _ = figure.axes  # the image, the space, and a panel a layer
    changes = np.concatenate([axes.images[0].get_array() for axes in panels])
    np.testing.assert_allclose(changes, route - gates.mean(0), atol=1e-6)
    assert texts_of(panels) == [f"{change:+.2f}" for change in changes.ravel()]
    boxes = grid_boxes(960, 800)
    _, *panels, _ = route_figures.draw_words(pairs, (2, 11), file, boxes, "title").axes
    weights = 100 * pairs.attention(2, 11)
    for axes, word, row in zip(panels, pairs.words(11), weights, strict=False):
        assert axes.get_title() == word
        heat = heat_map(row, boxes / 3, (267, 320))
        np.testing.assert_allclose(axes.images[1].get_array(), heat, rtol=1e-6)


def test_clusters_show_their_points_and_the_pair_in_their_middle() -> None:
    pairs = golden("i2t")
    gates = np.zeros((9, 9, 4))
    gates[:, 0, 0] = [0, 1, 5, 0, 1, 3, 9, 9, 9]  # the means of the first two clusters: 1.4 and 7.5
    labels, points = np.arange(9) // 5, np.random.default_rng(0).random((9, 2))
    axes = route_figures.draw_clusters(pairs, gates, points, labels, "title").axes[0]
    for label, (count, middle) in enumerate([(5, 1), (4, 6)]):
        shown = axes.collections[label]
        np.testing.assert_allclose(shown.get_offsets(), points[labels == label])
        assert shown.get_label() == f"{count} pairs: {pairs.captions[middle]}"


def test_clusters_are_groups_of_routes(caplog: pytest.LogCaptureFixture) -> None:
    centres = np.array([[0.0, 0, 0], [5, 0, 0], [0, 5, 0]])
    gates = centres.repeat(15, 0) + 0.1 * np.random.default_rng(0).normal(size=(45, 3))
    gates[1] = gates[0]
    points, labels = cluster(gates, 3)
    assert [len(set(labels[k : k + 15])) for k in (0, 15, 30)] == [1, 1, 1]
    assert len(set(labels)) == 3 and points.shape == (45, 2)
    assert (points[1] == points[0]).all()
    points, _ = cluster(np.linspace(0, 1, 20)[:, None], 2)
    assert points.shape == (20, 2)  # K = 1
    assert cluster(gates[:2].repeat(30, 0), 3) is None
    assert "only 1 different path vectors" in caplog.text


def test_heat_is_the_largest_weight_of_the_boxes_over_a_pixel() -> None:
    boxes = np.array([[-1, 0, 2, 2], [1, 1, 3, 3]])
    heat = heat_map(np.array([0.2, 0.7]), boxes, (3, 4))
    none = np.nan
    expected = [[0.2, 0.2, none, none], [0.2, 0.7, 0.7, none], [none, 0.7, 0.7, none]]
    np.testing.assert_allclose(heat, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "ablation", [{"routing": "hard"}, {"num_layer_routing": 1}, {"cells": "RIC,IMRC"}]
)
def test_ablated_models_are_drawn(ablation: dict[str, object], tmp_path: Path, data: Path) -> None:
    case = golden("t2i")
    split = Split.open(data, "test", None)
    model = small_model("i2t", img_dim=split.img_dim, max_words=10, **ablation)
    model.text.bert.resize_token_embeddings(len(case.vocabulary.entries), mean_resizing=False)
    encoded = encode_split(model, split, case.vocabulary, device=CPU)
    pairs = pairs_of(model, split, case.vocabulary, encoded)
    gates = pairs.routes(2)
    file, boxes = tmp_path / "images/0.png", inspect_routes.map_boxes(split, "test")
    figures = inspect_routes.draw_pair(pairs, gates, (0, 3), file, boxes)
    assert ("words_0_3" in figures) == ("CMRC" in pairs.cells)
    layers, cells = model.config.num_layer_routing, len(model.config.cell_names)
    space = route_figures.draw_space(pairs, gates, "title")
    assert len(space.axes) == layers + 2  # the space, the layers, the scale
    write_tables(pairs, gates, None, tmp_path)
    rows = table(tmp_path / "gates.csv")[1:]
    assert len(rows) == (layers - 1) * cells**2 + cells
    assert [row[1] == "score" for row in rows] == [row[0] == str(layers) for row in rows]


def test_a_model_without_a_routing_space_is_refused(
    tiny: Path, run_train: Run, monkeypatch, capsys
) -> None:
    argv = tiny_train(tiny, "--num_layer_routing", "0", "--max_steps", "1")
    assert run_train(*argv) == 0
    argv = ["--model_path", tiny / "runs/i2t/model_best.pth.tar", "--out", tiny / "out"]
    assert run_here(monkeypatch, inspect_routes.main, argv) == 2
    assert "--num_layer_routing 0" in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    assert cluster(np.eye(20), 2) is None
    assert "scikit-learn" in caplog.text


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--pair", 2, 999], "--pair 2 999"),
        (["--clusters", 9], "--clusters 9"),
        (["--pair", 2, 11], "test_boxes.npy: shape (12, 36, 3)"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    more: list[object], expected: str, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    np.save(data / "test_boxes.npy", np.zeros((IMAGES, 36, 3)))
    more = ["--images", tmp_path / "images", "--count", 1, *more]
    argv = command("t2i", tmp_path / "out", *more, data=data)
    assert run_here(monkeypatch, inspect_routes.main, argv) == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
