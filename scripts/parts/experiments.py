"""experiments.py — the runs that scripts/experiments.toml lists: their options, commands and files.

`scripts/reproduce.py` does the runs, `scripts/parts/run_results.py` reads and shows their results.
"""

import hashlib
import json
import shlex
import sys
from dataclasses import dataclass, field
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
BEST = "model_best.pth.tar"
BOOTSTRAP = "1000"  # samples of the intervals


@dataclass(frozen=True)
class Data:
    """What runs on the same data share: folders, training options, and the evaluated split."""

    needs: str
    images: int  # of the split
    data_path: str
    data_name: str
    bert_path: str
    split: SplitName
    train: str = ""


@dataclass(frozen=True)
class Table:
    """A table: every run on its data has a row."""

    title: str
    data: str
    fold5: bool = False  # its recalls are the means of five folds


@dataclass(frozen=True)
class Run:
    """A row of a table: a model of one direction, or an ensemble of other runs."""

    name: str
    title: str
    data: str = ""
    direction: str = ""
    train: str = ""
    of: list[str] = field(default_factory=list)
    paper: str = ""  # its row in results/paper.json
    beside: str = ""  # the run that it is compared with, seed by seed

    def folder(self, seed: int) -> Path:
        """Return the folder of its checkpoints and scores."""
        return RUNS / self.name / f"seed{seed}"

    def model(self, seed: int) -> Path:
        """Return the checkpoint that is evaluated."""
        return self.folder(seed) / self.direction / BEST

    def scores(self, seed: int) -> Path:
        """Return the file of its scores, from which ensembles are evaluated."""
        return self.folder(seed) / "scores.npy"

    def result(self, seed: int | str) -> Path:
        """Return the file of its result."""
        return RESULTS / "reproduce" / f"{self.name}_seed{seed}.json"

    def results(self) -> dict[int, Path]:
        """Return the files of its results that exist, by seed."""
        pattern = self.result("*")
        seeds = [path.stem.rpartition("seed")[2] for path in pattern.parent.glob(pattern.name)]
        return {seed: self.result(seed) for seed in sorted(map(int, filter(str.isdecimal, seeds)))}


class Registry:
    """The runs, tables and data of a file. Raises InputError if it has a slip."""

    def __init__(self, path: Path) -> None:
        try:
            content = tomllib.loads(read_text(path, "a registry of runs"))
            self.tables = {name: Table(**entry) for name, entry in content["table"].items()}
            self.data = {name: Data(**entry) for name, entry in content["data"].items()}
            self.runs = {name: Run(name, **entry) for name, entry in content["run"].items()}
            for run in self.runs.values():  # a slip in the last run is found before the first one
                self.evaluate(self.runs[run.beside or run.name], 0, {})
                for model in self.members(run):
                    parse(TrainConfig, self.train(model, 0, {})[1:], "")
        except (ValueError, AttributeError, KeyError, TypeError, InputError) as error:
            raise InputError(f"{path}: not a registry of runs: {error!r}") from error

    def run(self, name: str) -> Run:
        """Return the run of that name. Raises InputError if it is unknown."""
        require(name in self.runs, f"{name}: no such run; expected {', '.join(self.runs)}")
        return self.runs[name]

    def members(self, run: Run) -> list[Run]:
        """Return the models of an ensemble; a model is its own only member."""
        return [self.runs[name] for name in run.of] or [run]

    def data_of(self, run: Run) -> Data:
        """Return the data that a run needs."""
        return self.data[self.members(run)[0].data]

    def rows(self, table: Table) -> list[Run]:
        """Return the runs that have a row in a table."""
        data = self.data[table.data]
        return [run for run in self.runs.values() if self.data_of(run) is data]

    def digest(self, run: Run) -> str:
        """Return the SHA-256 of what a run's figures depend on. A result with another is stale."""
        return hashlib.sha256(json.dumps(self._entry(run), sort_keys=True).encode()).hexdigest()

    def _entry(self, run: Run) -> dict[str, Any]:
        # Titles are left out, and folders too: fingerprints say which data a result is of.
        if run.of:
            return {"of": [self._entry(member) for member in self.members(run)]}
        data = self.data[run.data]
        return {
            "train": ["--direction", run.direction, *shlex.split(f"{data.train} {run.train}")],
            "evaluate": [data.data_name, data.split, data.images],
        }

    def commands(self, run: Run, seed: int, paths: dict[str, str]) -> list[str]:
        """Return all commands of a run as one types them; of an ensemble its members' first."""
        commands = []
        for model in self.members(run):
            commands += [self.train(model, seed, paths), self.evaluate(model, seed, paths)]
        commands += [self.evaluate(run, seed, paths)] if run.of else []
        return [as_typed(command) for command in commands]

    def train(self, run: Run, seed: int, paths: dict[str, str]) -> list[str]:
        """Return the command that trains a model or resumes its training."""
        text = f"{self.data[run.data].train} {run.train}"
        options = ["--direction", run.direction, *shlex.split(text)]
        more = ["--seed", str(seed), "--logger_name", str(run.folder(seed)), "--resume", "auto"]
        return ["train.py", *self._data_options(run, paths), *options, *more]

    def evaluate(self, run: Run, seed: int, paths: dict[str, str]) -> list[str]:
        """Return the command that evaluates a model, or an ensemble from its members' scores."""
        if run.of:
            source = ["--scores", *(str(member.scores(seed)) for member in self.members(run))]
        else:
            source = ["--model_path", str(run.model(seed)), *self._data_options(run, paths)]
            source += ["--save_scores", str(run.scores(seed))]
        split = self.data_of(run).split
        return ["evaluate_models.py", *source, "--split", split, "--bootstrap", BOOTSTRAP]

    def _data_options(self, run: Run, paths: dict[str, str]) -> list[str]:
        data = self.data[run.data]
        where = {"data_path": data.data_path, "bert_path": data.bert_path} | paths
        options = where | {"data_name": data.data_name}
        return [word for name, value in options.items() for word in (f"--{name}", value)]


def as_typed(command: list[str]) -> str:
    """Return a command of the registry as one types it."""
    return f"python {shlex.join(command)}"
