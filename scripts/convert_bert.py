"""convert_bert.py — Google's TensorFlow BERT to a folder that --bert_path reads.

    pip install tensorflow-cpu
    python -m scripts.convert_bert --tensorflow uncased_L-12_H-768_A-12 --out bert/uncased

The folder of Google's zip file holds `bert_model.ckpt.index`, `bert_model.ckpt.data-*`,
`bert_config.json` and `vocab.txt`. The new one gets `config.json`, `vocab.txt` and
`model.safetensors`. TensorFlow is needed here and nowhere else. The pooler, the heads of
pre-training and an optimiser's state are left out; any other missing or surplus weight is an error.
"""

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import torch

from checkpoint.bert import assembled_bert, load_bert, write_bert
from checkpoint.weights import Weights
from common.cli import parse, progress, run
from common.errors import InputError, require, summarise
from common.files import check_new_folder, require_regular_file
from common.memory import is_oom

log = logging.getLogger(__name__)

DATA = ".data-00000-of-00001"
LEFT_OUT = re.compile(r"^(bert/pooler|cls)/|/adam_[mv]$|^global_step$")
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Options:
    tensorflow: Annotated[str, "folder of the TensorFlow checkpoint, its configuration and words"]
    out: Annotated[str, "folder to write; new or empty"]


class Reader(Protocol):
    """What TensorFlow's reader of checkpoints can do, as far as it is needed here."""

    def get_variable_to_shape_map(self) -> Mapping[str, list[int]]: ...
    def get_variable_to_dtype_map(self) -> Mapping[str, Any]: ...
    def get_tensor(self, name: str) -> np.ndarray: ...


def main() -> None:
    options = parse(Options, None, __doc__)
    source, out = Path(options.tensorflow), Path(options.out)
    check_new_folder("--out", out)
    prefix = prefix_in(source)
    data = Path(f"{prefix}{DATA}")
    bert = assembled_bert(source, read_weights(opened(prefix), data), data)
    write_bert(out, bert)
    found = load_bert(out).fingerprint
    require(found == bert.fingerprint, f"{out}: reads otherwise than it was written")
    log.info("%s: written, fingerprint %s", out, found[:12])


def prefix_in(folder: Path) -> Path:
    """The one checkpoint of a folder, as TensorFlow names it: without .index.

    Raises InputError where there is none or more than one, or its data are not in one file.
    """
    require(os.path.isdir(folder), f"{folder}: no such folder; expected a TensorFlow checkpoint's")
    found = sorted(folder.glob("*.index"))
    names = summarise([path.name for path in found]) or "none"
    require(len(found) == 1, f"{folder}: expected one checkpoint, *.ckpt.index; found {names}")
    prefix = found[0].with_suffix("")
    require_regular_file(found[0], "the index of a TensorFlow checkpoint")
    require_regular_file(Path(f"{prefix}{DATA}"), "the weights of a TensorFlow checkpoint")
    return prefix


def opened(prefix: Path) -> Reader:
    """TensorFlow's reader. Raises InputError where TensorFlow is missing, or the file is none."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # it tells of processors and GPUs
    try:
        from tensorflow.train import load_checkpoint
    except ImportError as error:
        command = "pip install tensorflow-cpu"
        raise InputError(f"TensorFlow reads its checkpoints and is missing: {command}") from error
    with _whole(prefix):
        return load_checkpoint(str(prefix))


def read_weights(reader: Reader, source: Path) -> Weights:
    """The weights of BERT under torch's names, float32; matrices are `[outputs, inputs]`.

    `source` is the file that holds the numbers. Raises InputError where it cannot hold what is
    claimed, or a weight is no float32.
    """
    size = require_regular_file(source, "the weights of a TensorFlow checkpoint")
    with _whole(source):
        shapes, kinds = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    names = [name for name in sorted(shapes) if not LEFT_OUT.search(name)]
    for name in names:
        kind = kinds[name].name
        require(kind == "float32", f"{source}: {name} is {kind}; expected float32")
    claimed = FLOAT_BYTES * sum(math.prod(shapes[name]) for name in names)
    require(claimed <= size, f"{source}: {claimed} bytes of weights in a file of {size} bytes")
    weights: Weights = {}
    with progress("weights", len(names), "weight") as shown:
        for name in names:
            own = torch_name(name)
            require(own not in weights, f"{source}: holds {own} twice, under two names")
            with _whole(source):
                array = reader.get_tensor(name)
            turned = array.T if name.endswith("/kernel") else array
            weights[own] = torch.from_numpy(np.array(turned, order="C"))
            shown.update()
    return weights


def torch_name(name: str) -> str:
    """torch's name of a variable: `bert/encoder/layer_0/output/dense/kernel`, for one."""
    name = re.sub(r"/layer_(\d+)/", r"/layer.\1/", name)
    name = re.sub(r"/kernel$|(?<=_embeddings)$", "/weight", name)
    return name.replace("/", ".")


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Turn what TensorFlow says of a damaged file, in any of its ways, into an InputError."""
    try:
        yield
    except Exception as error:
        if is_oom(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: no whole TensorFlow checkpoint: {reason}") from error


if __name__ == "__main__":
    run(main)
