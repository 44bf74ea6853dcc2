"""results_table.py — the README's tables, made from the files under results/.

    python -m scripts.results_table            # print them
    python -m scripts.results_table --write    # put them between the README's markers

What has not been run says so.
"""

import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from common.cli import parse, print_line, run
from common.errors import require
from common.files import read_json, read_text, write_text
from common.layout import CAPTIONS_PER_IMAGE
from scripts.parts.experiments import REGISTRY, RESULTS, Registry
from scripts.parts.paper_table import as_markdown
from scripts.parts.reports import about, commit_of, demo_rows, scoring_tables, speed_tables
from scripts.parts.tables import COLUMNS, markdown
from training.log import METRICS, RUN, events

README = Path("README.md")
REPORT = "a report under results/"
TAGS = ("r1", "r5", "r10", "r1i", "r5i", "r10i", "rsum")


@dataclass(frozen=True)
class Options:
    write: Annotated[bool, "rewrite the block between the README's markers"] = False


def training(folder: Path) -> str:
    """One training run: how it came about, and its validations."""
    session = read_json(folder / RUN, REPORT)
    if not (folder / METRICS).exists():
        return f"`{session['command']}`: not run.\n"
    validations = [event for event in events(folder) if "rsum" in event]
    rows = [[str(e["step"]), *(f"{e[tag]:.1f}" for tag in TAGS)] for e in validations]
    images = session["options"]["val_captions"] // CAPTIONS_PER_IMAGE
    resumed = ", ".join(map(str, session["resumed_at"])) or "never"
    gigabytes = session["peak_memory_bytes"] / 1e9
    return (
        f"`{session['command']}`\n\n"
        f"First {images} dev images; {session['options']['precision']}, {session['device']}, "
        f"{session['seconds'] / 60:.0f} minutes, {gigabytes:.1f} GB at most, cut off and resumed "
        f"at step: {resumed}; commit {commit_of(session)}; all figures in `{folder}`.\n\n"
        f"{markdown(['step', *COLUMNS], rows)}"
    )


def results(folder: Path) -> str:
    """The paper's figures and ours, then the trainings whose logs are kept."""
    runs = [training(path.parent) for path in sorted(folder.glob(f"flickr8k/*/{RUN}"))]
    return "\n".join([as_markdown(Registry(REGISTRY), folder), *runs])


def reliability(folder: Path) -> str:
    """What the programs that seek faults found."""
    path = folder / "reliability.json"
    found = read_json(path, REPORT) if path.exists() else {}
    return "\n".join([chaos(found.get("chaos")), fuzz(found.get("fuzz"))])


def chaos(found: dict[str, Any] | None) -> str:
    """Runs that were cut off."""
    if found is None:
        return "Runs that were cut off: not run.\n"
    ways = ", ".join(f"{count} {way}" for way, count in sorted(found["ways"].items()))
    ended = sum(count for end, count in found["exits"].items() if end.endswith(" 0"))
    return (
        f"{about(found)}: {found['survived']} of {found['cycles']} cycles ({ways}) left the state "
        f"of an uncut run, bit for bit; {found['cycles'] - ended} of them cut the program off, in "
        f"the others it came to its end. {found['runs_completed']} runs were completed that way, "
        f"with the logs and the best model of an uncut one. Steps done twice: "
        f"{found['steps_done_twice']} in all, {found['most_steps_done_twice']} at most after one "
        f"cut (`--save_step {found['save_step']}`). {found['seconds'] / 60:.0f} minutes.\n"
    )


def fuzz(found: dict[str, Any] | None) -> str:
    """Files from strangers."""
    if found is None:
        return "Fuzzing of the readers: not run.\n"
    head = ["reader", "inputs", "read", "refused", "slowest, s", "minutes", "open faults", "mended"]
    head += ["commit", "torch"]
    rows = [
        [
            *(name, f"{r['inputs']:,}", f"{r['read']:,}", f"{r['refused']:,}"),
            *(f"{r['slowest_seconds']:.2f}", f"{r['seconds'] / 60:.0f}", str(len(r["faults"]))),
            "; ".join(r["mended"]) or "none found",
            *(commit_of(r), r.get("torch", "unknown")),
        ]
        for name, r in found["readers"].items()
    ]
    # the file's command is that of the last report; rows of other readers stay in it
    command = re.sub(r"(?<=--only )\S+", "READER", found["command"])
    return f"`{command}` ({found['machine']}):\n\n{markdown(head, rows)}"


def speed(folder: Path) -> str:
    """What the benchmark found."""
    path = folder / "speed.json"
    if not path.exists():
        return "Benchmark: not run.\n"
    found = read_json(path, REPORT)
    ranks = found["ranks"]
    return (
        f"{speed_tables(found)}\n"
        f"Ranks and recalls of a memory-mapped matrix of {ranks['images']:,} x "
        f"{ranks['captions']:,} scores: {ranks['seconds']:.1f} s, {ranks['peak_gb']:.2f} GB.\n"
    )


def text_cache(folder: Path) -> str:
    """What a training step takes where BERT reads in every step, and where it has read once."""
    rows = []
    for path in sorted(folder.glob(f"cache_text/*/{RUN}")):
        session = read_json(path, REPORT)
        times = [event["batch_time"] for event in events(path.parent) if "batch_time" in event]
        seconds = statistics.median(times[1:])  # the first ones compile
        about = [session["device"], commit_of(session)]
        rows.append([f"`{session['command']}`", f"{seconds:.2f}", *about])
    if not rows:
        return "With and without `--cache_text`: not run.\n"
    return markdown(["", "seconds a step, median", "machine", "commit"], rows)


def scoring(folder: Path) -> str:
    """What the ways of scoring cost and change on trained models."""
    files = sorted(folder.glob("scoring/*.json"))
    found = [read_json(path, REPORT) for path in files]
    return "\n".join(map(scoring_tables, found)) or "Ways of scoring: not run.\n"


def demo(folder: Path) -> str:
    """What the demonstration measured."""
    path = folder / "demo.json"
    if not path.exists():
        return "Demonstration: not run.\n"
    found = read_json(path, REPORT)
    minutes = sum(found["seconds"][name] for name in ("i2t", "t2i")) / 60
    return (
        f"{about(found)}, {minutes:.1f} minutes of training, width {found['width']} in place of "
        f"the paper's 256; {found['settings']}:\n\n{demo_rows(found)}"
    )


BLOCKS: dict[str, Callable[[Path], str]] = {
    "demo": demo,
    "cache": text_cache,
    "results": results,
    "reliability": reliability,
    "speed": speed,
    "scoring": scoring,
}


def updated(readme: str, folder: Path = RESULTS) -> str:
    """The README with each block between its markers as the files under results/ have it."""
    for name, block in BLOCKS.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        parts = re.split(f"{re.escape(begin)}.*?{re.escape(end)}", readme, flags=re.DOTALL)
        require(len(parts) == 2, f"{README}: expected the markers of {name}, once, in this order")
        readme = f"{begin}{block(folder)}{end}".join(parts)
    return readme


def main() -> None:
    if not parse(Options, None, __doc__).write:
        print_line("\n".join(block(RESULTS) for block in BLOCKS.values()))
        return
    write_text(README, updated(read_text(README, "the README, in this folder")))


if __name__ == "__main__":
    run(main)
