"""results_table.py — the tables of README.md and docs/, made from the files under results/.

    python -m scripts.results_table            # print them
    python -m scripts.results_table --write    # put them between the markers of the pages

A figure that was not measured is `not run`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from common.cli import parse, print_line, run
from common.errors import require
from common.files import read_json, read_text, write_text
from common.layout import CAPTIONS_PER_IMAGE
from scripts.parts.experiments import REGISTRY, RESULTS, Registry
from scripts.parts.paper_table import legend, markdown_tables, rows
from scripts.parts.tables import (
    COLUMNS,
    demo_rows,
    markdown,
    origin,
    short_commit,
    speed_tables,
)

REPORT = "a report under results/"
TAGS = ("r1", "r5", "r10", "r1i", "r5i", "r10i", "rsum")  # of a validation in metrics.jsonl
PAPER_TABLES = ("flickr30k_1k", "mscoco_1k_fold5", "mscoco_5k")
SHORT_NAMES = ("Flickr30K, 1K", "MSCOCO, 5 folds of 1K", "MSCOCO, 5K")
SHORT = {0: "R@1 i2t", 3: "R@1 t2i", 6: "rsum"}  # columns of the README's table
NOT_RUN = "not run\n"


@dataclass(frozen=True)
class Options:
    write: Annotated[bool, "rewrite the text between the markers of the pages"] = False


def paper(results: Path) -> str:
    """The README's table: the paper's figures and ours."""
    registry, lines = Registry(REGISTRY), []
    for name, short in zip((*PAPER_TABLES, "flickr8k"), (*SHORT_NAMES, "Flickr8k"), strict=True):
        for row in rows(registry, name, results):
            theirs = [f"{row.paper[k]:.1f}" if row.paper else "" for k in SHORT]
            ours = [replace(row, paper=None, intervals=None).cell(k) for k in SHORT]
            lines.append([short, row.run.title, *theirs, *ours])
    columns = [f"{whose} {what}" for whose in ("paper", "ours") for what in SHORT.values()]
    return markdown(["data", "model", *columns], lines)


def tables(*names: str) -> Callable[[Path], str]:
    """Return a function that makes these tables of the registry."""
    return lambda results: markdown_tables(Registry(REGISTRY), names, results)


def paper_full(results: Path) -> str:
    """The paper's tables, with every figure."""
    return f"{tables(*PAPER_TABLES)(results)}\n{legend(results)}"


def flickr8k(results: Path) -> str:
    """The models on Flickr8k, and their trainings."""
    trainings = [training(path) for path in sorted((results / "flickr8k").iterdir())]
    return "\n".join([tables("flickr8k")(results), *trainings])


def training(folder: Path) -> str:
    """A training: how it was made, and its validations."""
    from training.log import METRICS, RUN, events

    session = read_json(folder / RUN, REPORT)
    if not (folder / METRICS).exists():
        return f"`{session['command']}`: not run.\n"
    validations = [event for event in events(folder) if "rsum" in event]
    lines = [[str(e["step"]), *(f"{e[tag]:.1f}" for tag in TAGS)] for e in validations]
    images = session["options"]["val_captions"] // CAPTIONS_PER_IMAGE
    resumed = ", ".join(map(str, session["resumed_at"])) or "never"
    return (
        f"`{session['command']}`\n\n"
        f"First {images} dev images; {session['options']['precision']}, {session['device']}, "
        f"{session['seconds'] / 60:.0f} minutes, {session['peak_memory_bytes'] / 1e9:.1f} GB at "
        f"most, resumed at step: {resumed}; commit {short_commit(session)}; all figures in "
        f"`{folder}`.\n\n{markdown(['step', *COLUMNS], lines)}"
    )


def chaos(results: Path) -> str:
    """Interrupted trainings."""
    report = _report(results / "reliability.json").get("chaos")
    if report is None:
        return NOT_RUN
    ways = ", ".join(f"{count} {way}" for way, count in sorted(report["ways"].items()))
    ended = sum(count for end, count in report["exits"].items() if end.endswith(" 0"))
    return (
        f"{origin(report)}: after {report['survived']} of {report['cycles']} cycles ({ways}) the "
        f"state was that of an uninterrupted run, bit for bit. {report['cycles'] - ended} of them "
        f"interrupted the program, in the others it ended first. {report['runs_completed']} runs "
        f"were completed, each with the logs and the best model of an uninterrupted one. Steps "
        f"done twice: {report['steps_done_twice']}, at most {report['most_steps_done_twice']} "
        f"after one interruption (`--save_step {report['save_step']}`). "
        f"{report['seconds'] / 60:.0f} minutes.\n"
    )


def fuzz(results: Path) -> str:
    """Damaged files."""
    report = _report(results / "reliability.json").get("fuzz")
    if report is None:
        return NOT_RUN
    head = ["reader", "inputs", "read", "refused", "slowest, s", "minutes", "open faults", "mended"]
    lines = [
        [
            *(name, f"{r['inputs']:,}", f"{r['read']:,}", f"{r['refused']:,}"),
            *(f"{r['slowest_seconds']:.2f}", f"{r['seconds'] / 60:.0f}", str(len(r["faults"]))),
            "; ".join(r["mended"]) or "none found",
            *(short_commit(r), r.get("torch", "unknown")),
        ]
        for name, r in report["readers"].items()
    ]
    # The command is that of the last report, the rows of other readers are older.
    command = re.sub(r"(?<=--only )\S+", "READER", report["command"])
    return f"`{command}` ({report['machine']}):\n\n{markdown([*head, 'commit', 'torch'], lines)}"


def speed(results: Path) -> str:
    """The benchmark."""
    report = _report(results / "speed.json")
    return speed_tables(report) if report else NOT_RUN


def demo(results: Path) -> str:
    """The demonstration."""
    report = _report(results / "demo.json")
    if not report:
        return NOT_RUN
    minutes = (report["seconds"]["i2t"] + report["seconds"]["t2i"]) / 60
    return (
        f"{origin(report)}, {minutes:.1f} minutes of training, width {report['width']} instead of "
        f"256; {report['settings']}:\n\n{demo_rows(report)}"
    )


def _report(path: Path) -> dict[str, Any]:
    return read_json(path, REPORT) if path.exists() else {}


PAGES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"paper": paper, "demo": demo},
    "docs/results.md": {
        "paper_full": paper_full,
        "flickr8k": flickr8k,
        "demo_seeds": tables("demo"),
        "ablations": tables("ablations"),
    },
    "docs/speed.md": {"speed": speed},
    "docs/reliability.md": {"chaos": chaos, "fuzz": fuzz},
}


def updated(page: str, text: str, results: Path = RESULTS) -> str:
    """Return a page's text with its tables made anew. Raises InputError if a marker is missing."""
    for name, table in PAGES[page].items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        parts = re.split(f"{re.escape(begin)}.*?{re.escape(end)}", text, flags=re.DOTALL)
        require(len(parts) == 2, f"{page}: expected the markers of {name}, once, in this order")
        text = f"{begin}{table(results)}{end}".join(parts)
    return text


def main() -> None:
    options = parse(Options, None, __doc__)
    for page, blocks in PAGES.items():
        if options.write:
            write_text(Path(page), updated(page, read_text(Path(page), "a page of the project")))
        else:
            print_line("\n".join(block(RESULTS) for block in blocks.values()))


if __name__ == "__main__":
    run(main)
