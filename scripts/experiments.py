"""experiments.py — the registry of runs (scripts/experiments.toml) and what came of them.

Read by scripts/reproduce.py, which runs them, and scripts/results_table.py, which fills the README.
"""

import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evalconfig import EvaluateConfig
from files import read_json
from options import InputError, parse, require, short
from runfolder import BEST
from trainconfig import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REGISTRY = Path(__file__).with_suffix(".toml")
RESULTS = Path("results")
RUNS = Path("runs/reproduce")
RESULT = "the results of an evaluation"
METRICS = [(way, name) for way in ("i2t", "t2i") for name in ("r1", "r5", "r10")]
COLUMNS = ("i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10", "rsum")
NAMES = [*(f"{way} R@{name[1:]}" for way, name in METRICS), "rsum"]  # each by itself


@dataclass(frozen=True)
class Data:
    """What a run needs, and the options that all runs on it share."""

    needs: str
    data_path: str
    data_name: str
    bert_path: str
    evaluate: str
    train: str = ""


@dataclass(frozen=True)
class Run:
    """One row of a table: a model of one direction, or an ensemble of other runs."""

    name: str
    title: str
    tables: dict[str, str]  # the tables it has a row in, and the protocol that counts there
    data: str = ""
    direction: str = ""
    train: str = ""
    of: list[str] = field(default_factory=list)
    paper: str = ""  # its row in results/paper.json

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
            content = tomllib.loads(path.read_text(encoding="utf-8"))
            self.tables: dict[str, str] = content["tables"]
            self.data = {name: Data(**fields) for name, fields in content["data"].items()}
            self.runs = {name: Run(name, **fields) for name, fields in content["run"].items()}
        except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{path}: no registry of runs: {error!r}") from error
        for run in self.runs.values():
            known = set(run.tables) <= set(self.tables) and set(run.of) <= set(self.runs)
            known &= bool(run.of) != (run.data in self.data)
            require(known, f"{path}: run.{run.name} names a table, data or a run that is not there")
        for run in self.runs.values():
            try:
                self._check(run)
            except (InputError, ValueError, TypeError) as error:
                raise InputError(f"{path}: run.{run.name}: {error}") from error

    def _check(self, run: Run) -> None:
        """Raise an error where a run would come to no figures, before it is begun."""
        no_models = [name for name in run.of if self.runs[name].of]
        require(not no_models, f"of {', '.join(no_models)}, an ensemble; expected models")
        data = {member.data for member in self.members(run)}
        require(len(data) == 1, f"of models on {', '.join(sorted(data))}; expected one")
        fields = vars(run) | vars(self.data_of(run))
        other = [k for k, v in fields.items() if k not in ("of", "tables") and type(v) is not str]
        require(not other, f"{', '.join(other)}: expected text")
        if not run.of:
            parse(TrainConfig, self.train(run, 0, {})[1:], "")
        given = parse(EvaluateConfig, self.evaluate(run, 0, {})[1:], "").all_protocols
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


@dataclass(frozen=True)
class Row:
    """A run's figures in a table: six recalls and rsum, the paper's and ours."""

    title: str
    paper: list[float] | None
    ours: list[list[float]]  # by seed
    interval: list[list[float]] | None = None  # of a single seed's figures, low and high

    @property
    def mean(self) -> list[float] | None:
        """Over seeds."""
        return [statistics.mean(column) for column in zip(*self.ours, strict=True)] or None

    @property
    def deviation(self) -> list[float] | None:
        """Over seeds; None for one seed."""
        several = len(self.ours) > 1
        columns = zip(*self.ours, strict=True)
        return [statistics.stdev(column) for column in columns] if several else None

    @property
    def difference(self) -> list[float] | None:
        """Ours less the paper's."""
        if self.paper is None or self.mean is None:
            return None
        return [ours - paper for ours, paper in zip(self.mean, self.paper, strict=True)]


def rows(registry: Registry, table: str, results: Path = RESULTS) -> list[Row]:
    """The rows of a table, from the files under `results`. Raises InputError on damaged ones."""
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
                where = f"{results / 'paper.json'}: {run.paper} in {table} is {short(recalls)}"
                require(six == [True] * len(METRICS), f"{where}; expected six recalls")
                paper = [*recalls, sum(recalls)]
            files, protocol = [*run.results(results).values()], run.tables[table]
            ours = [figures_of(path, protocol) for path in files]
            interval = intervals_of(files[0], protocol) if len(files) == 1 else None
            found.append(Row(run.title, paper, ours, interval))
    return found


def papers_source(results: Path = RESULTS) -> str:
    """Where the paper's figures are from."""
    found = read_json(results / "paper.json", "the paper's figures").get("source", "not named")
    return " ".join(str(found).split())


def figures_of(path: Path, protocol: str) -> list[float]:
    """Six recalls and rsum of an evaluation. Raises InputError where the file has none."""
    found = _seven(path, protocol, "metrics")
    fits = all(type(value) in (int, float) and 0 <= value <= 600 for value in found)
    fits = fits and abs(sum(found[:-1]) - found[-1]) < 1e-6
    require(fits, f"{path}: {short(found)}; expected six recalls and their sum, rsum")
    return found


def intervals_of(path: Path, protocol: str) -> list[list[float]] | None:
    """The 95 % intervals of these figures, `[7][2]`; None where the evaluation made none."""
    content: Any = read_json(path, RESULT)
    if content["protocols"][protocol].get("intervals") is None:
        return None
    found = _seven(path, protocol, "intervals")
    fits = all(isinstance(ends, list) and len(ends) == 2 for ends in found)
    fits = fits and all(type(end) in (int, float) for ends in found for end in ends)
    require(fits, f"{path}: intervals {short(found)}; expected low and high of each figure")
    return found


def _seven(path: Path, protocol: str, kind: str) -> list[Any]:
    """Of an evaluation, what it holds of that kind for six recalls and rsum."""
    content: Any = read_json(path, RESULT)
    try:
        values = content["protocols"][protocol][kind]
        return [*(values[way][name] for way, name in METRICS), values["rsum"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: holds no {kind} of protocol {protocol}: {error!r}") from error


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    every = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every) + "\n"


def cells(row: Row) -> list[str]:
    """A row's cells: the paper's figure · ours, with deviation or interval · the difference."""
    texts = []
    for k in range(len(COLUMNS)):
        paper = f"{row.paper[k]:.1f}" if row.paper else ""
        ours = f"{row.mean[k]:.1f}" if row.mean else "not run"
        ours += f" ± {row.deviation[k]:.1f}" if row.deviation else ""
        ours += " [{:.1f}, {:.1f}]".format(*row.interval[k]) if row.interval else ""
        difference = f"{row.difference[k]:+.1f}" if row.difference else ""
        texts.append(" · ".join(part for part in (paper, ours, difference) if part))
    return texts


def as_markdown(registry: Registry, results: Path = RESULTS) -> str:
    """Every table."""
    parts = []
    for name, title in registry.tables.items():
        lines = [
            [row.title, str(len(row.ours) or ""), *cells(row)]
            for row in rows(registry, name, results)
        ]
        parts.append(f"{title}:\n\n{markdown(['', 'seeds', *COLUMNS], lines)}")
    about = (
        "A cell: the paper's figure, if there is one · ours, mean ± deviation over seeds, or\n"
        "of one seed, where it is known, its 95 % interval over images · the difference.\n"
    )
    return "\n".join([*parts, f"{about}The paper's: {papers_source(results)}\n"])
