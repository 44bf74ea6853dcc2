"""results_table.py — the README's tables, made from the files under results/.

    python -m scripts.results_table            # print them
    python -m scripts.results_table --write    # put them between the README's markers

The paper's figures come from results/paper.json; what has not been run says so.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from files import read_text, whole_file
from options import parse, run

RESULTS = Path("results")
README = Path("README.md")
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
TITLES = {
    "flickr30k_1k": "Flickr30K, 1,000 test images",
    "mscoco_1k_fold5": "MSCOCO, mean of five folds of 1,000 test images",
    "mscoco_5k": "MSCOCO, 5,000 test images",
}
SIDES = ("i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10", "rsum")
TAGS = ("r1", "r5", "r10", "r1i", "r5i", "r10i", "rsum")


@dataclass(frozen=True)
class Options:
    write: Annotated[bool, "rewrite the block between the README's markers"] = False


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def paper(results: Path) -> str:
    """The paper's figures beside ours."""
    figures = json.loads((results / "paper.json").read_text(encoding="utf-8"))
    parts = []
    for key, title in TITLES.items():
        rows = [
            [model, *(f"{recall:.1f}" for recall in recalls), f"{sum(recalls):.1f}", "not run"]
            for model, recalls in figures[key].items()
        ]
        parts.append(f"{title}, the paper's figures:\n\n{table(['', *SIDES, 'ours'], rows)}")
    return "\n".join([*parts, f"Source: {figures['source']}\n"])


def training(folder: Path) -> str:
    """One training run: how it came about, and its validations."""
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    validations = [event for event in events if "rsum" in event]
    rows = [[str(e["step"]), *(f"{e[tag]:.1f}" for tag in TAGS)] for e in validations]
    images = about["options"]["val_captions"] // 5
    resumed = ", ".join(map(str, about["resumed_at"])) or "never"
    gigabytes = about["peak_memory_bytes"] / 1e9
    commit = (about["commit"] or "unknown")[:12]
    return (
        f"`{about['command']}`\n\n"
        f"First {images} dev images; {about['options']['precision']}, {about['device']}, "
        f"{about['seconds'] / 60:.0f} minutes, {gigabytes:.1f} GB at most, cut off and resumed at "
        f"step: {resumed}; commit {commit}; all figures in `{folder}`.\n\n"
        f"{table(['step', *SIDES], rows)}"
    )


def tables(results: Path = RESULTS) -> str:
    """Everything between the markers."""
    runs = [training(path.parent) for path in sorted(results.glob("*/*/run.json"))]
    return "\n".join([*runs, paper(results)])


def main() -> None:
    if not parse(Options, None, __doc__).write:
        sys.stdout.write(tables())
        return
    before, rest = read_text(README, "the README, in this folder").split(BEGIN)
    text = f"{before}{BEGIN}\n{tables()}{END}{rest.split(END)[1]}".encode()
    with whole_file(README, len(text)) as file:
        file.write(text)


if __name__ == "__main__":
    run(main)
