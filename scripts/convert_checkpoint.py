"""convert_checkpoint.py — a checkpoint in another form: published, this project's, or safetensors.

    python -m scripts.convert_checkpoint --checkpoint Flickr30K_DIME_it.pth.tar --bert_path bert \\
        --to own --out i2t.pth.tar

evaluate_models.py reads all three, and scores stay what they were (--half excepted).

    own          this project's: a checksum, and BERT's fingerprint in place of its weights
    published    what the published code reads, BERT's weights among it
    safetensors  weights as OUT.safetensors, and options and fingerprint as OUT.json beside it

A published checkpoint brings its BERT; --bert_out writes it as a folder of its own, which is needed
where the folder of --bert_path holds other weights. What a published checkpoint holds and never
uses is kept in an own one, so that the way back gives the same file content; elsewhere it is
zeros. The published code has no ablations (--routing, --num_layer_routing, --cells), so such a
checkpoint is refused. The optimiser's state is not carried over: training cannot go on from a
converted checkpoint.
"""

import argparse
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from checkpoint.bert import Bert, bert_files, load_bert, normal_name, write_bert
from checkpoint.checkpoint import (
    FORMAT,
    Checkpoint,
    bert_of,
    build_model,
    json_beside,
    read_checkpoint,
    write_checkpoint,
)
from checkpoint.official import NEVER_USED, PARTS, official_names
from checkpoint.weights import Weights, check_finite
from common.cli import parse, run
from common.config import ModelConfig
from common.errors import brief_repr, require, summarise
from common.files import check_new_folder, check_writable, write_json
from common.torch_files import write_old_torch, write_safetensors
from model import DIME

log = logging.getLogger(__name__)

ABLATIONS = ("routing", "num_layer_routing", "cells")  # which the published code has not
COUNTS = ("epoch", "step", "best_rsum", "best_r1")  # of what a checkpoint knows of its run


@dataclass(frozen=True)
class Options:
    checkpoint: Annotated[str, "checkpoint to convert, in any of the three forms"]
    out: Annotated[str, "file to write; it must not be there yet"]
    to: Annotated[Literal["own", "published", "safetensors"], "form to write"]
    bert_path: Annotated[str | None, "folder of its BERT (default: the checkpoint's option)"] = None
    bert_out: Annotated[str | None, "folder to write its BERT to; new or empty"] = None
    half: Annotated[
        bool, "safetensors with weights in float16: half the size, scores change a little"
    ] = False


def main() -> None:
    options = parse(Options, None, __doc__)
    out, folder = Path(options.out), Path(options.bert_out or "")
    check_outputs(options)
    checkpoint = read_checkpoint(options.checkpoint)
    if options.to == "published":
        _check_no_ablation(checkpoint)
    if options.half:
        state = checkpoint.state | {"metrics": None}  # which were of the whole weights
        checkpoint = replace(checkpoint, weights=halved(checkpoint.weights), state=state)
        check_finite(checkpoint.weights, Path(f"{options.checkpoint} in float16"))
    bert = bert_of(checkpoint, options.bert_path)
    model = build_model(checkpoint, bert)  # nothing is written unless everything fits
    if options.bert_out:
        write_bert(folder, bert)
    elif checkpoint.bert_weights is not None and options.to != "published":
        _check_bert_is_elsewhere(bert)
    if options.to == "own":
        write_own(out, checkpoint, model, bert)
    elif options.to == "published":
        write_published(out, checkpoint, bert)
    else:
        write_arrays(out, checkpoint, bert)
    log.info("%s: written, %s", out, options.to)


def check_outputs(options: Options) -> None:
    """Raise InputError before anything is read where an output has a wrong name, or is there."""
    out, arrays = Path(options.out), options.to == "safetensors"
    require(
        (out.suffix == ".safetensors") == arrays,
        f"--out {out}: the name of safetensors ends with .safetensors, no other form's does",
    )
    require(arrays or not options.half, "--half goes with --to safetensors")
    taken = bert_files(options.bert_out) if options.bert_out else []
    for path in (out, json_beside(out)) if arrays else (out,):
        require(not os.path.lexists(path), f"--out: {path} is there already; expected a new name")
        check_writable(path, taken)
    if options.bert_out:
        check_new_folder("--bert_out", Path(options.bert_out))


def _check_no_ablation(checkpoint: Checkpoint) -> None:
    """Raise InputError where the published code would take a model for another one."""
    for name in ABLATIONS:
        found, only = getattr(checkpoint.config, name), getattr(ModelConfig, name)
        require(
            found == only,
            f"{checkpoint.path}: --{name} {found}: the published code knows {only} alone",
        )


def _check_bert_is_elsewhere(bert: Bert) -> None:
    """Raise InputError where the BERT that a published checkpoint brings would be lost."""
    folder = bert.vocabulary.path.parent
    require(
        load_bert(folder).fingerprint == bert.fingerprint,
        f"{folder}: holds another BERT than the checkpoint, which would be lost; "
        "write it to a folder of its own with --bert_out",
    )


def write_own(path: Path, checkpoint: Checkpoint, model: DIME, bert: Bert) -> None:
    state = _of_run(checkpoint)
    if "published" in checkpoint.state:
        state["published"] = checkpoint.state["published"]
    write_checkpoint(path, model, checkpoint.options, bert, **state)


def write_arrays(path: Path, checkpoint: Checkpoint, bert: Bert) -> None:
    """Weights and, last, what names their SHA-256: the two cannot be mixed up."""
    about = {"format": FORMAT, "options": checkpoint.options, "bert": bert.fingerprint}
    digest = write_safetensors(path, checkpoint.weights)
    write_json(json_beside(path), about | _of_run(checkpoint) | {"sha256": digest})


def halved(weights: Weights) -> Weights:
    """Weights in float16; what is no floating-point number as it is."""
    return {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}


def _counts(checkpoint: Checkpoint) -> dict[str, int | float]:
    """Those of COUNTS that a file gave as a number; epochs are counted from 0."""
    state = checkpoint.state
    found = {name: state[name] for name in COUNTS if type(state.get(name)) in (int, float)}
    if checkpoint.bert_weights is not None and "epoch" in found:
        found["epoch"] -= 1  # REFERENCE: the published trainer counts them from 1
    elif state.get("position") == 0 < found.get("step", 0) and "epoch" in found:
        found["epoch"] -= 1  # a run's own checkpoint names the epoch of the next batch
    return found


def _of_run(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where a model comes from: counts, commit, its figures on dev, and which dev that was.

    By the last, evaluating on the split that selected it can be told.
    """
    state, found = checkpoint.state, dict(_counts(checkpoint))
    found |= {k: state[k] for k in ("dev_data", "commit") if type(state.get(k)) is str}
    return found | ({"metrics": checkpoint.metrics} if checkpoint.metrics else {})


def write_published(path: Path, checkpoint: Checkpoint, bert: Bert) -> None:
    """Three state dicts with BERT's weights; what this project has no use for as it was read."""
    unused, names = _unused(checkpoint)
    arrays = official_names(checkpoint.weights) | _their_bert(bert, names) | unused
    parts = [
        OrderedDict((k.split("/", 1)[1], v) for k, v in arrays.items() if k.startswith(f"{part}/"))
        for part in PARTS
    ]
    counts = {"epoch": 0, "step": 0, "best_rsum": 0.0, "best_r1": 0.0} | _counts(checkpoint)
    opt = {"do_lower_case": True, "vocab_file": "vocab.txt", "init_checkpoint": ""}
    opt |= {"bert_config_file": "bert_config.json"} | checkpoint.options
    content = {"epoch": counts["epoch"] + 1, "model": parts, "best_rsum": counts["best_rsum"]}
    content |= {"best_r1": counts["best_r1"], "opt": argparse.Namespace(**opt)}
    write_old_torch(path, content | {"Eiters": counts["step"]})


def _unused(checkpoint: Checkpoint) -> tuple[Weights, list[str]]:
    """What a published checkpoint held beside what is used, and its names of BERT's weights.

    Raises InputError where an own checkpoint gives something else.
    """
    rest = checkpoint.state.get("published", {"weights": {}, "bert_names": []})
    where = f"{checkpoint.path}: what it keeps of a published checkpoint"
    require(isinstance(rest, dict), f"{where} is {brief_repr(rest)}; expected a dictionary")
    weights, names = rest.get("weights"), rest.get("bert_names")
    require(isinstance(weights, dict) and isinstance(names, list), f"{where} lacks its names")
    for name, value in [*weights.items(), *((name, torch.empty(0)) for name in names)]:
        fits = isinstance(name, str) and isinstance(value, torch.Tensor)
        require(fits, f"{where}: {brief_repr(name)} is no weight")
    used = sorted(name for name in weights if not _is_unused(name, checkpoint))
    require(not used, f"{where}: {summarise(used)} would take the place of a weight in use")
    return weights, names


def _is_unused(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a weight, `module/name`, is one that the published model has and never uses."""
    part, _, key = name.partition("/")
    idle_norm = part == "img_enc" and key.startswith("bn.")
    return (
        (part == "itr_module" and NEVER_USED.search(key) is not None)
        or (idle_norm and "image.norm.weight" not in checkpoint.weights)
        or (part == "txt_enc" and key.startswith("bert.") and normal_name(key) is None)
    )


def _their_bert(bert: Bert, names: Sequence[str]) -> Weights:
    """BERT's weights as the published text encoder has them, under these names or the usual ones.

    Raises InputError where `names` are those of another BERT.
    """
    weights = bert.model.state_dict()
    names = names or [f"bert.{name}" for name in weights]
    known = {normal_name(name): name for name in names}
    where = bert.vocabulary.path.parent
    require(known.keys() == weights.keys(), f"{where}: has other layers than the checkpoint's")
    width = bert.model.config.hidden_size
    pooler = {"weight": torch.zeros(width, width), "bias": torch.zeros(width)}  # never used
    found = {f"txt_enc/{known[name]}": weight for name, weight in weights.items()}
    return found | {f"txt_enc/bert.pooler.dense.{k}": v for k, v in pooler.items()}


if __name__ == "__main__":
    run(main)
