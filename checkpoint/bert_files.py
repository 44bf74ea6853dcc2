"""bert_files.py — the files of a BERT folder (SPEC §10): configuration, weights and their names."""

import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import BertConfig

from checkpoint.weights import Weights, check_named
from common.errors import InputError, brief_repr, require, summarise
from common.files import explain_os_errors, read_json
from common.torch_files import read_safetensors, read_torch
from vocab import FLAGS, LARGEST_SIZE, TOKENIZER, WORDS, check_class

log = logging.getLogger(__name__)

CONFIGURATIONS = ("bert_config.json", "config.json")  # the first is read, the other compared
# The first is read. An index lists the files ("shards") that hold the weights.
INDEX = ".index.json"
WEIGHTS = tuple(
    name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", INDEX)
)
# What a BERT of 2018 computes depends on SIZES and FIXED alone. A configuration may leave out FIXED
# and DEFAULTS.
FIXED: dict[str, Any] = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "is_decoder": False,
    "position_embedding_type": "absolute",
}
DEFAULTS = {"type_vocab_size": 2, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "max_position_embeddings", *DEFAULTS),
)
UNUSED = re.compile(r"(cls|pooler)\.|.*\bposition_ids$")


def bert_files(folder: str | Path) -> list[Path]:
    """Return every file that BERT may be read from; no output may replace one of them."""
    folder = Path(folder)
    named = [folder / name for name in (WORDS, TOKENIZER, FLAGS, *CONFIGURATIONS, *WEIGHTS)]
    with explain_os_errors(folder, "a folder to read BERT from"):
        entries = sorted(folder.iterdir()) if os.path.isdir(folder) else []
    shards = [path for path in entries if path.suffix in (".safetensors", ".bin")]
    return list(dict.fromkeys([*named, *shards]))


def find_files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Return those of the files that a folder holds. Raises InputError if it holds none."""
    paths = [folder / name for name in names if os.path.isfile(folder / name)]
    require(bool(paths), f"{folder}: holds no {' and no '.join(names)}; a BERT folder needs one")
    return paths


def find_weights(folder: Path) -> tuple[Path, list[Path]]:
    """Return the file of weights that is read, and its shards, which are the file itself or others.

    Raises InputError if there is none, or if an index names no files of its own folder.
    """
    source, *ignored = find_files(folder, WEIGHTS)
    if ignored:
        names = summarise([path.name for path in ignored])
        log.info("%s: ignored %s, since %s is there, too", folder, names, source.name)
    if not source.name.endswith(INDEX):
        return source, [source]
    shards = read_json(source, "the index of BERT's weights").get("weight_map")
    if not (isinstance(shards, dict) and shards):
        raise InputError(f"{source}: lacks weight_map; expected the file of each weight")
    end = Path(source.name.removesuffix(INDEX)).suffix
    for name in shards.values():
        # A name alone stays inside the folder.
        is_name = isinstance(name, str) and PurePosixPath(name).name == name
        if not (is_name and name.endswith(end)):
            raise InputError(
                f"{source}: a weight is in {brief_repr(name)}; expected a file *{end} of its folder"
            )
    return source, [folder / name for name in sorted(set(shards.values()))]


def read_weights(folder: Path) -> tuple[Weights, Path]:
    """Return the weights of a folder as they are named there, and the file that they came from.

    Raises InputError that names a missing or damaged file.
    """
    source, shards = find_weights(folder)
    weights: Weights = {}
    for shard in shards:
        read = read_safetensors if shard.suffix == ".safetensors" else read_torch
        content = read(shard)
        check_named(content, shard)
        if twice := sorted(content.keys() & weights.keys()):
            raise InputError(f"{shard}: holds {summarise(twice)}, which another shard holds, too")
        weights |= content
    return weights, source


def native_bert_names(weights: Any, source: Path) -> Weights:
    """Return weights under transformers' names of today, without those that DIME does not use.

    Files differ: the prefixes `bert.` and `module.`, LayerNorm's `gamma` and `beta`, heads.
    Raises InputError if a weight is there under two names: either could be the right one.
    """
    check_named(weights, source)
    if all(name.startswith("module.") for name in weights):  # saved from nn.DataParallel
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    # What stands beside `bert.` is the head of another task.
    has_prefix = any(name.startswith("bert.") for name in weights)
    native: Weights = {}
    heads: list[str] = []
    for key, value in weights.items():
        name = key.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if UNUSED.match(name):
            continue
        if has_prefix and not key.startswith("bert."):
            heads.append(name)
            continue
        require(name not in native, f"{source}: holds {name} twice, under two names")
        native[name] = value
    if twice := sorted(native.keys() & heads):
        raise InputError(f"{source}: holds {summarise(twice)} twice, under two names")
    if heads:
        log.info("%s: ignored %s: heads of another task", source, summarise(heads))
    return native


def bert_config(folder: Path) -> BertConfig:
    """Return the configuration in a BERT folder.

    Raises InputError if it is not that of such a BERT, or if its two files disagree: no weight
    shows a wrong number of heads.
    """
    paths = find_files(folder, CONFIGURATIONS)
    sizes, *others = map(_bert_sizes, paths)
    for other in others:
        wrong = [f"{name} {other[name]}" for name in sizes if other[name] != sizes[name]]
        require(not wrong, f"{paths[1]}: {summarise(wrong)}; {paths[0].name} says otherwise")
    return BertConfig(**sizes, hidden_act="gelu")


def _bert_sizes(path: Path) -> dict[str, Any]:
    """Return the SIZES in a configuration. Raises InputError."""
    config = FIXED | DEFAULTS | read_json(path, "the configuration of BERT")
    check_class(config, path)
    for name, expected in FIXED.items():
        if config[name] != expected:
            value = brief_repr(config[name])
            raise InputError(f"{path}: {name} is {value}; expected {expected!r}")
    sizes: dict[str, Any] = {name: config.get(name) for name in SIZES}
    for name, value in sizes.items():
        if name.endswith("_prob"):
            valid = type(value) in (int, float) and 0 <= value < 1
        else:
            valid = type(value) is int and 0 < value <= LARGEST_SIZE
        require(valid, f"{path}: {name} is {brief_repr(value)}; expected a size or a probability")
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    require(width % heads == 0, f"{path}: hidden_size {width} is no multiple of {heads} heads")
    return sizes
