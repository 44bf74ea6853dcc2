"""checkpoint.py — BERT folders, own and published checkpoints (SPEC §10): read, write, compare.

Nothing that a file holds is executed. Knows nothing of training or of data.
"""

import argparse
import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from files import (
    has_checksum,
    naming,
    read_json,
    read_safetensors,
    read_torch,
    sha256_of,
    size_of,
    write_json,
    write_lines,
    write_safetensors,
    write_torch,
)
from model import DIME, ModelConfig
from options import LARGEST_FLOAT, PLAIN, InputError, require, short, some
from published import NEVER_USED, PARTS, own_names
from vocab import Vocabulary

log = logging.getLogger(__name__)

FORMAT = "dime-1"  # of own checkpoints; another number would mean other names or meanings
# The options of a published checkpoint that count; it may hold others, of any kind.
KNOWN = {field.name for field in fields(ModelConfig)} | {"data_path", "data_name", "bert_path"}
BERT_KEYS = "text.bert."  # frozen, known by its fingerprint, and not stored

Weights = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)

# What a BERT of 2018 is made of; nothing else of its configuration changes what it computes.
BERT_SIZES = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
CONFIGURATIONS = ("bert_config.json", "config.json")  # files of a BERT folder, the first is read
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
MOST_LAYERS = 100  # of BERT; the largest published one has 24


@dataclass(frozen=True)
class Bert:
    """A frozen BERT with its vocabulary."""

    model: BertModel
    vocabulary: Vocabulary
    fingerprint: str  # SHA-256 of weights and vocabulary, whatever the files were


def load_bert(folder: str | Path) -> Bert:
    """BERT from a local folder; nothing is downloaded.

    Raises InputError that names the file, and the key that is missing or too many.
    """
    return assembled_bert(Path(folder), *read_bert(folder))


def read_bert(folder: str | Path) -> tuple[Weights, Path]:
    """The weights of a BERT folder as they are stored, and their file. Raises InputError."""
    folder = Path(folder)
    require(os.path.isdir(folder), f"{folder}: no such folder; --bert_path must name a BERT folder")
    source = _one_of(folder, *WEIGHTS)
    return _read_weights(source), source


def assembled_bert(folder: Path, weights: Weights, source: Path) -> Bert:
    """BERT of a folder's vocabulary and configuration with the weights of a file `source`.

    Raises InputError like `load_bert`.
    """
    vocabulary = Vocabulary.load(folder)
    config = bert_config(folder)
    weights = normalised_bert(weights, source)
    entries = len(vocabulary.entries)
    words = list(weights.get("embeddings.word_embeddings.weight", torch.empty(0)).shape)
    require(
        [entries] == words[:1] == [config.vocab_size],
        f"{vocabulary.path}: {entries} entries, but word embeddings {words} in {source} "
        f"and vocab_size {config.vocab_size} in its configuration; expected one number",
    )
    layers = len({name.split(".")[2] for name in weights if name.startswith("encoder.layer.")})
    claimed = config.num_hidden_layers
    require(claimed == layers, f"{source}: holds {layers} layers, its configuration says {claimed}")
    model = filled(lambda: _bert_model(config), weights, source)
    return Bert(model, vocabulary, fingerprint(weights, vocabulary))


def bert_config(folder: str | Path) -> BertConfig:
    """The configuration in a BERT folder. Raises InputError where it is none of such a BERT."""
    sizes = _bert_sizes(_one_of(Path(folder), *CONFIGURATIONS))
    return BertConfig(**sizes, hidden_act="gelu")


def bert_parameters(config: BertConfig) -> int:
    """Numbers that a BERT of that configuration has, without the pooler, which is not used."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in _bert_model(config).parameters())


def _bert_model(config: BertConfig) -> BertModel:
    return BertModel(config, add_pooling_layer=False)


def normalised_bert(weights: Mapping[str, Tensor], source: Path) -> Weights:
    """Weights under one set of names: no prefix, LayerNorm.weight and .bias, nothing unused."""
    normal: Weights = {}
    for key, value in weights.items():
        name = normal_name(key)
        if name is None:
            continue
        require(name not in normal, f"{source}: holds {name} twice, under two names")
        require(value.is_floating_point(), f"{source}: {key} is {value.dtype}; expected floats")
        normal[name] = value
    # weights that share their numbers in the file would have their own in float32
    held = sum(value.numel() * value.element_size() for value in normal.values())
    size = size_of(source, "the weights of BERT")
    require(held <= size, f"{source}: {held} bytes of weights in a file of {size} bytes")
    return {name: value.float() for name, value in normal.items()}


def normal_name(key: str) -> str | None:
    """The one name of a weight of BERT; None for what is not used."""
    name = key.removeprefix("bert.")
    if name.startswith(("cls.", "pooler.")) or name.endswith("position_ids"):
        return None
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)


def write_bert(folder: Path, bert: Bert) -> None:
    """Write config.json, vocab.txt and model.safetensors into a folder, which is made.

    The weights come last, so that a folder that is not whole is no BERT folder. Raises InputError
    where that cannot be done.
    """
    with naming(folder, "a folder to write to"):
        folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: getattr(bert.model.config, name) for name in BERT_SIZES}
    kind = {"model_type": "bert", "architectures": ["BertModel"]}
    write_json(folder / "config.json", kind | FIXED | sizes)
    write_lines(folder / "vocab.txt", bert.vocabulary.entries)
    write_safetensors(folder / "model.safetensors", bert.model.state_dict())


def fingerprint(bert: Weights, vocabulary: Vocabulary) -> str:
    """SHA-256 over sorted names, shapes and float32 bytes, and the vocabulary's entries."""
    digest = hashlib.sha256()
    for name in sorted(bert):
        digest.update(f"{name} {list(bert[name].shape)}\n".encode())
        digest.update(bert[name].contiguous().numpy().data)
    digest.update("\n".join(vocabulary.entries).encode())
    return digest.hexdigest()


def filled(make: Callable[[], Module], weights: Weights, source: Path, keep: str = "") -> Module:
    """The module that `make` makes, with these weights, held to them as `load_strictly` does.

    A file's word for its sizes is not taken: they are compared before memory is.
    """
    with torch.device("meta"):
        check_fit(make(), weights, source, keep)
    module = make()
    module.load_state_dict(weights, strict=False)
    return module


def load_strictly(model: nn.Module, weights: Weights, source: Path, keep: str = "") -> None:
    """Fill `model`; a missing, surplus or wrongly shaped key is an InputError that names it.

    Keys of the model that start with `keep` stay as they are.
    """
    check_fit(model, weights, source, keep)
    model.load_state_dict(weights, strict=False)


def check_fit(model: nn.Module, weights: Weights, source: Path, keep: str = "") -> None:
    """Raise InputError unless `model` and `weights` have the same keys, shapes and kinds of number.

    Keys of the model that start with `keep` do not count.
    """
    # DEVIATION: a missing or surplus weight is an error (the published code skipped it in silence).
    wanted = {k: v for k, v in model.state_dict().items() if not (keep and k.startswith(keep))}
    missing, surplus = sorted(wanted.keys() - weights), sorted(weights.keys() - wanted)
    require(not missing, f"{source}: lacks {some(missing)}")
    require(not surplus, f"{source}: holds {some(surplus)} too many")
    for name, value in wanted.items():
        found, expected = list(weights[name].shape), list(value.shape)
        require(found == expected, f"{source}: {name} is {found}, expected {expected}")
        floats = weights[name].is_floating_point() and value.is_floating_point()
        fits = floats or weights[name].dtype == value.dtype
        require(fits, f"{source}: {name} is {weights[name].dtype}; expected {value.dtype}")


def _one_of(folder: Path, *names: str) -> Path:
    for name in names:
        if os.path.isfile(folder / name):
            return folder / name
    raise InputError(f"{folder}: holds no {' and no '.join(names)}; a BERT folder needs one")


def _bert_sizes(path: Path) -> dict[str, Any]:
    config = read_json(path, "the configuration of BERT")
    kind = config.get("model_type", "bert")
    require(kind == "bert", f"{path}: model_type is {short(kind)}; expected 'bert'")
    for name, expected in FIXED.items():
        found = config.get(name, expected)
        require(found == expected, f"{path}: {name} is {short(found)}; expected {expected!r}")
    sizes = {name: config.get(name, default) for name, default in BERT_SIZES.items()}
    for name, value in sizes.items():
        fits = type(value) is int and 0 < value < 2**24
        if name.endswith("_prob"):
            fits = type(value) in (int, float) and 0 <= value < 1
        require(fits, f"{path}: {name} is {short(value)}; expected a size or a probability")
    layers, heads = sizes["num_hidden_layers"], sizes["num_attention_heads"]
    require(layers <= MOST_LAYERS, f"{path}: {layers} layers; expected {MOST_LAYERS} at most")
    require(
        sizes["hidden_size"] % heads == 0,
        f"{path}: hidden_size {sizes['hidden_size']} is no multiple of {heads} attention heads",
    )
    return sizes


def _read_weights(path: Path) -> Weights:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    weights = read_torch(path)
    _check_named(weights, path)
    return weights


def _check_named(weights: Any, path: Path) -> None:
    """Raise InputError unless these are weights by their names."""
    require(isinstance(weights, dict), f"{path}: expected a dictionary of named weights")
    for name, value in weights.items():
        fits = isinstance(name, str) and isinstance(value, Tensor)
        require(fits, f"{path}: {short(name)} is {type(value).__name__}; expected a weight")


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
            f"{source}: option {field.name} is {short(value)}; expected {expected}",
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
    require(not absent, f"{source}: lacks {some(sorted(absent))}")
    require(isinstance(content["options"], dict), f"{source}: its options are no dictionary")
    _check_options(content["options"], source)
    require(isinstance(content["bert"], str), f"{source}: its BERT's fingerprint is no text")
    _check_named(content["weights"], path)
    state = {k: v for k, v in content.items() if k not in ("options", "weights", "bert")}
    return Checkpoint(path, content["options"], content["weights"], None, content["bert"], state)


def json_beside(path: Path) -> Path:
    """Where the options are that go with weights in a `.safetensors` file."""
    return path.with_suffix(".json")


def _from_arrays(path: Path) -> Checkpoint:
    """A checkpoint as convert_checkpoint writes it: `.safetensors`, and JSON beside it.

    Raises InputError where it is none, or damaged.
    """
    size_of(path, "a safetensors file")
    beside = json_beside(path)
    content = read_json(beside, f"the options that go with {path.name}")
    found = content.pop("format", None)
    require(found == FORMAT, f"{beside}: format {short(found)}; expected {FORMAT!r}")
    fits = content.pop("sha256", None) == sha256_of(path)
    require(fits, f"{path}: damaged, or another file's: its SHA-256 is not the one in {beside}")
    require("weights" not in content, f"{beside}: holds weights, which {path.name} has")
    return _own(path, content | {"weights": read_safetensors(path)}, beside)


def _check_options(options: Mapping[str, Any], path: Path) -> None:
    """Raise InputError where an option is more than a text or a number, or has no name."""
    for name, value in options.items():
        require(isinstance(name, str), f"{path}: {short(name)} is no name of an option")
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


def bert_of(checkpoint: Checkpoint, bert_path: str | Path | None = None) -> Bert:
    """The BERT that a checkpoint goes with, from `bert_path` or the folder it was trained with.

    Of a published checkpoint the folder gives vocabulary and configuration, no more. Another BERT
    than the checkpoint's is an InputError.
    """
    folder = Path(bert_path or str(checkpoint.options.get("bert_path", ".")))
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
    config = checkpoint.config
    check_positions(bert, config, f"{checkpoint.path}: ")
    weights, path = checkpoint.weights, checkpoint.path
    model = filled(lambda: DIME(config, bert.model), weights, path, keep=BERT_KEYS)
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
        _check_named(part, path)
    image, text, space = (dict(part) for part in parts)
    bert = {k: text.pop(k) for k in list(text) if k.startswith("bert.")}
    unused = {f"txt_enc/{k}": v for k, v in bert.items() if normal_name(k) is None}
    if options.get("direction", "i2t") == "i2t":
        idle = [k for k in image if k.startswith("bn.")]
        unused |= {f"img_enc/{k}": image.pop(k) for k in idle}
    unused |= {f"itr_module/{k}": v for k, v in space.items() if NEVER_USED.search(k)}
    weights = own_names(dict(zip(PARTS, (image, text, space), strict=True)), path)
    state = {name: content.get(name) for name in ("epoch", "best_rsum", "best_r1")}
    state["step"] = content.get("Eiters")
    names = [k for k in bert if normal_name(k) is not None]
    state["published"] = {"weights": unused, "bert_names": names}
    return Checkpoint(path, options, weights, bert, None, state)
