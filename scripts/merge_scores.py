"""merge_scores.py — a score matrix from the parts that several jobs wrote.

    python evaluate_models.py --model_path MODEL --part 1/2 --save_scores 1.safetensors   # a job
    python evaluate_models.py --model_path MODEL --part 2/2 --save_scores 2.safetensors   # another
    python -m scripts.merge_scores 1.safetensors 2.safetensors --out scores.npy
    python evaluate_models.py --scores scores.npy

Checks that all parts are of the same models, BERT and data, and that each is given once. The matrix
equals that of one process.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

import numpy as np

from common.cli import parse, print_line, run
from common.files import check_writable, write_blocks
from common.score_files import ScorePart, check_whole


@dataclass(frozen=True)
class Options:
    parts: Annotated[list[str], "files of evaluate_models.py --part, in any order", "PART"]
    out: Annotated[str, "write the score matrix (images, captions), .npy"]


def main() -> None:
    options = parse(Options, None, __doc__)
    parts = check_whole([ScorePart.open(Path(path)) for path in options.parts])
    out, shape = Path(options.out), parts[0].shape
    check_writable(out, options.parts)
    blocks = (block for part in parts for block in part.blocks())
    write_blocks(out, shape, np.dtype(np.float32), blocks)
    print_line(f"{out}: {shape[0]} images, {shape[1]} captions, from {len(parts)} parts")


if __name__ == "__main__":
    run(main)
