"""bert.py — BERT of a local folder (SPEC §1): built, checked, described, written."""

import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
from checkpoint.weights import load_state_dict_strict
from common.errors import InputError, require, summarise
from common.files import explain_os_errors, write_json, write_lines
from common.torch_files import write_safetensors
from vocab import FLAGS, WORDS, Vocabulary

log = logging.getLogger(__name__)

WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"
CASED = 0.01  # share of entries with a capital letter; an uncased vocabulary has none
CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")


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
    words = weights.get(WORD_EMBEDDINGS)
    if words is None:
        raise InputError(f"{source}: no {WORD_EMBEDDINGS}; holds {summarise(list(weights))}")
    layers = len({name.split(".")[2] for name in weights if name.startswith("encoder.layer.")})
    held = [*words.shape, layers]
    expected = [claimed, config.hidden_size, config.num_hidden_layers]
    if held != expected:
        sizes = "entries, width and layers"
        raise InputError(f"{source}: {sizes} are {held}; its configuration has {expected}")
    model = BertModel(config, add_pooling_layer=False)
    load_state_dict_strict(model, weights, source)
    return Bert(model, vocabulary, _fingerprint(model.state_dict(), vocabulary))


def _fingerprint(weights: Mapping[str, Tensor], vocabulary: Vocabulary) -> str:
    """Return the SHA-256 of sorted names, shapes and float32 bytes, and the vocabulary."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {list(weights[name].shape)}\n".encode())
        digest.update(weights[name].contiguous().numpy().data)
    digest.update("\n".join(vocabulary.entries).encode())
    return digest.hexdigest()


def _without_accents(text: str) -> str:
    decomposed = unicodedata.normalize("NFD", text)
    return "".join(c for c in decomposed if unicodedata.category(c) != "Mn")


def share_changed(vocabulary: Vocabulary, change: Callable[[str], str]) -> float:
    """Return the share of a vocabulary's entries that a function changes."""
    words = [entry for entry in vocabulary.entries if not entry.startswith("[")]
    return sum(word != change(word) for word in words) / max(1, len(words))


def reading_advice(vocabulary: Vocabulary) -> list[str]:
    """Return a line of advice if captions are read in a way that the vocabulary was not made for.

    The vocabulary of an uncased English BERT has no capitals, 0.1 % accents, 1.7 % Chinese.
    """
    rules = vocabulary.tokenization
    joined = rules.published and not rules.split_chinese
    checks = (
        (rules.lower_case, str.lower, CASED, "capitals", '"do_lower_case": false'),
        (rules.strip_accents, _without_accents, CASED, "accents", '"strip_accents": false'),
        (joined, partial(CHINESE.sub, ""), 0.05, "Chinese", '"tokenize_chinese_chars": true'),
    )
    for applies, change, limit, what, flag in checks:
        if applies and share_changed(vocabulary, change) > limit:
            rule = ", ".join(rules.rules[:3])
            problem = f"{vocabulary.path}: has {what}, but captions are read as: {rule}"
            return [f"{problem}; if that is wrong, write {{{flag}}} into {FLAGS}"]
    return []


def describe_bert(folder: str | Path) -> list[str]:
    """Return lines that describe a BERT folder: files, sizes, fingerprint, reading of captions.

    Loads BERT, and raises InputError like `load_bert`.
    """
    bert, folder = load_bert(folder), Path(folder)
    config, vocabulary = bert.model.config, bert.vocabulary
    capitals = share_changed(vocabulary, str.lower)
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
        *reading_advice(vocabulary),
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
