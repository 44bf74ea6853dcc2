"""bert.py — BERT of a local folder (SPEC §1): built, checked, described, written."""

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertModel

from checkpoint.bert_files import (
    CONFIGURATIONS,
    FIXED,
    SIZES,
    bert_config,
    find_files,
    find_weights,
    native_bert_names,
    read_weights,
)
from checkpoint.weights import check_finite, load_state_dict_strict
from common.errors import InputError, require
from common.files import explain_os_errors, write_json, write_lines
from common.torch_files import write_safetensors
from vocab import FLAGS, WORDS, Vocabulary

log = logging.getLogger(__name__)

CASED = 0.01  # share of entries with a capital letter; an uncased vocabulary has none


@dataclass(frozen=True)
class Bert:
    """A frozen BERT with its vocabulary."""

    model: BertModel
    vocabulary: Vocabulary
    fingerprint: str  # SHA-256 of weights and vocabulary, whatever files they came from


def load_bert(folder: str | Path) -> Bert:
    """Load BERT from a local folder; nothing is downloaded.

    Raises InputError that names the file and the wrong, missing or surplus weight.
    """
    folder = Path(folder)
    require(os.path.isdir(folder), f"{folder}: no such folder; --bert_path must name a BERT folder")
    return assemble_bert(folder, *read_weights(folder))


def assemble_bert(folder: Path, weights: Any, source: Path) -> Bert:
    """Build BERT from a folder's vocabulary and configuration and the weights of a file `source`.

    Raises InputError like `load_bert`.
    """
    vocabulary, config = Vocabulary.load(folder), bert_config(folder)
    weights = native_bert_names(weights, source)
    # Sizes are compared before memory is allocated for them.
    entries, claimed = len(vocabulary.entries), config.vocab_size
    require(entries <= claimed, f"{vocabulary.path}: {entries} entries, but vocab_size {claimed}")
    if entries < claimed:  # the last rows are never looked up
        log.info("%s: %d entries, fewer than vocab_size %d", vocabulary.path, entries, claimed)
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


def _fingerprint(weights: Mapping[str, Tensor], vocabulary: Vocabulary) -> str:
    """Return the SHA-256 of sorted names, shapes and float32 bytes, and the vocabulary."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {list(weights[name].shape)}\n".encode())
        digest.update(weights[name].contiguous().numpy().data)
    digest.update("\n".join(vocabulary.entries).encode())
    return digest.hexdigest()


def share_of_capitals(vocabulary: Vocabulary) -> float:
    """Return the share of a vocabulary's entries that lower-casing changes."""
    words = [entry for entry in vocabulary.entries if not entry.startswith("[")]
    return sum(word != word.lower() for word in words) / max(1, len(words))


def case_advice(vocabulary: Vocabulary) -> list[str]:
    """Return a line of advice if captions are lower-cased, but the vocabulary is not."""
    if share_of_capitals(vocabulary) <= CASED or not vocabulary.tokenization.lower_case:
        return []
    problem = f"{vocabulary.path}: is cased, but captions are lower-cased"
    return [f'{problem}; {{"do_lower_case": false}} in {FLAGS} keeps their case']


def describe_bert(folder: str | Path) -> list[str]:
    """Return lines that describe a BERT folder: files, sizes, fingerprint, reading of captions.

    Loads BERT, and raises InputError like `load_bert`.
    """
    bert, folder = load_bert(folder), Path(folder)
    config, vocabulary = bert.model.config, bert.vocabulary
    capitals = share_of_capitals(vocabulary)
    case = "cased" if capitals > CASED else "uncased"
    source, shards = find_weights(folder)
    files = [vocabulary.path, folder / FLAGS, *find_files(folder, CONFIGURATIONS), source, *shards]
    existing = [path for path in dict.fromkeys(files) if path.is_file()]
    return [
        "files: " + ", ".join(f"{path.name} ({path.stat().st_size:,} bytes)" for path in existing),
        f"sizes: {config.num_hidden_layers} layers, {config.hidden_size} wide, "
        f"{config.num_attention_heads} heads, {config.vocab_size:,} embeddings of words, "
        f"{config.max_position_embeddings} positions",
        f"fingerprint: {bert.fingerprint}",
        f"vocabulary: {len(vocabulary.entries):,} entries, {case} "
        f"({100 * capitals:.1f} % have a capital letter)",
        f"captions: {', '.join(vocabulary.tokenization.rules)}",
        *case_advice(vocabulary),
    ]


def write_bert(folder: Path, bert: Bert) -> None:
    """Write a BERT folder, which is made: config.json, vocab.txt and model.safetensors.

    A tokenizer_config.json is added unless captions are read as SPEC §1 says. The weights come
    last: a folder that was not finished is no BERT folder. Raises InputError.
    """
    with explain_os_errors(folder, "a folder to write to"):
        folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: getattr(bert.model.config, name) for name in SIZES}
    write_json(folder / "config.json", FIXED | {"architectures": ["BertModel"]} | sizes)
    write_lines(folder / WORDS, bert.vocabulary.entries)
    if flags := bert.vocabulary.tokenization.flags:
        write_json(folder / FLAGS, flags)
    write_safetensors(folder / "model.safetensors", bert.model.state_dict())
