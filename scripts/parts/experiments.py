"""experiments.py — the registry of runs: scripts/experiments.toml.

Read by scripts/reproduce.py, which runs them, and scripts/parts/paper_table.py. Whether results are
what a run's row says is asked in scripts/parts/objections.py.
"""

import re
import shlex
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin

from common.cli import parse
from common.errors import InputError, require, summarise
from common.files import read_text
from evalconfig import EvaluateConfig
from training.config import FREE, TrainConfig
from training.runfolder import BEST

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REGISTRY = Path(__file__).parent.parent / "experiments.toml"
RESULTS = Path("results")
RUNS = Path("runs/reproduce")
RESULT = "the results of an evaluation"
# What results may differ in from the registry: where files are, what changes figures by rounding
# alone (device, compilation), what changes none of a table's, and the features' width, which the
# data has.
ELSEWHERE = {
    "train.py": FREE - {"num_epochs", "max_steps", "val_step", "skip_bad_batches"} | {"img_dim"},
    "evaluate_models.py": {"data_path", "bert_path", "device", "workers", "compile", "bootstrap"},
}
CONFIGS = {"train.py": TrainConfig, "evaluate_models.py": EvaluateConfig}


class Entry:
    """Part of the registry. Raises TypeError where it holds another kind than it should."""

    def __post_init__(self) -> None:
        for field_ in fields(self):
            kind, value = get_origin(field_.type) or field_.type, getattr(self, field_.name)
            if not isinstance(value, kind):
                raise TypeError(f"{field_.name} is {value!r}; expected {kind.__name__}")


@dataclass(frozen=True)
class Data(Entry):
    """What a run needs, and the options that all runs on it share."""

    needs: str
    images: int  # that are evaluated
    data_path: str
    data_name: str
    bert_path: str
    evaluate: str
    train: str = ""


@dataclass(frozen=True)
class Run(Entry):
    """One row of a table: a model of one direction, or an ensemble of other runs."""

    name: str
    title: str
    tables: dict[str, str]  # the tables it has a row in, and the protocol that counts there
    data: str = ""
    direction: str = ""
    train: str = ""
    of: list[str] = field(default_factory=list)
    paper: str = ""  # its row in results/paper.json
    beside: str = ""  # a run that it is compared with, seed by seed

    def folder(self, seed: int) -> Path:
        """Where its checkpoints are."""
        return RUNS / self.name / f"seed{seed}"

    def model(self, seed: int) -> Path:
        """The checkpoint that is evaluated."""
        return self.folder(seed) / self.direction / BEST

    def scores(self, seed: int) -> Path:
        """The matrix that its evaluation keeps, of which ensembles are evaluated."""
        return self.folder(seed) / "scores.npy"

    def result(self, seed: int | str, results: Path = RESULTS) -> Path:
        """The file of its evaluation."""
        return results / "reproduce" / f"{self.name}_seed{seed}.json"

    def results(self, results: Path = RESULTS) -> dict[int, Path]:
        """The files of its evaluations that are there, by seed."""
        pattern = self.result("*", results)
        texts = [
            path.stem.removeprefix(f"{self.name}_seed")
            for path in pattern.parent.glob(pattern.name)
        ]
        seeds = sorted(int(text) for text in texts if re.fullmatch("0|[1-9][0-9]*", text))
        return {seed: self.result(seed, results) for seed in seeds}


class Registry:
    """All runs, tables and data. Raises InputError where the file is no registry, or has a slip."""

    def __init__(self, path: Path) -> None:
        try:
            content = tomllib.loads(read_text(path, "a registry of runs"))
            self.tables: dict[str, str] = content["tables"]
            self.data = {name: Data(**entry) for name, entry in content["data"].items()}
            self.runs = {name: Run(name, **entry) for name, entry in content["run"].items()}
        except (tomllib.TOMLDecodeError, AttributeError, KeyError, TypeError) as error:
            raise InputError(f"{path}: no registry of runs: {error!r}") from error
        for check in (self._check_names, self._check_commands):
            for run in self.runs.values():
                try:
                    check(run)
                except (InputError, ValueError, TypeError) as error:
                    raise InputError(f"{path}: run.{run.name}: {error}") from error

    def _check_names(self, run: Run) -> None:
        """Raise InputError where a run names what is not there."""
        tables, named = set(run.tables) - set(self.tables), {*run.of, run.beside or run.name}
        runs = named - set(self.runs)
        require(not tables, f"names tables that are not there: {summarise(sorted(tables))}")
        require(not runs, f"names runs that are not there: {summarise(sorted(runs))}")
        shared = not run.beside or run.tables.keys() & self.runs[run.beside].tables.keys()
        require(bool(shared), f"is beside {run.beside}, which has no row in its tables")
        require(not run.of or not run.data, "is of other runs and names data, too")
        known = bool(run.of) or run.data in self.data
        require(known, f"names data {run.data!r}; expected one of {summarise(sorted(self.data))}")

    def _check_commands(self, run: Run) -> None:
        """Raise an error where a run would come to no figures, before it is begun."""
        no_models = [name for name in run.of if self.runs[name].of]
        require(not no_models, f"of {', '.join(no_models)}, an ensemble; expected models")
        data = {member.data for member in self.members(run)}
        require(len(data) == 1, f"of models on {', '.join(sorted(data))}; expected one")
        if not run.of:
            parse(TrainConfig, self.train(run, 0, {})[1:], "")
        evaluation = parse(EvaluateConfig, self.evaluate(run, 0, {})[1:], "")
        require(evaluation.split is not None, "its evaluation names no --split")
        given = evaluation.all_protocols
        for table, protocol in run.tables.items():
            found = f"table {table} takes protocol {protocol}"
            require(protocol in given, f"{found}; its evaluation gives {', '.join(given)}")

    def run(self, name: str) -> Run:
        """The run of that name."""
        require(name in self.runs, f"{name}: no such run; expected {', '.join(self.runs)}")
        return self.runs[name]

    def members(self, run: Run) -> list[Run]:
        """The models of an ensemble; of a model itself."""
        return [self.runs[name] for name in run.of] or [run]

    def data_of(self, run: Run) -> Data:
        """What a run needs."""
        return self.data[self.members(run)[0].data]

    def commands(self, run: Run, seed: int, paths: dict[str, str]) -> list[list[str]]:
        """All commands of a run, of an ensemble those of its members first."""
        if run.of:
            every = [self.commands(member, seed, paths) for member in self.members(run)]
            before = [command for commands in every for command in commands]
        else:
            before = [self.train(run, seed, paths)]
        return [*before, self.evaluate(run, seed, paths)]

    def train(self, run: Run, seed: int, paths: dict[str, str]) -> list[str]:
        """The command that trains a model, or goes on with it."""
        text = f"{self.data[run.data].train} {run.train}"
        options = ["--direction", run.direction, *shlex.split(text)]
        more = ["--seed", str(seed), "--logger_name", str(run.folder(seed)), "--resume", "auto"]
        return ["train.py", *self._data(run, paths), *options, *more]

    def evaluate(self, run: Run, seed: int, paths: dict[str, str]) -> list[str]:
        """The command that evaluates a model or an ensemble; it names no results file to write.

        An ensemble's is the mean of its members' scores, which are not computed again.
        """
        if run.of:
            what = ["--scores", *(str(member.scores(seed)) for member in self.members(run))]
        else:
            what = ["--model_path", str(run.model(seed)), *self._data(run, paths)]
            what += ["--save_scores", str(run.scores(seed))]
        return ["evaluate_models.py", *what, *shlex.split(self.data_of(run).evaluate)]

    def _data(self, run: Run, paths: dict[str, str]) -> list[str]:
        """The options that name a run's data, wherever its model was trained."""
        data = self.data[run.data]
        where = {"data_path": data.data_path, "bert_path": data.bert_path} | paths
        options = where | {"data_name": data.data_name}
        return [word for name, value in options.items() for word in (f"--{name}", value)]


def shown(command: list[str]) -> str:
    """A command of the registry as it is typed."""
    return f"python {shlex.join(command)}"


def typed(text: str) -> list[str]:
    """The command that `shown` shows."""
    require(isinstance(text, str), f"{text!r}; expected a command")
    return shlex.split(text)[1:]


def works(command: list[str]) -> tuple[str, dict[str, Any]]:
    """A command's program, and the options that its figures depend on, beyond rounding."""
    program, *words = command
    require(not {"-h", "--help"} & set(words), f"{shown(command)}: computes nothing")
    options = asdict(parse(CONFIGS[program], words, ""))
    return program, {k: v for k, v in options.items() if k not in ELSEWHERE[program]}
