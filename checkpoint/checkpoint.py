"""checkpoint.py — own and published checkpoints (SPEC §10): read, write, compare.

Nothing that a file holds is executed. Knows nothing of training or of data.
"""

import argparse
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from checkpoint.bert import Bert, assembled_bert, load_bert, normal_name
from checkpoint.official import NEVER_USED, PARTS, native_names
from checkpoint.weights import Weights, build_with_weights, check_named
from common.cli import LARGEST_FLOAT, keep_float32
from common.config import ModelConfig
from common.errors import PLAIN, InputError, brief_repr, require, summarise
from common.files import read_json, require_regular_file, sha256_of
from common.layout import SplitName
from common.torch_files import has_checksum, read_safetensors, read_torch, write_torch
from model import DIME

log = logging.getLogger(__name__)

FORMAT = "dime-1"  # of own checkpoints; another number would mean other names or meanings
# The options of a published checkpoint that count; it may hold others, of any kind.
KNOWN = {field.name for field in fields(ModelConfig)} | {"data_path", "data_name", "bert_path"}
BERT_KEYS = "text.bert."  # frozen, known by its fingerprint, and not stored


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from a file, own or published, under this project's names."""

    path: Path
    options: dict[str, Any]  # options of the run that wrote it
    weights: Weights  # BERT's left out
    bert_weights: Weights | None  # the BERT that a published checkpoint brings
    bert_fingerprint: str | None  # of the BERT that an own checkpoint was trained with
    # The rest: optimiser, epoch, step, best scores, random states; under "published" what a
    # published checkpoint holds and this project has no use for.
    state: dict[str, Any]

    @property
    def config(self) -> ModelConfig:
        """The model's configuration; an option that the file lacks has its default."""
        return configured(ModelConfig, self.options, self.path)

    @property
    def metrics(self) -> dict[str, float] | None:
        """Figures on dev of these very weights; None where the file names none."""
        found = self.state.get("metrics")
        fits = isinstance(found, dict) and all(
            type(name) is str and type(value) is float and math.isfinite(value)
            for name, value in found.items()
        )
        return found if fits else None


def configured(cls: type, options: Mapping[str, Any], source: Path) -> Any:
    """Dataclass `cls` from those `options` that it has; InputError where one has another type."""
    known, hints = {}, get_type_hints(cls)
    for field in fields(cls):
        value = options.get(field.name, field.default)
        kind, choices = type(field.default), get_args(hints[field.name])  # of a Literal
        fits = type(value) is kind or (kind is float and type(value) is int)
        expected = f"one of {', '.join(choices)}" if choices else kind.__name__
        require(
            fits and (not choices or value in choices),
            f"{source}: option {field.name} is {brief_repr(value)}; expected {expected}",
        )
        finite = kind is not float or abs(value) <= LARGEST_FLOAT
        require(finite, f"{source}: option {field.name} is {value}; expected a finite number")
        known[field.name] = kind(value)
    try:
        return cls(**known)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read an own or a published checkpoint. Raises InputError where it is neither, or damaged."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return _from_arrays(path)
    content = read_torch(path)
    require(isinstance(content, dict), f"{path}: holds {type(content).__name__}; no checkpoint")
    if isinstance(content.get("opt"), argparse.Namespace):
        return _published(path, content)
    require(
        content.get("format") == FORMAT,
        f"{path}: neither a checkpoint of this project ({FORMAT}) nor a published one",
    )
    if not has_checksum(path):
        log.warning("%s: carries no checksum, so damage would go unnoticed", path)
    return _own(path, content, path)


def _own(path: Path, content: dict[str, Any], source: Path) -> Checkpoint:
    """An own checkpoint from what a file holds; `source` is the file that says what belongs to it.

    Raises InputError where something is missing or of another kind.
    """
    absent = {"options", "weights", "bert"} - content.keys()
    require(not absent, f"{source}: lacks {summarise(sorted(absent))}")
    require(isinstance(content["options"], dict), f"{source}: its options are no dictionary")
    _check_options(content["options"], source)
    require(isinstance(content["bert"], str), f"{source}: its BERT's fingerprint is no text")
    check_named(content["weights"], path)
    state = {k: v for k, v in content.items() if k not in ("options", "weights", "bert")}
    return Checkpoint(path, content["options"], content["weights"], None, content["bert"], state)


def json_beside(path: Path) -> Path:
    """Where the options are that go with weights in a `.safetensors` file."""
    return path.with_suffix(".json")


def _from_arrays(path: Path) -> Checkpoint:
    """A checkpoint as convert_checkpoint writes it: `.safetensors`, and JSON beside it.

    Raises InputError where it is none, or damaged.
    """
    require_regular_file(path, "a safetensors file")
    beside = json_beside(path)
    content = read_json(beside, f"the options that go with {path.name}")
    found = content.pop("format", None)
    require(found == FORMAT, f"{beside}: format {brief_repr(found)}; expected {FORMAT!r}")
    fits = content.pop("sha256", None) == sha256_of(path)
    require(fits, f"{path}: damaged, or another file's: its SHA-256 is not the one in {beside}")
    require("weights" not in content, f"{beside}: holds weights, which {path.name} has")
    return _own(path, content | {"weights": read_safetensors(path)}, beside)


def _check_options(options: Mapping[str, Any], path: Path) -> None:
    """Raise InputError where an option is more than a text or a number, or has no name."""
    for name, value in options.items():
        require(isinstance(name, str), f"{path}: {brief_repr(name)} is no name of an option")
        kind = type(value).__name__
        require(
            isinstance(value, PLAIN), f"{path}: option {name} is {kind}; expected text or a number"
        )
        fits = not isinstance(value, str) or value.isprintable()
        require(fits, f"{path}: option {name} is a text that cannot be printed")


def write_checkpoint(
    path: Path,
    model: DIME,
    options: dict[str, Any],
    bert: Bert,
    keep: Path | None = None,
    **state: Any,
) -> None:
    """Write plain data: it loads with `weights_only=True`, and BERT's weights are not in it.

    What had the name before is then found at `keep`, if one is given.
    """
    # DEVIATION: BERT's weights are known by a fingerprint (the published code stored them).
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith(BERT_KEYS)}
    content = {"format": FORMAT, "options": options, "weights": weights, "bert": bert.fingerprint}
    write_torch(path, content | state, keep)


def bert_folder(checkpoint: Checkpoint, bert_path: str | Path | None = None) -> Path:
    """`bert_path`, or else the folder of the BERT that a checkpoint was trained with."""
    return Path(bert_path or str(checkpoint.options.get("bert_path", ".")))


def bert_of(checkpoint: Checkpoint, bert_path: str | Path | None = None) -> Bert:
    """The BERT that a checkpoint goes with, from `bert_path` or the folder it was trained with.

    Of a published checkpoint the folder gives vocabulary and configuration, no more. Another BERT
    than the checkpoint's is an InputError.
    """
    folder = bert_folder(checkpoint, bert_path)
    if checkpoint.bert_weights is not None:
        return assembled_bert(folder, checkpoint.bert_weights, checkpoint.path)
    bert = load_bert(folder)
    check_same_bert(checkpoint, bert)
    return bert


def check_same_bert(checkpoint: Checkpoint, bert: Bert) -> None:
    """Raise InputError where an own checkpoint was trained with another BERT."""
    expected, found = checkpoint.bert_fingerprint, bert.fingerprint
    require(
        expected == found,
        f"{checkpoint.path}: was trained with another BERT than the one in "
        f"{bert.vocabulary.path.parent} (fingerprint {str(expected)[:12]}, found {found[:12]})",
    )


def build_model(checkpoint: Checkpoint, bert: Bert, device: str | torch.device = "cpu") -> DIME:
    """The checkpoint's model in evaluation mode."""
    keep_float32()
    config = checkpoint.config
    check_positions(bert, config, f"{checkpoint.path}: ")
    weights, path = checkpoint.weights, checkpoint.path
    model = build_with_weights(lambda: DIME(config, bert.model), weights, path, keep=BERT_KEYS)
    return model.eval().to(device)


def check_positions(bert: Bert, config: ModelConfig, where: str = "") -> None:
    """Raise InputError where captions would be longer than BERT can read."""
    positions = bert.model.config.max_position_embeddings
    require(
        config.max_words <= positions,
        f"{where}--max_words {config.max_words}: this BERT reads {positions} at most",
    )


def load_model(
    path: str | Path, bert_path: str | Path | None = None, device: str | torch.device = "cpu"
) -> DIME:
    """A checkpoint's model, own or published, in evaluation mode on `device`."""
    checkpoint = read_checkpoint(path)
    return build_model(checkpoint, bert_of(checkpoint, bert_path), device)


def _published(path: Path, content: dict[str, Any]) -> Checkpoint:
    every = vars(content["opt"])
    options = {k: v for k, v in every.items() if k in KNOWN or isinstance(v, PLAIN)}
    _check_options(options, path)
    parts = content.get("model")
    fits = isinstance(parts, list | tuple) and len(parts) == 3
    require(fits, f"{path}: 'model' is no list of three state dicts (image, text, interaction)")
    for part in parts:
        check_named(part, path)
    image, text, space = (dict(part) for part in parts)
    bert = {k: text.pop(k) for k in list(text) if k.startswith("bert.")}
    unused = {f"txt_enc/{k}": v for k, v in bert.items() if normal_name(k) is None}
    if options.get("direction", "i2t") == "i2t":
        idle = [k for k in image if k.startswith("bn.")]
        unused |= {f"img_enc/{k}": image.pop(k) for k in idle}
    unused |= {f"itr_module/{k}": v for k, v in space.items() if NEVER_USED.search(k)}
    weights = native_names(dict(zip(PARTS, (image, text, space), strict=True)), path)
    state = {name: content.get(name) for name in ("epoch", "best_rsum", "best_r1")}
    state["step"] = content.get("Eiters")
    names = [k for k in bert if normal_name(k) is not None]
    state["published"] = {"weights": unused, "bert_names": names}
    return Checkpoint(path, options, weights, bert, None, state)


def warn_of_selection(
    path: str | Path,
    split: SplitName | None,
    selected_on: Any = None,
    fingerprint: str | None = None,
) -> None:
    """Say so where figures are of the split that selected a model, or of one named dev.

    `path` is the model's, or its scores'; `selected_on` and `fingerprint`, where they are known,
    those of the split that selected it and of the one that the figures are of.
    """
    same = fingerprint is not None and selected_on == fingerprint
    if same or split == "dev":  # the same pictures may be stored in another way
        certain = "the model was selected on this split, so"
        where = certain if same else "if the model was selected on this dev split,"
        log.warning("%s: %s its figures are too good; a test split tells", path, where)


def common_option(checkpoints: Sequence[Checkpoint], option: str) -> str:
    """What the checkpoints agree on for an option that was not given."""
    values = {str(checkpoint.options.get(option)) for checkpoint in checkpoints}
    require(
        len(values) == 1 and "None" not in values,
        f"--{option} is needed: the checkpoints say {', '.join(sorted(values))}",
    )
    return values.pop()
