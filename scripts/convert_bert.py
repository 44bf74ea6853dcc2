"""convert_bert.py — Google's TensorFlow BERT as a folder that --bert_path reads.

    pip install tensorflow-cpu
    python -m scripts.convert_bert --tensorflow uncased_L-12_H-768_A-12 --out bert/uncased

The folder of Google's zip file holds `bert_model.ckpt.index`, `bert_model.ckpt.data-*`,
`bert_config.json` and `vocab.txt`. The new one gets `config.json`, `vocab.txt` and
`model.safetensors`, and `tokenizer_config.json` if there was one. No other program needs
TensorFlow. The pooler, the heads of pre-training and an optimiser's state are left out; any other
missing or surplus weight is an error.
"""

import logging
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

from common.cli import parse, run
from common.errors import InputError, require, summarise
from common.files import check_new_folder, require_regular_file
from common.memory import is_oom

if TYPE_CHECKING:
    from checkpoint.weights import Weights

log = logging.getLogger(__name__)

DATA = ".data-00000-of-00001"
OPTIMIZER = re.compile(r"/adam_[mv]$|^global_step$")


@dataclass(frozen=True)
class Options:
    tensorflow: Annotated[str, "folder of the TensorFlow checkpoint, its configuration and words"]
    out: Annotated[str, "folder to write; new or empty"]


def main() -> None:
    options = parse(Options, None, __doc__)
    source, out = Path(options.tensorflow), Path(options.out)
    check_new_folder("--out", out)
    prefix = find_checkpoint(source)
    data = Path(f"{prefix}{DATA}")
    from checkpoint.bert import assemble_bert, write_bert

    try:
        weights = read_weights(open_checkpoint(prefix), data)
    except InputError:
        raise
    except Exception as error:  # TensorFlow has many for a damaged file
        if is_oom(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{prefix}: no whole TensorFlow checkpoint: {reason}") from error
    bert = assemble_bert(source, weights, data)
    write_bert(out, bert)
    log.info("%s: written, fingerprint %s", out, bert.fingerprint[:12])


def find_checkpoint(folder: Path) -> Path:
    """Return the one checkpoint of a folder, as TensorFlow names it: without .index.

    Raises InputError if there is not exactly one, or if its data is not in one file.
    """
    indices = sorted(folder.glob("*.index"))
    names = summarise([path.name for path in indices]) or "none"
    require(len(indices) == 1, f"{folder}: expected one checkpoint, *.ckpt.index; found {names}")
    prefix = indices[0].with_suffix("")
    require_regular_file(Path(f"{prefix}{DATA}"), "the weights of a TensorFlow checkpoint")
    return prefix


def open_checkpoint(prefix: Path) -> Any:
    """Return TensorFlow's CheckpointReader. Raises InputError if TensorFlow is missing."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no lines about processors and GPUs
    try:
        from tensorflow.train import load_checkpoint
    except ImportError as error:
        raise InputError("TensorFlow is missing: pip install tensorflow-cpu") from error
    return load_checkpoint(str(prefix))


def read_weights(reader: Any, source: Path) -> "Weights":
    """Return the weights of BERT under torch's names, float32; matrices are `[outputs, inputs]`.

    Raises InputError if a weight in the file `source` is not float32.
    """
    import torch

    weights: Weights = {}
    for name, dtype in sorted(reader.get_variable_to_dtype_map().items()):
        if OPTIMIZER.search(name):
            continue
        if dtype.name != "float32":
            raise InputError(f"{source}: {name} is {dtype.name}; expected float32")
        array = torch.tensor(reader.get_tensor(name))
        weights[torch_name(name)] = array.T if name.endswith("/kernel") else array
    return weights


def torch_name(name: str) -> str:
    """Return torch's name of a variable like `bert/encoder/layer_0/output/dense/kernel`."""
    name = re.sub(r"/layer_(\d+)/", r"/layer.\1/", name)
    name = re.sub(r"/kernel$|(?<=_embeddings)$", "/weight", name)
    return name.replace("/", ".")


if __name__ == "__main__":
    run(main)
