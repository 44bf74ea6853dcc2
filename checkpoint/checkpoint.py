"""checkpoint.py — native and official checkpoints (SPEC §10): read, written, built into models."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from checkpoint.bert import Bert, assemble_bert, load_bert, reading_advice
from checkpoint.official import PARTS, native_names
from checkpoint.weights import Weights, check_named, load_state_dict_strict
from common.cli import LARGEST_FLOAT
from common.config import ModelConfig, Precision
from common.errors import PLAIN, InputError, brief_repr, require
from common.files import read_json, sha256_of
from common.layout import SplitName, check_backbone
from common.precision import has_tf32, keep_float32, warn_if_bf16_is_slow
from common.torch_files import read_safetensors, read_torch, write_torch
from model import DIME
from vocab import Tokenization

log = logging.getLogger(__name__)

FORMAT = "dime-1"  # of native checkpoints; another number would mean other names or meanings
# The options of an official checkpoint that count; it may hold others, of any kind.
KNOWN = {field.name for field in fields(ModelConfig)} | {"data_path", "data_name", "bert_path"}
APART = "evaluate each model with --save_scores, then all of them with --scores"
BERT_KEYS = "text.bert."  # frozen, known by its fingerprint, and not stored


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from a file, native or official, under native names."""

    path: Path
    options: dict[str, Any]  # of the run that wrote it
    weights: Weights  # without BERT's
    bert_weights: Weights | None  # the BERT that an official checkpoint brings
    bert_fingerprint: str | None  # of the BERT that a native checkpoint was trained with
    tokenization: Tokenization  # that it was trained with
    state: dict[str, Any]  # the rest: optimiser, epoch, step, best scores, random states

    @property
    def config(self) -> ModelConfig:
        """The model's configuration; an option that the file lacks has its default.

        Raises InputError if the command line would refuse an option.
        """
        hints, known = get_type_hints(ModelConfig), {}
        for field in fields(ModelConfig):
            value = self.options.get(field.name, field.default)
            kind: Any = type(field.default)
            choices = get_args(hints[field.name])  # of a Literal
            if kind is float:
                valid = type(value) in (int, float) and abs(value) <= LARGEST_FLOAT
            else:
                valid = type(value) is kind and (not choices or value in choices)
            if not valid:
                message = f"option {field.name} is {brief_repr(value)}; expected "
                raise InputError(f"{self.path}: {message}{' or '.join(choices) or kind.__name__}")
            known[field.name] = kind(value)
        try:
            return ModelConfig(**known)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error

    def precision_on(self, device: torch.device) -> Precision:
        """Return the precision that the model was trained in, fp32 if the device has no TF32."""
        precision = self.options.get("precision", "fp32")
        if precision not in get_args(Precision):
            expected = ", ".join(get_args(Precision))
            raise InputError(f"{self.path}: precision {precision!r}; expected one of {expected}")
        if precision == "tf32" and not has_tf32(device):
            log.info("%s: precision tf32 needs a CUDA GPU; computing in fp32", self.path)
            return "fp32"
        return precision

    @property
    def metrics(self) -> dict[str, float] | None:
        """The metrics of exactly these weights on dev, if the file has them."""
        metrics = self.state.get("metrics")
        return metrics if isinstance(metrics, dict) else None

    @property
    def backbone(self) -> dict[str, Any] | None:
        """What made the features of the training data, if that is known. Raises InputError."""
        about = self.state.get("backbone")
        return None if about is None else check_backbone(about, self.path)


def load_model(
    path: str | Path, bert_path: str | Path | None = None, device: str | torch.device = "cpu"
) -> DIME:
    """Return a checkpoint's model, native or official, in evaluation mode on `device`."""
    checkpoint = read_checkpoint(path)
    return build_model(checkpoint, bert_of(checkpoint, bert_path), device)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a native or an official checkpoint. Raises InputError if it is neither, or damaged."""
    path = Path(path)
    source = json_beside(path) if path.suffix == ".safetensors" else path
    content = read_torch(path) if source == path else _read_arrays(path, source)
    if isinstance(content, dict) and isinstance(content.get("opt"), argparse.Namespace):
        return _official_checkpoint(path, content)
    if not (isinstance(content, dict) and content.get("format") == FORMAT):
        raise InputError(f"{source}: neither a native checkpoint ({FORMAT}) nor an official one")
    options, weights, bert = (content.pop(name, None) for name in ("options", "weights", "bert"))
    _check_options(options, source)
    require(isinstance(bert, str), f"{source}: lacks the fingerprint of its BERT")
    check_named(weights, path)
    tokenization = Tokenization.of_checkpoint(content.pop("tokenization", None), source)
    return Checkpoint(path, options, weights, None, bert, tokenization, content)


def json_beside(path: Path) -> Path:
    """Return the path of the options that go with weights in a `.safetensors` file."""
    return path.with_suffix(".json")


def _read_arrays(path: Path, beside: Path) -> dict[str, Any]:
    """Return the content of a `.safetensors` file and the JSON beside it, as one dictionary."""
    digest = sha256_of(path)
    content = read_json(beside, f"the options that go with {path.name}")
    if content.get("sha256") != digest:
        raise InputError(f"{path}: damaged or replaced: its SHA-256 is not the one in {beside}")
    return content | {"weights": read_safetensors(path)}


def _official_checkpoint(path: Path, content: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint in an official file's content. Raises InputError."""
    every = vars(content["opt"])
    options = {k: v for k, v in every.items() if k in KNOWN or isinstance(v, PLAIN)}
    _check_options(options, path)
    parts = content.get("model")
    if not (isinstance(parts, list | tuple) and len(parts) == len(PARTS)):
        raise InputError(f"{path}: 'model' is no list of three state dicts")
    for part in parts:
        check_named(part, path)
    image, text, space = (dict(part) for part in parts)
    bert = {k: text.pop(k) for k in list(text) if k.startswith("bert.")}
    if options.get("direction", "i2t") == "i2t":  # its batch normalisation of images is idle
        image = {k: v for k, v in image.items() if not k.startswith("bn.")}
    weights = native_names(dict(zip(PARTS, (image, text, space), strict=True)), path)
    state = {name: content.get(name) for name in ("epoch", "best_rsum", "best_r1")}
    # REFERENCE: the published trainer counts epochs from 1, so a file names the next epoch.
    state |= {"step": content.get("Eiters"), "position": 0}
    return Checkpoint(path, options, weights, bert, None, Tokenization(), state)


def _check_options(options: Any, path: Path) -> None:
    """Raise InputError unless `options` maps names to texts and numbers."""
    require(isinstance(options, dict), f"{path}: lacks options")
    for name, value in options.items():
        if not (isinstance(name, str) and isinstance(value, PLAIN)):
            option = f"{path}: option {brief_repr(name)} is {type(value).__name__}"
            raise InputError(f"{option}; expected text or a number")


def write_checkpoint(
    path: Path, model: DIME, options: dict[str, Any], bert: Bert, **state: Any
) -> None:
    """Write plain data and tensors, which `torch.load(weights_only=True)` reads, too."""
    # DEVIATION: BERT's weights are known by a fingerprint (the published code stored them).
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith(BERT_KEYS)}
    content = {"format": FORMAT, "options": options, "weights": weights} | describe_text(bert)
    write_torch(path, content | state)


def describe_text(bert: Bert) -> dict[str, Any]:
    """Return what a native checkpoint stores of the BERT that it was trained with."""
    tokenization = asdict(bert.vocabulary.tokenization)
    return {"bert": bert.fingerprint, "tokenization": tokenization}


def bert_folder(checkpoint: Checkpoint, bert_path: str | Path | None = None) -> Path:
    """Return `bert_path`, or else the folder of the BERT that the checkpoint was trained with."""
    return Path(bert_path or str(checkpoint.options.get("bert_path", ".")))


def bert_of(
    checkpoint: Checkpoint,
    bert_path: str | Path | None = None,
    captions: Sequence[str] | None = None,
) -> Bert:
    """Return the checkpoint's BERT, from `bert_path` or the folder that it was trained with.

    An official checkpoint brings BERT's weights; the folder gives vocabulary and configuration.
    Captions are read as in training. A warning names the folder if it says otherwise; it is a mere
    line of the log if that changes none of `captions`.
    Raises InputError if the folder holds another BERT than a native checkpoint's.
    """
    folder = bert_folder(checkpoint, bert_path)
    if checkpoint.bert_weights is not None:
        bert = assemble_bert(folder, checkpoint.bert_weights, checkpoint.path)
    else:
        bert = load_bert(folder)
        check_same_bert(checkpoint, bert)
    return tokenize_as_trained(checkpoint, bert, captions)


def bert_to_train_with(folder: str | Path, trained: Checkpoint | None) -> Bert:
    """Return a folder's BERT, with the tokenisation of the model that is trained on, if any.

    Warns if captions are not read as the folder says, or not as its vocabulary needs.
    Raises InputError like `load_bert`.
    """
    bert = load_bert(folder)
    if trained is not None:
        return tokenize_as_trained(trained, bert)
    for line in reading_advice(bert.vocabulary):
        log.warning(line)
    return bert


def tokenize_as_trained(
    checkpoint: Checkpoint, bert: Bert, captions: Sequence[str] | None = None
) -> Bert:
    """Return a BERT with the tokenisation that a checkpoint was trained with.

    Warns if the folder's is another one; a mere line of the log if both read `captions` alike, and
    not even that if there are no captions yet, `()`.
    """
    trained, words = checkpoint.tokenization, bert.vocabulary
    if trained == words.tokenization:
        return bert
    as_trained = replace(bert, vocabulary=replace(words, tokenization=trained))
    rules = zip(trained.rules, words.tokenization.rules, strict=True)
    then, now = (", ".join(r) for r in zip(*[r for r in rules if r[0] != r[1]], strict=True))
    message = f"{checkpoint.path}: captions are read as in training: {then}; the folder of BERT, "
    message += f"{words.path.parent}, says: {now}"
    level = logging.WARNING
    if captions is not None:
        readings = [
            v.encode(captions, checkpoint.config.max_words)[0]
            for v in (words, as_trained.vocabulary)
        ]
        differ = int((readings[0] != readings[1]).any(1).sum())
        message += f"; {differ} of {len(captions)} captions differ"
        alike = logging.INFO if captions else logging.DEBUG
        level = logging.WARNING if differ else alike
    log.log(level, message)
    return as_trained


def check_same_bert(checkpoint: Checkpoint, bert: Bert) -> None:
    """Raise InputError if a native checkpoint was trained with another BERT."""
    trained_with = checkpoint.bert_fingerprint
    require(
        trained_with == bert.fingerprint,
        f"{checkpoint.path}: was trained with another BERT than the one in "
        f"{bert.vocabulary.path.parent} (fingerprint {str(trained_with)[:12]}, "
        f"not {bert.fingerprint[:12]})",
    )


def build_model(checkpoint: Checkpoint, bert: Bert, device: str | torch.device = "cpu") -> DIME:
    """Return the checkpoint's model in evaluation mode."""
    keep_float32()
    check_positions(bert, checkpoint.config, f"{checkpoint.path}: ")
    model = DIME(checkpoint.config, bert.model)
    load_state_dict_strict(model, checkpoint.weights, checkpoint.path, keep=BERT_KEYS)
    return model.eval().to(device)


def build_with_precision(
    checkpoint: Checkpoint, bert: Bert, device: torch.device, precision: Precision | None
) -> DIME:
    """Return the checkpoint's model in `precision`, by default that of its training.

    Warns if the device emulates it. Raises InputError if the checkpoint names no precision.
    """
    model = build_model(checkpoint, bert, device)
    model.precision = precision or checkpoint.precision_on(device)
    warn_if_bf16_is_slow(model.precision, device)
    return model


def check_space(checkpoint: Checkpoint, wanted: bool, where: str = "") -> None:
    """Raise InputError unless the model has a routing space, or has none, as `wanted`."""
    layers = checkpoint.config.num_layer_routing
    expected = "1 or more, a model with a routing space" if wanted else "0, the encoders alone"
    problem = f"{where}{checkpoint.path}: was trained with --num_layer_routing {layers}"
    require((layers > 0) == wanted, f"{problem}; expected {expected}")


def check_positions(bert: Bert, config: ModelConfig, where: str = "") -> None:
    """Raise InputError if captions would be longer than BERT can read."""
    positions = bert.model.config.max_position_embeddings
    require(
        config.max_words <= positions,
        f"{where}--max_words {config.max_words}: this BERT reads {positions} at most",
    )


def warn_of_selection(
    path: str | Path,
    split: SplitName | None,
    selected_on: Any = None,
    fingerprint: str | None = None,
) -> None:
    """Warn if metrics are computed on the split that selected the model, or on one named dev.

    `path` is the model's, or its scores'. `selected_on` and `fingerprint`, if known, are those of
    the split that selected the model and of the split that is evaluated.
    """
    same = fingerprint is not None and selected_on == fingerprint
    if same or split == "dev":  # the same images may be stored in another way
        certain = "the model was selected on this split, so"
        reason = certain if same else "if the model was selected on this dev split,"
        log.warning("%s: %s its metrics are too good; use a test split", path, reason)


def common_option(checkpoints: Sequence[Checkpoint], option: str) -> str:
    """Return the checkpoints' value of an option that was not given. Raises InputError."""
    values = {str(checkpoint.options.get(option)) for checkpoint in checkpoints}
    require(
        len(values) == 1 and "None" not in values,
        f"--{option} is needed: the checkpoints have {', '.join(sorted(values))}"
        + f"; or {APART}" * (len(values) > 1),
    )
    return values.pop()
