"""objections.py — why results, or a model, are not what a run's row in a table says.

For scripts/reproduce.py, which makes results, and scripts/parts/paper_table.py, which shows them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoint import read_checkpoint
from files import read_json
from options import InputError, short
from runlog import RUN
from scripts.parts.experiments import RESULT, RESULTS, Registry, Run, typed, works
from trainconfig import FREE

HOW_TRAINED = "how a model was trained"
INPUTS = ("data", "bert", "training")  # fingerprints of what a model read

Works = tuple[str, dict[str, Any]]  # a program and its options


def objection(
    registry: Registry,
    run: Run,
    seed: int,
    results: Path = RESULTS,
    content: dict[str, Any] | None = None,
) -> str:
    """Why a run's results are not what its row in a table says; empty where they are.

    `content` is what they are to be, if they are not written yet. Raises InputError where they are
    not there, or damaged.
    """
    path, images = run.result(seed, results), registry.data_of(run).images
    content = read_json(path, RESULT) if content is None else content
    if found := made_otherwise(registry, run, seed, content):
        return f"{path}: was made by other commands than now: {found}"
    for training in content["trainings"]:
        if training and training.get("complete") is False:
            return f"{path}: {cut_off(training)}"
    if content.get("images") != images:
        return f"{path}: is of {short(content.get('images'))} images; expected {images}"
    scores = scores_of(content)
    parts = [part.result(seed, results) for part in registry.members(run)]
    parts = [read_json(part, RESULT) for part in parts if part != path and part.exists()]
    if not all(scores_of(part).items() <= scores.items() for part in parts):
        return f"{path}: was made of other scores than its models' now"
    for other, read in _others(registry, [run], results):
        earlier = int(other.stem.rsplit("_seed", 1)[1]) < seed
        if earlier and set(scores.values()) & set(scores_of(read).values()):
            return f"{path}: is of the same scores as {other}; expected a model of its own"
    return _of_other_inputs(registry, run, path, content, results)


def _of_other_inputs(
    registry: Registry, run: Run, path: Path, content: dict[str, Any], results: Path
) -> str:
    """An objection where data or BERT are not those of the first results that tell theirs."""
    inputs, data = inputs_of(content), registry.data_of(run)
    if name := differs(inputs):
        return f"{path}: its models are of different {name}"
    of_data = [each for each in registry.runs.values() if registry.data_of(each) == data]
    others = _others(registry, of_data, results)
    told = ((other, inputs if other == path else inputs_of(read)) for other, read in others)
    first, theirs = next(((other, found) for other, found in told if found), (path, []))
    if name := differs([*inputs, *theirs]):
        return f"{path}: is of other {name} than {first}"
    return ""


def _others(
    registry: Registry, runs: list[Run], results: Path
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The results of some runs that can be read; of others it is told where they are asked for."""
    for run in runs:
        for path in run.results(results).values():
            try:
                yield path, read_json(path, RESULT)
            except InputError:
                continue


def made_otherwise(registry: Registry, run: Run, seed: int, content: dict[str, Any]) -> str:
    """How results came about otherwise than by the registry's commands, wherever the files were.

    Of a model whose training is not known, None among them, the evaluation alone is compared.
    """
    now = [works(command) for command in registry.commands(run, seed, {})]
    try:
        found = [works(typed(text)) for text in content["commands"]]
        trainings = content["trainings"]
        fits = isinstance(trainings, list) and all(isinstance(t, dict | None) for t in trainings)
    except (InputError, KeyError, TypeError, ValueError) as error:
        return f"its commands are none of these programs ({error!r})"
    members = len(registry.members(run))
    if not fits or len(trainings) != members:
        return f"its trainings are no list of {members}, each told or null"
    known = iter(trainings)
    now = [each for each in now if each[0] != "train.py" or next(known) is not None]
    programs, expected = ([program for program, _ in commands] for commands in (found, now))
    if programs != expected:
        return f"{', '.join(programs)}; expected {', '.join(expected)}"
    pairs = zip(found, now, strict=True)
    return next((told for each in pairs if (told := first_difference(*each))), "")


def first_difference(found: Works, now: Works) -> str:
    """The first option of a program that is told to be another than it should."""
    program, options = now
    for name, value in options.items():
        if name in found[1] and found[1][name] != value:
            return f"{program} --{name} {short(found[1][name])}; expected {short(value)}"
    return ""


def model_objection(registry: Registry, run: Run, seed: int) -> str:
    """Why a model is not the one that is to be evaluated, before the evaluation; empty where it is.

    As far as its checkpoint tells, and the run.json beside it. Raises InputError where the model is
    damaged.
    """
    path, trained = run.model(seed), {}
    if (beside := path.parent / RUN).exists():
        told = read_json(beside, HOW_TRAINED)
        if told.get("complete") is False:  # older ones do not tell
            return f"{beside}: {cut_off(told)}; expected a complete one (train.py --resume auto)"
        trained = told.get("options")
    # What a run may change as it goes on may be told of an earlier step in a best model.
    options = {k: v for k, v in read_checkpoint(path).options.items() if k not in FREE}
    options |= trained if isinstance(trained, dict) else {}
    found = first_difference(("train.py", options), works(registry.train(run, seed, {})))
    return found and f"{path}: was trained with {found}"


def cut_off(training: Mapping[str, Any]) -> str:
    """What is said of a training that did not come to its end."""
    return f"the training was cut off at step {short(training.get('step'))}"


def scores_of(content: dict[str, Any]) -> dict[str, str]:
    """The score matrices that results are of, and their SHA-256; none where it is not told."""
    found = content.get("matrices")
    return {name: str(digest) for name, digest in found.items()} if isinstance(found, dict) else {}


def inputs_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Fingerprints of what each model of some results read; none where it is not told."""
    found = content.get("fingerprints")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def differs(inputs: list[dict[str, Any]]) -> str:
    """In what models differ that they read, as far as it is told; empty where it is the same."""
    names = {"data": "data", "bert": "BERT", "training": "training data"}
    for name in INPUTS:
        told = [each[name] for each in inputs if each.get(name) is not None]
        if told and told.count(told[0]) < len(told):
            return names[name]
    return ""
