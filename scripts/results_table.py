"""results_table.py — the tables of README.md and docs/, made from the files under results/.

    python -m scripts.results_table            # print them
    python -m scripts.results_table --write    # put them between the markers of the pages

A figure that was not measured is `not run`.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

from common.cli import parse, print_line, run
from common.errors import require
from common.files import read_json, read_text, write_text
from scripts.parts.experiments import REGISTRY, RESULTS, read_registry, require_project_folder
from scripts.parts.gpu_tables import gpu_status, gpu_tables
from scripts.parts.run_results import legend, read_result, recall_table, table_rows
from scripts.parts.search_tables import search_tables
from scripts.parts.tables import (
    chance,
    counts_table,
    markdown,
    origin,
    scaling_table,
    short_commit,
    speed_tables,
    surroundings,
)
from scripts.parts.traffic import traffic_table

PAPER_TABLES = {
    "flickr30k_1k": "Flickr30K, 1K",
    "mscoco_1k_fold5": "MSCOCO, 5 folds of 1K",
    "mscoco_5k": "MSCOCO, 5K",
}
NAMES = PAPER_TABLES | {  # in the README's table
    "flickr8k": "Flickr8k, short",
    "flickr8k_256_cached": "Flickr8k, full",
}
SHORT = {0: "R@1 i2t", 3: "R@1 t2i", 6: "rsum"}  # columns of the README's tables


@dataclass(frozen=True)
class Options:
    write: Annotated[bool, "rewrite the text between the markers of the pages"] = False


def report(name: str) -> dict[str, Any]:
    """Return the content of a file under results/."""
    return read_json(RESULTS / f"{name}.json", "a report under results/")


def paper() -> str:
    """Return the README's table: the paper's figures and ours, of runs that have any."""
    _, every = read_registry(REGISTRY)
    lines = []
    for table, name in NAMES.items():
        for row in table_rows(every[table]):
            if not (row.paper or row.seeds):
                continue
            theirs = [f"{row.paper[k]:.1f}" if row.paper else "" for k in SHORT]
            lines.append([name, row.run.title, *theirs, *map(row.ours, SHORT)])
    columns = [f"{whose} {column}" for whose in ("paper", "ours") for column in SHORT.values()]
    return markdown(["data", "model", *columns], lines)


def demonstration() -> str:
    """Return the README's table of the demonstration: chance, and the figures over seeds."""
    _, every = read_registry(REGISTRY)
    table = every["demo"]
    results = [read_result(path) for run in table.runs for path in run.results().values()]
    where = "; ".join(sorted(set(map(surroundings, results))))
    recalls = chance(table.runs[0].images)
    random = [*recalls, sum(recalls)]
    rows = table_rows(table)
    cells = [["chance", *(f"{random[k]:.1f}" for k in SHORT)]]
    cells += [[row.run.title, *map(row.ours, SHORT)] for row in rows]
    head = [f"{table.runs[0].images} unseen scenes", *SHORT.values()]
    seeds = max((len(row.seeds) for row in rows), default=0)
    return f"Mean ± deviation over {seeds} seeds, on {where}:\n\n{markdown(head, cells)}"


def tables(*names: str) -> str:
    """Return tables of the registry."""
    _, every = read_registry(REGISTRY)
    return "\n".join(recall_table(every[name]) for name in names)


def chaos() -> str:
    """Return how many interrupted trainings resumed."""
    r = report("reliability")["chaos"]
    ways = ", ".join(f"{count} {way}" for way, count in sorted(r["ways"].items()))
    return (
        f"{origin(r)}: after {r['survived']} of {r['cycles']} cycles ({ways}) the "
        f"state was that of an uninterrupted run, bit for bit. {r['runs_completed']} runs "
        f"were completed, each with the logs and the best model of an uninterrupted one. At most "
        f"{r['most_steps_done_twice']} steps were done twice after one interruption "
        f"(`--save_step {r['save_step']}`). {r['seconds'] / 60:.0f} minutes.\n"
    )


def fuzz() -> str:
    """Return the table of the readers of files, and what they did with damaged ones."""
    results = report("reliability")["fuzz"]
    head = ["reader", "inputs", "read", "refused", "slowest, s", "minutes", "open faults", "mended"]
    lines = []
    for name, r in results["readers"].items():
        counts = [f"{r[key]:,}" for key in ("inputs", "read", "refused")]
        times = [f"{r['slowest_seconds']:.2f}", f"{r['seconds'] / 60:.0f}"]
        faults = [str(len(r["faults"])), "; ".join(r["mended"]) or "none found"]
        lines.append([name, *counts, *times, *faults, short_commit(r), r["torch"]])
    # The command is that of the last report, the rows of other readers are older.
    command = re.sub(r"(?<=--only )\S+", "READER", results["command"])
    return f"`{command}` ({results['machine']}):\n\n{markdown([*head, 'commit', 'torch'], lines)}"


def report_if_run(name: str) -> dict[str, Any] | None:
    """Return the content of a file under results/, None if it was not measured."""
    return report(name) if (RESULTS / f"{name}.json").exists() else None


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "gpu_status": lambda: gpu_status(report_if_run("gpu")),
        "paper": paper,
        "demo": demonstration,
    },
    "docs/results.md": {
        "paper_full": lambda: f"{tables(*PAPER_TABLES)}\n{legend()}",
        "flickr8k": lambda: tables("flickr8k"),
        "demo_seeds": lambda: tables("demo"),
        "ablations": lambda: tables("ablations"),
        "full": lambda: tables("flickr8k_64", "flickr8k_256_cached", "flickr8k_256"),
    },
    "docs/speed.md": {
        "counts": lambda: counts_table(report("counts")["rows"]),
        "speed": lambda: speed_tables(report("speed")),
        "search": lambda: search_tables(report_if_run("search")),
        "gpu": lambda: gpu_tables(report_if_run("gpu")),
    },
    "docs/training.md": {
        "traffic": traffic_table,
        "scaling": lambda: scaling_table(report("scaling")),
    },
    "docs/reliability.md": {"chaos": chaos, "fuzz": fuzz},
}


def updated(page: str) -> str:
    """Return a page with its tables made anew. Raises InputError if a marker is missing."""
    text = read_text(Path(page), "a page of the project")
    for name, table in PAGES[page].items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        parts = re.split(f"{re.escape(begin)}.*?{re.escape(end)}", text, flags=re.DOTALL)
        require(len(parts) == 2, f"{page}: expected the markers of {name}, once, in this order")
        text = f"{begin}{table()}{end}".join(parts)
    return text


def main() -> None:
    options = parse(Options, None, __doc__)
    require_project_folder()
    for page, blocks in PAGES.items():
        if options.write:
            write_text(Path(page), updated(page))
        else:
            print_line("\n".join(block() for block in blocks.values()))


if __name__ == "__main__":
    run(main)
