"""plot_run.py — the curves of training runs: loss and recalls by step.

    python -m scripts.plot_run runs/demo/i2t runs/demo/t2i --out curves.png

Reads metrics.jsonl of each run's folder.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

from common.cli import parse, run
from scripts.parts.figures import COLOURS, check_figure, new_figure, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Dashes tell runs apart in print. Both repeat, after 6 and 4 runs: 12 runs differ.
DASHES = ("-", "--", ":", "-.")
RECALLS = {"r1": "i2t R@1", "r1i": "t2i R@1", "r10": "i2t R@10", "r10i": "t2i R@10"}
MARKERS = dict(zip(RECALLS, "o^sx", strict=True))
LOSS = "ranking loss, summed over the batch,\n+ trade_off x path loss"

Events = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Options:
    runs: Annotated[list[str], "folders of runs, LOGGER_NAME/DIRECTION", "RUN"]
    out: Annotated[str, "figure to write, .png"]


def curve(events: Events, name: str) -> tuple[list[float], list[float]]:
    """Return steps and values of one metric."""
    points = [(event["step"], event[name]) for event in events if name in event]
    return [step for step, _ in points], [value for _, value in points]


def figure(runs: Mapping[str, Events]) -> "Figure":
    """Draw the loss on the left and the recalls on dev on the right."""
    drawing = new_figure(12, 4.5)
    loss, recall = drawing.subplots(1, 2)
    for number, (name, events) in enumerate(runs.items()):
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.3}
        style["linestyle"] = DASHES[number % len(DASHES)]
        steps, values = curve(events, "Le")
        loss.plot(steps, values, **style, label=name, marker="." if len(steps) == 1 else "")
        for tag, marker in MARKERS.items():
            recall.plot(*curve(events, tag), **style, marker=marker, markersize=5)
    for tag, marker in MARKERS.items():
        recall.plot([], [], "k", linestyle="", marker=marker, label=RECALLS[tag])
    loss.set(title="Training loss, mean since the last point", xlabel="step", ylabel=LOSS)
    recall.set(title="Recall on dev", xlabel="step", ylabel="recall, %", ylim=(0, 102))
    loss.set_ylim(bottom=0)
    for axes, title, place in (loss, "run", "upper"), (recall, "recall", "lower"):
        axes.grid(alpha=0.3)
        where = {"loc": f"outside right {place}", "title": title, "fontsize": "small"}
        drawing.legend(*axes.get_legend_handles_labels(), **where)
    return drawing


def main() -> None:
    options = parse(Options, None, __doc__)
    check_figure(Path(options.out))
    from training.log import events

    runs = {folder: events(Path(folder)) for folder in options.runs}
    write_figure(figure(runs), Path(options.out))


if __name__ == "__main__":
    run(main)
