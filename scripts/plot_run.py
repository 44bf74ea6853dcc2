"""plot_run.py — the curves of training runs: loss and recalls by step.

    python -m scripts.plot_run runs/demo/i2t runs/demo/t2i --out curves.png

Reads metrics.jsonl of each run's folder. Writes the picture as PNG, and beside it as SVG.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from common.cli import parse, run
from common.errors import require
from common.files import check_writable
from scripts.parts.figures import COLOURS, write_figure
from training.log import events

# Tell runs apart in grey: points of ink and of none, by turns.
DASHES = ((), (6, 2), (1, 1.5), (6, 2, 1, 2), (12, 3), (6, 2, 1, 2, 1, 2), (3, 3), (12, 2, 3, 2))
MOST_RUNS = len(DASHES)
RECALLS = {"r1": "i2t R@1", "r1i": "t2i R@1", "r10": "i2t R@10", "r10i": "t2i R@10"}
LOSS = "ranking loss, summed over the batch,\n+ trade_off x path loss"
MARKERS = ("o", "^", "s", "x")  # of the recalls


@dataclass(frozen=True)
class Options:
    runs: Annotated[
        list[str], f"folders of runs, LOGGER_NAME/DIRECTION; {MOST_RUNS} at most", "RUN"
    ]
    out: Annotated[str, "picture to write, .png; .svg is written beside it"]


def curve(found: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one figure."""
    points = [(event["step"], event[name]) for event in found if name in event]
    return [step for step, _ in points], [value for _, value in points]


def labels(folders: Sequence[str]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart. Raises InputError."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for number, path in enumerate(parts):
        require(path not in parts[:number], f"{folders[number]}: is given twice")
    depth = 1
    while len({path[-depth:] for path in parts}) < len(parts):
        depth += 1
    return ["/".join(path[-depth:]) for path in parts]


def shown(axes: Axes, title: str, unit: str) -> None:
    """Title and units of one panel."""
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if not any(len(line.get_xdata()) for line in axes.lines):
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center")


def figure(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Loss on the left, recalls on dev on the right; a run has its colour and dashes in both."""
    picture = Figure(figsize=(12, 4.5), layout="constrained")
    loss, recall = picture.subplots(1, 2)
    handles = []
    for number, (name, found) in enumerate(runs.items()):
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "dashes": DASHES[number],
            "linewidth": 1.3,
        }
        losses = curve(found, "Le")
        loss.plot(*losses, **style, marker="." if len(losses[0]) == 1 else "")
        for tag, marker in zip(RECALLS, MARKERS, strict=True):
            recall.plot(*curve(found, tag), **style, marker=marker, markersize=5)
        text = f"./{name}" if name.startswith("_") else name  # which no legend shows
        handles.append(Line2D([], [], **style, label=text.replace("$", r"\$")))
    shown(loss, "Training loss, mean of the steps between two points", LOSS)
    shown(recall, "Recall on dev", "recall, %")
    recall.set_ylim(0, 102)
    recalls = [
        Line2D([], [], color="black", linestyle="", marker=marker, label=title)
        for title, marker in zip(RECALLS.values(), MARKERS, strict=True)
    ]
    small = {"fontsize": "small", "alignment": "left"}
    picture.legend(handles=handles, loc="outside right upper", title="run", **small)
    picture.legend(handles=recalls, loc="outside right lower", title="recall", **small)
    return picture


def main() -> None:
    chosen = parse(Options, None, __doc__)
    out = Path(chosen.out)
    require(out.suffix == ".png", f"--out {out}: expected a name that ends in .png")
    pictures = (out, out.with_suffix(".svg"))
    for path in pictures:
        check_writable(path)
    found = f"{len(chosen.runs)} runs; expected {MOST_RUNS} at most, which look different"
    require(len(chosen.runs) <= MOST_RUNS, found)
    names = labels(chosen.runs)
    picture = figure(dict(zip(names, map(events, map(Path, chosen.runs)), strict=True)))
    for path in pictures:
        write_figure(picture, path)


if __name__ == "__main__":
    run(main)
