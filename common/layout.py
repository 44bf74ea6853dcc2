"""layout.py — the folder of a data set as SCAN laid it out: names and checked readers (SPEC §10).

    {split}_ims.npy     region features (rows, regions, width), one row an image or one a caption
    {split}_caps.txt    captions, one a line, in the order of the images
    {split}_ids.txt     ids, one a line: an image's id for each caption, however many it has, or
                        for each image, if it has five captions, as without the file; optional
    id_mapping.json     file name of each id's image; optional

Readers and checks raise InputError, which names the file, its content and what was expected.
"""

import hashlib
import mmap
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from common.errors import PLAIN, InputError, brief_repr, require, summarise
from common.files import map_array, read_json, read_text

SplitName = Literal["train", "dev", "test", "testall"]

CAPTIONS_PER_IMAGE = 5
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, surrogates
LONGEST_CAPTION = 10_000  # characters; a longer line is not a caption and slow to tokenise


# Names


def split_files(folder: str | Path, name: SplitName) -> tuple[Path, Path]:
    """Features and captions of a split."""
    return Path(folder) / f"{name}_ims.npy", Path(folder) / f"{name}_caps.txt"


def ids_file(folder: str | Path, name: SplitName) -> Path:
    """Ids of a split's images."""
    return Path(folder) / f"{name}_ids.txt"


def boxes_file(folder: str | Path, name: SplitName) -> Path:
    """Boxes of a split's regions, written by extract_regions.py."""
    return Path(folder) / f"{name}_boxes.npy"


def extraction_file(folder: str | Path, name: SplitName) -> Path:
    """State of extract_regions.py: options, images, rows done."""
    return Path(folder) / f"{name}_regions.json"


def names_file(folder: str | Path) -> Path:
    """File names of the images of all splits, by id."""
    return Path(folder) / "id_mapping.json"


def files_of(folder: str | Path, name: SplitName) -> list[Path]:
    """All files that a split may have; no program writes its output over them."""
    of_regions = [file(folder, name) for file in (ids_file, boxes_file, extraction_file)]
    return [*split_files(folder, name), *of_regions, names_file(folder)]


# Captions


def read_lines(path: Path, wanted: str) -> tuple[str, ...]:
    """Return the stripped lines of a UTF-8 file that is not empty. Only `\\n` ends a line (§10)."""
    text = read_text(path, wanted)
    require(len(text) > 0, f"{path}: is empty; expected {wanted}")
    return tuple(line.strip() for line in text.removesuffix("\n").split("\n"))


def read_captions(path: Path, allow_empty: bool = True) -> tuple[str, ...]:
    """Return the captions of a file, one a line."""
    captions = read_lines(path, "captions, one a line")
    for line, caption in enumerate(captions, 1):
        length = len(caption)
        if length > LONGEST_CAPTION or (length == 0 and not allow_empty):
            expected = f"expected a caption of 1 to {LONGEST_CAPTION} characters"
            raise InputError(f"{path}: line {line} has {length} characters; {expected}")
    return captions


# Captions of an image


@dataclass(frozen=True, eq=False)
class CaptionGroups:
    """How many captions each image has. They are consecutive, in the order of the images."""

    counts: np.ndarray  # [I] int64, each 1 or more

    @classmethod
    def of_five(cls, images: int) -> "CaptionGroups":
        """Return SCAN's layout: five captions an image."""
        return cls(np.full(images, CAPTIONS_PER_IMAGE))

    def __str__(self) -> str:
        low, high = self.counts.min(), self.counts.max()
        return f"{low}" if low == high else f"{low} to {high}"

    @property
    def images(self) -> int:
        """Number of images, I."""
        return len(self.counts)

    @property
    def is_five(self) -> bool:
        """Whether this is SCAN's layout."""
        return bool((self.counts == CAPTIONS_PER_IMAGE).all())

    @cached_property
    def image_of_caption(self) -> np.ndarray:
        """The image of each caption, `[T]`: ascending and consecutive."""
        return np.repeat(np.arange(self.images), self.counts)

    @cached_property
    def first(self) -> np.ndarray:
        """The first caption of each image, `[I]`."""
        return self.counts.cumsum() - self.counts

    def captions_of(self, images: np.ndarray) -> np.ndarray:
        """Return all captions of some images, image by image."""
        counts = self.counts[images]
        place = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        return np.repeat(self.first[images], counts) + place

    def whole_images(self, captions: int) -> int:
        """Return how many images have all their captions among the first `captions`."""
        return int((self.counts.cumsum() <= captions).sum())


def read_groups(
    folder: str | Path, name: SplitName, captions: int, images: int | None = None
) -> CaptionGroups:
    """Return which of the `captions` of a split describe the same image.

    Consecutive lines of {split}_ids.txt with the same id are one image's captions. Without the
    file, or if it has a line for every five captions, each image has five. If all ids differ, they
    may be SCAN's ids of captions: `images`, the number of images if it is known, decides.
    """
    path = ids_file(folder, name)
    known = "" if images is None else f"{images} rows for "
    if path.exists():
        lines = read_lines(path, "ids, one a line")
        if len(lines) == captions:
            counts = np.array(list(_group_ids(path, lines).values()))
            if images is None or not len(counts) == captions == CAPTIONS_PER_IMAGE * images:
                return CaptionGroups(counts)
        elif len(lines) * CAPTIONS_PER_IMAGE != captions:
            problem = f"{path}: ends at line {len(lines)}, but there are {known}{captions} captions"
            raise InputError(f"{problem}; expected an id for each caption, or for every five")
    if captions % CAPTIONS_PER_IMAGE:
        problem = f"{split_files(folder, name)[1]}: {known}{captions} captions"
        raise InputError(f"{problem}; expected five an image, or {path} with an id a caption")
    return CaptionGroups.of_five(captions // CAPTIONS_PER_IMAGE)


def read_groups_of_scores(
    path: Path, shape: tuple[int, ...], folder: Path | None, name: SplitName | None
) -> CaptionGroups:
    """Return which captions of a score matrix describe which image.

    `folder` and `name` are the split of the scores; without them an image has five captions. Raises
    InputError if the matrix, file `path`, is of another number of images or captions.
    """
    if folder is None or name is None:
        groups = CaptionGroups.of_five(shape[0])
        of = "five captions an image, or --data_path, --data_name and --split of others"
    else:
        captions = read_captions(split_files(folder, name)[1])
        groups = read_groups(folder, name, len(captions), shape[0])
        of = f"{name} of {folder}"
    expected = (groups.images, len(groups.image_of_caption))
    require(shape == expected, f"{path}: shape {shape}; expected {expected}: {of}")
    return groups


def _group_ids(path: Path, lines: Sequence[str]) -> dict[str, int]:
    """Return how many consecutive lines have each id. Raises InputError if an id comes again."""
    counts: dict[str, int] = {}
    line = 1
    for key, group in groupby(lines):
        require(bool(key), f"{path}: line {line} is empty; expected an id")
        if key in counts:
            problem = f"{path}: line {line} repeats {brief_repr(key)} of line"
            expected = "expected an image's captions on consecutive lines"
            raise InputError(f"{problem} {lines.index(key) + 1}; {expected}")
        counts[key] = len(list(group))
        line += counts[key]
    return counts


# Ids and file names of images


def read_ids(path: Path, images: int) -> tuple[str, ...]:
    """Return the id of each image, from a file with one line an image or one a caption."""
    lines = read_lines(path, "ids, one a line")
    ids = tuple(_group_ids(path, lines))
    if len(ids) != images:
        problem = f"{path}: {len(ids)} different ids on {len(lines)} lines for {images} images"
        raise InputError(f"{problem}; expected one an image, on each line of its captions or once")
    return ids


def read_names(folder: Path) -> dict[str, str]:
    """Return the file name of each id's image, relative to the folder of the images."""
    path = names_file(folder)
    names = read_json(path, "the file name of each id")
    for key, name in names.items():
        if not stays_inside(name):
            problem = f"{path}: {brief_repr(key)} is {brief_repr(name)}"
            raise InputError(f"{problem}; expected a file in the folder of the images")
    return names


def check_named(ids_path: Path, ids: Sequence[str], names: Collection[str]) -> None:
    """Raise InputError if an id of the file `ids_path` has no file name."""
    absent = [key for key in ids if key not in names]
    if absent:
        path = names_file(ids_path.parent)
        raise InputError(f"{path}: lacks {summarise(absent)} of {ids_path.name}")


def images_digest(ids: Sequence[str], names: dict[str, str]) -> str:
    """SHA-256 of the ids and file names of a split's images, in their order."""
    lines = [f"{key} {names[key]}" for key in ids]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def stays_inside(name: Any) -> bool:
    """Whether a file name from a stranger's file stays inside the folder it is joined to."""
    if not isinstance(name, str) or not is_one_line(name) or "\\" in name:
        return False
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def is_one_line(text: str) -> bool:
    """Whether a text has no control characters and no half of a surrogate pair; spaces are fine."""
    return UNPRINTABLE.search(text) is None


# Features


def read_backbone(folder: Path, name: SplitName) -> dict[str, Any] | None:
    """Return what extract_regions.py made a split's features with, if its record says so.

    A record that is not complete is not of the features that are there. Raises InputError if it is
    damaged.
    """
    path = extraction_file(folder, name)
    if not path.exists():
        return None
    record = read_json(path, "a record of extract_regions.py")
    return check_backbone(record.get("about"), path) if record.get("complete") else None


def check_backbone(about: Any, source: Path) -> dict[str, Any]:
    """Return what made features, from a file. Raises InputError unless it is JSON with a model."""
    is_named = isinstance(about, dict) and isinstance(about.get("model"), str)
    problem = f"{source}: the backbone of the features is {brief_repr(about)}"
    require(is_named and _is_json(about), f"{problem}; expected its model and its weights")
    return about


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(value[key]) for key in value)
    return all(map(_is_json, value)) if isinstance(value, list) else isinstance(value, PLAIN)


def map_features(path: Path) -> np.memmap:
    """Open region features `(rows, regions, width)`, float32 or float16, as a memory map."""
    features = map_array(path, "region features, a .npy file")
    if features.ndim != 3 or features.size == 0:
        raise InputError(f"{path}: shape {features.shape}; expected (rows, regions, img_dim)")
    if features.dtype.kind != "f" or features.dtype.itemsize not in (2, 4):
        raise InputError(f"{path}: {features.dtype} features; expected float32 or float16")
    return features


def read_rows(features: np.memmap, rows: np.ndarray) -> np.ndarray:
    """Return a copy of some rows of mapped features, `[rows, L, img_dim]` float16 or float32."""
    values = np.ascontiguousarray(features[rows], dtype=features.dtype.newbyteorder("="))
    # Pages read from a map count as this process's memory until they are given back.
    if hasattr(mmap, "MADV_DONTNEED") and isinstance(features.base, mmap.mmap):
        features.base.madvise(mmap.MADV_DONTNEED)
    return values


def check_finite_rows(path: Path, values: np.ndarray, rows: Sequence[int] | np.ndarray) -> None:
    """Raise InputError if `values` `[rows, L, n]`, rows `rows` of `path`, hold NaN or infinity."""
    bad = np.asarray(rows)[~np.isfinite(values).all((1, 2))]
    if len(bad):
        raise InputError(f"{path}: row {bad.min()} holds NaN or infinite numbers")
