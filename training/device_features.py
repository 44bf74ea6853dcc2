"""device_features.py — the features of all training images on the device of the training.

A batch is then an index: nothing is read, and no worker process is needed.
"""

import logging

import numpy as np
import torch
from torch import Tensor

from common.cli import progress
from common.errors import require
from common.memory import free_memory, storage_device
from data import Split

log = logging.getLogger(__name__)

BLOCK = 2**26  # bytes read at a time, about


def load_features(split: Split, device: torch.device, wanted: bool | None) -> Tensor | None:
    """Return the features `[images, L, img_dim]` on the device, as stored, each image once.

    Returns None if they are not `wanted`. If that is None, they are wanted on a CUDA GPU if half of
    its free memory holds them. Raises InputError on NaN or inf, and if they are wanted and do not
    fit.
    """
    row = split.regions(np.arange(1))
    size, free = row.nbytes * split.images, free_memory(device)
    if wanted is None:  # main memory keeps what was read of a file anyway
        wanted = device.type != "cpu" and storage_device(device, size) == device
    if not wanted:
        return None
    need = f"--features_on_device: {split.path} needs {size / 1e9:.3g} GB"
    require(size <= free, f"{need}; {free / 1e9:.3g} GB are free on {device}")
    log.info("%s: %.3g GB of features are loaded to %s", split.path, size / 1e9, device)
    features = torch.empty(split.images, *row.shape[1:], dtype=row.dtype, device=device)
    images = np.arange(split.images)
    with progress("loading features", split.images, "images") as bar:
        for block in np.array_split(images, min(size // BLOCK + 1, split.images)):
            features[block[0] : block[-1] + 1] = split.regions(block)
            bar.update(len(block))
    return features
