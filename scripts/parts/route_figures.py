"""route_figures.py — drawings of the routing space, of a pair's route, and of where words attend.

Gates are `[P, N]`: of the N cells that each of P paths comes from (see routes.py).
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from common.config import CELLS
from scripts.parts.figures import COLOURS, new_figure, thumbnail
from scripts.parts.images import read_image
from scripts.parts.routes import Pairs

FAINTEST = 0.02  # smaller gates are not drawn
LEGEND_GATES = (0.1, 0.25, 0.5, 1.0)
DASHES, BELOW = (2, 1), 0.1  # of a bypass: in line widths, and how far below the gate's line
MARKERS = "os^Dv<>P"  # tell clusters of the same colour apart
ENTRY = -0.8  # x of the query; layer l is at x = l
GREY = "#555555"
COLUMNS = 5  # of words
# Attention darkens a paled image, also in print.
VEIL = LinearSegmentedColormap.from_list("veil", ["#08306b00", "#08306bb3"])
PALE = 0.5
QUERIES = {"i2t": "regions", "t2i": "words"}
UNITS = {
    "i2t": "share of a region's attention that is on this word, %",
    "t2i": "share of this word's attention that is on a region, %",
}


def draw_space(pairs: Pairs, gates: np.ndarray, title: str) -> Figure:
    """Return the routing space with the mean of gates `[pairs, P, N]`.

    Below it stand the means as numbers, with the shares of pairs for which a gate is closed.
    """
    means, closed = gates.mean(0), 100 * (gates == 0).mean(0)
    figure = _routing(pairs, f"mean gates: {title}", gates)
    texts = np.char.mod("%.2f\n", means) + np.char.mod("%.0f %%", closed)
    label = "mean gate; below it the\nshare of pairs it is closed for"
    _draw_gates(pairs, figure, means, texts, label, cmap="Blues", vmin=0, vmax=1)
    return figure


def draw_route(
    pairs: Pairs, gates: np.ndarray, pair: Sequence[int], file: Path | None, title: str
) -> Figure:
    """Return the route of a pair, below it by how much it differs from the mean of the gates."""
    image, caption = pair
    route = pairs.route(image, [caption])
    changes = route[0] - gates.mean(0)
    figure = _routing(pairs, title, route, file)
    limit = max(0.01, np.abs(changes).max())  # smaller differences are not worth a colour
    texts, label = np.char.mod("%+.2f", changes), "gate minus the mean gate"
    _draw_gates(pairs, figure, changes, texts, label, cmap="PuOr", vmin=-limit, vmax=limit)
    return figure


def _routing(pairs: Pairs, title: str, gates: np.ndarray, file: Path | None = None) -> Figure:
    """Return the routing space with the mean of gates `[pairs, P, N]`, in the upper half.

    An image stands to the left of it.
    """
    layers = pairs.model.config.num_layer_routing
    figure = new_figure(2.4 * layers + 2, 6.5)
    figure.suptitle(textwrap.fill(title, 30 * layers + 30), fontsize=10)
    halves: Any = figure.subfigures(2, 1, height_ratios=[3, 2])
    if file:
        left, axes = halves[0].subplots(1, 2, width_ratios=[1, layers])
        left.imshow(thumbnail(file))
        left.axis("off")
    else:
        axes = halves[0].subplots()
    _draw_lines(pairs, axes, gates.mean(0), pairs.bypasses(gates).mean(0))
    lines = [Line2D([], [], label=f"gate {g:g}", **_line(g, GREY)) for g in LEGEND_GATES]
    lines.append(Line2D([], [], label="input goes on", **_line(0.5, GREY, DASHES)))
    title = "A dashed line is the input of a closed cell, which goes on unchanged or rectified"
    _legend_below(figure, title, "center", handles=lines, ncols=len(lines))
    return figure


def _draw_lines(pairs: Pairs, axes: Axes, gates: np.ndarray, bypasses: np.ndarray) -> None:
    """Draw a column of cells a layer; lines are as wide as gates, dashed ones bypass cells."""
    cells, last = pairs.cells, pairs.model.config.num_layer_routing
    colours = [COLOURS[CELLS.index(cell.lower())] for cell in cells]
    heights = np.arange(len(cells))[::-1].astype(float)  # the first cell is on top
    middle = heights.mean()
    height_of = dict(zip(cells, heights, strict=True)) | {"score": middle}
    for height in heights:
        axes.plot([ENTRY, 0], [middle, height], color=GREY, lw=0.6, zorder=0)
    for values, dashes, below in ((gates, (), 0.0), (bypasses, DASHES, BELOW)):
        for p, n in np.argwhere(values >= FAINTEST):
            layer, end = pairs.path_ends[p]
            ends = [heights[n] - below, height_of[end] - below]
            axes.plot([layer - 1, layer], ends, **_line(values[p, n], colours[n], dashes))
    for layer in range(last):
        for height, name, colour in zip(heights, cells, colours, strict=True):
            _node(axes, layer, height, name, colour)
        axes.text(layer, len(cells) - 0.35, f"layer {layer + 1}", ha="center", fontsize=8)
    _node(axes, ENTRY, middle, QUERIES[pairs.model.direction], GREY)
    _node(axes, last, middle, "score", GREY)
    axes.set(xlim=(-1.1, last + 0.3), ylim=(-0.5, len(cells) - 0.1))
    axes.axis("off")


def _draw_gates(
    pairs: Pairs, figure: Figure, values: np.ndarray, texts: np.ndarray, label: str, **scale: Any
) -> None:
    """Draw a value and a text for each gate, `[P, N]`, in the figure's lower half."""
    below: Any = figure.subfigs[1]
    panels = below.subplots(1, pairs.model.config.num_layer_routing, squeeze=False)[0]
    for layer, axes in enumerate(panels, 1):
        paths = [p for p, (start, _) in enumerate(pairs.path_ends) if start == layer]
        shade = axes.imshow(values[paths], aspect="auto", **scale)
        ends = [f"to {pairs.path_ends[p][1]}" for p in paths]
        axes.set_xticks(range(len(pairs.cells)), pairs.cells, fontsize=7)
        axes.set_yticks(range(len(paths)), ends, fontsize=7)
        axes.set_title(f"layer {layer}", fontsize=8)
        for (o, n), text in np.ndenumerate(texts[paths]):
            is_dark = abs(values[paths][o, n]) > 0.6 * scale["vmax"]
            style = {"fontsize": 6.5, "color": "white" if is_dark else "black"}
            axes.text(n, o, text, ha="center", va="center", **style)
    _bar(below, shade, panels, label)


def draw_clusters(
    pairs: Pairs, gates: np.ndarray, points: np.ndarray, labels: np.ndarray, title: str
) -> Figure:
    """Return the path vectors in a plane, by cluster, each with the pair closest to its mean."""
    names = np.unique(labels)
    figure = new_figure(7, 6 + 0.25 * len(names))
    axes = figure.subplots()
    for number in names:
        members = np.flatnonzero(labels == number)
        vectors = gates[members].reshape(len(members), -1)
        central = members[np.linalg.norm(vectors - vectors.mean(0), axis=1).argmin()]
        example = textwrap.shorten(pairs.captions[central], 85)
        label = f"{len(members)} pairs: {example}"
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number]
        style: dict[str, Any] = {"s": 22, "alpha": 0.8, "linewidths": 0}
        axes.scatter(*points[members].T, color=colour, marker=marker, label=label, **style)
    axes.set(xlabel="t-SNE, first axis (no unit)", ylabel="t-SNE, second axis (no unit)")
    axes.set_title(textwrap.fill(f"path vectors: {title}", 90), fontsize=9)
    _legend_below(figure, "spectral clusters, each with a pair from its middle", "left")
    return figure


def draw_words(
    pairs: Pairs, pair: Sequence[int], file: Path, boxes: np.ndarray, title: str
) -> Figure:
    """Return where each word attends; boxes `[regions, 4]` are in the image's pixels."""
    words, percent = pairs.words(pair[1]), 100 * pairs.attention(*pair)
    picture = thumbnail(file)
    boxes = boxes * np.tile(np.array(picture.size) / read_image(file).size, 2)
    columns = min(COLUMNS, len(words) + 1)
    rows = -(-(len(words) + 1) // columns)
    figure = new_figure(2 * columns + 1.2, 2.1 * rows + 1)
    figure.suptitle(textwrap.fill(title, 24 * columns), fontsize=9)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    panels.flat[0].imshow(picture)
    scale = {"vmin": percent.min(), "vmax": percent.max()}  # the same for all words
    for axes, word, row in zip(panels.flat[1:], words, percent, strict=False):
        axes.imshow(picture, alpha=PALE)  # on white
        shade = axes.imshow(heat_map(row, boxes, picture.size[::-1]), cmap=VEIL, **scale)
        axes.set_title(word, fontsize=9)
    _bar(figure, shade, panels, UNITS[pairs.model.direction], fraction=0.04, shrink=0.7)
    return figure


def heat_map(weights: np.ndarray, boxes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return `[height, width]`: the largest weight of the boxes over a pixel, NaN without one."""
    heat = np.full(shape, np.nan, dtype=np.float32)
    starts, ends = np.floor(boxes[:, :2]).clip(0), np.ceil(boxes[:, 2:]).clip(0)
    for weight, (x1, y1), (x2, y2) in zip(weights, starts, ends, strict=True):
        part = heat[int(y1) : int(y2), int(x1) : int(x2)]
        np.fmax(part, weight, out=part)
    return heat


def _line(gate: float, colour: str, dashes: Sequence[int] = ()) -> dict[str, Any]:
    style = {"color": colour, "dashes": dashes, "solid_capstyle": "butt", "zorder": 1}
    return {"lw": 0.4 + 5 * gate, "alpha": 0.35 + 0.5 * gate, **style}


def _node(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    box = {"boxstyle": "round,pad=0.35", "fc": "white", "ec": colour, "lw": 1.5}
    axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box, zorder=2)


def _bar(figure: Any, shade: AxesImage, panels: Any, label: str, **where: float) -> None:
    bar = figure.colorbar(shade, ax=panels, **({"fraction": 0.05} | where))
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=7)


def _legend_below(figure: Any, title: str, alignment: str, **more: Any) -> None:
    style = {"fontsize": 7, "title_fontsize": 7, "frameon": False, "alignment": alignment}
    figure.legend(loc=f"outside lower {alignment}", title=title, **style, **more)
