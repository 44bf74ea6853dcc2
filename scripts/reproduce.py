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
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from common.cli import parse, print_line, run
from common.errors import InputError, brief_repr, raise_first, require
from common.files import read_json, sha256_of
from common.results import EvaluationResult
from common.signals import Stopped, handled
from scripts.parts.experiments import REGISTRY, Registry, Run, as_typed
from scripts.parts.run_results import RunResult, legend, markdown_tables, problems
from training.config import FREE, TrainConfig

log = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent
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
    """Return every run with its state, data and commands."""
    lines = []
    for each in registry.runs.values():
        states = [f"seed {seed} {state(registry, each, seed)}" for seed in each.results()]
        data = registry.data_of(each)
        lines.append(f"{each.name}: {each.title}; {', '.join(states) or 'not run'}")
        lines.append(f"  needs: {'; '.join([*each.of, data.needs])}")
        lines += [f"  {command}" for command in registry.commands(each, 0, {})]
    return "\n".join(lines) + "\n"


def state(registry: Registry, each: Run, seed: int) -> str:
    """Return whether a run is done, or what is wrong with its result."""
    try:
        return next(problems(registry, each, RunResult.read(each.result(seed))), "is done")
    except InputError as error:
        return f"is damaged ({error})"


def reproduce(
    registry: Registry, each: Run, seed: int, options: RunOptions, with_scores: bool = False
) -> RunResult:
    """Return the result of a run; first do what is missing: its members, training, evaluation.

    `with_scores` evaluates a model again if the scores behind its result are gone.
    """
    path = each.result(seed)
    if path.exists():
        result = RunResult.read(path)
        against = problems(registry, each, result)
        raise_first(f"{path}: {problem}; delete it to run it again" for problem in against)
        if not with_scores or result.matrices == scores_digest(each, seed):
            log.info("%s, seed %d: done, %s", each.name, seed, path)
            return result
    parts = []
    if each.of:
        members = registry.members(each)
        parts = [reproduce(registry, part, seed, options, with_scores=True) for part in members]
    else:
        if options.train:
            check_split(registry, each, options.paths)
            run_program(registry.train(each, seed, options.paths))
        check_model(registry, each, seed)
    result = evaluate(registry, each, seed, options.paths, parts)
    raise_first(f"{path}: not written: {problem}" for problem in problems(registry, each, result))
    result.write(path)
    log.info("%s, seed %d: %s", each.name, seed, path)
    return result


def check_split(registry: Registry, each: Run, paths: dict[str, str]) -> None:
    """Raise InputError before the training if the split to be evaluated does not fit."""
    from data import Split

    data = registry.data_of(each)
    folder = Path(paths.get("data_path", data.data_path)) / data.data_name
    split = Split.open(folder, data.split, None)
    wrong = f"{split.path}: {split.images} images; expected {data.images}"
    require(split.images == data.images, wrong)


def evaluate(
    registry: Registry, each: Run, seed: int, paths: dict[str, str], parts: list[RunResult]
) -> RunResult:
    """Evaluate a model, or an ensemble whose models have the results `parts`."""
    from common import provenance

    path = each.result(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    run_program([*registry.evaluate(each, seed, paths), "--json", str(temporary)])
    evaluation = EvaluationResult.from_json(read_json(temporary, "a result"), temporary)
    temporary.unlink()
    if parts:  # saved scores do not say what their models read
        inputs = [one for part in parts for one in part.fingerprints]
        evaluation = replace(evaluation, fingerprints=inputs)
    trainings: list[dict[str, Any] | None] = []
    matrices: dict[str, str] = {}
    for member in registry.members(each):
        session = read_session(member, seed)
        trainings.append(session and {k: v for k, v in session.items() if k != "options"})
        matrices |= scores_digest(member, seed)
    about = registry.digest(each), registry.commands(each, seed, paths), trainings, matrices
    return RunResult(*about, evaluation, **provenance.surroundings())


def read_session(each: Run, seed: int) -> dict[str, Any] | None:
    """Return the run.json beside a model, which a model from elsewhere may lack."""
    path = each.model(seed).with_name("run.json")
    return read_json(path, "how a model was trained") if path.exists() else None


def scores_digest(each: Run, seed: int) -> dict[str, str]:
    """Return the SHA-256 of a model's scores by their file; nothing if they are gone."""
    path = each.scores(seed)
    return {str(path): sha256_of(path)} if path.exists() else {}


def check_model(registry: Registry, each: Run, seed: int) -> None:
    """Raise InputError if a model was trained with other options, or not to its end."""
    from checkpoint.checkpoint import read_checkpoint

    wanted = asdict(parse(TrainConfig, registry.train(each, seed, {})[1:], ""))
    # Paths may differ, and the width of the features is that of the data.
    lasting = [name for name in wanted if name not in {*FREE, "data_name", "img_dim"}]
    path = each.model(seed)
    options = read_checkpoint(path).options
    trained = [(path, name, options) for name in lasting]
    if session := read_session(each, seed):
        unfinished = f"{path}: its training did not finish; resume it (train.py --resume auto)"
        require(session.get("complete") is not False, unfinished)
        # The best model may be older than the last resume, run.json has the newest options.
        beside, options = path.with_name("run.json"), session.get("options", {})
        trained += [(beside, name, options) for name in (*lasting, *LENGTH)]
    for file, name, options in trained:
        if name in options and options[name] != wanted[name]:
            problem = f"{file}: was trained with --{name} {brief_repr(options[name])}"
            raise InputError(f"{problem}; expected {brief_repr(wanted[name])}")


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

    with handled(forward):
        status = program.wait()
    if received:
        raise Stopped(received[0])
    require(status == 0, f"{command[0]} ended with status {status}, see above")


def main() -> None:
    action, *rest = sys.argv[1:] or ["--help"]
    if action == "list":
        print_line(overview(Registry(REGISTRY)))
    elif action == "table":
        registry = Registry(REGISTRY)
        print_line(f"{markdown_tables(registry, registry.tables)}\n{legend()}")
    elif action == "run":
        options, registry = parse(RunOptions, rest, __doc__, "reproduce.py run"), Registry(REGISTRY)
        for each in [registry.run(name) for name in options.names]:
            for seed in options.seeds:
                reproduce(registry, each, seed, options)
    elif action in ("-h", "--help"):
        print_line(__doc__)
    else:
        raise InputError(f"{action}: expected list, run or table (see --help)")


if __name__ == "__main__":
    run(main)
