"""experiments.py — the runs that scripts/experiments.toml lists: their options, commands and files.

`scripts/reproduce.py` does the runs, `scripts/parts/run_results.py` reads and shows their results.
"""

import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import parse
from common.errors import InputError, require
from common.files import read_text
from common.layout import SplitName
from training.config import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REGISTRY = Path(__file__).parent.parent / "experiments.toml"
RESULTS = Path("results")
RUNS = Path("runs/reproduce")
BOOTSTRAP = "1000"  # samples of the intervals


@dataclass(frozen=True)
class Run:
    """A row of a table: a model of one direction with its data, or an ensemble of models."""

    name: str
    title: str
    data: str  # name of the [data.NAME] entry, which has the next six
    needs: str
    images: int  # of the split
    data_path: str
    data_name: str
    bert_path: str
    split: SplitName
    train: str  # training options: those of the data, then those of the run
    direction: str = ""
    of: tuple["Run", ...] = ()  # the models of an ensemble
    baseline: str = ""  # the run that it is compared with, seed by seed

    def folder(self, seed: int) -> Path:
        """Return the folder of a training and of its scores."""
        return RUNS / self.name / f"seed{seed}"

    def model(self, seed: int) -> Path:
        """Return the path of the best checkpoint of a training."""
        return self.folder(seed) / self.direction / "model_best.pth.tar"

    def scores(self, seed: int) -> Path:
        """Return the path of the scores. An ensemble is evaluated from those of its models."""
        return self.folder(seed) / "scores.npy"

    def result(self, seed: int) -> Path:
        """Return the path of the result of a seed."""
        return RESULTS / "reproduce" / f"{self.name}_seed{seed}.json"

    def comparison(self) -> Path:
        """Return the path of the comparison with the baseline, over seeds."""
        return RESULTS / "compare" / f"{self.name}.json"

    def results(self) -> dict[int, Path]:
        """Return the paths of the results that exist, by seed."""
        paths = self.result(0).parent.glob(f"{self.name}_seed*.json")
        seeds = filter(str.isdecimal, (path.stem.rpartition("seed")[2] for path in paths))
        return {seed: self.result(seed) for seed in sorted(map(int, seeds))}

    def digest(self) -> str:
        """Return the SHA-256 of what the figures depend on. A result with another one is stale."""
        return hashlib.sha256(json.dumps(self._entry(), sort_keys=True).encode()).hexdigest()

    def _entry(self) -> dict[str, Any]:
        # Titles are left out, and folders too: fingerprints say which data a result is of.
        if self.of:
            return {"of": [model._entry() for model in self.of]}
        return {
            "train": ["--direction", self.direction, *shlex.split(self.train)],
            "evaluate": [self.data_name, self.split, self.images],
        }

    def train_command(self, seed: int) -> list[str]:
        """Return the command that trains a model or resumes its training."""
        options = ["--direction", self.direction, *shlex.split(self.train), "--seed", str(seed)]
        where = ["--logger_name", str(self.folder(seed)), "--resume", "auto"]
        return ["train.py", *self._data_options(), *options, *where]

    def evaluate_command(self, seed: int) -> list[str]:
        """Return the command that evaluates a model, or an ensemble from its models' scores."""
        if self.of:
            source = ["--scores", *(str(model.scores(seed)) for model in self.of)]
        else:
            source = ["--model_path", str(self.model(seed)), *self._data_options()]
            source += ["--save_scores", str(self.scores(seed))]
        return ["evaluate_models.py", *source, "--split", self.split, "--bootstrap", BOOTSTRAP]

    def compare_command(self, baseline: "Run", seeds: Sequence[int]) -> list[str]:
        """Return the command that compares the scores of this run and of its baseline."""
        scores = [str(each.scores(seed)) for each in (self, baseline) for seed in seeds]
        where = ["--data_path", self.data_path, "--data_name", self.data_name]
        return ["scripts/compare.py", *scores, *where, "--split", self.split]

    def _data_options(self) -> list[str]:
        folders = ["--data_path", self.data_path, "--bert_path", self.bert_path]
        return [*folders, "--data_name", self.data_name]

    def commands(self, seed: int) -> list[str]:
        """Return all commands as one types them; those of an ensemble's models come first."""
        commands = [command for model in self.of for command in model.commands(seed)]
        commands = commands or [as_typed(self.train_command(seed))]
        return [*commands, as_typed(self.evaluate_command(seed))]


@dataclass(frozen=True)
class Table:
    """A table: a row for each run on its data."""

    name: str
    title: str
    runs: list[Run]
    fold5: bool = False  # its recalls are the means of five folds


def read_registry(
    path: Path, folders: Mapping[str, str] | None = None
) -> tuple[dict[str, Run], dict[str, Table]]:
    """Return runs and tables by name. `folders` replace data_path and bert_path.

    All training options are parsed, so that a mistake is found before the first run is trained.
    Raises InputError.
    """
    runs: dict[str, Run] = {}
    tables = {}
    try:
        content = tomllib.loads(read_text(path, "a registry of runs"))
        for name, entry in content["run"].items():
            of = tuple(runs[model] for model in entry.get("of", ()))
            data = of[0].data if of else entry["data"]
            shared = content["data"][data] | (folders or {})
            train = f"{shared.get('train', '')} {entry.get('train', '')}"
            derived = {"name": name, "data": data, "train": train, "of": of}
            runs[name] = run = Run(**shared | entry | derived)
            require(run.baseline in {"", *runs}, f"{name}: no run {run.baseline}")
            for model in of or (run,):
                parse(TrainConfig, model.train_command(0)[1:], "")
        for name, entry in content["table"].items():
            rows = [run for run in runs.values() if run.data == entry["data"]]
            tables[name] = Table(name, entry["title"], rows, entry.get("fold5", False))
    except (ValueError, AttributeError, KeyError, TypeError, InputError) as error:
        raise InputError(f"{path}: not a registry of runs: {error!r}") from error
    return runs, tables


def require_project_folder() -> None:
    """Raise InputError elsewhere: results and runs are named relative to the project's folder."""
    paper, folder = RESULTS / "paper.json", REGISTRY.parent.parent
    require(paper.is_file(), f"{paper}: not found; run this program in {folder}")


def as_typed(command: list[str]) -> str:
    """Return a command of the registry as one types it."""
    return f"python {shlex.join(command)}"
