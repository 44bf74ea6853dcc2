"""run_results.py — the results of runs, and our recalls beside the paper's as Markdown.

`scripts/reproduce.py` writes results/reproduce/NAME_seedN.json; results/paper.json has the paper's
figures. A cell without a result is `not run`.
"""

import logging
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import read_json, write_json
from common.results import EvaluationResult
from scripts.parts.experiments import RESULTS, Registry, Run
from scripts.parts.tables import COLUMNS, markdown, recalls_and_rsum

log = logging.getLogger(__name__)

INPUTS = ("data", "bert", "training")  # that a fingerprint is of
LEGEND = (
    "A cell: the paper's figure, if there is one · ours, mean ± standard deviation over seeds, or, "
    "for one seed, with its 95 % interval over images · the difference."
)

Fingerprints = dict[str, str | None]  # by input; None if it is not known


@dataclass(frozen=True)
class RunResult:
    """The evaluation of a run, and how its models came about."""

    entry: str  # SHA-256 of the run's entry in the registry
    commands: list[str]  # of the registry; of a model from elsewhere only the last ones were run
    trainings: list[dict[str, Any] | None]  # of run.json, one a model; None if it came without
    matrices: dict[str, str]  # SHA-256 of each model's scores, by file
    evaluation: EvaluationResult
    machine: str
    torch: str
    commit: str | None

    @classmethod
    def read(cls, path: Path) -> "RunResult":
        """Read a results file. Raises InputError if it is damaged."""
        content = read_json(path, "the result of a run")
        evaluation = EvaluationResult.from_json(content.get("evaluation", {}), path)
        try:
            return cls(**content | {"evaluation": evaluation})
        except TypeError as error:  # a key is missing or unknown
            raise InputError(f"{path}: not the result of a run: {error}") from error

    def write(self, path: Path) -> None:
        """Write a results file."""
        write_json(path, vars(self) | {"evaluation": self.evaluation.to_json()})

    @property
    def fingerprints(self) -> list[Fingerprints]:
        """What each model read, as far as it is known."""
        return [each for each in self.evaluation.fingerprints or () if each]


def problems(registry: Registry, run: Run, result: RunResult) -> Iterator[str]:
    """Yield why a result must not stand in a table."""
    expected, images = registry.data_of(run).images, result.evaluation.images
    if result.entry != registry.digest(run):
        yield "is stale: scripts/experiments.toml lists other options now"
    if any(training and training.get("complete") is False for training in result.trainings):
        yield "its training did not finish"
    if images != expected:
        yield f"is of {images} images; expected {expected}"
    if len(set(result.matrices.values())) != len(registry.members(run)):
        yield "its models do not have different scores"
    if differ := different_inputs(result.fingerprints):
        yield f"its models read different inputs ({differ})"


def different_inputs(fingerprints: Sequence[Fingerprints]) -> str:
    """Return which inputs differ among fingerprints; an unknown one differs from none."""
    known = {name: {each.get(name) for each in fingerprints} - {None} for name in INPUTS}
    return ", ".join(name for name, values in known.items() if len(values) > 1)


@dataclass(frozen=True)
class Row:
    """A run in a table: six recalls and rsum, the paper's and ours."""

    run: Run
    paper: list[float]  # empty if the paper has no such row
    ours: dict[int, list[float]]  # by seed
    intervals: list[tuple[float, float]]  # of a single seed, otherwise empty

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


def rows(registry: Registry, name: str) -> list[Row]:
    """Return the rows of a table."""
    table = registry.tables[name]
    papers = read_json(RESULTS / "paper.json", "the paper's figures").get(name, {})
    reference: list[Fingerprints] = []
    every = []
    for run in registry.rows(table):
        theirs = papers.get(run.paper, [])
        ours, intervals = {}, []
        for seed, result in _accepted(registry, run, reference).items():
            protocol = result.evaluation.fold5 if table.fold5 else result.evaluation.whole
            if protocol is None:
                raise InputError(f"{run.result(seed)}: has no recalls of five folds")
            ours[seed] = recalls_and_rsum(protocol.metrics.to_json())
            intervals = recalls_and_rsum(protocol.intervals) if protocol.intervals else []
        paper = [*theirs, sum(theirs)] if theirs else []
        every.append(Row(run, paper, ours, intervals if len(ours) == 1 else []))
    return every


def _accepted(registry: Registry, run: Run, reference: list[Fingerprints]) -> dict[int, RunResult]:
    """Return a run's results by seed; one with a problem is left out, with a warning.

    Only figures of the same inputs are averaged and compared, so `reference` holds, or gets, those
    of the table's first result.
    """
    accepted: dict[int, RunResult] = {}
    scores: set[str] = set()
    for seed, path in run.results().items():
        result = RunResult.read(path)
        against = [*problems(registry, run, result)]
        if differ := different_inputs([*reference, *result.fingerprints]):
            against.append(f"read other inputs ({differ}) than the table's first result")
        if scores & {*result.matrices.values()}:
            against.append("is of the same scores as another seed")
        if against:
            log.warning("%s: %s; left out", path, against[0])
        else:
            accepted[seed] = result
            scores |= {*result.matrices.values()}
            reference += [] if reference else result.fingerprints
    return accepted


def legend() -> str:
    """Return what a cell holds, and where the paper's figures are from."""
    source = read_json(RESULTS / "paper.json", "the paper's figures")["source"]
    return f"{LEGEND}\nThe paper's: {source}\n"


def markdown_tables(registry: Registry, names: Iterable[str]) -> str:
    """Return these tables."""
    parts = []
    for name in names:
        every = rows(registry, name)
        lines = [
            [row.run.title, str(len(row.ours) or ""), *map(row.cell, range(len(COLUMNS)))]
            for row in every
        ]
        table = markdown(["", "seeds", *COLUMNS], lines)
        parts.append(f"{registry.tables[name].title}:\n\n{table}")
        if compared := [*_by_seed(every)]:
            parts.append(markdown(["", "beside", "seeds", "rsum differs by"], compared))
    return "\n".join(parts)


def _by_seed(every: Sequence[Row]) -> Iterator[list[str]]:
    """Yield by how much rsum differs from the run beside it, at each seed that both have."""
    by_name = {row.run.name: row for row in every}
    for row in every:
        other = by_name.get(row.run.beside, row)
        seeds = sorted(row.ours.keys() & other.ours.keys())
        if other is not row and seeds:
            differences = [f"{row.ours[seed][-1] - other.ours[seed][-1]:+.1f}" for seed in seeds]
            numbers = ", ".join(map(str, seeds))
            yield [row.run.title, other.run.title, numbers, ", ".join(differences)]
