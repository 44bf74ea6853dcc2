"""route_figures.py — drawings of the routing space and of what a pair looks at.

Matplotlib only; what is drawn comes from scripts/inspect_routes.py.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("Agg")

# Okabe and Ito's colours, which the colour-blind tell apart
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
FAINTEST = 0.02  # gates below it are not drawn
DPI = 150


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    plt.close(figure)


def draw_space(axes: Axes, gates: Sequence[np.ndarray], cells: Sequence[str]) -> None:
    """The routing space: a column of cells a layer, and its paths as open as their gates.

    `gates` are `[O, N]` a layer: to cell o of the next layer from cell n; one row for the last.
    """
    heights = np.arange(len(cells))[::-1].astype(float)
    middle = heights.mean()
    for layer, values in enumerate(gates):
        ends = heights if layer < len(gates) - 1 else [middle]
        for o, end in enumerate(ends):
            for n, start in enumerate(heights):
                gate = float(values[o, n])
                if gate >= FAINTEST:
                    line = {"lw": 0.3 + 4 * gate, "alpha": min(1.0, 0.15 + gate)}
                    axes.plot([layer, layer + 1], [start, end], color=COLOURS[n], **line, zorder=1)
        for n, height in enumerate(heights):
            _node(axes, layer, height, cells[n], COLOURS[n])
    _node(axes, len(gates), middle, "score", "#444444")
    axes.set_xlim(-0.4, len(gates) + 0.4)
    axes.set_ylim(-0.5, len(cells) - 0.5)
    axes.axis("off")


def _node(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    box = {"boxstyle": "round,pad=0.35", "fc": "white", "ec": colour, "lw": 1.5}
    axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box, zorder=2)


def space_figure(gates: Sequence[np.ndarray], cells: Sequence[str], title: str) -> Figure:
    """The mean gates of many pairs, with their numbers below."""
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 6), gridspec_kw={"height_ratios": [3, 1.3]}
    )
    draw_space(above, gates, cells)
    above.set_title(title, fontsize=10)
    below.axis("off")
    below.set_xlim(0, len(gates))
    for layer, values in enumerate(gates):
        lines = [" " * 7 + "".join(f"{cell:>6}" for cell in cells)]
        names = cells if layer < len(gates) - 1 else ["score"]
        for name, row in zip(names, values, strict=True):
            lines.append(f"to {name:<6}"[:9] + "".join(f"{value:6.2f}" for value in row))
        text = "\n".join([f"layer {layer + 1}, mean gates", *lines])
        below.text(layer, 1, text, family="monospace", fontsize=6, va="top")
    return figure


def routes_figure(
    routes: Sequence[Sequence[np.ndarray]],
    captions: Sequence[str],
    pictures: Sequence[np.ndarray | None],
    cells: Sequence[str],
) -> Figure:
    """Some pairs' routes side by side, with captions, and pictures where there are some."""
    columns = 2 if any(picture is not None for picture in pictures) else 1
    size = (3 * (columns - 1) + 6, 2.6 * len(routes))
    ratios = {"width_ratios": [1, 2][-columns:]}
    figure, axes = plt.subplots(
        len(routes), columns, figsize=size, squeeze=False, gridspec_kw=ratios
    )
    for row, gates, caption, picture in zip(axes, routes, captions, pictures, strict=True):
        draw_space(row[-1], gates, cells)
        row[-1].set_title(caption, fontsize=8, wrap=True)
        if columns == 2:
            row[0].axis("off")
            if picture is not None:
                row[0].imshow(picture)
    figure.tight_layout()
    return figure


def clusters_figure(points: np.ndarray, clusters: np.ndarray, examples: Sequence[str]) -> Figure:
    """Path vectors in a plane, coloured by cluster, with a caption for each."""
    figure, axes = plt.subplots(figsize=(7, 6))
    for number, example in enumerate(examples):
        own = points[clusters == number]
        marker = "os^Dv<>P"[number % 8]
        label = f"{len(own)}: {example[:60]}"
        style = {"s": 14, "color": COLOURS[number % 8], "marker": marker}
        axes.scatter(own[:, 0], own[:, 1], label=label, **style)
    axes.set_xlabel("t-SNE, first axis")
    axes.set_ylabel("t-SNE, second axis")
    axes.legend(
        fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1), title="cluster: example"
    )
    return figure


def attention_figure(
    weights: np.ndarray, words: Sequence[str], boxes: np.ndarray, picture: np.ndarray
) -> Figure:
    """Where each word is seen: weights `[words, regions]` over the regions' boxes in a picture."""
    columns = min(4, len(words))
    lines = -(-len(words) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3 * columns, 3 * lines + 0.5), squeeze=False
    )
    for place in axes.flat[len(words) :]:
        place.axis("off")
    for place, word, row in zip(axes.flat, words, weights, strict=False):
        place.imshow(picture)
        place.imshow(_heat(row, boxes, picture.shape[:2]), cmap="magma", alpha=0.6)
        place.set_title(word, fontsize=9)
        place.axis("off")
    return figure


def _heat(weights: np.ndarray, boxes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A map `[height, width]` of the largest weight among the boxes x1 y1 x2 y2 at each pixel."""
    heat = np.zeros(shape, dtype=np.float32)
    for weight, (left, top, right, bottom) in zip(weights, boxes, strict=True):
        part = heat[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))]
        np.maximum(part, weight, out=part)
    return heat
