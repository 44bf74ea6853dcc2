"""reproduce.py — trains and evaluates the runs of the paper's tables, and shows their results.

    python -m scripts.reproduce list                       # every run: commands, data, state
    python -m scripts.reproduce run f30k_ensemble          # what is missing of it: hours to days
    python -m scripts.reproduce run ablation_uniform --seeds 0 1 2
    python -m scripts.reproduce run f30k_i2t --no-train    # evaluate a model that is there already
    python -m scripts.reproduce table                      # the results beside the paper's
    python -m scripts.reproduce run --help                 # --seeds, --data_path, --bert_path, ...

scripts/experiments.toml lists the runs. `run` skips what is done, resumes what was interrupted, and
writes results/reproduce/NAME_seedN.json; checkpoints and scores go to runs/reproduce/. An ensemble
is evaluated from the scores of its models.
"""

import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from common.cli import parse, print_line, run
from common.errors import InputError, brief_repr, raise_first, require
from common.files import read_json, sha256_of
from common.results import EvaluationResult
from scripts.parts.experiments import REGISTRY, Registry, Run, as_typed
from scripts.parts.paper_table import as_markdown
from scripts.parts.run_results import RunResult, problems
from training.config import FREE, TrainConfig

log = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent
RUN_JSON = "run.json"
# Of the options that a resumed training may change, those that change its result.
LENGTH = {"num_epochs", "max_steps", "val_step", "skip_bad_batches"}


@dataclass(frozen=True)
class RunOptions:
    names: Annotated[list[str], "runs that `list` shows", "NAME"]
    seeds: Annotated[list[int], "one training each"] = (0,)  # type: ignore[assignment]  # immutable
    data_path: Annotated[str | None, "in place of the registry's"] = None
    bert_path: Annotated[str | None, "in place of the registry's"] = None
    train: Annotated[bool, "--no-train only evaluates models that are in runs/reproduce"] = True

    def __post_init__(self) -> None:
        require(min(self.seeds) >= 0, f"--seeds {min(self.seeds)}: expected 0 or more")

    @property
    def paths(self) -> dict[str, str]:
        """The folders that take the place of the registry's."""
        given = {"data_path": self.data_path, "bert_path": self.bert_path}
        return {name: path for name, path in given.items() if path is not None}


def overview(registry: Registry) -> str:
    """Return every run with its tables, data, commands and state."""
    lines = []
    for each in registry.runs.values():
        tables = [table.title for table in registry.tables.values() if each in registry.rows(table)]
        lines.append(f"{each.name}: {each.title}; {state(registry, each)}")
        lines.append(f"  tables: {'; '.join(tables)}")
        lines.append(f"  needs: {'; '.join([*each.of, registry.data_of(each).needs])}")
        lines += [f"  {as_typed(command)}" for command in registry.commands(each, 0, {})]
    return "\n".join(lines) + "\n"


def state(registry: Registry, each: Run) -> str:
    """Return for each seed of a run whether it is done, or what is wrong with its result."""
    states = []
    for seed, path in each.results().items():
        try:
            found = next(problems(registry, each, RunResult.read(path)), "is done")
        except InputError as error:
            found = f"is damaged ({error})"
        states.append(f"seed {seed} {found}")
    return ", ".join(states) or "not run"


def check(registry: Registry, each: Run, seed: int, paths: dict[str, str]) -> None:
    """Raise InputError before the training if an older result or the split does not fit."""
    from data import Split

    for part in [*map(registry.run, each.of), each]:
        path, data = part.result(seed), registry.data_of(part)
        if path.exists():
            against = problems(registry, part, RunResult.read(path))
            raise_first(f"{path}: {problem}; delete it to run it again" for problem in against)
        elif not part.of:
            folder = Path(paths.get("data_path", data.data_path)) / data.data_name
            split = Split.open(folder, data.split, None)
            wrong = f"{split.path}: {split.images} images; expected {data.images}"
            require(split.images == data.images, wrong)


def reproduce(
    registry: Registry, each: Run, seed: int, options: RunOptions, with_scores: bool = False
) -> RunResult:
    """Return the result of a run; first do what is missing: its members, training, evaluation.

    `with_scores` evaluates a model again if the scores behind its result are gone.
    """
    path = each.result(seed)
    if path.exists():
        result = RunResult.read(path)
        if not with_scores or result.matrices == scores_digest(each, seed):
            log.info("%s, seed %d: done, %s", each.name, seed, path)
            return result
    if each.of:
        members = registry.members(each)
        parts = [reproduce(registry, part, seed, options, with_scores=True) for part in members]
    else:
        if options.train:
            run_program(registry.train(each, seed, options.paths))
        check_model(registry, each, seed)
        parts = []
    result = evaluate(registry, each, seed, options.paths, parts)
    raise_first(f"{path}: not written: {problem}" for problem in problems(registry, each, result))
    result.write()
    log.info("%s, seed %d: %s", each.name, seed, path)
    return result


def evaluate(
    registry: Registry, each: Run, seed: int, paths: dict[str, str], parts: list[RunResult]
) -> RunResult:
    """Evaluate a model, or an ensemble whose models have the results `parts`."""
    from common import provenance

    path, command = each.result(seed), registry.evaluate(each, seed, paths)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    run_program([*command, "--json", str(temporary)])
    evaluation = EvaluationResult.from_json(read_json(temporary, "a result"), temporary)
    temporary.unlink()
    if parts:  # saved scores do not say what their models read
        inputs = [one for part in parts for one in part.fingerprints]
        evaluation = replace(evaluation, fingerprints=inputs)
        commands = [text for part in parts for text in part.commands]
        trainings = [training for part in parts for training in part.trainings]
        matrices = {name: digest for part in parts for name, digest in part.matrices.items()}
    else:
        beside = each.model(seed).parent / RUN_JSON  # which a model from elsewhere may lack
        session = read_json(beside, "how a model was trained") if beside.exists() else None
        commands = [session["command"]] if session else []
        trainings = [session and {k: v for k, v in session.items() if k != "options"}]
        matrices = scores_digest(each, seed)
    commands = [*commands, as_typed(command)]
    about = registry.digest(each), commands, trainings, matrices, provenance.surroundings()
    return RunResult(path, *about, evaluation)


def scores_digest(each: Run, seed: int) -> dict[str, str]:
    """Return the SHA-256 of a model's scores by their file; nothing if they are gone."""
    path = each.scores(seed)
    return {str(path): sha256_of(path)} if path.exists() else {}


def check_model(registry: Registry, each: Run, seed: int) -> None:
    """Raise InputError if a model was trained with other options, or not to its end."""
    from checkpoint.checkpoint import read_checkpoint

    path = each.model(seed)
    require(path.exists(), f"{path}: not found; expected the model to evaluate")
    wanted = asdict(parse(TrainConfig, registry.train(each, seed, {})[1:], ""))
    # Paths may differ, and the width of the features is that of the data.
    lasting = {k: v for k, v in wanted.items() if k not in {*FREE, "data_name", "img_dim"}}
    raise_first(other_options(path, read_checkpoint(path).options, lasting))
    beside = path.parent / RUN_JSON
    if beside.exists():
        session = read_json(beside, "how a model was trained")
        unfinished = f"{beside}: the training did not finish; resume it (train.py --resume auto)"
        require(session.get("complete") is not False, unfinished)
        # The best model may be older than the last resume, run.json has the newest options.
        length = {name: wanted[name] for name in LENGTH}
        raise_first(other_options(beside, session.get("options", {}), lasting | length))


def other_options(path: Path, options: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """Yield the options of a training that the registry lists otherwise."""
    for name, value in wanted.items():
        if name in options and options[name] != value:
            trained = f"{path}: was trained with --{name} {brief_repr(options[name])}"
            yield f"{trained}; expected {brief_repr(value)}"


def run_program(command: list[str]) -> None:
    """Run a program of the project. Raises InputError if it fails.

    A signal is passed on to the program, which saves before it ends.
    """
    log.info("%s", as_typed(command))
    program = subprocess.Popen([sys.executable, ROOT / command[0], *command[1:]])
    received = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        program.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, forward) for number in numbers]
    status = program.wait()
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    if received or status > 128:
        sys.exit(128 + received[0] if received else status)
    require(status == 0, f"{command[0]} ended with status {status}, see above")


def main() -> None:
    action, *rest = sys.argv[1:] or ["--help"]
    if action == "list":
        print_line(overview(Registry(REGISTRY)))
    elif action == "table":
        print_line(as_markdown(Registry(REGISTRY)))
    elif action == "run":
        options, registry = parse(RunOptions, rest, __doc__, "reproduce.py run"), Registry(REGISTRY)
        runs = [(registry.run(name), seed) for name in options.names for seed in options.seeds]
        for each, seed in runs:
            check(registry, each, seed, options.paths)
        for each, seed in runs:
            reproduce(registry, each, seed, options)
    elif action in ("-h", "--help"):
        print_line(__doc__)
    else:
        raise InputError(f"{action}: expected list, run or table (see --help)")


if __name__ == "__main__":
    run(main)
