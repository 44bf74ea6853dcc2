"""reproduce.py — trains and evaluates the runs of the paper's tables, and shows their results.

    python -m scripts.reproduce list                       # every run: commands, data, state
    python -m scripts.reproduce run f30k_ensemble          # its missing parts: hours to days
    python -m scripts.reproduce run ablation_uniform --seeds 0 1 2
    python -m scripts.reproduce run f30k_i2t --no-train    # evaluate a model that is there already
    python -m scripts.reproduce table                      # our results and the paper's
    python -m scripts.reproduce run --help                 # --seeds, --data_path, --bert_path, ...

scripts/experiments.toml lists the runs. `run` skips what is done, resumes what was interrupted, and
writes results/reproduce/NAME_seedN.json; checkpoints and scores go to runs/reproduce/. An ensemble
is evaluated from the scores of its models. A run with a baseline is compared with it over the seeds
whose scores both have: results/compare/NAME.json.
"""

import logging
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

from common.cli import parse, print_line, run
from common.errors import brief_repr, require
from common.files import read_json, write_json
from common.signals import Stopped, handled
from scripts.parts.experiments import (
    REGISTRY,
    Run,
    as_typed,
    read_registry,
    require_project_folder,
)
from scripts.parts.run_results import find_problem, fingerprints, legend, read_result, recall_table
from training.config import FREE, TrainConfig

log = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent
# Options that a resumed training may change, and that change its result.
DECISIVE = {"num_epochs", "max_steps", "patience", "val_step", "skip_bad_batches", "init"}


@dataclass(frozen=True)
class RunOptions:
    names: Annotated[list[str], "runs that `list` shows", "NAME"]
    seeds: Annotated[list[int], "one training each"] = (0,)  # type: ignore[assignment]  # immutable
    data_path: Annotated[str | None, "default: the registry's"] = None
    bert_path: Annotated[str | None, "default: the registry's"] = None
    train: Annotated[bool, "--no-train only evaluates models that are in runs/reproduce"] = True


def overview(each: Run) -> str:
    """Return a run's state, data and commands."""
    states = [
        f"seed {seed} {find_problem(each, read_result(path)) or 'is done'}"
        for seed, path in each.results().items()
    ]
    state = f"{each.name}: {each.title}; {', '.join(states) or 'not run'}"
    needs = "; ".join(["needs: " + each.needs, *(model.name for model in each.of)])
    return "\n  ".join([state, needs, *each.commands(0)])


def reproduce(each: Run, seed: int, train: bool, needs_scores: bool = False) -> dict[str, Any]:
    """Train and evaluate a run, or an ensemble's models and then itself; return the result.

    What is done is skipped. A model is evaluated again if an ensemble `needs_scores` that are gone.
    """
    from common import provenance

    path = each.result(seed)
    if path.exists():
        result = read_result(path)
        problem = find_problem(each, result)
        require(problem is None, f"{path}: {problem}; delete it to run it again")
        if each.scores(seed).exists() or not needs_scores:
            log.info("%s, seed %d: done, %s", each.name, seed, path)
            return result
    models = [reproduce(model, seed, train, needs_scores=True) for model in each.of]
    if not models and train:
        run_program(each.train_command(seed))
    trainings = [t for model in models for t in model["trainings"]] or [check_model(each, seed)]
    file = each.folder(seed) / "evaluation.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    outputs = ["--json", str(file)]
    if models:  # for a comparison
        outputs += ["--save_scores", str(each.scores(seed))]
    run_program([*each.evaluate_command(seed), *outputs])
    result = {
        "entry": each.digest(),
        "commands": each.commands(seed),  # of a model from elsewhere only the last one was run
        "trainings": trainings,
        "evaluation": read_json(file, "an evaluation"),
        **provenance.surroundings(),
    }
    if models:  # saved scores do not say what their models read
        inputs = [one for model in models for one in fingerprints(model)]
        result["evaluation"]["fingerprints"] = inputs
    problem = find_problem(each, result)
    require(problem is None, f"{path}: not written: {problem}")
    write_json(path, result)
    log.info("%s, seed %d: %s", each.name, seed, path)
    return result


def compare(each: Run, baseline: Run) -> None:
    """Compare a run with its baseline over the seeds whose results and scores both have."""
    runs = (each, baseline)
    common = each.results().keys() & baseline.results().keys()
    seeds = [s for s in sorted(common) if all(one.scores(s).exists() for one in runs)]
    if not seeds:
        log.info("%s: not compared with %s, which has no scores yet", each.name, baseline.name)
        return
    path, entries = each.comparison(), [one.digest() for one in runs]
    if path.exists():
        known = read_json(path, "a comparison")
        if known["entries"] == entries and known["seeds"] == seeds:
            log.info("%s: compared with %s, %s", each.name, baseline.name, path)
            return
    file = each.folder(seeds[0]) / "comparison.json"
    run_program([*each.compare_command(baseline, seeds), "--json", str(file)])
    content = {"entries": entries, "seeds": seeds, **read_json(file, "a comparison")}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def check_model(each: Run, seed: int) -> dict[str, Any] | None:
    """Return how a model was trained, without its options; None if it came without run.json.

    Raises InputError if its training has other options, or did not finish.
    """
    from checkpoint.checkpoint import read_checkpoint

    file = each.model(seed).with_name("run.json")
    wanted = asdict(parse(TrainConfig, each.train_command(seed)[1:], ""))
    # Paths may differ, and the width of the features is that of the data.
    names = wanted.keys() - {*FREE, "data_name", "img_dim"}
    training = None
    if file.exists():
        training = read_json(file, "how a model was trained")
        unfinished = f"{file}: the training did not finish; resume it (train.py --resume auto)"
        require(training.get("complete") is not False, unfinished)
        options, names = training.pop("options", {}), names | DECISIVE
    else:
        file = each.model(seed)
        options = read_checkpoint(file).options
    for name in sorted(names & options.keys()):
        problem = f"{file}: was trained with --{name} {brief_repr(options[name])}"
        require(options[name] == wanted[name], f"{problem}; expected {brief_repr(wanted[name])}")
    return training


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
    require(action == "run" or not rest, f"{action}: {' '.join(rest)}: expected no option")
    if action == "list":
        require_project_folder()
        runs, _ = read_registry(REGISTRY)
        print_line("\n".join(map(overview, runs.values())))
    elif action == "table":
        require_project_folder()
        _, tables = read_registry(REGISTRY)
        print_line("\n".join([*map(recall_table, tables.values()), legend()]))
    elif action == "run":
        options = parse(RunOptions, rest, __doc__, "reproduce.py run")
        require_project_folder()
        given = {"data_path": options.data_path, "bert_path": options.bert_path}
        runs, _ = read_registry(REGISTRY, {name: path for name, path in given.items() if path})
        for name in options.names:
            require(name in runs, f"{name}: no such run; expected {', '.join(runs)}")
        for name in options.names:
            for seed in options.seeds:
                reproduce(runs[name], seed, options.train)
            if baseline := runs[name].baseline:
                compare(runs[name], runs[baseline])
    else:
        require(action in ("-h", "--help"), f"{action}: expected list, run or table (see --help)")
        print_line(__doc__)


if __name__ == "__main__":
    run(main)
