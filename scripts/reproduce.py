"""reproduce.py — the paper's tables by one command: train, evaluate, and set beside the paper.

    python -m scripts.reproduce list                       # every run: commands, data, state
    python -m scripts.reproduce run f30k_ensemble          # what is missing of it: hours to days
    python -m scripts.reproduce run ablation_uniform --seeds 0 1 2
    python -m scripts.reproduce run f30k_i2t --no-train    # evaluate a model that is there already
    python -m scripts.reproduce table [--format md|latex|csv|json]
    python -m scripts.reproduce run --help                 # --seeds, --data_path, --bert_path, ...

The runs are those of scripts/experiments.toml. `run` skips what is done, goes on with what was cut
off, and writes results/reproduce/NAME_seedN.json; checkpoints go to runs/reproduce/. A table holds
six recalls and rsum a row: the paper's, ours as mean and deviation over seeds, the difference; what
was not run says so. An ensemble is evaluated from its models' scores, kept beside them.
"""

import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from common import provenance
from common.cli import parse, print_line, run
from common.errors import InputError, raise_first, require
from common.files import read_json, sha256_of, write_json
from common.signals import Stopped, handled
from data import Split
from evalconfig import EvaluateConfig
from scripts.parts.experiments import REGISTRY, RESULT, Registry, Run, shown
from scripts.parts.objections import (
    HOW_TRAINED,
    model_objections,
    objections,
    scores_of,
    split_objections,
)
from scripts.parts.paper_table import FORMATS, figures_of
from training import log as runlog

log = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent
# What results tell of run.json.
TRAINING = ("command", *runlog.RAN_ON, "seconds", "resumed_at", "earlier", "step", "complete")


@dataclass(frozen=True)
class RunOptions:
    names: Annotated[list[str], "runs that `list` tells of", "NAME"]
    seeds: Annotated[list[int], "one training for each"] = (0,)
    data_path: Annotated[str | None, "in place of the registry's"] = None
    bert_path: Annotated[str | None, "in place of the registry's"] = None
    train: Annotated[bool, "--no-train only evaluates the models that are in runs/reproduce"] = True

    def __post_init__(self) -> None:
        for seed in self.seeds:
            require(seed >= 0, f"--seeds {seed}: expected 0 or more")

    @property
    def paths(self) -> dict[str, str]:
        """What takes the place of the registry's paths."""
        every = {"data_path": self.data_path, "bert_path": self.bert_path}
        return {name: path for name, path in every.items() if path is not None}


@dataclass(frozen=True)
class TableOptions:
    format: Annotated[Literal["md", "latex", "csv", "json"], "how it is written"] = "md"


@dataclass(frozen=True)
class ListOptions:
    pass


def listed(registry: Registry) -> str:
    """Every run: what it needs, its commands, and whether it is done."""
    lines = []
    for each in registry.runs.values():
        lines.append(f"{each.name}: {each.title}; {state(registry, each)}")
        lines.append(f"  tables: {'; '.join(registry.tables[name] for name in each.tables)}")
        lines.append(f"  needs: {'; '.join([*each.of, registry.data_of(each).needs])}")
        for command in registry.commands(each, 0, {}):
            lines.append(f"  {shown(command)}")
    return "\n".join(lines) + "\n"


def state(registry: Registry, each: Run) -> str:
    """Which seeds of a run are done, and whose results are stale or damaged."""
    seeds: dict[str, list[str]] = {}
    for seed, path in each.results().items():
        try:
            check_figures(each, path)
            word = "stale" if any(objections(registry, each, seed)) else "done"
        except InputError:
            word = "damaged"
        seeds.setdefault(word, []).append(str(seed))
    told = (f"{word} for seed {', '.join(found)}" for word, found in seeds.items())
    return ", ".join(told) or "not run"


def check_figures(each: Run, path: Path) -> None:
    """Raise InputError where a results file lacks figures of a table that the run has a row in."""
    for protocol in each.tables.values():
        figures_of(path, protocol)


def reproduce(
    registry: Registry, each: Run, seed: int, options: RunOptions, of_ensemble: bool = False
) -> None:
    """Do what is missing of a run: its members, its training, its evaluation.

    Of a member of an ensemble so are the scores that gave its results.
    """
    path, paths = each.result(seed), options.paths
    if os.path.lexists(path):
        if not of_ensemble or has_scores(each, seed):
            log.info("%s, seed %d: done, %s", each.name, seed, path)
            return
        log.info("%s: done again, %s has not its scores", path, each.scores(seed))
    if each.of:
        for member in registry.members(each):
            reproduce(registry, member, seed, options, of_ensemble=True)
    else:
        if options.train:
            _call(registry.train(each, seed, paths))
        check_model(registry, each, seed)
    evaluation = registry.evaluate(each, seed, paths)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    _call([*evaluation, "--json", str(part)])
    about, found = origin(registry, each, seed, evaluation), read_json(part, RESULT)
    part.unlink()
    content = about | {name: found[name] for name in found if name not in about}
    against = next(objections(registry, each, seed, content=content), "")
    require(not against, f"not written: {against}; delete older results that are stale")
    write_json(path, content)
    log.info("%s, seed %d: %s", each.name, seed, path)


def origin(registry: Registry, each: Run, seed: int, evaluation: list[str]) -> dict[str, Any]:
    """How results came about: the commands that were run, where, the trainings, the scores.

    Of an ensemble what its models read, too.

    A model that came without its run.json has null for its training, and no command of it.
    """
    if each.of:
        parts = [read_json(member.result(seed), RESULT) for member in registry.members(each)]
        commands = [command for part in parts for command in part["commands"]]
        trainings = [training for part in parts for training in part["trainings"]]
        read = {path: digest for part in parts for path, digest in part["matrices"].items()}
        inputs = [one for part in parts for one in part.get("fingerprints") or [None]]
        known = {"fingerprints": inputs}  # which the evaluation of scores cannot know
    else:
        path = each.model(seed).parent / runlog.RUN
        found = read_json(path, HOW_TRAINED) if path.exists() else {}
        trainings = [{name: found.get(name) for name in TRAINING} if found else None]
        commands = [found["command"]] if "command" in found else []
        read, known = {str(each.scores(seed)): sha256_of(each.scores(seed))}, {}
    about = {"commands": [*commands, shown(evaluation)]} | provenance.surroundings()
    return about | {"trainings": trainings, "matrices": read} | known


def has_scores(each: Run, seed: int) -> bool:
    """Whether the scores that gave a model's results are there."""
    path = each.scores(seed)
    if not path.exists():
        return False
    return scores_of(read_json(each.result(seed), RESULT)) == {str(path): sha256_of(path)}


def check_run(registry: Registry, each: Run, seed: int, paths: dict[str, str]) -> None:
    """Raise InputError where a run would come to no results, before it is begun.

    So it is where its own or its members' are damaged or stale, and where what has to be evaluated
    is not there.
    """
    to_do = not os.path.lexists(each.result(seed))
    for part in [each, *map(registry.run, each.of)]:
        path = part.result(seed)
        there = os.path.lexists(path)
        if there:
            try:
                check_figures(part, path)
                raise_first(objections(registry, part, seed))
            except InputError as error:
                raise InputError(f"{error}; delete it to have the run done again") from error
        if to_do and not part.of and not (there and has_scores(part, seed)):
            check_split(registry, part, paths)
            if there:
                found = f"{path}: its scores are gone, and {part.model(seed)}, too"
                again = f"delete {path} to have the model trained anew"
                require(part.model(seed).exists(), f"{found}; {again}")


def check_split(registry: Registry, each: Run, paths: dict[str, str]) -> None:
    """Raise InputError unless the images and captions that are evaluated are those of its row."""
    config = parse(EvaluateConfig, registry.evaluate(each, 0, paths)[1:], "")
    folder = Path(config.data_path) / config.data_name
    raise_first(split_objections(registry, each, Split.open(folder, config.split, None)))


def check_model(registry: Registry, each: Run, seed: int) -> None:
    """Raise InputError unless the model is there, and as far as it tells the one that is meant."""
    model = each.model(seed)
    require(model.exists(), f"{model}: not found; expected the model that is to be evaluated")
    raise_first(model_objections(registry, each, seed))


def _call(command: list[str]) -> None:
    """Run a program of the project. Raises what it ended with.

    Signals are handed on to it, which saves before it ends, and are waited out.
    """
    log.info("%s", shown(command))
    programs: list[subprocess.Popen] = []
    told: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        told.append(number)
        for program in programs:
            program.send_signal(number)

    with handled(hand_on):  # SIGINT, too, which a shell has ignored for every `&`
        programs.append(subprocess.Popen([sys.executable, ROOT / command[0], *command[1:]]))
        if told:  # before it was there
            programs[0].send_signal(told[0])
        status = programs[0].wait()
    if told or status > 128:
        raise Stopped(told[0] if told else status - 128)
    require(status == 0, f"{command[0]} ended with status {status}, see above")


def main() -> None:
    argv = sys.argv[1:]
    action, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    registry = Registry(REGISTRY)
    if action == "list":
        parse(ListOptions, rest, __doc__, "reproduce.py list")
        print_line(listed(registry))
    elif action == "table":
        options = parse(TableOptions, rest, __doc__, "reproduce.py table")
        print_line(FORMATS[options.format](registry))
    elif action == "run":
        options = parse(RunOptions, rest, __doc__, "reproduce.py run")
        runs = [(registry.run(name), seed) for name in options.names for seed in options.seeds]
        for each, seed in runs:  # before the long work
            check_run(registry, each, seed, options.paths)
        for each, seed in runs:
            reproduce(registry, each, seed, options)
    elif action in ("-h", "--help"):
        print_line(__doc__)
    else:
        raise InputError(f"{action}: expected list, run or table (see --help)")


if __name__ == "__main__":
    run(main)
