"""run_results.py — the result of a run: its evaluation, and how its models came about.

`scripts/reproduce.py` writes results/reproduce/NAME_seedN.json, the tables read it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError, brief_repr
from common.files import read_json, write_json
from common.results import EvaluationResult
from scripts.parts.experiments import Registry, Run

METRICS = [(way, name) for way in ("i2t", "t2i") for name in ("r1", "r5", "r10")]
INPUTS = ("data", "bert", "training")  # that a fingerprint is of
KINDS = {"entry": str, "commands": list, "trainings": list, "matrices": dict, "evaluation": dict}

Fingerprints = dict[str, str | None]  # by input; None if it is not known


@dataclass(frozen=True)
class RunResult:
    """The content of a results file."""

    path: Path
    entry: str  # SHA-256 of the run's entry in the registry
    commands: list[str]
    trainings: list[dict[str, Any] | None]  # of run.json, one a model; None if it came without
    matrices: dict[str, str]  # SHA-256 of each model's scores, by file
    surroundings: dict[str, Any]  # machine, torch, commit of the evaluation
    evaluation: EvaluationResult

    @classmethod
    def read(cls, path: Path) -> "RunResult":
        """Read a results file. Raises InputError if it is damaged."""
        content = read_json(path, "the results of a run")
        for name, kind in KINDS.items():
            value = content.get(name)
            if not isinstance(value, kind):
                raise InputError(f"{path}: {name} is {brief_repr(value)}; expected {kind.__name__}")
        evaluation = EvaluationResult.from_json(content.pop("evaluation"), path)
        known = {name: content.pop(name) for name in KINDS if name != "evaluation"}
        return cls(path, **known, surroundings=content, evaluation=evaluation)

    def write(self) -> None:
        """Write the results file."""
        known = {name: getattr(self, name) for name in KINDS}
        evaluation = {"evaluation": self.evaluation.to_json()}
        write_json(self.path, known | self.surroundings | evaluation)

    @property
    def fingerprints(self) -> list[Fingerprints]:
        """What each model read, as far as it is known."""
        return [each for each in self.evaluation.fingerprints or () if each]

    def recalls(self, fold5: bool) -> list[float]:
        """Six recalls in percent and rsum. Raises InputError if the evaluation has none."""
        return self._seven("metrics", fold5)

    def intervals(self, fold5: bool) -> list[tuple[float, float]]:
        """The 95 % intervals of the same figures. Raises InputError without --bootstrap."""
        return self._seven("intervals", fold5)

    def _seven(self, kind: str, fold5: bool) -> list[Any]:
        protocol = self.evaluation.fold5 if fold5 else self.evaluation.whole
        values = protocol.to_json()[kind] if protocol else None
        if values is None:
            raise InputError(f"{self.path}: the evaluation lacks {kind} (five folds: {fold5})")
        return [*(values[way][name] for way, name in METRICS), values["rsum"]]


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
