"""paper_table.py — recalls of every run beside the paper's, as Markdown, LaTeX, CSV and JSON.

From results/paper.json and the results files of the registry's runs. What was not run says so.
"""

import csv
import io
import json
import logging
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError, brief_repr, require
from common.files import read_json
from scripts.parts.experiments import RESULT, RESULTS, Registry
from scripts.parts.objections import objections
from scripts.parts.tables import COLUMNS, markdown

log = logging.getLogger(__name__)

METRICS = [(way, name) for way in ("i2t", "t2i") for name in ("r1", "r5", "r10")]
ABOUT = (
    "A cell: the paper's figure, if there is one · ours, mean ± deviation over seeds, or "
    "of one seed, where it is known, its 95 % interval over images · the difference."
)
ROUNDING = 1e-6
PERCENT = 100 + ROUNDING
HEAD = ["", "seeds", *COLUMNS]
BESIDE = ["", "beside", "seeds", "rsum differs by"]
NAMES = [*(f"{way} R@{name[1:]}" for way, name in METRICS), "rsum"]  # each by itself

Lines = list[list[str]]


@dataclass(frozen=True)
class Row:
    """A run's figures in a table: six recalls and rsum, the paper's and ours."""

    run: str
    title: str
    paper: list[float] | None
    ours: dict[int, list[float]]  # by seed
    interval: list[list[float]] | None = None  # of a single seed's figures, low and high
    beside: str = ""  # the run that it is compared with, seed by seed

    @property
    def mean(self) -> list[float] | None:
        """Over seeds."""
        columns = zip(*self.ours.values(), strict=True)
        return [statistics.mean(column) for column in columns] or None

    @property
    def deviation(self) -> list[float] | None:
        """Over seeds; None for one seed."""
        several = len(self.ours) > 1
        columns = zip(*self.ours.values(), strict=True)
        return [statistics.stdev(column) for column in columns] if several else None

    @property
    def difference(self) -> list[float] | None:
        """Ours less the paper's."""
        if self.paper is None or self.mean is None:
            return None
        return [ours - paper for ours, paper in zip(self.mean, self.paper, strict=True)]


def rows(registry: Registry, table: str, results: Path = RESULTS) -> list[Row]:
    """The rows of a table, from the files under `results`. Raises InputError on damaged ones.

    Left out, with a warning, are results that there is an objection to.
    """
    papers = read_json(results / "paper.json", "the paper's figures")
    found = []
    for run in registry.runs.values():
        if table in run.tables:
            paper = None
            if run.paper:
                recalls = (
                    papers[table].get(run.paper) if isinstance(papers.get(table), dict) else None
                )
                six = isinstance(recalls, list) and [type(r) in (int, float) for r in recalls]
                where = f"{results / 'paper.json'}: {run.paper} in {table} is {brief_repr(recalls)}"
                require(six == [True] * len(METRICS), f"{where}; expected six recalls")
                paper = [*recalls, sum(recalls)]
            protocol, paths = run.tables[table], {}
            for seed, path in run.results(results).items():
                if against := next(objections(registry, run, seed, results), ""):
                    log.warning("%s; left out", against)
                else:
                    paths[seed] = path
            ours = {seed: figures_of(path, protocol) for seed, path in paths.items()}
            interval = intervals_of(*paths.values(), protocol) if len(paths) == 1 else None
            found.append(Row(run.name, run.title, paper, ours, interval, run.beside))
    return found


def papers_source(results: Path = RESULTS) -> str:
    """Where the paper's figures are from."""
    found = read_json(results / "paper.json", "the paper's figures").get("source", "not named")
    return " ".join(str(found).split())


def figures_of(path: Path, protocol: str) -> list[float]:
    """Six recalls and rsum of an evaluation. Raises InputError where the file has none."""
    found = _seven(path, protocol, "metrics")
    fits = all(type(value) in (int, float) and 0 <= value <= PERCENT for value in found[:-1])
    fits = fits and all(side == sorted(side) for side in (found[:3], found[3:6]))
    fits = fits and type(found[-1]) in (int, float)
    fits = fits and abs(sum(found[:-1]) - found[-1]) < ROUNDING
    told = ", ".join(map(brief_repr, found))
    require(fits, f"{path}: {told}; expected R@1 to R@10 in percent, twice, and their sum")
    return found


def intervals_of(path: Path, protocol: str) -> list[list[float]] | None:
    """The 95 % intervals of these figures, `[7][2]`; None where the evaluation made none."""
    content: Any = read_json(path, RESULT)
    if content["protocols"][protocol].get("intervals") is None:
        return None
    found = _seven(path, protocol, "intervals")
    fits = all(isinstance(ends, list) and len(ends) == 2 for ends in found)
    fits = fits and all(type(end) in (int, float) for ends in found for end in ends)
    most = [*(PERCENT for _ in METRICS), len(METRICS) * PERCENT]
    fits = fits and all(0 <= a <= b <= top for (a, b), top in zip(found, most, strict=True))
    told = ", ".join(brief_repr(str(ends)) for ends in found)
    require(fits, f"{path}: intervals {told}; expected low and high of each figure")
    return found


def _seven(path: Path, protocol: str, kind: str) -> list[Any]:
    """Of an evaluation, what it holds of that kind for six recalls and rsum."""
    content: Any = read_json(path, RESULT)
    try:
        values = content["protocols"][protocol][kind]
        return [*(values[way][name] for way, name in METRICS), values["rsum"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: holds no {kind} of protocol {protocol}: {error!r}") from error


def texts(row: Row) -> list[str]:
    """A row's cells: the paper's figure · ours, with deviation or interval · the difference."""
    found = []
    for k in range(len(COLUMNS)):
        paper = f"{row.paper[k]:.1f}" if row.paper else ""
        ours = f"{row.mean[k]:.1f}" if row.mean else "not run"
        ours += f" ± {row.deviation[k]:.1f}" if row.deviation else ""
        ours += " [{:.1f}, {:.1f}]".format(*row.interval[k]) if row.interval else ""
        difference = f"{row.difference[k]:+.1f}" if row.difference else ""
        found.append(" · ".join(part for part in (paper, ours, difference) if part))
    return found


def as_markdown(registry: Registry, results: Path = RESULTS) -> str:
    """Every table."""
    parts = []
    for title, lines, compared in _lines(registry, results):
        parts.append(f"{title}:\n\n{markdown(HEAD, lines)}")
        if compared:
            parts.append(markdown(BESIDE, compared))
    return "\n".join([*parts, f"{ABOUT}\nThe paper's: {papers_source(results)}\n"])


def _lines(registry: Registry, results: Path) -> Iterator[tuple[str, Lines, Lines]]:
    """Of each table its title, its lines, and those that compare rows seed by seed, if any."""
    for name, title in registry.tables.items():
        every = rows(registry, name, results)
        lines = [[row.title, str(len(row.ours) or ""), *texts(row)] for row in every]
        yield title, lines, by_seed(every)


def by_seed(every: Sequence[Row]) -> Lines:
    """How far rsum lies from that of the run that a row is compared with, at each seed of both."""
    runs = {row.run: row for row in every}
    lines = []
    for row in every:
        other = runs.get(row.beside)
        seeds = sorted(row.ours.keys() & other.ours.keys()) if other else []
        if seeds:
            differences = (f"{row.ours[seed][-1] - other.ours[seed][-1]:+.1f}" for seed in seeds)
            numbers = ", ".join(map(str, seeds))
            lines.append([row.title, other.title, numbers, ", ".join(differences)])
    return lines


def as_csv(registry: Registry) -> str:
    """One line a figure, its mean `not run` where it has none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for number, line in enumerate(_figures(registry)):
        if number == 0:
            writer.writerow(line)
        known = line | ({"mean": "not run"} if line["mean"] is None else {})
        writer.writerow(["" if value is None else value for value in known.values()])
    return text.getvalue()


def as_json(registry: Registry) -> str:
    """The same figures, a list; null where there is none."""
    return json.dumps(list(_figures(registry)), indent=1) + "\n"


def _figures(registry: Registry) -> list[dict[str, object]]:
    return [
        _figure(name, row, k)
        for name in registry.tables
        for row in rows(registry, name)
        for k in range(len(COLUMNS))
    ]


def _figure(table: str, row: Row, k: int) -> dict[str, object]:
    def at(values: Sequence[float] | None) -> float | None:
        return None if values is None else round(values[k], 4)

    low, high = zip(*row.interval, strict=True) if row.interval else (None, None)
    return {
        "table": table,
        "run": row.run,
        "model": row.title,
        "metric": NAMES[k],
        "paper": at(row.paper),
        "mean": at(row.mean),
        "sd": at(row.deviation),
        "low": at(low),
        "high": at(high),
        "seeds": len(row.ours),
        "difference": at(row.difference),
    }


def as_latex(registry: Registry) -> str:
    """Tables for a paper."""
    parts = []
    for title, lines, compared in _lines(registry, RESULTS):
        parts.append(_latex(f"{title}. {ABOUT}", HEAD, lines))
        if compared:
            parts.append(_latex(f"{title}. Seed by seed.", BESIDE, compared))
    return "\n".join([*parts, f"% The paper's figures: {papers_source()}\n"])


def _latex(caption: str, head: list[str], lines: list[list[str]]) -> str:
    body = "\n".join(" & ".join(map(_tex, line)) + r" \\" for line in lines)
    return (
        f"\\begin{{table}}\n\\caption{{{_tex(caption)}}}\n"
        f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n"
        f"{' & '.join(map(_tex, head))} \\\\ \\hline\n"
        f"{body}\n\\end{{tabular}}\n\\end{{table}}\n"
    )


def _tex(text: str) -> str:
    text = re.sub(r"(?<![\w-])-(?=\d)", "−", text)
    return text.replace("--", "-\0-").translate(TEX)


TEX = str.maketrans(
    {mark: f"\\{mark}" for mark in "_%&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"\0": "{}", "±": r"$\pm$", "−": "$-$", "·": r"$\cdot$", "`": ""}
)
FORMATS = {"md": as_markdown, "latex": as_latex, "csv": as_csv, "json": as_json}
