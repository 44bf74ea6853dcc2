"""layout.py — the folder of a data set as SCAN laid it out: names and checked readers (SPEC §10).

    {split}_ims.npy     region features (rows, regions, width), one row an image or one a caption
    {split}_caps.txt    captions, one a line, five an image, in the order of the images
    {split}_ids.txt     ids, one a line, for each image or five times for its captions; optional
    id_mapping.json     file name of each id's image; optional

Readers and checks raise InputError, which names the file, its content and what was expected.
"""

import hashlib
import mmap
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from common.errors import InputError, brief_repr, require, summarise
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


def count_images(path: Path, captions: Sequence[str]) -> int:
    """Return how many images the captions of file `path` describe, five each."""
    is_whole = len(captions) % CAPTIONS_PER_IMAGE == 0
    require(is_whole, f"{path}: {len(captions)} captions; expected five an image")
    return len(captions) // CAPTIONS_PER_IMAGE


# Ids and file names of images


def read_ids(path: Path, images: int) -> tuple[str, ...]:
    """Return the id of each image, from a file with one line an image or one a caption."""
    lines = read_lines(path, "ids, one a line")
    if len(lines) not in (images, images * CAPTIONS_PER_IMAGE):
        raise InputError(
            f"{path}: {len(lines)} ids for {images} images; expected one an image or one a caption"
        )
    if "" in lines:
        raise InputError(f"{path}: line {lines.index('') + 1} is empty; expected an id")
    ids = lines if len(lines) == images else lines[::CAPTIONS_PER_IMAGE]
    for number, line in enumerate(lines):
        expected = ids[number * images // len(lines)]
        if line != expected:
            problem = f"{path}: line {number + 1} is {brief_repr(line)}"
            raise InputError(f"{problem}; expected {brief_repr(expected)}, the same image's id")
    repeated = [key for key, count in Counter(ids).items() if count > 1]
    require(not repeated, f"{path}: {summarise(repeated)} is there twice; expected each image once")
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


def map_features(path: Path) -> np.memmap:
    """Open region features `(rows, regions, width)`, float32 or float16, as a memory map."""
    features = map_array(path, "region features, a .npy file")
    if features.ndim != 3 or features.size == 0:
        raise InputError(f"{path}: shape {features.shape}; expected (rows, regions, img_dim)")
    if features.dtype.kind != "f" or features.dtype.itemsize not in (2, 4):
        raise InputError(f"{path}: {features.dtype} features; expected float32 or float16")
    return features


def rows_per_image(path: Path, rows: int, captions: int) -> int:
    """Return 5 if each image's row is repeated for its captions, 1 if it is not.

    Raises InputError, for features `path`, if the counts do not fit each other.
    """
    if captions % CAPTIONS_PER_IMAGE or rows not in (captions, captions // CAPTIONS_PER_IMAGE):
        raise InputError(
            f"{path}: {rows} rows for {captions} captions; expected five captions an image, "
            "and a row for each image or one for each caption"
        )
    return CAPTIONS_PER_IMAGE if rows == captions else 1


def read_rows(features: np.memmap, rows: np.ndarray) -> np.ndarray:
    """Return a copy of some rows of mapped features, `[rows, L, img_dim]` float32."""
    values = np.ascontiguousarray(features[rows], dtype=np.float32)
    # Pages read from a map count as this process's memory until they are given back.
    if hasattr(mmap, "MADV_DONTNEED") and isinstance(features.base, mmap.mmap):
        features.base.madvise(mmap.MADV_DONTNEED)
    return values


def check_finite_rows(path: Path, values: np.ndarray, rows: Sequence[int] | np.ndarray) -> None:
    """Raise InputError if `values` `[rows, L, n]`, rows `rows` of `path`, hold NaN or infinity."""
    bad = np.asarray(rows)[~np.isfinite(values).all((1, 2))]
    if len(bad):
        raise InputError(f"{path}: row {bad.min()} holds NaN or infinite numbers")
