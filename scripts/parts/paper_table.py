"""paper_table.py — our recalls beside the paper's, as Markdown and CSV.

From results/paper.json and the results of the registry's runs. A cell without a result says so.
"""

import csv
import io
import logging
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import require
from common.files import read_json
from scripts.parts.experiments import RESULTS, Registry, Run
from scripts.parts.run_results import (
    METRICS,
    Fingerprints,
    RunResult,
    different_inputs,
    problems,
)
from scripts.parts.tables import COLUMNS, markdown

log = logging.getLogger(__name__)

LEGEND = (
    "A cell: the paper's figure, if there is one · ours, mean ± standard deviation over seeds, or, "
    "for one seed, with its 95 % interval over images · the difference."
)
HEAD = ["", "seeds", *COLUMNS]
BESIDE = ["", "beside", "seeds", "rsum differs by"]
NAMES = [*(f"{way} R@{name[1:]}" for way, name in METRICS), "rsum"]  # each by itself

Lines = list[list[str]]


@dataclass(frozen=True)
class Row:
    """A run in a table: six recalls and rsum, the paper's and ours."""

    run: Run
    paper: list[float] | None
    ours: dict[int, list[float]]  # by seed
    intervals: list[tuple[float, float]] | None = None  # of a single seed

    @property
    def mean(self) -> list[float] | None:
        """Means over seeds."""
        return [statistics.mean(column) for column in zip(*self.ours.values(), strict=True)] or None

    @property
    def deviation(self) -> list[float] | None:
        """Standard deviations over seeds; None for one seed."""
        if len(self.ours) < 2:
            return None
        return [statistics.stdev(column) for column in zip(*self.ours.values(), strict=True)]

    @property
    def difference(self) -> list[float] | None:
        """Ours minus the paper's."""
        if self.paper is None or self.mean is None:
            return None
        return [ours - paper for ours, paper in zip(self.mean, self.paper, strict=True)]


def rows(registry: Registry, table: str, results: Path = RESULTS) -> list[Row]:
    """Return the rows of a table."""
    papers = read_json(results / "paper.json", "the paper's figures").get(table, {})
    fold5 = registry.tables[table].fold5
    every: list[Row] = []
    reference: list[Fingerprints] = []  # of the first result that has some
    for run in registry.rows(registry.tables[table]):
        accepted = _accepted(registry, run, results, reference)
        ours = {seed: result.recalls(fold5) for seed, result in accepted.items()}
        one = next(iter(accepted.values())) if len(accepted) == 1 else None
        intervals = one.intervals(fold5) if one else None
        every.append(Row(run, _paper(papers, run, results), ours, intervals))
    return every


def _accepted(
    registry: Registry, run: Run, results: Path, reference: list[Fingerprints]
) -> dict[int, RunResult]:
    """Return a run's results by seed; one with a problem is left out, with a warning.

    Only figures of the same inputs are averaged and compared, so `reference` holds, or gets, those
    of the table's first result.
    """
    accepted: dict[int, RunResult] = {}
    for seed, path in run.results(results).items():
        result = RunResult.read(path)
        against = next(problems(registry, run, result), "")
        if differ := different_inputs([*reference, *result.fingerprints]):
            against = against or f"read other inputs ({differ}) than the table's first result"
        if any(result.matrices == other.matrices for other in accepted.values()):
            against = against or "is of the same scores as another seed"
        if against:
            log.warning("%s: %s; left out", path, against)
        else:
            accepted[seed] = result
            reference += [] if reference else result.fingerprints
    return accepted


def _paper(papers: dict[str, list[float]], run: Run, results: Path) -> list[float] | None:
    """Return the paper's six recalls and rsum of a run, if it has a row there."""
    if not run.paper:
        return None
    recalls = papers.get(run.paper, [])
    where = f"{results / 'paper.json'}: {run.paper}"
    require(len(recalls) == len(METRICS), f"{where} is {recalls}; expected six recalls")
    return [*recalls, sum(recalls)]


def legend(results: Path = RESULTS) -> str:
    """Return what a cell holds, and where the paper's figures are from."""
    source = read_json(results / "paper.json", "the paper's figures")["source"]
    return f"{LEGEND}\nThe paper's: {source}\n"


def as_markdown(registry: Registry) -> str:
    """Return all tables, and what a cell holds."""
    return f"{markdown_tables(registry, registry.tables)}\n{legend()}"


def markdown_tables(registry: Registry, tables: Iterable[str], results: Path = RESULTS) -> str:
    """Return these tables."""
    parts = []
    for title, lines, compared in _lines(registry, tables, results):
        parts.append(f"{title}:\n\n{markdown(HEAD, lines)}")
        if compared:
            parts.append(markdown(BESIDE, compared))
    return "\n".join(parts)


def _lines(
    registry: Registry, tables: Iterable[str], results: Path
) -> Iterator[tuple[str, Lines, Lines]]:
    """Yield each table's title, its lines, and those that compare rows seed by seed, if any."""
    for name in tables:
        every = rows(registry, name, results)
        lines = [[row.run.title, str(len(row.ours) or ""), *_cells(row)] for row in every]
        yield registry.tables[name].title, lines, by_seed(every)


def _cells(row: Row) -> list[str]:
    cells = []
    for k in range(len(COLUMNS)):
        paper = f"{row.paper[k]:.1f}" if row.paper else ""
        ours = f"{row.mean[k]:.1f}" if row.mean else "not run"
        ours += f" ± {row.deviation[k]:.1f}" if row.deviation else ""
        ours += " [{:.1f}, {:.1f}]".format(*row.intervals[k]) if row.intervals else ""
        difference = f"{row.difference[k]:+.1f}" if row.difference else ""
        cells.append(" · ".join(part for part in (paper, ours, difference) if part))
    return cells


def by_seed(every: Sequence[Row]) -> Lines:
    """Return by how much rsum differs from the run beside it, at each seed that both have."""
    runs = {row.run.name: row for row in every}
    lines = []
    for row in every:
        other = runs.get(row.run.beside)
        seeds = sorted(row.ours.keys() & other.ours.keys()) if other else []
        if other and seeds:
            differences = [f"{row.ours[seed][-1] - other.ours[seed][-1]:+.1f}" for seed in seeds]
            numbers = ", ".join(map(str, seeds))
            lines.append([row.run.title, other.run.title, numbers, ", ".join(differences)])
    return lines


def as_csv(registry: Registry) -> str:
    """Return all tables with a line for each figure; the mean is `not run` if there is none."""
    head = ["table", "run", "model", "metric", "paper", "mean", "sd", "low", "high", "difference"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*head, "seeds"])
    for table in registry.tables:
        for row in rows(registry, table):
            low, high = zip(*row.intervals, strict=True) if row.intervals else (None, None)
            columns = (row.paper, row.mean, row.deviation, low, high, row.difference)
            for k, name in enumerate(NAMES):
                numbers = [round(values[k], 4) if values else "" for values in columns]
                numbers[1] = "not run" if row.mean is None else numbers[1]
                about = [table, row.run.name, row.run.title, name]
                writer.writerow([*about, *numbers, len(row.ours)])
    return text.getvalue()
