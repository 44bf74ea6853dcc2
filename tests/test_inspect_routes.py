"""scripts/inspect_routes.py: tables held to plain loops, weights to the model's own, drawings."""

import csv
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from conftest import GOLDEN, Case, run_here
from matplotlib.axes import Axes
from PIL import Image
from test_model import small_model
from test_train import last_line
from torch import Tensor

from cells import CrossModalRefinement
from data import Split
from evaluation import encode_split
from scripts import inspect_routes
from scripts.inspect_routes import Options
from scripts.parts import route_figures
from scripts.parts.regions import grid_boxes
from scripts.parts.route_figures import Space, heat_map
from scripts.parts.routes import (
    Clusters,
    Pairs,
    clustered,
    entropies,
    most_different,
    passed_on,
)

CELLS = ["RIC", "GLGC", "IMRC", "CMRC"]
IMAGES = 12  # of the golden test splits


@pytest.fixture(scope="module", params=["i2t", "t2i"])
def pairs(request: pytest.FixtureRequest) -> Pairs:
    return golden(request.param)


@cache
def golden(name: str) -> Pairs:
    """The matching pairs of a golden case, some of whose gates and paths are closed."""
    case = Case(GOLDEN / name)
    model, bert, _ = case.load()
    cpu = torch.device("cpu")
    encoded = encode_split(model, case.split(), bert.vocabulary, device=cpu)
    return Pairs(model, case.split(), bert.vocabulary, encoded)


def given(direction: str, out: Path, *more: object, data: Path | None = None) -> list[object]:
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
    """A data set with pictures, 40 x 30, in a folder beside it, without boxes."""
    folder, names = tmp_path / "data/own", {str(100 + i): f"{i}.png" for i in range(IMAGES)}
    folder.mkdir(parents=True)
    for file in (GOLDEN / "t2i/data/f30k_precomp").glob("test_*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "id_mapping.json").write_text(json.dumps(names))
    (folder / "test_ids.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "pictures").mkdir()
    for i, name in enumerate(names.values()):
        Image.new("RGB", (40, 30), (9 * i, 0, 0)).save(tmp_path / "pictures" / name)
    return folder


def test_all_that_is_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    boxes = np.tile(np.array([0, 0, 20, 15], np.float32), (IMAGES, 36, 1))
    np.save(data / "test_boxes.npy", boxes)
    out, more = tmp_path / "routes", ["--images", tmp_path / "pictures", "--pair", 2, 11]
    monkeypatch.setattr(inspect_routes, "EXAMPLES", 2)
    argv = given("t2i", out, *more, "--clusters", 3, "--count", 4, data=data)
    assert run_here(monkeypatch, inspect_routes.main, argv) == 0
    assert "20 pairs of" in capsys.readouterr().out
    tables = {"gates.csv", "entropy.csv", "routes.csv"}
    sizes = {"space": 1100, "different": 1600, "clusters": 800, "pair_2_11": 1600, "words_2_11": 1}
    assert {path.name for path in out.iterdir()} == tables | {f"{name}.png" for name in sizes}
    for name, width in sizes.items():
        with Image.open(out / f"{name}.png") as picture:
            assert picture.width > width and picture.height > 300
            assert np.asarray(picture.convert("L")).std() > 5, name  # no blank sheet
    head, *rows = table(out / "routes.csv")
    assert head[-3:] == ["cluster", "x", "y"] and {row[-3] for row in rows} == {"0", "1", "2"}
    assert len(rows) == 20 and rows[11][:2] == ["2", "11"]
    argv = given("t2i", out, "--pair", 2, 11, "--clusters", 0, "--count", 1, data=data)
    assert run_here(monkeypatch, inspect_routes.main, argv) == 0
    stale = {"clusters.png", "words_2_11.png"}  # which this run has not drawn
    assert {path.name for path in out.iterdir()} == tables | {f"{n}.png" for n in sizes} - stale


def test_path_vectors_are_those_of_the_equations(pairs: Pairs) -> None:
    model, (images, captions) = pairs.model, (pairs.encoded.images, pairs.encoded.captions)
    found = pairs.paths(3)
    assert found.shape == (15, 36)
    for k in (0, 7, 14):
        text = pairs.encoded.text[k]
        real = int(captions.mask[text].sum())
        ways = (images, k // 5, captions, text, real), (captions, text, images, k // 5, 36)
        query, q, context, c, seen = ways[model.direction == "t2i"]
        vectors = query.tokens[q], context.tokens[c, :seen], context.pooled[c]
        _, expected = oracle.route(model.space, *vectors, model.config)
        torch.testing.assert_close(found[k], expected.detach(), atol=1e-4, rtol=1e-4)


def test_tables_are_those_of_plain_loops(pairs: Pairs, tmp_path: Path) -> None:
    paths = pairs.paths(IMAGES)
    numbers = np.arange(len(paths)) % 2
    places = np.stack([numbers, -numbers], 1) / 3
    inspect_routes.write_tables(pairs, paths, Clusters(places, numbers, ""), tmp_path)
    means, bits, skipped = [], [], 0
    for layer, names in ((1, CELLS), (2, CELLS), (3, ["score"])):
        for o, path in enumerate(names):
            first = 16 * (layer - 1) + 4 * o  # of a vector's numbers
            shares = [vector[first : first + 4].tolist() for vector in paths]
            all_closed = sum(not any(gates) for gates in shares) / len(shares)
            every, passed = [0.0], []  # so that a sum is there
            for gates in shares:
                if layer < 3:  # a dead path carries the first cell's input
                    passed.append([float(sum(gates) < 0.9), 0, 0, 0])
                else:
                    passed.append([float(gate < 1e-4 / 4) for gate in gates])
                weights = [g + p for g, p in zip(gates, passed[-1], strict=True)]
                parts = [weight / sum(weights) for weight in weights if weight > 0]
                every += [-part * math.log2(part) for part in parts]
            bits.append([layer, path, sum(every) / len(shares), all_closed])
            for n, cell in enumerate(CELLS):
                gates = [vector[first + n].item() for vector in paths]
                closed = sum(gate == 0 for gate in gates) / len(gates)
                on = sum(pair[n] for pair in passed) / len(gates)
                means.append([layer, path, cell, sum(gates) / len(gates), closed, on])
                skipped += on > 0
    assert any(0 < row[-2] < 1 for row in means) and any(row[-1] > 0 for row in bits)
    assert skipped > 2
    for name, names, expected in (("gates", 3, means), ("entropy", 2, bits)):
        head, *rows = table(tmp_path / f"{name}.csv")
        assert len(head) == len(expected[0]) and len(rows) == len(expected)
        for row, wanted in zip(rows, expected, strict=True):
            assert row[:names] == [str(x) for x in wanted[:names]]
            assert [float(x) for x in row[names:]] == pytest.approx(wanted[names:], abs=2e-6)
    head, *rows = table(tmp_path / "routes.csv")
    assert head[3:7] == ["1 RIC>RIC", "1 GLGC>RIC", "1 IMRC>RIC", "1 CMRC>RIC"]
    assert head[-4:] == ["3 CMRC>score", "cluster", "x", "y"]
    assert [row[:3] for row in rows[4:6]] == [
        ["0", "4", pairs.split.captions[4]],
        ["1", "5", pairs.split.captions[5]],
    ]
    found = np.array([row[3:] for row in rows], dtype=float)
    wanted = np.hstack([paths.numpy(), numbers[:, None], places])
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_words_have_the_weights_that_the_model_gives_them(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first that the model itself computes, when it scores the pair, are the first layer's."""
    pairs.model.space.skip_nothing()
    kept: list[Tensor] = []
    computed = CrossModalRefinement.attention

    def noted(cell: CrossModalRefinement, *given: Tensor) -> Tensor:
        kept.append(computed(cell, *given))
        return kept[-1]

    monkeypatch.setattr(CrossModalRefinement, "attention", noted)
    pairs.of(2, [11])
    weights, i2t = kept[0][0, 0], pairs.model.direction == "i2t"
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
    words = pairs.words(11)
    said = "".join(words).replace("##", "")
    assert said == pairs.split.captions[11].lower().replace(" ", "")
    found = pairs.attention(2, 11)
    assert found.shape == (len(words), 36) and len(kept) == 4  # a cell a layer, and this
    expected = (weights.T if i2t else weights)[1 : len(words) + 1]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_entropy_is_zero_for_one_cell_and_two_bits_for_four() -> None:
    gates = torch.tensor([[[0, 0.7, 0, 0], [0.3] * 4, [0.0] * 4, [0.5, 0, 0.5, 0]]])
    torch.testing.assert_close(entropies(gates), torch.tensor([[0.0, 2, 0, 1]]))


def test_what_goes_on_where_gates_are_closed() -> None:
    """By hand: two cells, a dense layer and the last one, three pairs."""
    dense = torch.tensor([[[0.5, 0.5], [0.0, 0.0]], [[1.0, 0.0], [0.2, 0.8]], [[0.0, 0.0]] * 2])
    last = torch.tensor([[[0.3, 0.0]], [[0.0, 0.0]], [[0.00004, 0.6]]])
    found = passed_on([dense, last], hard=False)
    assert found[0].tolist() == [[[0, 0], [1, 0]], [[0, 0], [0, 0]], [[1, 0], [1, 0]]]
    assert found[1].tolist() == [[[0, 1]], [[1, 1]], [[1, 0]]]
    _, of_chosen = passed_on([dense, last], hard=True)
    assert of_chosen.tolist() == [[[0, 0]], [[1, 0]], [[0, 0]]]


def drawn_lines(axes: Axes) -> set[tuple[float, ...]]:
    """Lines between layers: ends, gate by their width, and whether they are dashed."""
    found = set()
    for line in axes.lines:
        (x1, x2), (y1, y2) = line.get_data()
        if x1 >= 0 and line.get_color() != route_figures.GREY:
            gate = (line.get_linewidth() - 0.4) / 5
            dashed = line.get_linestyle() != "-"
            found.add((x1, x2, round(y1, 2), round(y2, 2), round(gate, 4), dashed))
    return found


def test_a_route_is_drawn_as_its_gates_are() -> None:
    """Of two cells, RIC above CMRC, by hand."""
    space = Space(("ric", "cmrc"), "regions")
    gates = [np.array([[0.75, 0.25], [0.0, 0.0]]), np.array([[0.0, 0.6]])]
    skips = [np.array([[0, 0], [1, 0]]), np.array([[1, 0]])]
    axes = route_figures.Figure().subplots()
    route_figures.draw_space(axes, gates, skips, space)
    high, low, middle = 1.0, 0.0, 0.5
    assert drawn_lines(axes) == {
        (0, 1, high, high, 0.75, False),  # RIC to RIC
        (0, 1, low, high, 0.25, False),  # CMRC to RIC
        (0, 1, high - 0.1, low - 0.1, 1, True),  # RIC's input to CMRC, whose path is dead
        (1, 2, high - 0.1, middle - 0.1, 1, True),  # RIC's input to the score
        (1, 2, low, middle, 0.6, False),
    }
    names = [text.get_text() for text in axes.texts]
    assert names == ["RIC", "CMRC", "layer 1", "RIC", "CMRC", "layer 2", "regions", "score"]


def test_drawings_show_what_the_tables_hold(pairs: Pairs, tmp_path: Path, drawn: dict) -> None:
    paths = pairs.paths(IMAGES)
    options = Options(model_path="m", out=str(tmp_path))
    drawings = inspect_routes.Drawings(pairs, paths, [], options)
    drawings.mean_gates()
    drawings.different()
    inspect_routes.write_tables(pairs, paths, None, tmp_path)
    rows = table(tmp_path / "gates.csv")[1:]
    upper, *panels, _ = drawn["space.png"].axes
    shown = [text.get_text() for axes in panels for text in axes.texts]
    assert shown == [f"{float(row[3]):.2f}\n{100 * float(row[4]):.0f} %" for row in rows]
    by_hand = set()
    for layer, path, cell, mean, _, passed in rows:
        start, x = 3 - CELLS.index(cell), int(layer) - 1
        end = 1.5 if path == "score" else 3 - CELLS.index(path)
        for gate, below in ((float(mean), 0), (float(passed), 0.1)):
            if gate >= 0.02:
                by_hand.add((x, x + 1, start - below, end - below, round(gate, 4), below > 0))
    found = drawn_lines(upper)
    assert len(found) == len(by_hand) > 25
    for line, wanted in zip(sorted(found), sorted(by_hand), strict=True):
        assert line == pytest.approx(wanted, abs=2e-4)
    chosen = most_different(paths, 4)
    means = paths.mean(0)
    changes = [axes.images[0].get_array() for axes in drawn["different.png"].axes if axes.images]
    for k, change in zip(chosen, changes, strict=True):
        expected = (paths[k] - means).numpy()
        for layer in (0, 1):
            part = expected[16 * layer : 16 * layer + 16].reshape(4, 4)
            np.testing.assert_allclose(change[:, 4 * layer : 4 * layer + 4], part, atol=1e-6)
        np.testing.assert_allclose(change[:, 8:], np.tile(expected[32:], (4, 1)), atol=1e-6)


def test_a_pairs_route_and_words_are_drawn_as_they_are(pairs: Pairs, drawn: dict) -> None:
    paths, picture = pairs.paths(IMAGES), Image.new("RGB", (12, 10), "blue")
    seen = route_figures.Seen(picture, grid_boxes(12, 10))
    drawings = inspect_routes.Drawings(pairs, paths, [], Options(model_path="m", out="o"))
    drawings.pair(2, 11, seen)
    change = (pairs.of(2, [11])[0] - paths.mean(0)).numpy()
    (found,) = (axes.images[0].get_array() for axes in drawn["pair_2_11.png"].axes if axes.images)
    for layer in (0, 1):
        part = change[16 * layer : 16 * layer + 16].reshape(4, 4)
        np.testing.assert_allclose(found[:, 4 * layer : 4 * layer + 4], part, atol=1e-6)
    words, weights = pairs.words(11), 100 * pairs.attention(2, 11)
    _, *panels, bar = drawn["words_2_11.png"].axes
    unit = "a region's" if pairs.model.direction == "i2t" else "this word's"
    assert f"share of {unit} attention that is on" in bar.get_ylabel()
    for axes, word, row in zip(panels, words, weights, strict=False):
        heat = heat_map(row, seen.boxes, (10, 12))
        assert axes.get_title() == word
        np.testing.assert_allclose(axes.images[1].get_array(), heat, rtol=1e-6)


def test_clusters_are_drawn_as_they_are(drawn: dict) -> None:
    pairs = golden("i2t")
    paths = pairs.paths(IMAGES)
    numbers = np.arange(len(paths)) % 4 // 2  # as many of both
    numbers[0] = 1
    places = np.random.default_rng(0).random((len(paths), 2))
    found = Clusters(places, numbers, "about")
    inspect_routes.Drawings(pairs, paths, [], Options(model_path="m", out="o")).clusters(found)
    axes = drawn["clusters.png"].axes[0]
    for number, (points, middle) in enumerate(
        zip(axes.collections, found.middle(paths), strict=True)
    ):
        np.testing.assert_allclose(points.get_offsets(), places[numbers == number])
        said = f"{(numbers == number).sum()} pairs: {pairs.split.captions[middle]}"
        assert points.get_label() == said


def test_a_change_has_its_sign_in_print() -> None:
    axes = route_figures.Figure().subplots()
    change = np.array([[0.5, -0.5], [0.01, 0.2]])
    route_figures._draw_change(axes, change, 0.5, 1, Space(("ric", "cmrc"), "regions"))
    signs = {text.get_position(): text.get_text() for text in axes.texts}
    assert {(0, 0): "+", (1, 0): "−", (1, 1): "+"}.items() <= signs.items()
    assert (0, 1) not in signs


def test_the_most_different_pairs_are_far_apart_and_none_alike() -> None:
    paths = torch.tensor([[0.0, 0], [0.1, 0], [9, 0], [0, 6], [9.1, 0]])
    assert most_different(paths, 3) == [3, 4, 1]
    assert sorted(most_different(paths, 9)) == [0, 1, 2, 3, 4]
    assert len(most_different(paths[[0, 2, 0, 2, 0]], 4)) == 2


def test_clusters_are_groups_of_routes(caplog: pytest.LogCaptureFixture) -> None:
    centres = torch.tensor([[0.0, 0, 0], [5, 0, 0], [0, 5, 0]])
    paths = centres.repeat_interleave(15, 0) + 0.1 * torch.randn(45, 3)
    paths[1] = paths[0]
    found = clustered(paths, 3)
    assert [len(set(found.numbers[k : k + 15])) for k in (0, 15, 30)] == [1, 1, 1]
    assert len(set(found.numbers)) == 3 and found.places.shape == (45, 2)
    assert (found.places[1] == found.places[0]).all()
    for middle in found.middle(paths):
        own = paths[found.numbers == found.numbers[middle]]
        assert (paths[middle] - own.mean(0)).norm() < 0.2
    assert clustered(paths[:2].repeat(30, 1), 3) is None
    one = torch.linspace(0, 1, 20)[:, None]  # of a single cell in a single layer
    assert clustered(one, 2).places.shape == (20, 2)
    assert "there are only 1 different path vectors" in caplog.text


def test_a_words_heat_is_the_largest_of_its_boxes() -> None:
    boxes = np.array([[-1, 0, 2, 2], [1, 1, 3, 3]])
    heat = heat_map(np.array([0.2, 0.7]), boxes, (3, 4))
    none = np.nan
    expected = [[0.2, 0.2, none, none], [0.2, 0.7, 0.7, none], [none, 0.7, 0.7, none]]
    np.testing.assert_allclose(heat, expected, rtol=1e-6)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, route_figures.Figure]:
    """The figures that are made, by name; they are not written."""
    found = {}
    monkeypatch.setattr(
        inspect_routes, "write_figure", lambda figure, path: found.update({path.name: figure})
    )
    return found


def texts(figure: route_figures.Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))]


ABLATIONS = {
    "hard": {"routing": "hard"},
    "uniform": {"routing": "uniform"},
    "one layer": {"num_layer_routing": 1},
    "two cells": {"cells": "RIC,IMRC"},
    "one cell": {"cells": "CMRC"},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablated_models_are_drawn_as_far_as_they_go(
    name: str, tmp_path: Path, drawn: dict, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    case = golden("t2i")
    sizes = {"img_dim": case.split.img_dim, "max_words": 10}
    model, vocabulary = small_model("i2t", **sizes | ABLATIONS[name]), case.vocabulary
    model.text.bert.resize_token_embeddings(len(vocabulary.entries), mean_resizing=False)
    split, cpu = Split.open(data, "test", None), torch.device("cpu")
    encoded = encode_split(model, split, vocabulary, device=cpu)
    pairs, files = Pairs(model, split, vocabulary, encoded), [tmp_path / "pictures/0.png"] * IMAGES
    options = Options(model_path="m", out=str(tmp_path), grid=True, pair=[0, 3])
    paths = pairs.paths(IMAGES)
    drawings = inspect_routes.Drawings(pairs, paths, files, options)
    drawings.mean_gates()
    drawings.different()
    drawings.pair(0, 3, inspect_routes.seen_pair(pairs, files, options))
    inspect_routes.write_tables(pairs, paths, None, tmp_path)
    layers, cells = model.config.num_layer_routing, len(model.config.cell_names)
    said = texts(drawn["space.png"])
    assert f"layer {layers}" in said and f"layer {layers + 1}" not in said
    gates = table(tmp_path / "gates.csv")[1:]
    if name in ("hard", "uniform"):  # of the last layer one cell counts, or all of them
        last = [float(row[3]) + float(row[5]) for row in gates if row[1] == "score"]
        assert 0.1 < sum(last) <= 1 + 1e-5 if name == "hard" else last == [1] * cells
    assert len(gates) == (layers - 1) * cells**2 + cells
    assert [row[1] == "score" for row in gates] == [row[0] == str(layers) for row in gates]
    assert ("words_0_3.png" in drawn) == (name != "two cells")
    assert ("which needs a model with CMRC" in caplog.text) == (name == "two cells")
    routes = sum("caption" in text for text in texts(drawn["different.png"]))
    assert routes == (1 if name == "uniform" else 4)


def test_boxes_are_those_of_the_shrunken_picture(data: Path, tmp_path: Path) -> None:
    case = golden("t2i")
    pairs = Pairs(case.model, Split.open(data, "test", None), case.vocabulary, case.encoded)
    Image.new("RGB", (1280, 640)).save(tmp_path / "large.png")
    options = Options(model_path="m", out="o", grid=True, pair=[0, 0])
    seen = inspect_routes.seen_pair(pairs, [tmp_path / "large.png"], options)
    assert seen.picture.size == (320, 160)
    np.testing.assert_allclose(seen.boxes, grid_boxes(320, 160), rtol=1e-6)


def test_without_clusters_no_package_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, drawn: dict
) -> None:
    find = inspect_routes.importlib.util.find_spec
    monkeypatch.setattr(
        inspect_routes.importlib.util,
        "find_spec",
        lambda name, *more: None if name == "sklearn" else find(name, *more),
    )
    argv = given("i2t", tmp_path / "out", "--count", 1)
    assert run_here(monkeypatch, inspect_routes.main, argv) == 2
    assert "a package is missing: pip install scikit-learn (or --clusters 0)" in last_line(capsys)
    assert not (tmp_path / "out").exists()
    assert run_here(monkeypatch, inspect_routes.main, [*argv, "--clusters", 0]) == 0
    assert table(tmp_path / "out/routes.csv")[0][-1] == "3 CMRC>score"
    assert drawn.keys() == {"space.png", "different.png"}


def narrow_boxes(data: Path) -> None:
    np.save(data / "test_boxes.npy", np.zeros((IMAGES, 36, 3), np.float32))


def no_boxes(data: Path) -> None:
    boxes = np.zeros((IMAGES, 36, 4), np.float32)
    boxes[2, 5] = np.nan
    np.save(data / "test_boxes.npy", boxes)


def seven_regions(data: Path) -> None:
    features = np.load(data / "test_ims.npy")
    np.save(data / "test_ims.npy", features[:, :7])


def no_picture(data: Path) -> None:
    (data.parent.parent / "pictures/2.png").unlink()


FAULTS: dict[str, tuple[list[object], str, Callable[[Path], None] | None]] = {
    "pair": (["--pair", 2, 999], "--pair 2 999: ", None),
    "one number": (["--pair", 2], "--pair: expected an image and a caption", None),
    "grid alone": (["--grid"], "--grid goes with --pair", None),
    "clusters": (["--clusters", 9], "--clusters 9: expected 0 to 8", None),
    "count": (["--count", 0], "--count 0: expected 1 or more", None),
    "boxes": (["--pair", 2, 11], "shape (12, 36, 3); expected (12, 36, 4)", narrow_boxes),
    "no box": (["--pair", 2, 11], "test_boxes.npy: row 2 holds NaN; expected pixels", no_boxes),
    "picture": (["--pair", 2, 11], "2.png: not found; expected a picture", no_picture),
    "grid": (["--pair", 2, 11, "--grid"], "test_ims.npy has 7 regions an image", seven_regions),
    "ids": ([], "test_ids.txt: not found", lambda data: (data / "test_ids.txt").unlink()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_done_is_one_line(
    fault: str,
    data: Path,
    tmp_path: Path,
    drawn: dict,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    more, said, spoil = FAULTS[fault]
    if spoil:
        spoil(data)
    more = ["--images", tmp_path / "pictures", "--count", 1, *more]
    argv = given("t2i", tmp_path / "out", *more, data=data)
    assert run_here(monkeypatch, inspect_routes.main, argv) == 2
    assert said in last_line(capsys)


@pytest.mark.parametrize("name", ["space", "different", "clusters", "pair_2_11", "words_2_11"])
def test_no_picture_is_written_over(
    name: str,
    data: Path,
    tmp_path: Path,
    drawn: dict,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Nor deleted as a drawing of an earlier run."""
    folder = tmp_path / "pictures"
    (folder / "2.png").rename(folder / f"{name}.png")
    mapping = (data / "id_mapping.json").read_text().replace('"2.png"', f'"{name}.png"')
    (data / "id_mapping.json").write_text(mapping)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    more = ["--images", folder, "--pair", 2, 11, "--count", 1, "--clusters", 0]
    argv = given("t2i", folder, *more, data=data)
    assert run_here(monkeypatch, inspect_routes.main, argv) == 2
    assert f"{name}.png: is an input or another output" in last_line(capsys)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    argv = given("t2i", tmp_path / "file")
    assert run_here(monkeypatch, inspect_routes.main, argv) == 2
    assert "file: File exists; expected a folder to write to" in last_line(capsys)
    (tmp_path / "out/space.png").mkdir(parents=True)
    argv = given("t2i", tmp_path / "out", "--clusters", 0)
    assert run_here(monkeypatch, inspect_routes.main, argv) == 2
    assert "space.png: Is a directory; expected a file to write" in last_line(capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["space.png"]
