"""convert_checkpoint.py — an official checkpoint in this project's form, or any as safetensors.

    python -m scripts.convert_checkpoint --checkpoint Flickr30K_DIME_it.pth.tar --bert_path bert \\
        --out i2t.pth.tar

evaluate_models.py reads all forms, and scores stay the same (except with --half). The name of --out
decides which one is written:

    NAME.safetensors   weights, and options and BERT's fingerprint as NAME.json beside them
    any other name     a native checkpoint: checksums, and BERT's fingerprint instead of its weights

BERT's weights stay in the folder of --bert_path; those of an official checkpoint must be the same.
The optimiser's state is not converted: training cannot resume from a converted checkpoint.
"""

import logging
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

from common.cli import parse, run
from common.errors import require
from common.files import check_writable, write_json

if TYPE_CHECKING:
    from checkpoint.bert import Bert
    from checkpoint.checkpoint import Checkpoint

log = logging.getLogger(__name__)

# The origin of a model. The dev split's fingerprint lets evaluate_models.py warn on that split.
ORIGIN = ("epoch", "step", "best_rsum", "best_r1", "dev_data", "commit")


@dataclass(frozen=True)
class Options:
    checkpoint: Annotated[str, "checkpoint to convert, in any form"]
    out: Annotated[str, "new file to write; .safetensors writes NAME.json beside it"]
    bert_path: Annotated[str | None, "folder of its BERT (default: the checkpoint's option)"] = None
    half: Annotated[bool, "safetensors in float16: half the size, scores change a little"] = False


def main() -> None:
    options = parse(Options, None, __doc__)
    from checkpoint.bert import load_bert
    from checkpoint.checkpoint import bert_of, build_model, read_checkpoint, write_checkpoint

    out = Path(options.out)
    check_outputs(out, options.half)
    checkpoint = read_checkpoint(options.checkpoint)
    if options.half:
        checkpoint = halve(checkpoint)
    bert = bert_of(checkpoint, options.bert_path)
    model = build_model(checkpoint, bert)  # nothing is written unless everything fits
    if checkpoint.bert_weights is not None:
        folder = bert.vocabulary.path.parent
        is_same = load_bert(folder).fingerprint == bert.fingerprint
        require(is_same, f"{folder}: holds another BERT; expected that of {checkpoint.path}")
    if out.suffix == ".safetensors":
        write_arrays(out, checkpoint, bert)
    else:
        write_checkpoint(out, model, checkpoint.options, bert, **_run_of(checkpoint))
    log.info("%s: written", out)


def check_outputs(out: Path, half: bool) -> None:
    """Raise InputError if an output exists or cannot be written."""
    from checkpoint.checkpoint import json_beside

    is_safetensors = out.suffix == ".safetensors"
    require(is_safetensors or not half, f"--half: expected --out NAME.safetensors, not {out}")
    for path in (out, json_beside(out)) if is_safetensors else (out,):
        require(not os.path.lexists(path), f"--out: {path} exists; expected a new name")
        check_writable(path)


def write_arrays(out: Path, checkpoint: "Checkpoint", bert: "Bert") -> None:
    """Write weights as safetensors, and beside it the options and the SHA-256 as JSON."""
    from checkpoint.checkpoint import FORMAT, describe_text, json_beside
    from common.torch_files import write_safetensors

    # The JSON holds the SHA-256 of the weights: the two cannot be mixed up.
    about = {"format": FORMAT, "options": checkpoint.options} | describe_text(bert)
    about |= _run_of(checkpoint)
    digest = write_safetensors(out, checkpoint.weights)
    write_json(json_beside(out), about | {"sha256": digest})


def halve(checkpoint: "Checkpoint") -> "Checkpoint":
    """Return a checkpoint with weights in float16, and without the metrics of the whole ones."""
    from checkpoint.weights import check_finite

    weights = {k: v.half() if v.is_floating_point() else v for k, v in checkpoint.weights.items()}
    check_finite(weights, Path(f"{checkpoint.path} in float16"))
    return replace(checkpoint, weights=weights, state=checkpoint.state | {"metrics": None})


def _run_of(checkpoint: "Checkpoint") -> dict[str, Any]:
    """Return ORIGIN, the metrics and the backbone, as far as the checkpoint has them."""
    state = checkpoint.state
    run = {name: state[name] for name in ORIGIN if type(state.get(name)) in (int, float, str)}
    if state.get("position") == 0 and type(run.get("epoch")) is int:
        run["epoch"] = max(0, run["epoch"] - 1)  # a training names the epoch of the next batch
    more = {"metrics": checkpoint.metrics, "backbone": checkpoint.backbone}
    return run | {name: value for name, value in more.items() if value}


if __name__ == "__main__":
    run(main)
