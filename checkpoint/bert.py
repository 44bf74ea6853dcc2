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
# What a BERT of 2018 computes depends on SIZES and FIXED alone. A configuration may leave out FIXED
# and DEFAULTS.
FIXED: dict[str, Any] = {"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12}
DEFAULTS = {"type_vocab_size": 2, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "max_position_embeddings", *DEFAULTS),
)
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
    source, *ignored = _files(folder, WEIGHTS)
    if ignored:
        log.info("%s: ignored, since %s is there, too", ignored[0], source.name)
    read = read_safetensors if source.suffix == ".safetensors" else read_torch
    return assemble_bert(folder, read(source), source)


def assemble_bert(folder: Path, weights: Any, source: Path) -> Bert:
    """Build BERT from a folder's vocabulary and configuration and the weights of a file `source`.

    Raises InputError like `load_bert`.
    """
    vocabulary, config = Vocabulary.load(folder), _bert_config(folder)
    weights = _native_bert_names(weights, source)
    # Sizes are compared before memory is allocated for them.
    entries, claimed = len(vocabulary.entries), config.vocab_size
    require(entries == claimed, f"{vocabulary.path}: {entries} entries, but vocab_size {claimed}")
    layers = len({name.split(".")[2] for name in weights if name.startswith("encoder.layer.")})
    held = [*weights.get("embeddings.word_embeddings.weight", torch.empty(0)).shape, layers]
    expected = [claimed, config.hidden_size, config.num_hidden_layers]
    if held != expected:
        sizes = "entries, width and layers"
        raise InputError(f"{source}: {sizes} are {held}; its configuration has {expected}")
    model = BertModel(config, add_pooling_layer=False)
    load_state_dict_strict(model, weights, source)
    check_finite(model.state_dict(), source)
    return Bert(model, vocabulary, _fingerprint(model.state_dict(), vocabulary))


def _native_bert_names(weights: Any, source: Path) -> Weights:
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


def _files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Return those of the files that a folder holds. Raises InputError if it holds none."""
    paths = [folder / name for name in names if os.path.isfile(folder / name)]
    require(bool(paths), f"{folder}: holds no {' and no '.join(names)}; a BERT folder needs one")
    return paths


def _bert_config(folder: Path) -> BertConfig:
    """Return the configuration in a BERT folder.

    Raises InputError if it is not that of such a BERT, or if its two files disagree: no weight
    shows a wrong number of heads.
    """
    paths = _files(folder, CONFIGURATIONS)
    sizes, *others = map(_bert_sizes, paths)
    for other in others:
        wrong = [f"{name} {other[name]}" for name in sizes if other[name] != sizes[name]]
        require(not wrong, f"{paths[1]}: {summarise(wrong)}; {paths[0].name} says otherwise")
    return BertConfig(**sizes, hidden_act="gelu")


def _bert_sizes(path: Path) -> dict[str, Any]:
    """Return the SIZES in a configuration. Raises InputError."""
    config = FIXED | DEFAULTS | read_json(path, "the configuration of BERT")
    for name, expected in FIXED.items():
        if config[name] != expected:
            value = brief_repr(config[name])
            raise InputError(f"{path}: {name} is {value}; expected {expected!r}")
    sizes: dict[str, Any] = {name: config.get(name) for name in SIZES}
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
    files = [path for path in bert_files(folder) if path.is_file()]
    words = [entry for entry in bert.vocabulary.entries if not entry.startswith("[")]
    cased = sum(word != word.lower() for word in words) / max(1, len(words))
    advice = "cased, but captions are lower-cased: use an uncased BERT"
    kind = advice if cased > CASED else "uncased"
    return [
        "files: " + ", ".join(f"{path.name} ({path.stat().st_size:,} bytes)" for path in files),
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
    sizes = {name: getattr(bert.model.config, name) for name in SIZES}
    write_json(folder / "config.json", FIXED | {"architectures": ["BertModel"]} | sizes)
    write_lines(folder / "vocab.txt", bert.vocabulary.entries)
    write_safetensors(folder / "model.safetensors", bert.model.state_dict())
