"""run_results.py — the results of runs, and tables of our recalls and the paper's.

`scripts/reproduce.py` writes results/reproduce/NAME_seedN.json; results/paper.json has the paper's
figures. A cell without a result is `not run`.
"""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import require
from common.files import read_json
from common.results import EvaluationResult
from scripts.parts.experiments import RESULTS, Run, Table
from scripts.parts.tables import COLUMNS, markdown, recalls_and_rsum

log = logging.getLogger(__name__)


def read_result(path: Path) -> dict[str, Any]:
    """Return the result of a run. Raises InputError if it is damaged.

    Its keys: "entry", the digest of the run; "commands"; "trainings", the run.json of each model
    or None; "evaluation", the JSON of an EvaluationResult; and the machine, torch and commit that
    evaluated it.
    """
    result = read_json(path, "the result of a run")
    missing = {"entry", "trainings", "evaluation"} - result.keys()
    require(not missing, f"{path}: not the result of a run: lacks {', '.join(missing)}")
    EvaluationResult.from_json(result["evaluation"], path)
    return result


def find_problem(
    run: Run, result: dict[str, Any], before: Sequence[dict[str, Any]] = ()
) -> str | None:
    """Return why a result must not stand in a table after the results `before`, or None."""
    if result["entry"] != run.digest():
        return "is stale: scripts/experiments.toml lists other options now"
    if any(training and training.get("complete") is False for training in result["trainings"]):
        return "its training did not finish"
    every = [inputs for each in (result, *before) for inputs in fingerprints(each)]
    for name in ("data", "bert", "training"):
        if len({inputs.get(name) for inputs in every} - {None}) > 1:  # an unknown one fits
            return f"its models, or the results before it, read different inputs ({name})"
    return None


def fingerprints(result: dict[str, Any]) -> list[dict[str, str | None]]:
    """Return what each model read: SHA-256 of "data", "bert" and "training", None if not known."""
    return [inputs for inputs in result["evaluation"]["fingerprints"] or () if inputs]


@dataclass(frozen=True)
class Row:
    """A run in a table: six recalls and rsum, the paper's and ours."""

    run: Run
    paper: list[float]  # empty if the paper has no such row
    seeds: dict[int, list[float]]  # ours, by seed
    intervals: list[tuple[float, float]]  # of a single seed, otherwise empty

    def ours(self, k: int) -> str:
        """Return our figure k, with its deviation if there are several seeds."""
        values = [figures[k] for figures in self.seeds.values()]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}" if values else "not run"

    def cell(self, k: int) -> str:
        """Return figure k: the paper's · ours, with deviation or interval · the difference."""
        ours = self.ours(k)
        if self.intervals:
            ours += " [{:.1f}, {:.1f}]".format(*self.intervals[k])
        if not self.paper:
            return ours
        values = [figures[k] for figures in self.seeds.values()]
        difference = f" · {statistics.mean(values) - self.paper[k]:+.1f}" if values else ""
        return f"{self.paper[k]:.1f} · {ours}{difference}"


def table_rows(table: Table) -> list[Row]:
    """Return a row for each run of a table.

    A result with a problem is left out, with a warning. Only figures of the same inputs are
    averaged and compared.
    """
    papers = read_json(RESULTS / "paper.json", "the paper's figures").get(table.name, {})
    accepted: list[dict[str, Any]] = []
    rows = []
    for run in table.runs:
        seeds, intervals = {}, []
        for seed, path in run.results().items():
            result = read_result(path)
            if problem := find_problem(run, result, accepted):
                log.warning("%s: %s; left out", path, problem)
                continue
            accepted.append(result)
            protocol = result["evaluation"]["fold5" if table.fold5 else "whole"]
            require(protocol is not None, f"{path}: has no recalls of five folds")
            seeds[seed] = recalls_and_rsum(protocol["metrics"])
            intervals = recalls_and_rsum(protocol["intervals"]) if protocol["intervals"] else []
        theirs = papers.get(run.title, [])
        paper = [*theirs, sum(theirs)] if theirs else []
        rows.append(Row(run, paper, seeds, intervals if len(seeds) == 1 else []))
    return rows


def legend() -> str:
    """Return what a cell holds, and where the paper's figures are from."""
    source = read_json(RESULTS / "paper.json", "the paper's figures")["source"]
    return (
        "A cell: the paper's figure, if there is one · ours, mean ± standard deviation over seeds, "
        "or, for one seed, with its 95 % interval over images · the difference.\n"
        f"The paper's: {source}\n"
    )


def recall_table(table: Table) -> str:
    """Return a table of runs, and by how much rsum differs from the baseline's, seed by seed.

    The mean difference has its interval and p-value if the scores were compared.
    """
    rows = {row.run.name: row for row in table_rows(table)}
    cells, compared = [], []
    for row in rows.values():
        count = str(len(row.seeds) or "")
        cells.append([row.run.title, count, *map(row.cell, range(len(COLUMNS)))])
        other = rows.get(row.run.baseline)
        if other and (both := sorted(row.seeds.keys() & other.seeds.keys())):
            differences = [f"{row.seeds[seed][-1] - other.seeds[seed][-1]:+.1f}" for seed in both]
            named = [row.run.title, other.run.title, ", ".join(map(str, both))]
            compared.append([*named, ", ".join(differences), *_compared(row.run, other.run, both)])
    text = f"{table.title}:\n\n{markdown(['', 'seeds', *COLUMNS], cells)}"
    head = ["", "baseline", "seeds", "rsum differs by", "mean [95 % interval]", "p"]
    return f"{text}\n{markdown(head, compared)}" if compared else text


def _compared(run: Run, baseline: Run, seeds: Sequence[int]) -> list[str]:
    """Return the mean difference of rsum with its interval, and p; `not run` if there are none.

    A comparison of other seeds or entries is left out, with a warning.
    """
    path = run.comparison()
    if not path.exists():
        return ["not run"] * 2
    content = read_json(path, "a comparison")
    if content["entries"] != [run.digest(), baseline.digest()] or content["seeds"] != seeds:
        log.warning("%s: is of other seeds, or stale; left out", path)
        return ["not run"] * 2
    low, high = content["intervals"]["rsum"]
    mean, p = content["difference"]["rsum"], content["p"]["rsum"]
    return [f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", f"{p:.4f}"]
