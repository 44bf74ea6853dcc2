"""text_cache.py — BERT's hidden states of the training captions, computed once (`--cache_text`)."""

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
from common.files import write_blocks
from model import TextEncoder
from training.resume import STATES

log = logging.getLogger(__name__)

CHUNK = 256  # captions encoded at a time


def cache_text(
    folder: Path, encoder: TextEncoder, bert: Bert, captions: Sequence[str], max_words: int
) -> Path:
    """Return a .npy file of hidden states `[captions, max_words, hidden]` float32.

    The file is written into the run's folder unless it is there. Raises InputError if the disk is
    too full.
    """
    # The name holds a hash of the content's origin, so that another run's file is never used.
    flags = map(str, bert.vocabulary.tokenization.flags.items())
    origin = "\n".join([bert.fingerprint, str(max_words), *flags, *captions])
    path = folder / STATES.format(hashlib.sha256(origin.encode()).hexdigest()[:16])
    shape = (len(captions), max_words, bert.model.config.hidden_size)
    size = int(np.prod(shape, dtype=np.int64)) * 4
    if os.path.lexists(path):  # whole, since it was written atomically
        return path
    free = shutil.disk_usage(folder).free
    require(size < free, f"--cache_text: {path} needs {size} bytes, {free} are free")
    log.info("--cache_text: encoding all captions once, into %s (%.1f GB)", path, size / 1e9)
    states = _hidden_states(encoder, bert, captions, max_words)
    write_blocks(path, shape, np.dtype(np.float32), states)
    return path


@torch.no_grad()
def _hidden_states(
    encoder: TextEncoder, bert: Bert, captions: Sequence[str], max_words: int
) -> Iterator[np.ndarray]:
    """Yield BERT's hidden states of consecutive captions, without dropout."""
    # DEVIATION: with --cache_text, BERT reads each caption once, in float32, without dropout (the
    # published code read it anew in every step, its dropout on).
    device = encoder.fc.weight.device
    encoder.bert.eval()
    with progress("encoding captions", len(captions), "captions") as bar:
        for first in range(0, len(captions), CHUNK):
            chunk = captions[first : first + CHUNK]
            ids, mask = bert.vocabulary.encode(chunk, max_words)
            yield encoder.read(ids.to(device), mask.to(device)).cpu().numpy()
            bar.update(len(chunk))
