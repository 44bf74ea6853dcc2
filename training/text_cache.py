"""textcache.py — BERT's states of the training captions, computed once (`--cache_text`).

Kept apart from data.py, which knows no model, and from trainer.py, which is the loop.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from checkpoint.bert import Bert
from common.cli import progress
from common.errors import require
from common.files import explain_os_errors, partial_path, require_regular_file, write_blocks
from model import TextEncoder
from training.runfolder import STATES

log = logging.getLogger(__name__)

BLOCK = 256  # captions read at a time
HEADER = 128  # bytes of a .npy file before its numbers


def cached_text(
    folder: Path, encoder: TextEncoder, bert: Bert, captions: Sequence[str], max_words: int
) -> Path:
    """The file of BERT's states `(captions, max_words, hidden)` float32 in a run's folder.

    It is made where it is not there yet. Raises InputError where the disk lacks the room.
    """
    # Its name tells what it was made of, so that no other run's is taken for it.
    about = "\n".join([bert.fingerprint, str(max_words), *captions])
    path = folder / STATES.format(hashlib.sha256(about.encode()).hexdigest()[:16])
    shape = (len(captions), max_words, bert.model.config.hidden_size)
    size = int(np.prod(shape, dtype=np.int64)) * 4
    if os.path.lexists(path):
        held = require_regular_file(path, "BERT's states")
        require(held == size + HEADER, f"{path}: {held} bytes, expected {size + HEADER}; delete it")
        return path
    with explain_os_errors(folder, "a folder to write to"):
        partial_path(path).unlink(missing_ok=True)  # before the free bytes are counted
        free = shutil.disk_usage(folder).free
    require(size < free, f"--cache_text: {path} needs {size} bytes, {free} are free")
    log.info("--cache_text: reading all captions once, into %s (%.1f GB)", path, size / 1e9)
    blocks = _states(encoder, bert, captions, max_words)
    write_blocks(path, shape, np.dtype(np.float32), blocks)
    return path


@torch.no_grad()
def _states(
    encoder: TextEncoder, bert: Bert, captions: Sequence[str], max_words: int
) -> Iterator[np.ndarray]:
    """BERT's states of captions, block by block, its dropout off."""
    # DEVIATION: with --cache_text, BERT reads each caption once, in float32, without dropout (the
    # published code read it anew in every step, its dropout on).
    device = encoder.fc.weight.device
    encoder.bert.eval()
    with progress("reading captions", len(captions), "captions") as bar:
        for first in range(0, len(captions), BLOCK):
            some = captions[first : first + BLOCK]
            ids, mask = bert.vocabulary.encode(some, max_words)
            yield encoder.read(ids.to(device), mask.to(device)).cpu().numpy()
            bar.update(len(some))
