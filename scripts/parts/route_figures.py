"""route_figures.py — drawings of the routing space, of routes, and of where words are seen.

Matplotlib only; what is drawn comes from scripts/inspect_routes.py. Gates are `[O, N]` a layer: of
cell n on its path to cell o of the next layer, one row in the last layer.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from PIL import Image

from common.config import CELLS, CellName
from scripts.parts.figures import COLOURS

FAINTEST = 0.02  # gates below it are not drawn
SHOWN_GATES = (0.1, 0.25, 0.5, 1.0)  # in the legend
SKIP, BELOW = (2, 1), 0.1  # dashes, in widths of the line; how far below the gate's own line
MARKERS = "os^Dv<>P"  # clusters are told apart by them where two have one colour
ENTRY = -0.8  # where the query stands, in layers
GREY = "#555555"
NOTE = (
    "Widths are gates. Those of a path to a cell are shares that sum to 1; where all are closed, "
    "the first cell's rectified input goes on (dashed). Those to the score are each from 0 to 1, "
    "and weights of a mean; where one is closed, the cell's input goes on, weighted by 1 (dashed)."
)
HARD_NOTE = (
    "Each path takes one cell alone: the gate is 1 to a cell, and what the router gives to the "
    "score. Where all are closed, the first cell's input goes on (dashed), rectified to a cell."
)
SMALLEST_LIMIT = 0.01  # of the scale of differences: less is no difference to look at
COLUMNS = 5  # of words
# Darker is more, in print too; where there is nothing the picture is only paled.
VEIL = LinearSegmentedColormap.from_list("veil", ["#08306b00", "#08306bb3"])
PALE = 0.5  # of the picture under it, the rest is white
SIGNED = 0.1  # of the largest difference: from there on its sign is written


@dataclass(frozen=True)
class Space:
    """What all drawings of a routing space have in common."""

    cells: Sequence[CellName]  # N of them
    query: str  # what goes in: regions or words
    hard: bool = False  # routing: one cell a path

    @property
    def names(self) -> list[str]:
        """What the cells are called."""
        return [cell.upper() for cell in self.cells]

    @property
    def colours(self) -> list[str]:
        """Of the cells, whichever others there are."""
        return [COLOURS[CELLS.index(cell)] for cell in self.cells]

    def heights(self) -> np.ndarray:
        """Where the cells are, the first one on top."""
        return np.arange(len(self.cells))[::-1].astype(float)


def draw_space(
    axes: Axes, gates: Sequence[np.ndarray], skips: Sequence[np.ndarray], space: Space
) -> None:
    """A column of cells a layer, and its paths as wide as their gates are open.

    Dashed is what goes on where gates are closed: `skips` are their weights, as gates are.
    """
    heights = space.heights()
    middle, last = heights.mean(), len(gates) - 1
    for height in heights:
        axes.plot([ENTRY, 0], [middle, height], color=GREY, lw=0.6, zorder=0)
    for layer, (values, passed) in enumerate(zip(gates, skips, strict=True)):
        ends = heights if layer < last else [middle]
        for o, end in enumerate(ends):
            for n, start in enumerate(heights):
                kinds = ((values[o, n], (), 0.0), (passed[o, n], SKIP, BELOW))
                for weight, dashes, by in kinds:
                    if weight >= FAINTEST:
                        style = _line(float(weight)) | {"color": space.colours[n]}
                        places = [start - by, end - by]
                        axes.plot([layer, layer + 1], places, dashes=dashes, **style)
        for node in zip(heights, space.names, space.colours, strict=True):
            _node(axes, layer, *node)
        axes.text(layer, len(heights) - 0.35, f"layer {layer + 1}", ha="center", fontsize=8)
    _node(axes, ENTRY, middle, space.query, GREY)
    _node(axes, last + 1, middle, "score", GREY)
    axes.set(xlim=(-1.1, last + 1.3), ylim=(-0.5, len(heights) - 0.1))
    axes.axis("off")


def _line(gate: float) -> dict[str, float | str]:
    return {"lw": 0.4 + 5 * gate, "alpha": 0.35 + 0.5 * gate, "solid_capstyle": "butt", "zorder": 1}


def _node(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    box = {"boxstyle": "round,pad=0.35", "fc": "white", "ec": colour, "lw": 1.5}
    axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box, zorder=2)


def _gate_legend(figure: Figure, space: Space) -> None:
    lines = [Line2D([], [], color=GREY, label=f"gate {g:g}", **_line(g)) for g in SHOWN_GATES]
    lines.append(Line2D([], [], color=GREY, label="input goes on", dashes=SKIP, **_line(0.5)))
    title = textwrap.fill(HARD_NOTE if space.hard else NOTE, 90)
    figure.legend(
        handles=lines,
        loc="outside lower center",
        ncols=len(lines),
        fontsize=8,
        title=title,
        title_fontsize=7,
        alignment="center",
        frameon=False,
    )


def space_figure(
    means: Sequence[np.ndarray],
    closed: Sequence[np.ndarray],
    skips: Sequence[np.ndarray],
    space: Space,
    title: str,
) -> Figure:
    """The mean gates of many pairs, drawn above, and as numbers with the closed shares below."""
    figure = Figure(figsize=(2.4 * len(means) + 2, 6.5), layout="constrained")
    figure.suptitle(textwrap.fill(title, 30 * len(means) + 30), fontsize=10, parse_math=False)
    above, below = figure.subfigures(2, 1, height_ratios=[3, 2])
    draw_space(above.subplots(), means, skips, space)
    panels = below.subplots(1, len(means), squeeze=False)[0]
    for layer, (axes, mean, share) in enumerate(zip(panels, means, closed, strict=True), 1):
        shade = axes.imshow(mean, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        to = space.names if layer < len(means) else ["score"]
        axes.set_xticks(range(len(space.cells)), space.names, fontsize=7)
        axes.set_yticks(range(len(to)), [f"to {name}" for name in to], fontsize=7)
        axes.set_title(f"layer {layer}", fontsize=8)
        for (o, n), value in np.ndenumerate(mean):
            text = f"{value:.2f}\n{100 * share[o, n]:.0f} %"
            colour = "white" if value > 0.6 else "black"
            axes.text(n, o, text, ha="center", va="center", fontsize=6.5, color=colour)
    bar = below.colorbar(shade, ax=panels, fraction=0.05)
    bar.set_label("mean gate; below it the\nshare of pairs it is closed for", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    _gate_legend(figure, space)
    return figure


def routes_figure(
    routes: Sequence[Sequence[np.ndarray]],
    skips: Sequence[Sequence[np.ndarray]],
    means: Sequence[np.ndarray],
    titles: Sequence[str],
    pictures: Sequence[Image.Image],
    space: Space,
) -> Figure:
    """Routes below each other: picture, where there is one, drawing, difference to the means."""
    layers = len(means)
    figure = Figure(figsize=(3.2 * layers + 4, 2.6 * len(routes) + 0.9), layout="constrained")
    ratios = [1.4] * bool(pictures) + [0.8 + 0.8 * layers, 0.5 + 0.6 * layers]
    panels = figure.subplots(len(routes), len(ratios), squeeze=False, width_ratios=ratios)
    changes = [side_by_side(gates) - side_by_side(means) for gates in routes]
    limit = max(np.abs(changes).max(), SMALLEST_LIMIT)
    parts = zip(panels, routes, skips, changes, titles, strict=True)
    for row, gates, passed, change, title in parts:
        draw_space(row[-2], gates, passed, space)
        text = textwrap.fill(title, 24 * layers + 10)
        row[-2].set_title(text, fontsize=8, parse_math=False)
        shade = _draw_change(row[-1], change, limit, layers, space)
    for row, picture in zip(panels, pictures, strict=False):
        row[0].imshow(picture)
        row[0].axis("off")
    bar = figure.colorbar(shade, ax=panels[:, -1], fraction=0.05)
    bar.set_label("gate minus the mean gate", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    _gate_legend(figure, space)
    return figure


def side_by_side(gates: Sequence[np.ndarray]) -> np.ndarray:
    """Gates as `[N, layers * N]`, the last layer's one row repeated."""
    count = gates[0].shape[1]
    return np.hstack([np.broadcast_to(layer, (count, count)) for layer in gates])


def _draw_change(
    axes: Axes, change: np.ndarray, limit: float, layers: int, space: Space
) -> AxesImage:
    """By how much each gate is more or less open than the mean."""
    count = len(space.cells)
    shade = axes.imshow(change, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
    for (n, place), value in np.ndenumerate(change):
        if abs(value) >= SIGNED * limit:  # for print
            sign, colour = "+" if value > 0 else "−", "white" if abs(value) > limit / 2 else "black"
            axes.text(place, n, sign, ha="center", va="center", fontsize=6, color=colour)
    ticks = {"fontsize": 6, "rotation": 90}
    axes.set_xticks(range(layers * count), space.names * layers, **ticks)
    to = [f"to {name}" for name in space.names] if layers > 1 else []
    axes.set_yticks(range(len(to)), to, fontsize=6)
    for layer in range(layers):
        name = f"layer {layer + 1}" if layer < layers - 1 else f"layer {layers}: to score"
        place = count * layer + (count - 1) / 2
        axes.text(place, -0.6, name, ha="center", va="bottom", fontsize=7)
        axes.axvline(count * layer - 0.5, color="black", lw=0.8)
    return shade


def clusters_figure(
    places: np.ndarray, clusters: np.ndarray, examples: Sequence[str], title: str
) -> Figure:
    """Path vectors in a plane `[pairs, 2]`, by cluster, with an example of each."""
    figure = Figure(figsize=(7, 6 + 0.25 * len(examples)), layout="constrained")
    axes = figure.subplots()
    for number, example in enumerate(examples):
        own = places[clusters == number]
        axes.scatter(
            *own.T,
            s=22,
            alpha=0.8,
            linewidths=0,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number],
            label=f"{len(own)} pairs: {textwrap.shorten(example, 85)}".replace("$", r"\$"),
        )
    axes.set(xlabel="t-SNE, first axis (no unit)", ylabel="t-SNE, second axis (no unit)")
    axes.set_title(textwrap.fill(title, 90), fontsize=9, parse_math=False)
    figure.legend(
        loc="outside lower left",
        fontsize=7,
        title="spectral clusters, each with a pair from its midst",
        title_fontsize=8,
        alignment="left",
        frameon=False,
    )
    return figure


@dataclass(frozen=True)
class Seen:
    """A picture and where its regions are."""

    picture: Image.Image
    boxes: np.ndarray  # [regions, 4] x1 y1 x2 y2 in the picture's pixels


def words_figure(
    weights: np.ndarray, words: Sequence[str], seen: Seen, title: str, unit: str
) -> Figure:
    """Where each word is seen: weights `[words, regions]` over a picture, on one scale."""
    columns = min(COLUMNS, len(words) + 1)
    lines = -(-(len(words) + 1) // columns)
    figure = Figure(figsize=(2 * columns + 1.2, 2.1 * lines + 1), layout="constrained")
    figure.suptitle(textwrap.fill(title, 24 * columns), fontsize=9, parse_math=False)
    panels = figure.subplots(lines, columns, squeeze=False)
    first, *others = panels.flat
    for axes in panels.flat:
        axes.axis("off")
    first.imshow(seen.picture)
    white = Image.new("RGB", seen.picture.size, "white")
    pale = np.asarray(Image.blend(white, seen.picture.convert("RGB"), PALE))
    percent = 100 * weights
    for axes, word, row in zip(others, words, percent, strict=False):
        axes.imshow(pale)
        heat = heat_map(row, seen.boxes, pale.shape[:2])
        shade = axes.imshow(heat, cmap=VEIL, vmin=percent.min(), vmax=percent.max())
        axes.set_title(word, fontsize=9, parse_math=False)
    bar = figure.colorbar(shade, ax=panels, fraction=0.04, shrink=0.7)
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def heat_map(weights: np.ndarray, boxes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """`[height, width]`: the largest weight of the boxes that a pixel is in, NaN where in none."""
    heat = np.full(shape, np.nan, dtype=np.float32)
    starts, ends = np.floor(boxes[:, :2]).clip(0), np.ceil(boxes[:, 2:]).clip(0)
    for weight, (x1, y1), (x2, y2) in zip(weights, starts, ends, strict=True):
        part = heat[int(y1) : int(y2), int(x1) : int(x2)]
        np.fmax(part, weight, out=part)
    return heat
