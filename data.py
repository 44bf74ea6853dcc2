"""data.py — a split's images and captions, and training batches (SPEC §8, §10).

A batch is a pure function of (seed, epoch, position): worker processes hold no state, their number
changes nothing, and training can resume at any position of an epoch. Knows nothing of the model.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
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
from common.errors import InputError, require
from common.layout import (
    CAPTIONS_PER_IMAGE,
    CaptionGroups,
    SplitName,
    check_finite_rows,
    map_features,
    read_captions,
    read_groups,
    read_rows,
    split_files,
)
from common.numbers import check_numbers
from common.workers import load
from common.world import ALONE, World
from vocab import EncodedCaptions, Vocabulary

SMALL_FILE = 2**28  # bytes; all rows of features up to this size are checked when they are opened
SAMPLED_ROWS = 16  # rows of a larger file that its fingerprint covers; images that are checked
CHECKED_AT_ONCE = 2**24  # bytes, about
ORDER, EXTRAS = 1, 2  # first number of the two random streams' seeds, so that they never coincide


@dataclass(frozen=True)
class Split:
    """Images and captions of one split; features are read from the disk when they are needed."""

    path: Path  # the *_ims.npy file
    captions: tuple[str, ...]
    groups: CaptionGroups  # which captions describe which image
    row_a_caption: bool  # whether each image's row is repeated for its captions

    @classmethod
    def open(
        cls, folder: str | Path, name: SplitName, img_dim: int | None, training: bool = False
    ) -> "Split":
        """Open the features, captions and ids of a split and check that they fit each other.

        `img_dim` is the expected width of the features; None accepts any. An empty caption is an
        error only in training. All rows are checked, or those of some images if the file is larger
        than SMALL_FILE. Raises InputError that names the file and what was expected.
        """
        path, captions_path = split_files(folder, name)
        captions = read_captions(captions_path, allow_empty=not training)
        features = map_features(path)
        rows, width = len(features), features.shape[2]
        require(
            img_dim in (None, width),
            f"{path}: features are {width} wide; expected {img_dim}, the model's --img_dim",
        )
        five = rows == len(captions) and _has_five_rows_an_image(features)
        images = rows // CAPTIONS_PER_IMAGE if five else rows
        groups = read_groups(folder, name, len(captions), images)
        if rows not in (groups.images, len(captions)):
            problem = f"{path}: {rows} rows for {len(captions)} captions of {groups.images} images"
            expected = "expected a row for each image or one for each caption"
            raise InputError(f"{problem}; {expected}; captions of one image have the same id")
        split = cls(path, captions, groups, rows == len(captions))
        count = split.images if features.nbytes <= SMALL_FILE else SAMPLED_ROWS
        for _ in split.checked_rows(spread(split.images, count)):
            pass
        split._check_distinct(count)
        return split

    @property
    def images(self) -> int:
        """Number of distinct images."""
        return self.groups.images

    @property
    def regions_per_image(self) -> int:
        """Number of regions of an image, L."""
        return self._features.shape[1]

    @property
    def img_dim(self) -> int:
        """Width of the features."""
        return self._features.shape[2]

    @cached_property
    def _features(self) -> np.memmap:
        return map_features(self.path)

    def __getstate__(self) -> dict[str, Any]:
        # pickling a memory map would copy the whole file to a spawned worker
        return {key: value for key, value in vars(self).items() if key != "_features"}

    @property
    def _ids_name(self) -> str:
        return self.path.name.replace("_ims.npy", "_ids.txt")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the captions, the features' shape and type, and the features.

        Of a file above SMALL_FILE it covers SAMPLED_ROWS rows. If an image has not five captions,
        it covers their numbers.
        """
        features = self._features
        digest = hashlib.sha256("\n".join(self.captions).encode())
        if not self.groups.is_five:
            digest.update(self.groups.counts.astype("<i8").data)
        digest.update(f"{features.shape} {features.dtype.str}".encode())
        count = len(features) if features.nbytes <= SMALL_FILE else SAMPLED_ROWS
        for row in np.linspace(0, len(features) - 1, count, dtype=int):
            digest.update(np.ascontiguousarray(features[row]).data)
        return digest.hexdigest()

    def image_rows(self, images: np.ndarray) -> np.ndarray:
        """Row of the features of each image."""
        return self.groups.first[images] if self.row_a_caption else images

    def rows_of(self, images: np.ndarray) -> np.ndarray:
        """All rows of some images: one each, or one for each caption."""
        return self.groups.captions_of(images) if self.row_a_caption else images

    def checked_rows(self, images: np.ndarray) -> Iterator[np.ndarray]:
        """Yield all rows of some images, `[rows, L, img_dim]` float32, several images at a time.

        Raises InputError on NaN or inf, on numbers that no feature can be, and if rows of one image
        differ.
        """
        size = len(self.rows_of(images)) * self._features[0].size * 4
        blocks = size // CHECKED_AT_ONCE + 1
        for block in np.array_split(images, min(blocks, len(images))):
            rows = self.rows_of(block)
            values = self._read(rows).float().numpy()
            check_numbers(self.path, values, rows, self._features.dtype)
            if self.row_a_caption:
                self._check_repeats(values, self.groups.image_of_caption[rows])
            yield values

    def _check_repeats(self, values: np.ndarray, images: np.ndarray) -> None:
        """Raise InputError if rows `[rows, L, img_dim]` of the same one of `images` differ."""
        differ = (values[1:] != values[:-1]).any((1, 2)) & (images[1:] == images[:-1])
        if differ.any():
            image = images[1:][differ][0]
            first = self.groups.first[image]
            raise InputError(
                f"{self.path}: rows {first} to {first + self.groups.counts[image] - 1} differ; "
                "expected one row, repeated for each caption of an image (or, with another number "
                f"of captions an image, {self._ids_name} with an id for each caption)"
            )

    def _check_distinct(self, count: int) -> None:
        """Raise InputError if half of `count` images have the features of another image.

        All images are compared; if `count` is less, those beside them and where tiles repeat them.
        """
        n = self.images
        some = spread(n, count)
        tiles = [n // times for times in range(2, 8)]
        others = [(some + step) % n for step in (0, 1, -1, *tiles)]
        images = np.unique(np.concatenate([some, *others]))
        rows = zip(images.tolist(), self.image_rows(images), strict=True)
        keys = {image: hash(self._features[row].tobytes()) for image, row in rows}
        times = Counter(keys.values())
        blank = hash(bytes(self._features[0].nbytes))  # of images that an extraction left out
        twins = sum(keys[image] != blank and times[keys[image]] > 1 for image in some.tolist())
        if 2 * twins >= len(some):
            raise InputError(
                f"{self.path}: rows repeat: {twins} of {len(some)} images have the features of "
                "another image; expected one row an image, or a row repeated for captions that are "
                f"consecutive and have the same id in {self._ids_name}"
            )

    def regions(self, images: np.ndarray) -> Tensor:
        """Features of `images`, `[images, L, img_dim]`, float16 or float32 as in the file.

        Raises InputError on NaN or inf.
        """
        return self._read(self.image_rows(images))

    def _read(self, rows: np.ndarray) -> Tensor:
        features = read_rows(self._features, rows)
        check_finite_rows(self.path, features, rows)
        return torch.from_numpy(features)


@dataclass(frozen=True)
class Batch:
    """A training batch; the first `pairs` images and captions match one to one.

    Of several processes, each has its share of the pairs, then its share of the extra negatives.
    """

    regions: Tensor  # [I, L, img_dim] float16 or float32, as stored; after `to` float32
    ids: Tensor  # [T, M] int64
    mask: Tensor  # [T, M] bool, True = a real token
    captions: Tensor  # index in the split, of all processes
    pairs: int  # of all processes
    hidden_states: Tensor | None = None  # [T, M, hidden] BERT's output, if it is cached
    extras: int = 0  # negatives beyond the pairs, of all processes

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device, which makes the features float32."""
        batch = self._each(lambda tensor: to_device(tensor, device))
        return replace(batch, regions=batch.regions.float())

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory (called by DataLoader)."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {key: change(v) for key, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]  # all of these fields are tensors


@dataclass(frozen=True)
class TrainingBatches(Dataset):
    """The training batches: `self[epoch, position]`."""

    split: Split
    vocabulary: Vocabulary
    config: DataConfig
    max_words: int
    skip_single: bool  # leave out a batch of one item, which batch normalisation cannot take
    hidden_states: Path | None = None  # BERT's output for all captions, see text_cache.py
    features: Tensor | None = None  # [images, L, img_dim] on the device, see device_features.py
    world: World = ALONE

    def __len__(self) -> int:
        """Number of batches of an epoch."""
        full, rest = divmod(len(self.split.captions), self.config.batch_size)
        # DEVIATION: a last batch that batch normalisation cannot take is skipped: of one item in
        # t2i without extra images, or of one region in i2t without extra sentences (the published
        # code crashed).
        smallest = 2 if self.skip_single else 1
        return full * (self.config.batch_size >= smallest) + (rest >= smallest)

    @cached_property
    def _encoded(self) -> EncodedCaptions:
        return EncodedCaptions.of(self.split.captions, self.vocabulary, self.max_words)

    def __getitem__(self, index: tuple[int, int]) -> Batch:
        images, captions, pairs = self._draw(*index)
        extras = max(len(images), len(captions)) - pairs
        every = torch.from_numpy(captions)
        if self.world.size > 1:
            images, captions = self._share(images, pairs), self._share(captions, pairs)
        if self.features is None:
            regions = self.split.regions(images)
        else:
            gathered = to_device(torch.from_numpy(images), self.features.device)
            regions = self.features.index_select(0, gathered)
        ids, mask = self._encoded[captions]
        hidden = None
        if self.hidden_states is not None:
            hidden = torch.from_numpy(open_memmap(self.hidden_states, mode="r")[captions])
        return Batch(regions, ids, mask, every, pairs, hidden, extras)

    def _draw(self, epoch: int, position: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return images `[I]` and captions `[T]` of a batch, and the number of its pairs."""
        # DEVIATION: order and extra negatives are functions of seed, epoch and position (the
        # published ones came from global generators).
        order = _order(self.config.seed, epoch, len(self.split.captions))
        size = self.config.batch_size
        paired = order[position * size : (position + 1) * size]
        # Extra negatives stand behind the pairs: captions as columns, images as rows (SPEC §7).
        rng = np.random.default_rng((EXTRAS, self.config.seed, epoch, position))
        captions = rng.integers(len(self.split.captions), size=len(paired) * self.config.extra_stc)
        images = rng.integers(self.split.images, size=len(paired) * self.config.extra_img)
        images = np.concatenate([self.split.groups.image_of_caption[paired], images])
        return images, np.concatenate([paired, captions]), len(paired)

    def _share(self, items: np.ndarray, pairs: int) -> np.ndarray:
        """Return this process's share of the pairs, then of the others, both padded."""
        parts = (items[:pairs], items[pairs:])
        return np.concatenate([part[self.world.padded_share(len(part))] for part in parts])

    def epoch(self, epoch: int, start: int, device: torch.device) -> Iterator[Batch]:
        """Yield the batches of an epoch from position `start` on, on a device.

        Worker processes read them, unless the features are on the device. Raises InputError that
        names the file or --workers.
        """
        keys = [(epoch, position) for position in range(start, len(self))]
        if self.features is not None:
            return (self[key].to(device) for key in keys)
        _ = self._encoded  # here, so that the workers get it
        batches = load(self, keys, self.config.workers, pin=device.type == "cuda")
        return copied_ahead(batches, device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the host does not wait for a copy to a CUDA GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # unless it is pinned
    return tensor.to(device, non_blocking=True)


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches on a device; a CUDA GPU copies the next one while it computes."""
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    # Copies have a stream of their own. Each waits for the steps that were launched before, because
    # it may take the memory of their batches; the step that is launched next runs beside it.
    copies = torch.cuda.Stream(device)
    ready: Batch | None = None
    for batch in batches:
        copies.synchronize()  # the copy of `ready`; it bounds how far the host runs ahead
        copies.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copies):
            copied = batch.to(device)
        if ready is not None:
            yield ready
        ready = copied
    copies.synchronize()
    if ready is not None:
        yield ready


@dataclass(frozen=True)
class ImageBlocks(Dataset):
    """For evaluation: `self[first, stop]` are the features of these images, as `Split.regions`."""

    split: Split

    def __getitem__(self, block: tuple[int, int]) -> Tensor:
        return self.split.regions(np.arange(*block))


def spread(length: int, count: int) -> np.ndarray:
    """Return at most `count` places, spread evenly over `length` ones."""
    return np.unique(np.linspace(0, length - 1, count, dtype=int))


def _has_five_rows_an_image(features: np.memmap) -> bool:
    """Return whether most of some images have five equal rows, as SCAN's have."""
    n = CAPTIONS_PER_IMAGE
    if len(features) % n:
        return False
    rows = spread(len(features) // n, SAMPLED_ROWS)[:, None] * n + np.arange(n)
    values = read_rows(features, rows.ravel()).reshape(*rows.shape, -1)
    return bool(2 * (values == values[:, :1]).all((1, 2)).sum() > len(rows))


@lru_cache(maxsize=1)
def _order(seed: int, epoch: int, captions: int) -> np.ndarray:
    return np.random.default_rng((ORDER, seed, epoch)).permutation(captions)
