"""route_figures.py — drawings of the routing space, of a pair's route, and of where words attend.

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
COLUMNS = 5  # of words
# Attention darkens a paled image, also in print.
VEIL = LinearSegmentedColormap.from_list("veil", ["#08306b00", "#08306bb3"])
PALE = 0.5
QUERIES = {"i2t": "regions", "t2i": "words"}
UNITS = {
    "i2t": "share of a region's attention that is on this word, %",
    "t2i": "share of this word's attention that is on a region, %",
}

Values = Sequence[np.ndarray]  # `[O, N]` a layer
Layers = Sequence[tuple[np.ndarray, np.ndarray]]  # gates and bypasses `[O, N]` of each


class Drawings:
    """Draws the routes of matching pairs; `files` are the images, if they are known."""

    def __init__(self, pairs: Pairs, paths: Tensor, files: Sequence[Path], title: str) -> None:
        config = pairs.model.config
        self.pairs, self.paths, self.files, self.title = pairs, paths, files, title
        self.cells, self.query = pairs.cells, QUERIES[config.direction]
        self.colours = [COLOURS[CELLS.index(cell)] for cell in config.cell_names]
        self.layers = pairs.layers(paths)
        self.means = [(gates.mean(0).numpy(), on.mean(0).numpy()) for gates, on in self.layers]

    def space(self) -> Figure:
        """Return the routing space with mean gates, below it as numbers with closed shares."""
        means = [gates for gates, _ in self.means]
        closed = [(gates == 0).float().mean(0).numpy() for gates, _ in self.layers]
        texts = [
            np.char.mod("%.2f\n", mean) + np.char.mod("%.0f %%", 100 * share)
            for mean, share in zip(means, closed, strict=True)
        ]
        figure = self._routing(f"mean gates: {self.title}", self.means, None)
        label = "mean gate; below it the\nshare of pairs it is closed for"
        self._draw_gates(figure, means, texts, label, cmap="Blues", vmin=0, vmax=1)
        return figure

    def route(self, image: int, caption: int) -> Figure:
        """Return the route of a pair, below it by how much its gates differ from the mean gates."""
        path = self.pairs.route(image, [caption])
        route = [(gates[0].numpy(), on[0].numpy()) for gates, on in self.pairs.layers(path)]
        changes = [own - mean for (own, _), (mean, _) in zip(route, self.means, strict=True)]
        texts = [np.char.mod("%+.2f", change) for change in changes]
        # Differences below 0.01 are not worth a colour.
        limit = max(0.01, *(np.abs(change).max() for change in changes))
        figure = self._routing(self._name(image, caption), route, image)
        label = "gate minus the mean gate"
        self._draw_gates(figure, changes, texts, label, cmap="PuOr", vmin=-limit, vmax=limit)
        return figure

    def _routing(self, title: str, layers: Layers, image: int | None) -> Figure:
        """Return a drawing of the routing space, beside an image, with its lower half free."""
        figure = Figure(figsize=(2.4 * len(layers) + 2, 6.5), layout="constrained")
        title = textwrap.fill(title, 30 * len(layers) + 30)
        figure.suptitle(title, fontsize=10, parse_math=False)
        halves: Any = figure.subfigures(2, 1, height_ratios=[3, 2])
        above = halves[0]
        if image is not None and self.files:
            beside, axes = above.subplots(1, 2, width_ratios=[1, len(layers)])
            beside.imshow(thumbnail(self.files[image]))
            beside.axis("off")
        else:
            axes = above.subplots()
        self._draw_space(axes, layers)
        lines = [Line2D([], [], color=GREY, label=f"gate {g:g}", **_line(g)) for g in LEGEND_GATES]
        bypass = {"label": "input goes on", "dashes": DASHES, **_line(0.5)}
        lines.append(Line2D([], [], color=GREY, **bypass))
        title = "A dashed line is the input of a closed cell, which goes on unchanged or rectified"
        _legend_below(figure, title, "center", handles=lines, ncols=len(lines))
        return figure

    def _draw_gates(
        self, figure: Figure, values: Values, texts: Values, label: str, **scale: Any
    ) -> None:
        """Draw a value and a text for each gate, `[O, N]` a layer, in the figure's lower half."""
        below: Any = figure.subfigs[1]
        panels = below.subplots(1, len(values), squeeze=False)[0]
        for layer, axes in enumerate(panels, 1):
            shade = axes.imshow(values[layer - 1], aspect="auto", **scale)
            targets = self.cells if layer < len(values) else ["score"]
            axes.set_xticks(range(len(self.cells)), self.cells, fontsize=7)
            axes.set_yticks(range(len(targets)), [f"to {name}" for name in targets], fontsize=7)
            axes.set_title(f"layer {layer}", fontsize=8)
            for (o, n), text in np.ndenumerate(texts[layer - 1]):
                is_dark = abs(values[layer - 1][o, n]) > 0.6 * scale["vmax"]
                style = {"fontsize": 6.5, "color": "white" if is_dark else "black"}
                axes.text(n, o, text, ha="center", va="center", **style)
        _bar(below, shade, panels, label)

    def _draw_space(self, axes: Axes, layers: Layers) -> None:
        """Draw a column of cells a layer; lines are as wide as gates, dashed ones bypass cells."""
        heights = np.arange(len(self.cells))[::-1].astype(float)  # the first cell is on top
        middle, last = heights.mean(), len(layers) - 1
        for height in heights:
            axes.plot([ENTRY, 0], [middle, height], color=GREY, lw=0.6, zorder=0)
        for layer, (gates, bypasses) in enumerate(layers):
            ends = heights if layer < last else [middle]
            for values, dashes, below in ((gates, (), 0.0), (bypasses, DASHES, BELOW)):
                for (o, n), weight in np.ndenumerate(values):
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
        title = textwrap.fill(f"path vectors: {self.title}", 90)
        axes.set_title(title, fontsize=9, parse_math=False)
        title = "spectral clusters, each with a pair from its middle"
        _legend_below(figure, title, "left")
        return figure

    def words(self, image: int, caption: int, boxes: np.ndarray) -> Figure:
        """Return where each word attends; boxes `[regions, 4]` are in the thumbnail's pixels."""
        words, percent = self.pairs.words(caption), 100 * self.pairs.attention(image, caption)
        picture = thumbnail(self.files[image])
        columns = min(COLUMNS, len(words) + 1)
        rows = -(-(len(words) + 1) // columns)
        figure = Figure(figsize=(2 * columns + 1.2, 2.1 * rows + 1), layout="constrained")
        title = textwrap.fill(self._name(image, caption), 24 * columns)
        figure.suptitle(title, fontsize=9, parse_math=False)
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat:
            axes.axis("off")
        panels.flat[0].imshow(picture)
        scale = {"vmin": percent.min(), "vmax": percent.max()}  # the same for all words
        for axes, word, row in zip(panels.flat[1:], words, percent, strict=False):
            axes.imshow(picture, alpha=PALE)  # on white
            shade = axes.imshow(heat_map(row, boxes, picture.size[::-1]), cmap=VEIL, **scale)
            axes.set_title(word, fontsize=9, parse_math=False)
        _bar(figure, shade, panels, UNITS[self.pairs.model.direction], fraction=0.04, shrink=0.7)
        return figure

    def _name(self, image: int, caption: int) -> str:
        return f"image {image}, caption {caption}: {self.pairs.split.captions[caption]}"


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


def _bar(figure: Any, shade: AxesImage, panels: Any, label: str, **where: float) -> None:
    bar = figure.colorbar(shade, ax=panels, **({"fraction": 0.05} | where))
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=7)


def _legend_below(figure: Any, title: str, alignment: str, **more: Any) -> None:
    style = {"fontsize": 7, "title_fontsize": 7, "frameon": False, "alignment": alignment}
    figure.legend(loc=f"outside lower {alignment}", title=title, **style, **more)
