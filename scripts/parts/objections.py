"""objections.py — why results, a model or a split are not what a run's row in a table says.

For scripts/reproduce.py, which makes results, and scripts/parts/paper_table.py, which shows them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoint.checkpoint import read_checkpoint
from common.errors import InputError, brief_repr
from common.files import read_json
from data import Split
from scripts.parts.experiments import RESULT, RESULTS, Registry, Run, typed, works
from training.config import FREE
from training.log import RUN

HOW_TRAINED = "how a model was trained"
INPUTS = {"data": "data", "bert": "BERT", "training": "training data"}  # that fingerprints are of

Content = dict[str, Any]  # of a results file


def objections(
    registry: Registry,
    run: Run,
    seed: int,
    results: Path = RESULTS,
    content: Content | None = None,
) -> Iterator[str]:
    """Why a run's results are not what its row in a table says.

    `content` is what they are to be, if they are not written yet. Raises InputError where they are
    not there, or damaged.
    """
    path, images = run.result(seed, results), registry.data_of(run).images
    content = read_json(path, RESULT) if content is None else content
    for found in _other_commands(registry, run, seed, content):
        yield f"{path}: was made by other commands than now: {found}"
        return
    for training in content["trainings"]:
        if training and training.get("complete") is False:
            yield f"{path}: {_cut_off(training)}"
    if content.get("images") != images:
        yield f"{path}: is of {brief_repr(content.get('images'))} images; expected {images}"
    yield from _other_scores(registry, run, seed, content, results)
    inputs = inputs_of(content)
    for name in _differing(inputs):
        yield f"{path}: its models are of different {name}"
    yield from _other_inputs(registry, run, path, inputs, results)


def _other_commands(registry: Registry, run: Run, seed: int, content: Content) -> Iterator[str]:
    """How results came about otherwise than by the registry's commands, wherever the files were.

    Of a model whose training is not known, None among them, the evaluation alone is compared.
    """
    now = [works(command) for command in registry.commands(run, seed, {})]
    members, trainings = len(registry.members(run)), content.get("trainings")
    told = isinstance(trainings, list) and all(isinstance(t, dict | None) for t in trainings)
    if not told or len(trainings) != members:
        yield f"its trainings are no list of {members}, each told or null"
        return
    try:
        found = [works(typed(text)) for text in content["commands"]]
    except (InputError, KeyError, TypeError, ValueError) as error:
        yield f"its commands cannot be read: {error!r}"
        return
    known = iter(trainings)
    now = [each for each in now if each[0] != "train.py" or next(known) is not None]
    programs, expected = ([program for program, _ in commands] for commands in (found, now))
    if programs != expected:
        yield f"{', '.join(programs)}; expected {', '.join(expected)}"
        return
    for (program, options), (_, wanted) in zip(found, now, strict=True):
        yield from _other_options(program, options, wanted)


def _other_options(
    program: str, options: Mapping[str, Any], wanted: Mapping[str, Any]
) -> Iterator[str]:
    """Options of a program that are told to be others than they should."""
    for name, value in wanted.items():
        if name in options and options[name] != value:
            yield f"{program} --{name} {brief_repr(options[name])}; expected {brief_repr(value)}"


def _other_scores(
    registry: Registry, run: Run, seed: int, content: Content, results: Path
) -> Iterator[str]:
    """Scores of an ensemble that are not its models' now, or of one model that are another's."""
    path, scores = run.result(seed, results), scores_of(content)
    parts = [registry.run(name).result(seed, results) for name in run.of]
    for part in (part for part in parts if part.exists()):
        if not scores_of(read_json(part, RESULT)).items() <= scores.items():
            yield f"{path}: was made of other scores than its models' now"
    if len(set(scores.values())) < len(scores):
        yield f"{path}: two of its models have the same scores; expected models of their own"
    if run.of:
        return  # whose scores are its models'
    models = [each for each in registry.runs.values() if not each.of]
    for other, read in _results_of(models, results):
        if other == path:
            return  # later ones are told there
        if set(scores.values()) & set(scores_of(read).values()):
            yield f"{path}: is of the same scores as {other}; expected a model of its own"


def split_objections(registry: Registry, run: Run, split: Split) -> Iterator[str]:
    """Why images and captions are not those that a run's row is of, before it is trained."""
    images = registry.data_of(run).images
    if split.images != images:
        yield f"{split.path}: {split.images} images; expected {images}"
    inputs = [{"data": split.fingerprint}]
    for found in _other_inputs(registry, run, split.path, inputs, RESULTS):
        yield f"{found}; expected the same, or no such older results"


def _other_inputs(
    registry: Registry, run: Run, path: Path, inputs: list[Content], results: Path
) -> Iterator[str]:
    """Data or BERT that are not those of the first results on that data which tell theirs."""
    data = registry.data_of(run)
    of_data = [each for each in registry.runs.values() if registry.data_of(each) == data]
    for other, read in _results_of(of_data, results):
        theirs = inputs if other == path else inputs_of(read)
        if theirs:
            for name in _differing([*inputs, *theirs]):
                yield f"{path}: is of other {name} than {other}"
            return


def model_objections(registry: Registry, run: Run, seed: int) -> Iterator[str]:
    """Why a model is not the one that is to be evaluated, before the evaluation.

    As far as its checkpoint tells, and the run.json beside it. Raises InputError where one of them
    is damaged.
    """
    path = run.model(seed)
    _, wanted = works(registry.train(run, seed, {}))
    # What a run may change as it goes on is in a best model as it was then. The evaluation reads
    # the registry's data, and tells by fingerprints whether the model was trained on it.
    lasting = {name: value for name, value in wanted.items() if name not in FREE | {"data_name"}}
    for found in _other_options("train.py", read_checkpoint(path).options, lasting):
        yield f"{path}: was trained by {found}"
    if (beside := path.parent / RUN).exists():
        told = read_json(beside, HOW_TRAINED)
        if told.get("complete") is False:  # older ones do not tell
            yield f"{beside}: {_cut_off(told)}; expected a complete one (train.py --resume auto)"
        options = told.get("options")
        for found in _other_options("train.py", options, wanted) if type(options) is dict else ():
            yield f"{beside}: is of {found}"


def _results_of(runs: list[Run], results: Path) -> Iterator[tuple[Path, Content]]:
    """The results of some runs that can be read; of others it is told where they are asked for."""
    for run in runs:
        for path in run.results(results).values():
            try:
                yield path, read_json(path, RESULT)
            except InputError:
                continue


def _cut_off(training: Mapping[str, Any]) -> str:
    """What is said of a training that did not come to its end."""
    return f"the training was cut off at step {brief_repr(training.get('step'))}"


def scores_of(content: Content) -> dict[str, str]:
    """The score matrices that results are of, and their SHA-256; none where it is not told."""
    found = content.get("matrices")
    return {name: str(digest) for name, digest in found.items()} if isinstance(found, dict) else {}


def inputs_of(content: Content) -> list[Content]:
    """Fingerprints of what each model of some results read; none where it is not told."""
    found = content.get("fingerprints")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _differing(inputs: list[Content]) -> Iterator[str]:
    """In what models differ that they read, as far as it is told."""
    for name, said in INPUTS.items():
        told = [each[name] for each in inputs if each.get(name) is not None]
        if told and told.count(told[0]) < len(told):
            yield said
