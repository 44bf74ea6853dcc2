"""paper_table.py — our recalls beside the paper's, as Markdown.

From results/paper.json and the results of the registry's runs. A cell without a result says so.
"""

import logging
import statistics
from collections.abc import Iterable, Sequence
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


@dataclass(frozen=True)
class Row:
    """A run in a table: six recalls and rsum, the paper's and ours."""

    run: Run
    paper: list[float] | None
    ours: dict[int, list[float]]  # by seed
    intervals: list[tuple[float, float]] | None = None  # of a single seed

    def cell(self, k: int) -> str:
        """Return figure k: the paper's · ours, with deviation or interval · the difference."""
        values = [figures[k] for figures in self.ours.values()]
        paper = [f"{self.paper[k]:.1f}"] if self.paper else []
        if not values:
            return " · ".join([*paper, "not run"])
        mean = statistics.mean(values)
        ours = f"{mean:.1f}"
        if len(values) > 1:
            ours += f" ± {statistics.stdev(values):.1f}"
        if self.intervals:
            ours += " [{:.1f}, {:.1f}]".format(*self.intervals[k])
        difference = [f"{mean - self.paper[k]:+.1f}"] if self.paper else []
        return " · ".join([*paper, ours, *difference])


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
    scores: set[str] = set()
    for seed, path in run.results(results).items():
        result = RunResult.read(path)
        against = next(problems(registry, run, result), "")
        if differ := different_inputs([*reference, *result.fingerprints]):
            against = against or f"read other inputs ({differ}) than the table's first result"
        if scores & {*result.matrices.values()}:
            against = against or "is of the same scores as another seed"
        if against:
            log.warning("%s: %s; left out", path, against)
        else:
            accepted[seed] = result
            scores |= {*result.matrices.values()}
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
    for name in tables:
        every = rows(registry, name, results)
        lines = [
            [row.run.title, str(len(row.ours) or ""), *map(row.cell, range(len(COLUMNS)))]
            for row in every
        ]
        parts.append(f"{registry.tables[name].title}:\n\n{markdown(HEAD, lines)}")
        if compared := by_seed(every):
            parts.append(markdown(BESIDE, compared))
    return "\n".join(parts)


def by_seed(every: Sequence[Row]) -> list[list[str]]:
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
