"""bert.py — a folder with BERT (SPEC §1): read, checked, written, known by a fingerprint.

Nothing that a file holds is executed, and nothing is downloaded. Knows nothing of DIME.
"""

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from checkpoint.weights import Weights, build_with_weights, check_finite, check_named
from common.errors import InputError, brief_repr, require, summarise
from common.files import explain_os_errors, read_json, require_regular_file, write_json, write_lines
from common.torch_files import read_safetensors, read_torch, write_safetensors
from vocab import Vocabulary

log = logging.getLogger(__name__)

# What a BERT of 2018 is made of; nothing else of its configuration changes what it computes.
BERT_SIZES = {  # with bert-base's value where a configuration may leave it out
    "vocab_size": None,
    "hidden_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "intermediate_size": None,
    "max_position_embeddings": None,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
CONFIGURATIONS = ("bert_config.json", "config.json")  # files of a BERT folder, the first is read
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
CASED = 0.01  # share of entries with a capital letter; an uncased vocabulary has none
MOST_LAYERS = 100  # of BERT; the largest published one has 24
MOST_SIZE = 2**24  # of any of its sizes; vocabularies have 10**5 entries


@dataclass(frozen=True)
class Bert:
    """A frozen BERT with its vocabulary."""

    model: BertModel
    vocabulary: Vocabulary
    fingerprint: str  # SHA-256 of weights and vocabulary, whatever the files were


def bert_files(folder: str | Path) -> list[Path]:
    """Every file that BERT may be read from, and that no result may take the place of."""
    return [Path(folder) / name for name in ("vocab.txt", *CONFIGURATIONS, *WEIGHTS)]


def load_bert(folder: str | Path) -> Bert:
    """BERT from a local folder; nothing is downloaded.

    Raises InputError that names the file, and the key that is missing or too many.
    """
    return assembled_bert(Path(folder), *read_bert(folder))


def describe_bert(folder: str | Path) -> list[str]:
    """Lines that describe a BERT folder: files, sizes, fingerprint, cased or uncased.

    Loads BERT, and raises InputError like `load_bert`.
    """
    bert, config = load_bert(folder), bert_config(folder)
    sizes = {path.name: path.stat().st_size for path in bert_files(folder) if path.is_file()}
    words = [entry for entry in bert.vocabulary.entries if not re.fullmatch(r"\[.*\]", entry)]
    cased = sum(word != word.lower() for word in words) / max(1, len(words))
    kind = "cased; captions are lower-cased, so use an uncased BERT" if cased > CASED else "uncased"
    return [
        "files: " + ", ".join(f"{name} ({size:,} bytes)" for name, size in sizes.items()),
        f"sizes: {config.num_hidden_layers} layers, {config.hidden_size} wide, "
        f"{config.num_attention_heads} heads, {config.vocab_size:,} entries, "
        f"{config.max_position_embeddings} positions",
        f"fingerprint: {bert.fingerprint}",
        f"vocabulary: {kind} ({100 * cased:.1f} % of its entries have a capital letter)",
    ]


def read_bert(folder: str | Path) -> tuple[Weights, Path]:
    """The weights of a BERT folder as they are stored, and their file. Raises InputError."""
    folder = Path(folder)
    require(os.path.isdir(folder), f"{folder}: no such folder; --bert_path must name a BERT folder")
    source = _one_of(folder, *WEIGHTS)
    for other in (folder / name for name in WEIGHTS):
        if other != source and os.path.isfile(other):
            log.info("%s: is not read, for there is %s, too", other, source.name)
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
    model = build_with_weights(lambda: _bert_model(config), weights, source)
    return Bert(model, vocabulary, fingerprint(weights, vocabulary))


def bert_config(folder: str | Path) -> BertConfig:
    """The configuration in a BERT folder.

    Raises InputError where it is none of such a BERT, or where two files tell two of them.
    """
    path = _one_of(Path(folder), *CONFIGURATIONS)
    sizes = _bert_sizes(path)
    for other in (Path(folder) / name for name in CONFIGURATIONS):
        if other != path and os.path.lexists(other):
            others = _bert_sizes(other)
            told = [f"{name} {others[name]}" for name in sizes if others[name] != sizes[name]]
            require(not told, f"{other}: tells {summarise(told)}; expected what {path.name} tells")
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
    size = require_regular_file(source, "the weights of BERT")
    require(held <= size, f"{source}: {held} bytes of weights in a file of {size} bytes")
    check_finite(normal, source)
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
    with explain_os_errors(folder, "a folder to write to"):
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


def _one_of(folder: Path, *names: str) -> Path:
    for name in names:
        if os.path.isfile(folder / name):
            return folder / name
    raise InputError(f"{folder}: holds no {' and no '.join(names)}; a BERT folder needs one")


def _bert_sizes(path: Path) -> dict[str, Any]:
    config = read_json(path, "the configuration of BERT")
    kind = config.get("model_type", "bert")
    require(kind == "bert", f"{path}: model_type is {brief_repr(kind)}; expected 'bert'")
    for name, expected in FIXED.items():
        found = config.get(name, expected)
        require(found == expected, f"{path}: {name} is {brief_repr(found)}; expected {expected!r}")
    sizes = {name: config.get(name, default) for name, default in BERT_SIZES.items()}
    absent = [name for name, size in sizes.items() if size is None]
    require(not absent, f"{path}: lacks {summarise(absent)}; expected the sizes of a BERT")
    for name, value in sizes.items():
        fits = type(value) is int and 0 < value < MOST_SIZE
        if name.endswith("_prob"):
            fits = type(value) in (int, float) and 0 <= value < 1
        require(fits, f"{path}: {name} is {brief_repr(value)}; expected a size or a probability")
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
    check_named(weights, path)
    return weights
