"""bert.py — folders with BERT (SPEC §1, §10): read, checked, written, known by a fingerprint."""

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

from checkpoint.weights import Weights, check_finite, check_named, load_state_dict_strict
from common.errors import InputError, brief_repr, require, summarise
from common.files import explain_os_errors, read_json, write_json, write_lines
from common.torch_files import read_safetensors, read_torch, write_safetensors
from vocab import Vocabulary

log = logging.getLogger(__name__)

CONFIGURATIONS = ("bert_config.json", "config.json")  # files of a BERT folder; the first is read
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# What a BERT of 2018 computes depends on these and on FIXED alone. A configuration may leave out
# those that have a default here.
BERT_SIZES = {
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
FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
LARGEST_SIZE = 2**17  # the vocabulary is the largest size; multilingual BERT's has 119,547
UNUSED = re.compile(r"(cls|pooler)\.|.*\bposition_ids$")
CASED = 0.01  # share of entries with a capital letter; an uncased vocabulary has none


@dataclass(frozen=True)
class Bert:
    """A frozen BERT with its vocabulary."""

    model: BertModel
    vocabulary: Vocabulary
    fingerprint: str  # SHA-256 of weights and vocabulary, whatever files they came from


def bert_files(folder: str | Path) -> list[Path]:
    """Return every file that BERT may be read from; no output may replace one of them."""
    return [Path(folder) / name for name in ("vocab.txt", *CONFIGURATIONS, *WEIGHTS)]


def load_bert(folder: str | Path) -> Bert:
    """Load BERT from a local folder; nothing is downloaded.

    Raises InputError that names the file and the wrong, missing or surplus weight.
    """
    folder = Path(folder)
    require(os.path.isdir(folder), f"{folder}: no such folder; --bert_path must name a BERT folder")
    source = _first_file(folder, WEIGHTS)
    unread = folder / WEIGHTS[-1]
    if source != unread and unread.is_file():
        log.info("%s: ignored, since %s is there, too", unread, source.name)
    safe = source.suffix == ".safetensors"
    return assemble_bert(folder, read_safetensors(source) if safe else read_torch(source), source)


def assemble_bert(folder: Path, weights: Any, source: Path) -> Bert:
    """Build BERT from a folder's vocabulary and configuration and the weights of a file `source`.

    Raises InputError like `load_bert`.
    """
    vocabulary, config = Vocabulary.load(folder), bert_config(folder)
    weights = native_bert_names(weights, source)
    entries, width = len(vocabulary.entries), config.hidden_size
    words = list(weights.get("embeddings.word_embeddings.weight", torch.empty(0)).shape)
    require(
        [entries, width] == words == [config.vocab_size, width],
        f"{vocabulary.path}: {entries} entries, but word embeddings {words} in {source} "
        f"and vocab_size {config.vocab_size}, hidden_size {width} in its configuration",
    )
    layers = len({name.split(".")[2] for name in weights if name.startswith("encoder.layer.")})
    if layers != config.num_hidden_layers:
        claimed = config.num_hidden_layers
        raise InputError(f"{source}: holds {layers} layers; its configuration says {claimed}")
    model = BertModel(config, add_pooling_layer=False)
    load_state_dict_strict(model, weights, source)
    check_finite(model.state_dict(), source)
    return Bert(model, vocabulary, _fingerprint(model.state_dict(), vocabulary))


def native_bert_names(weights: Any, source: Path) -> Weights:
    """Return weights under transformers' names of today, without those that DIME does not use.

    Files differ: the prefix `bert.`, LayerNorm's `gamma` and `beta`, heads of pre-training.
    Raises InputError if a weight is there under two names: either could be the right one.
    """
    check_named(weights, source)
    native: Weights = {}
    for key, value in weights.items():
        name = key.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if UNUSED.match(name):
            continue
        require(name not in native, f"{source}: holds {name} twice, under two names")
        native[name] = value
    return native


def bert_config(folder: str | Path) -> BertConfig:
    """Return the configuration in a BERT folder.

    Raises InputError if it is not that of such a BERT, or if its two files disagree: no weight
    shows a wrong number of heads.
    """
    path = _first_file(Path(folder), CONFIGURATIONS)
    sizes, other = _bert_sizes(path), Path(folder) / CONFIGURATIONS[-1]
    if other != path and os.path.lexists(other):
        others = _bert_sizes(other)
        wrong = [f"{name} {others[name]}" for name in sizes if others[name] != sizes[name]]
        require(not wrong, f"{other}: {summarise(wrong)}; {path.name} says otherwise")
    return BertConfig(**sizes, hidden_act="gelu")


def _first_file(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if os.path.isfile(folder / name):
            return folder / name
    raise InputError(f"{folder}: holds no {' and no '.join(names)}; a BERT folder needs one")


def _bert_sizes(path: Path) -> dict[str, Any]:
    """Return BERT_SIZES as a configuration has them. Raises InputError."""
    config = read_json(path, "the configuration of BERT")
    for name, expected in {"model_type": "bert", **FIXED}.items():
        value = config.get(name, expected)
        if value != expected:
            raise InputError(f"{path}: {name} is {brief_repr(value)}; expected {expected!r}")
    sizes: dict[str, Any] = {k: config.get(k, default) for k, default in BERT_SIZES.items()}
    for name, value in sizes.items():
        if name.endswith("_prob"):
            valid = type(value) in (int, float) and 0 <= value < 1
        else:
            valid = type(value) is int and 0 < value < LARGEST_SIZE
        require(valid, f"{path}: {name} is {brief_repr(value)}; expected a size or a probability")
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    require(width % heads == 0, f"{path}: hidden_size {width} is no multiple of {heads} heads")
    return sizes


def _fingerprint(weights: Mapping[str, Tensor], vocabulary: Vocabulary) -> str:
    """Return the SHA-256 of sorted names, shapes and float32 bytes, and the vocabulary."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {list(weights[name].shape)}\n".encode())
        digest.update(weights[name].contiguous().numpy().data)
    digest.update("\n".join(vocabulary.entries).encode())
    return digest.hexdigest()


def describe_bert(folder: str | Path) -> list[str]:
    """Return lines that describe a BERT folder: files, sizes, fingerprint, cased or uncased.

    Loads BERT, and raises InputError like `load_bert`.
    """
    bert = load_bert(folder)
    config = bert.model.config
    files = {path.name: path.stat().st_size for path in bert_files(folder) if path.is_file()}
    words = [entry for entry in bert.vocabulary.entries if not re.fullmatch(r"\[.*\]", entry)]
    cased = sum(word != word.lower() for word in words) / max(1, len(words))
    kind = (
        "cased, but captions are lower-cased: use an uncased BERT" if cased > CASED else "uncased"
    )
    return [
        "files: " + ", ".join(f"{name} ({size:,} bytes)" for name, size in files.items()),
        f"sizes: {config.num_hidden_layers} layers, {config.hidden_size} wide, "
        f"{config.num_attention_heads} heads, {config.vocab_size:,} entries, "
        f"{config.max_position_embeddings} positions",
        f"fingerprint: {bert.fingerprint}",
        f"vocabulary: {kind} ({100 * cased:.1f} % of its entries have a capital letter)",
    ]


def write_bert(folder: Path, bert: Bert) -> None:
    """Write config.json, vocab.txt and model.safetensors into a folder, which is made.

    The weights come last: a folder that was not finished is no BERT folder. Raises InputError.
    """
    with explain_os_errors(folder, "a folder to write to"):
        folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: getattr(bert.model.config, name) for name in BERT_SIZES}
    kind = {"model_type": "bert", "architectures": ["BertModel"]}
    write_json(folder / "config.json", kind | FIXED | sizes)
    write_lines(folder / "vocab.txt", bert.vocabulary.entries)
    write_safetensors(folder / "model.safetensors", bert.model.state_dict())
