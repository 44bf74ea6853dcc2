"""route_figures.py — drawings of the routing space, of routes, and of where words attend.

Gates are `[O, N]` a layer: of cell n on its path to cell o of the next layer; one row in the last.
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
from PIL import Image
from torch import Tensor

from common.config import CELLS
from scripts.parts.figures import COLOURS, thumbnail
from scripts.parts.routes import Clusters, Pairs

FAINTEST = 0.02  # smaller gates are not drawn
LEGEND_GATES = (0.1, 0.25, 0.5, 1.0)
DASHES, BELOW = (2, 1), 0.1  # of a bypass: in line widths, and how far below the gate's line
MARKERS = "os^Dv<>P"  # tell clusters of the same colour apart
ENTRY = -0.8  # x of the query; layer l is at x = l
GREY = "#555555"
NOTE = (
    "Widths are gates. The gates to a cell are shares that sum to 1; if all are closed, the first "
    "cell's rectified input goes on (dashed). The gates to the score, each from 0 to 1, are the "
    "weights of a mean; if one is closed, its cell's input goes on with a weight of 1 (dashed)."
)
HARD_NOTE = (
    "Each path takes one cell: with a gate of 1 to a cell, with the router's gate to the score. If "
    "all are closed, the first cell's input goes on (dashed), rectified on the way to a cell."
)
SMALLEST_LIMIT = 0.01  # of the colour scale of differences: smaller ones are not worth a colour
SIGNED = 0.1  # share of the limit above which a difference gets its sign, for print
COLUMNS = 5  # of words
# Attention darkens a paled image, also in print.
VEIL = LinearSegmentedColormap.from_list("veil", ["#08306b00", "#08306bb3"])
PALE = 0.5  # share of the image in the paled one, the rest is white
QUERIES = {"i2t": "regions", "t2i": "words"}
UNITS = {
    "i2t": "share of a region's attention that is on this word, %",
    "t2i": "share of this word's attention that is on a region, %",
}

Gates = Sequence[np.ndarray]  # [O, N] a layer


class Drawings:
    """Draws the routes of matching pairs; `files` are the images, if they are known."""

    def __init__(self, pairs: Pairs, paths: Tensor, files: Sequence[Path], title: str) -> None:
        config = pairs.model.config
        self.pairs, self.paths, self.files, self.title = pairs, paths, files, title
        self.cells, self.query = pairs.cells, QUERIES[config.direction]
        self.colours = [COLOURS[CELLS.index(cell)] for cell in config.cell_names]
        self.note = HARD_NOTE if config.routing == "hard" else NOTE
        self.gates, self.bypasses = _by_pair(pairs.gates(paths)), _by_pair(pairs.bypasses(paths))
        self.means = [np.mean(layer, 0) for layer in zip(*self.gates, strict=True)]

    def space(self) -> Figure:
        """Return the routing space with mean gates, below it as numbers with closed shares."""
        bypasses = [np.mean(layer, 0) for layer in zip(*self.bypasses, strict=True)]
        closed = [np.mean(np.equal(layer, 0), 0) for layer in zip(*self.gates, strict=True)]
        layers = len(self.means)
        figure = Figure(figsize=(2.4 * layers + 2, 6.5), layout="constrained")
        _title(figure, f"mean gates: {self.title}", 30 * layers + 30, 10)
        halves: Any = figure.subfigures(2, 1, height_ratios=[3, 2])
        above, below = halves
        self._draw_space(above.subplots(), self.means, bypasses)
        panels = below.subplots(1, layers, squeeze=False)[0]
        for layer, (axes, mean, share) in enumerate(zip(panels, self.means, closed, strict=True)):
            shade = axes.imshow(mean, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            targets = self.cells if layer < layers - 1 else ["score"]
            axes.set_xticks(range(len(self.cells)), self.cells, fontsize=7)
            axes.set_yticks(range(len(targets)), [f"to {name}" for name in targets], fontsize=7)
            axes.set_title(f"layer {layer + 1}", fontsize=8)
            for (o, n), value in np.ndenumerate(mean):
                text, colour = f"{value:.2f}\n{100 * share[o, n]:.0f} %", _ink(value > 0.6)
                axes.text(n, o, text, ha="center", va="center", fontsize=6.5, color=colour)
        _bar(below, shade, panels, "mean gate; below it the\nshare of pairs it is closed for")
        self._legend(figure)
        return figure

    def routes(self, paths: Tensor, numbers: Sequence[tuple[int, int]]) -> Figure:
        """Return the routes of path vectors `[pairs, K]`, and how they differ from the mean.

        `numbers` are the image and the caption of each pair.
        """
        gates, bypasses = _by_pair(self.pairs.gates(paths)), _by_pair(self.pairs.bypasses(paths))
        layers = len(self.means)
        figure = Figure(figsize=(3.2 * layers + 4, 2.6 * len(gates) + 0.9), layout="constrained")
        ratios = [1.4] * bool(self.files) + [0.8 + 0.8 * layers, 0.5 + 0.6 * layers]
        panels = figure.subplots(len(gates), len(ratios), squeeze=False, width_ratios=ratios)
        changes = [side_by_side(route) - side_by_side(self.means) for route in gates]
        limit = max(np.abs(changes).max(), SMALLEST_LIMIT)
        for k, (row, pair) in enumerate(zip(panels, numbers, strict=True)):
            self._draw_space(row[-2], gates[k], bypasses[k])
            title = textwrap.fill(self.pairs.title(*pair), 24 * layers + 10)
            row[-2].set_title(title, fontsize=8, parse_math=False)
            shade = self._draw_change(row[-1], changes[k], limit)
            if self.files:
                row[0].imshow(thumbnail(self.files[pair[0]]))
                row[0].axis("off")
        _bar(figure, shade, panels[:, -1], "gate minus the mean gate")
        self._legend(figure)
        return figure

    def _draw_space(self, axes: Axes, gates: Gates, bypasses: Gates) -> None:
        """Draw a column of cells a layer; lines are as wide as gates, dashed ones bypass cells."""
        heights = np.arange(len(self.cells))[::-1].astype(float)  # the first cell is on top
        middle, last = heights.mean(), len(gates) - 1
        for height in heights:
            axes.plot([ENTRY, 0], [middle, height], color=GREY, lw=0.6, zorder=0)
        for layer in range(len(gates)):
            ends = heights if layer < last else [middle]
            for values, dashes, below in ((gates, (), 0.0), (bypasses, DASHES, BELOW)):
                for (o, n), weight in np.ndenumerate(values[layer]):
                    if weight >= FAINTEST:
                        style = _line(float(weight)) | {"color": self.colours[n], "dashes": dashes}
                        axes.plot(
                            [layer, layer + 1], [heights[n] - below, ends[o] - below], **style
                        )
            for height, name, colour in zip(heights, self.cells, self.colours, strict=True):
                _node(axes, layer, height, name, colour)
            axes.text(layer, len(heights) - 0.35, f"layer {layer + 1}", ha="center", fontsize=8)
        _node(axes, ENTRY, middle, self.query, GREY)
        _node(axes, last + 1, middle, "score", GREY)
        axes.set(xlim=(-1.1, last + 1.3), ylim=(-0.5, len(heights) - 0.1))
        axes.axis("off")

    def _draw_change(self, axes: Axes, change: np.ndarray, limit: float) -> AxesImage:
        """Draw by how much each gate differs from the mean, `[N, layers * N]`."""
        count, layers = len(self.cells), len(self.means)
        shade = axes.imshow(change, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
        for (n, column), value in np.ndenumerate(change):
            if abs(value) >= SIGNED * limit:
                sign, colour = "+" if value > 0 else "−", _ink(abs(value) > limit / 2)
                axes.text(column, n, sign, ha="center", va="center", fontsize=6, color=colour)
        axes.set_xticks(range(layers * count), self.cells * layers, fontsize=6, rotation=90)
        targets = [f"to {name}" for name in self.cells] if layers > 1 else []
        axes.set_yticks(range(len(targets)), targets, fontsize=6)
        for layer in range(layers):
            name = f"layer {layer + 1}" if layer < layers - 1 else f"layer {layers}: to score"
            middle = count * layer + (count - 1) / 2
            axes.text(middle, -0.6, name, ha="center", va="bottom", fontsize=7)
            axes.axvline(count * layer - 0.5, color="black", lw=0.8)
        return shade

    def _legend(self, figure: Figure) -> None:
        lines = [Line2D([], [], color=GREY, label=f"gate {g:g}", **_line(g)) for g in LEGEND_GATES]
        bypass = {"label": "input goes on", "dashes": DASHES, **_line(0.5)}
        _legend_below(
            figure,
            "lower center",
            textwrap.fill(self.note, 100),
            handles=[*lines, Line2D([], [], color=GREY, **bypass)],
            ncols=len(lines) + 1,
            alignment="center",
        )

    def clusters(self, clusters: Clusters) -> Figure:
        """Return the path vectors in a plane, by cluster, each with an example."""
        examples = [self.pairs.split.captions[k] for k in clusters.central_pairs(self.paths)]
        figure = Figure(figsize=(7, 6 + 0.25 * len(examples)), layout="constrained")
        axes = figure.subplots()
        for number, example in enumerate(examples):
            own = clusters.points[clusters.labels == number]
            label = f"{len(own)} pairs: {textwrap.shorten(example, 85)}".replace("$", r"\$")
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number]
            style: dict[str, Any] = {"s": 22, "alpha": 0.8, "linewidths": 0}
            axes.scatter(*own.T, color=colour, marker=marker, label=label, **style)
        axes.set(xlabel="t-SNE, first axis (no unit)", ylabel="t-SNE, second axis (no unit)")
        title = textwrap.fill(f"path vectors: {self.title}, {clusters.method}", 90)
        axes.set_title(title, fontsize=9, parse_math=False)
        title = "spectral clusters, each with a pair from its middle"
        _legend_below(figure, "lower left", title, alignment="left")
        return figure

    def words(self, image: int, caption: int, boxes: np.ndarray) -> Figure:
        """Return where each word attends; boxes `[regions, 4]` are in the thumbnail's pixels."""
        words, percent = self.pairs.words(caption), 100 * self.pairs.attention(image, caption)
        picture = thumbnail(self.files[image])
        columns = min(COLUMNS, len(words) + 1)
        rows = -(-(len(words) + 1) // columns)
        figure = Figure(figsize=(2 * columns + 1.2, 2.1 * rows + 1), layout="constrained")
        _title(figure, self.pairs.title(image, caption), 24 * columns, 9)
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat:
            axes.axis("off")
        panels.flat[0].imshow(picture)
        white = Image.new("RGB", picture.size, "white")
        pale = np.asarray(Image.blend(white, picture, PALE))
        scale = {"vmin": percent.min(), "vmax": percent.max()}  # the same for all words
        for axes, word, row in zip(panels.flat[1:], words, percent, strict=False):
            axes.imshow(pale)
            shade = axes.imshow(heat_map(row, boxes, pale.shape[:2]), cmap=VEIL, **scale)
            axes.set_title(word, fontsize=9, parse_math=False)
        _bar(figure, shade, panels, UNITS[self.pairs.model.direction], fraction=0.04, shrink=0.7)
        return figure


def _by_pair(layers: Sequence[Tensor]) -> list[Gates]:
    """Return the gates of each pair from the gates `[pairs, O, N]` of each layer."""
    return [[layer[k].numpy() for layer in layers] for k in range(len(layers[0]))]


def side_by_side(gates: Gates) -> np.ndarray:
    """Return gates as `[N, layers * N]`; the last layer's one row is repeated."""
    count = gates[0].shape[1]
    return np.hstack([np.broadcast_to(layer, (count, count)) for layer in gates])


def heat_map(weights: np.ndarray, boxes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return `[height, width]`: the largest weight of the boxes over a pixel, NaN without one."""
    heat = np.full(shape, np.nan, dtype=np.float32)
    starts, ends = np.floor(boxes[:, :2]).clip(0), np.ceil(boxes[:, 2:]).clip(0)
    for weight, (x1, y1), (x2, y2) in zip(weights, starts, ends, strict=True):
        part = heat[int(y1) : int(y2), int(x1) : int(x2)]
        np.fmax(part, weight, out=part)
    return heat


def _line(gate: float) -> dict[str, Any]:
    return {"lw": 0.4 + 5 * gate, "alpha": 0.35 + 0.5 * gate, "solid_capstyle": "butt", "zorder": 1}


def _node(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    box = {"boxstyle": "round,pad=0.35", "fc": "white", "ec": colour, "lw": 1.5}
    axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box, zorder=2)


def _ink(dark: bool) -> str:
    """Return the colour of text on a dark or a light ground."""
    return "white" if dark else "black"


def _title(figure: Figure, text: str, width: int, size: int) -> None:
    figure.suptitle(textwrap.fill(text, width), fontsize=size, parse_math=False)


def _bar(figure: Any, shade: AxesImage, panels: Any, label: str, **where: float) -> None:
    bar = figure.colorbar(shade, ax=panels, **({"fraction": 0.05} | where))
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=7)


def _legend_below(figure: Any, where: str, title: str, **more: Any) -> None:
    style = {"fontsize": 7, "title_fontsize": 7, "frameon": False}
    figure.legend(loc=f"outside {where}", title=title, **style, **more)
