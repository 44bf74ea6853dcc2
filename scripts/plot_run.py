"""plot_run.py — the curves of training runs: loss and recalls by step.

    python -m scripts.plot_run runs/demo/i2t runs/demo/t2i --out curves.png

Reads metrics.jsonl of each run's folder. Writes the picture as PNG, and beside it as SVG.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from files import check_writable, read_text, write_bytes
from options import parse, require, run, short
from runlog import METRICS

# Okabe and Ito's colours, which the colour-blind can tell apart; dashes tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
RECALLS = (("r1", "i2t R@1"), ("r1i", "t2i R@1"), ("r10", "i2t R@10"), ("r10i", "t2i R@10"))
matplotlib.rcParams["svg.hashsalt"] = "dime"  # the same curves give the same file


@dataclass(frozen=True)
class Options:
    runs: Annotated[list[str], "folders of runs, LOGGER_NAME/DIRECTION", "RUN"]
    out: Annotated[str, "picture to write, .png; .svg is written beside it"]


def events(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, in order. Raises InputError where a line is no event."""
    path = folder / METRICS
    found = []
    for number, line in enumerate(read_text(path, "the log of a run").splitlines(), 1):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        fits = isinstance(event, dict) and all(
            type(value) in (int, float) for value in event.values()
        )
        require(
            fits and "step" in event, f"{path}: line {number}: {short(line)}; expected an event"
        )
        found.append(event)
    require(len(found) > 0, f"{path}: is empty; expected the log of a run")
    return found


def curve(found: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one figure."""
    points = [(event["step"], event[name]) for event in found if name in event]
    return [step for step, _ in points], [value for _, value in points]


def label(axes: Axes, title: str, unit: str) -> None:
    """Title, units and legend of one panel."""
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend(fontsize="small")


def figure(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Loss on the left, recalls on dev on the right."""
    picture = Figure(figsize=(11, 4.5), layout="constrained")
    loss, recall = picture.subplots(1, 2)
    for number, (name, found) in enumerate(runs.items()):
        colour = COLOURS[number % len(COLOURS)]
        loss.plot(*curve(found, "Le"), color=colour, label=name)
        for (tag, title), dash in zip(RECALLS, DASHES, strict=True):
            style = {"color": colour, "linestyle": dash, "marker": "o", "markersize": 3}
            recall.plot(*curve(found, tag), **style, label=f"{name}: {title}")
    label(loss, "Training loss", "loss (sum over a batch)")
    label(recall, "Recall on dev", "recall, %")
    recall.set_ylim(0, 100)
    return picture


def write_figure(picture: Figure, path: Path) -> None:
    """Write a picture in the format of its name, whole or not at all."""
    data = io.BytesIO()
    kind = path.suffix[1:]
    picture.savefig(data, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    write_bytes(path, data.getbuffer())


def main() -> None:
    chosen = parse(Options, None, __doc__)
    out = Path(chosen.out)
    require(out.suffix == ".png", f"--out {out}: expected a name that ends in .png")
    check_writable(out)
    picture = figure({Path(name).name: events(Path(name)) for name in chosen.runs})
    for path in (out, out.with_suffix(".svg")):
        write_figure(picture, path)


if __name__ == "__main__":
    run(main)
