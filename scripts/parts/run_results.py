"""run_results.py — the result of a run: its evaluation, and how its models came about.

`scripts/reproduce.py` writes results/reproduce/NAME_seedN.json, the tables read it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from common.errors import InputError, brief_repr, require
from common.files import read_json, write_json
from scripts.parts.experiments import Registry, Run

METRICS = [(way, name) for way in ("i2t", "t2i") for name in ("r1", "r5", "r10")]
ROUNDING = 1e-6
INPUTS = ("data", "bert", "training")  # that a fingerprint is of

Interval = list[float]  # low and high
Fingerprints = dict[str, str | None]  # by input; None if it is not known


@dataclass(frozen=True)
class RunResult:
    """The content of a results file."""

    path: Path
    entry: str  # SHA-256 of the run's entry in the registry
    commands: list[str]
    machine: str
    torch: str
    commit: str | None
    trainings: list[dict[str, Any] | None]  # of run.json, a model each; None if it came without
    matrices: dict[str, str]  # SHA-256 of each model's scores, by file
    evaluation: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "RunResult":
        """Read a results file. Raises InputError if it is damaged."""
        content = read_json(path, "the results of a run")
        kinds = {"entry": str, "commands": list, "trainings": list, "matrices": dict}
        for name, kind in (kinds | {"evaluation": dict}).items():
            value = content.get(name)
            if not isinstance(value, kind):
                raise InputError(f"{path}: {name} is {brief_repr(value)}; expected {kind.__name__}")
        values = {each.name: content.get(each.name) for each in fields(cls)[1:]}
        return cls(path, **values)

    def write(self) -> None:
        """Write the results file."""
        write_json(self.path, {k: v for k, v in asdict(self).items() if k != "path"})

    @property
    def fingerprints(self) -> list[Fingerprints]:
        """What each model read, as far as it is known."""
        return [each for each in self.evaluation.get("fingerprints") or () if each]

    def recalls(self, fold5: bool) -> list[float]:
        """Six recalls in percent and rsum. Raises InputError if the evaluation has none."""
        values = self._seven("metrics", fold5)
        fits = all(0 <= value <= 100 + ROUNDING for value in values[:-1])
        fits = fits and abs(sum(values[:-1]) - values[-1]) < ROUNDING
        require(fits, f"{self.path}: recalls {values}; expected percent, and their sum")
        return values

    def intervals(self, fold5: bool) -> list[Interval]:
        """The 95 % intervals of the same figures. Raises InputError if there are none."""
        return self._seven("intervals", fold5)

    def _seven(self, kind: str, fold5: bool) -> list[Any]:
        try:
            values = self.evaluation["protocols"]["1k5" if fold5 else "5k"][kind]
            return [*(values[way][name] for way, name in METRICS), values["rsum"]]
        except (KeyError, TypeError) as error:
            raise InputError(f"{self.path}: the evaluation lacks {kind}: {error!r}") from error


def problems(registry: Registry, run: Run, result: RunResult) -> Iterator[str]:
    """Yield why a result must not stand in a table."""
    images = registry.data_of(run).images
    if result.entry != registry.digest(run):
        yield "is stale: scripts/experiments.toml lists other options now"
    if any(training and training.get("complete") is False for training in result.trainings):
        yield "its training did not finish"
    if result.evaluation.get("images") != images:
        yield f"is of {brief_repr(result.evaluation.get('images'))} images; expected {images}"
    if len(set(result.matrices.values())) != len(registry.members(run)):
        yield "its models do not have different scores"
    if differ := different_inputs(result.fingerprints):
        yield f"its models read different {differ}"


def different_inputs(fingerprints: list[Fingerprints]) -> str:
    """Return which inputs differ among fingerprints; one that is not known differs from none."""
    known = {name: {each.get(name) for each in fingerprints} - {None} for name in INPUTS}
    return ", ".join(name for name, values in known.items() if len(values) > 1)
