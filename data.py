"""data.py — a split's images and captions by memory map, and training batches (SPEC §8, §10).

A batch is a pure function of (seed, epoch, position): workers hold no state, their number changes
nothing, and an epoch can be entered at any position. Knows nothing of the model.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import Dataset

from common.config import DataConfig
from common.errors import raise_first
from common.layout import (
    CAPTIONS_PER_IMAGE,
    SplitName,
    count_problems,
    finite_rows,
    map_features,
    number_problems,
    read_captions,
    read_rows,
    rows_per_image,
    split_files,
    width_problems,
)
from common.workers import load
from vocab import Vocabulary

CHEAP_BYTES = 2**28  # a feature file up to this size is read through for NaN when it is opened
SAMPLED_ROWS = 16  # of the features that tell one data set from another
CHECKED_ROWS = 500  # read through at a time
ORDER, EXTRAS = 1, 2  # lead the seeds of the two random streams, so that they never meet


@dataclass(frozen=True)
class Split:
    """Images and captions of one split; features stay on the disk until they are asked for."""

    path: Path  # the *_ims.npy file
    captions: tuple[str, ...]
    rows_per_image: int  # 5 where each image's row is repeated for its captions, else 1

    @classmethod
    def open(
        cls, folder: str | Path, name: SplitName, img_dim: int | None, training: bool = False
    ) -> "Split":
        """Open `folder/{name}_ims.npy` and `_caps.txt`, and check that they fit each other.

        Features may have any width where `img_dim` is None. Raises InputError that names the file,
        what was found and what was expected. In training an empty caption is an error too.
        """
        path, captions_path = split_files(folder, name)
        captions = read_captions(captions_path, allow_empty=not training)
        features = map_features(path)
        raise_first(width_problems(path, features, img_dim))
        raise_first(count_problems(path, len(features), len(captions)))
        split = cls(path, captions, rows_per_image(len(features), len(captions)))
        if features.nbytes <= CHEAP_BYTES:
            for first in range(0, len(features), CHECKED_ROWS):
                split.regions(np.arange(first, min(first + CHECKED_ROWS, len(features))))
        return split

    @property
    def images(self) -> int:
        """Number of distinct images."""
        return len(self.captions) // CAPTIONS_PER_IMAGE

    @property
    def regions_per_image(self) -> int:
        """Regions of an image, L."""
        return self._features.shape[1]

    @property
    def img_dim(self) -> int:
        """Width of the features."""
        return self._features.shape[2]

    @cached_property
    def _features(self) -> np.memmap:
        return map_features(self.path)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the whole file to a spawned worker.
        return {key: value for key, value in vars(self).items() if key != "_features"}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the captions, the features' shape and type, and their rows.

        Of a file above CHEAP_BYTES it is some of the rows.
        """
        features = self._features
        digest = hashlib.sha256("\n".join(self.captions).encode())
        digest.update(f"{features.shape} {features.dtype.str}".encode())
        count = len(features) if features.nbytes <= CHEAP_BYTES else SAMPLED_ROWS
        for row in np.linspace(0, len(features) - 1, count, dtype=int):
            digest.update(np.ascontiguousarray(features[row]).data)
        return digest.hexdigest()

    def image_rows(self, images: np.ndarray) -> np.ndarray:
        """Row of each image's features."""
        return images * self.rows_per_image

    def caption_rows(self, captions: np.ndarray) -> np.ndarray:
        """Row of the features that each caption belongs to."""
        return captions if self.rows_per_image > 1 else captions // CAPTIONS_PER_IMAGE

    def regions(self, rows: np.ndarray) -> Tensor:
        """Features of `rows`, `[rows, L, img_dim]` float32. Raises InputError on NaN or inf."""
        features = read_rows(self._features, rows)
        raise_first(number_problems(self.path, np.unique(rows[~finite_rows(features)])))
        return torch.from_numpy(features)


@dataclass(frozen=True)
class Batch:
    """A training batch; the first `pairs` images and captions match one to one."""

    regions: Tensor  # [I, L, img_dim] float32
    ids: Tensor  # [T, M] int64
    mask: Tensor  # [T, M] bool, True = a real token
    captions: Tensor  # [T] index in the split
    pairs: int
    states: Tensor | None = None  # [T, M, hidden] of BERT, where they are kept

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch where a GPU can fetch it (called by DataLoader)."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Any) -> "Batch":
        tensors = {key: change(v) for key, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class TrainingBatches(Dataset):
    """The training batches: `self[epoch, position]`."""

    split: Split
    vocabulary: Vocabulary
    config: DataConfig
    max_words: int
    skip_single: bool  # leave out a batch of one item, which batch normalisation cannot take
    states: Path | None = None  # BERT's states of all captions, see textcache.py

    def __len__(self) -> int:
        """Batches of an epoch."""
        full, rest = divmod(len(self.split.captions), self.config.batch_size)
        # DEVIATION: a last batch that batch normalisation cannot take is skipped: of one item in
        # t2i without extra images, or of one region in i2t without extra sentences (the published
        # code crashed).
        smallest = 2 if self.skip_single else 1
        return full * (self.config.batch_size >= smallest) + (rest >= smallest)

    def __getitem__(self, place: tuple[int, int]) -> Batch:
        epoch, position = place
        # DEVIATION: order and extra negatives are functions of seed, epoch and position (the
        # published ones came from global generators).
        order = _order(self.config.seed, epoch, len(self.split.captions))
        size = self.config.batch_size
        captions = order[position * size : (position + 1) * size]
        rng = np.random.default_rng((EXTRAS, self.config.seed, epoch, position))
        more = rng.integers(len(self.split.captions), size=len(captions) * self.config.extra_stc)
        images = rng.integers(self.split.images, size=len(captions) * self.config.extra_img)
        rows = np.concatenate([self.split.caption_rows(captions), self.split.image_rows(images)])
        captions = np.concatenate([captions, more])
        ids, mask = self.vocabulary.encode(
            [self.split.captions[c] for c in captions], self.max_words
        )
        pairs = len(captions) - len(more)
        states = None
        if self.states is not None:
            states = torch.from_numpy(open_memmap(self.states, mode="r")[captions])
        regions = self.split.regions(rows)
        return Batch(regions, ids, mask, torch.from_numpy(captions), pairs, states)

    def epoch(self, epoch: int, start: int, pin: bool) -> Iterator[Batch]:
        """The batches of an epoch from position `start` on, read by the workers."""
        places = [(epoch, position) for position in range(start, len(self))]
        return load(self, places, self.config.workers, pin)


@dataclass(frozen=True)
class ImageBlocks(Dataset):
    """Features of consecutive distinct images: `self[first, stop]`, for evaluation."""

    split: Split

    def __getitem__(self, block: tuple[int, int]) -> Tensor:
        return self.split.regions(self.split.image_rows(np.arange(*block)))


@lru_cache(maxsize=1)
def _order(seed: int, epoch: int, captions: int) -> np.ndarray:
    return np.random.default_rng((ORDER, seed, epoch)).permutation(captions)
