"""data_faults.py — what is in a data set's folder, and what is wrong with it.

For scripts/check_data.py, which prints it.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from common.cli import progress
from common.errors import InputError, summarise
from common.files import map_array, read_json
from common.layout import (
    CAPTIONS_PER_IMAGE,
    SplitName,
    boxes_file,
    caption_problems,
    count_images,
    count_problems,
    extraction_file,
    finite_rows,
    id_problems,
    ids_file,
    kind_problems,
    name_problems,
    nameless_problems,
    names_file,
    number_problems,
    one_an_image,
    pictures_digest,
    read_lines,
    read_rows,
    rows_per_image,
    split_files,
)
from vocab import Vocabulary

SAMPLE = 200  # images of a split whose rows are read
BLOCK = 16  # images read at a time: 24 MB where SCAN's rows are repeated
CAPTION_BLOCK = 1000  # captions tokenised at a time
KNOWN = {
    "Flickr30K": {"train": 29_000, "dev": 1_014, "test": 1_000},
    "MSCOCO": {"train": 113_287, "test": 1_000, "testall": 5_000},
}
SAME_IMAGES = {"test", "testall"}  # MSCOCO's test is the first thousand of testall
UNREADABLE = 0.05  # share of [UNK] above which the vocabulary is not the captions'
Result = TypeVar("Result")


@dataclass
class Found:
    """What is found of one split."""

    name: SplitName
    path: Path  # of the features
    captions: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()  # one an image
    shape: tuple[int, ...] | None = None  # of the features
    dtype: str = ""
    bytes: int = 0
    repeats: int = 0  # rows an image, 0 where features and captions do not fit each other
    rows_read: int = 0
    lengths: np.ndarray | None = None  # [T] WordPieces of each caption, uncut
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def attempt(self, work: Callable[..., Result], *given: object) -> Result | None:
        """What some work gives; where it cannot be done, that is a fault."""
        try:
            return work(*given)
        except InputError as error:
            self.faults.append(str(error))
            return None

    @property
    def images(self) -> int:
        """Images that there are captions of."""
        return len(self.captions) // CAPTIONS_PER_IMAGE

    def as_dict(self, max_words: int) -> dict[str, Any]:
        """Plain data."""
        about = {
            "name": self.name,
            "images": self.images,
            "captions": len(self.captions),
            "ids": len(self.ids),
            "shape": self.shape,
            "dtype": self.dtype,
            "rows_per_image": self.repeats,
            "bytes": self.bytes,
            "rows_read": self.rows_read,
        }
        if self.lengths is None:
            return about
        cut = int((self.lengths > max_words).sum())
        return about | {"longest": int(self.lengths.max()), "cut": cut}


def looked_at(folder: Path, name: SplitName, full: bool) -> Found:
    """All that is wrong with a split's own files."""
    path, captions_path = split_files(folder, name)
    found = Found(name, path)
    captions = found.attempt(read_lines, captions_path, "captions, one a line")
    if captions is not None:
        found.captions = captions
        found.faults += caption_problems(captions_path, captions, allow_empty=name != "train")
        if name != "train" and "" in captions:
            found.remarks.append(f"{captions_path}: {captions.count('')} captions are empty")
        found.attempt(count_images, captions_path, captions)
    features = found.attempt(map_array, path, "region features, a .npy file")
    if features is not None:
        look_at_features(found, features, full)
    ids_path, boxes_path = ids_file(folder, name), boxes_file(folder, name)
    if os.path.lexists(ids_path):
        look_at_ids(found, ids_path)
    if os.path.lexists(boxes_path) and found.repeats:
        boxes = found.attempt(map_array, boxes_path, "boxes, a .npy file")
        if boxes is not None:
            found.faults += box_problems(boxes_path, boxes, (found.images, features.shape[1], 4))
    return found


def box_problems(path: Path, boxes: np.ndarray, shape: tuple[int, ...]) -> Iterator[str]:
    """Boxes that are none of a split's regions."""
    if boxes.shape != shape or boxes.dtype.kind != "f":
        yield f"{path}: shape {boxes.shape}, {boxes.dtype}; expected {shape} of floats"
    elif not finite_rows(boxes).all():
        yield f"{path}: row {finite_rows(boxes).argmin()} holds NaN or infinite numbers"


def look_at_features(found: Found, features: np.memmap, full: bool) -> None:
    """Kind, size on the disk, rows for captions, and what the rows hold."""
    path = found.path
    found.shape, found.dtype = features.shape, str(features.dtype)
    found.bytes = path.stat().st_size
    more = found.bytes - features.offset - features.nbytes
    if more:
        found.faults.append(f"{path}: {more} bytes more than its header asks for")
    kinds = list(kind_problems(path, features))
    found.faults += kinds
    if kinds:
        return
    if not features.flags.c_contiguous:
        found.remarks.append(
            f"{path}: is stored in Fortran's order, in which rows are slow to read"
        )
    if found.captions:
        found.repeats = rows_per_image(len(features), len(found.captions))
        if len(found.captions) % CAPTIONS_PER_IMAGE == 0:  # else it is said already
            found.faults += count_problems(path, len(features), len(found.captions))
    read_through(found, features, full)


def read_through(found: Found, features: np.memmap, full: bool) -> None:
    """Rows of all images, or of some: whether they are numbers, and equal where repeated."""
    together = found.repeats or 1
    images = len(features) // together
    chosen = np.unique(np.linspace(0, images - 1, images if full else SAMPLE, dtype=int))
    bad, unequal, zero = [], [], 0
    with progress(f"reading {found.path.name}", len(chosen), "images") as bar:
        for first in range(0, len(chosen), BLOCK):
            block = chosen[first : first + BLOCK]
            rows = (block[:, None] * together + np.arange(together)).ravel()
            numbers = read_rows(features, rows)
            bad += rows[~finite_rows(numbers)].tolist()
            zero += int((~numbers.any((1, 2))).sum())
            bits = numbers.view(np.int32).reshape(len(block), together, -1)  # NaN equals itself
            unequal += block[(bits != bits[:, :1]).any((1, 2))].tolist()
            found.rows_read += len(rows)
            bar.update(len(block))
    found.faults += number_problems(found.path, bad)
    if unequal:
        found.faults.append(
            f"{found.path}: the five rows of image {summarise([str(image) for image in unequal])} "
            "differ; expected one row five times, since there is a row for each caption"
        )
    if zero:
        found.remarks.append(
            f"{found.path}: {zero} of the {found.rows_read} rows read hold zeros alone, as where "
            "an extraction was cut off"
        )


def look_at_ids(found: Found, path: Path) -> None:
    """A line for each image or for each caption, and no image twice."""
    ids = found.attempt(read_lines, path, "ids, one a line")
    if ids is None or not found.images or len(found.captions) % CAPTIONS_PER_IMAGE:
        return
    if len(ids) == len(found.captions) == len(set(ids)):
        return  # of captions, which name no images
    faults = list(id_problems(path, ids, found.images))
    found.faults += faults
    if not faults:
        found.ids = one_an_image(ids, found.images)


def between(splits: list[Found], folder: Path) -> Iterator[str]:
    """Faults of splits that do not go together, and of ids without a file."""
    wide = [split for split in splits if split.shape and len(split.shape) == 3]
    for split in wide[1:]:
        if split.shape[2] != wide[0].shape[2]:
            yield (
                f"{split.path}: features are {split.shape[2]} wide; expected {wide[0].shape[2]}, "
                f"as in {wide[0].path.name}"
            )
    for number, one in enumerate(splits):
        for other in splits[number + 1 :]:
            shared = sorted(set(one.ids) & set(other.ids))
            if shared and {one.name, other.name} != SAME_IMAGES:
                yield (
                    f"{ids_file(folder, other.name)}: {summarise(shared)} is in {one.name}_ids.txt "
                    "too; expected other images in every split"
                )
    mapping = names_file(folder)
    if os.path.lexists(mapping):
        try:
            names = read_json(mapping, "the file name of each id")
        except InputError as error:
            yield str(error)
            return
        yield from name_problems(mapping, names)
        for split in splits:
            yield from nameless_problems(ids_file(folder, split.name), names, split.ids)
            yield from picture_problems(split, folder, names)


def picture_problems(split: Found, folder: Path, names: dict[str, Any]) -> Iterator[str]:
    """Features that extract_regions made of other pictures than the ids are of now."""
    path = extraction_file(folder, split.name)
    if not path.exists() or not split.ids or any(key not in names for key in split.ids):
        return
    try:
        record = read_json(path, "what extract_regions did")
    except InputError as error:
        yield str(error)
        return
    if record.get("renaming"):
        yield f"{path}: features and boxes may be of two extractions; extract_regions goes on"
    about = record.get("about")
    then = about.get("ids") if isinstance(about, dict) else None
    if then != pictures_digest(split.ids, names):
        yield (
            f"{path}: features are of other pictures than {split.name}_ids.txt and "
            f"{names_file(folder).name} tell; extract_regions --overwrite makes them anew"
        )


def remarks_on(splits: list[Found], folder: Path) -> Iterator[str]:
    """What is no fault of the splits together."""
    names = {split.name for split in splits}
    for name in ("train", "dev"):
        if name not in names:
            yield f"{folder}: holds no {name}, which train.py needs"
    if not names & SAME_IMAGES:
        yield f"{folder}: holds no test, which evaluate_models.py reads if not told otherwise"
    regions = {split.shape[1] for split in splits if split.shape and len(split.shape) == 3}
    if len(regions) > 1:
        yield f"{folder}: images have {' or '.join(map(str, sorted(regions)))} regions, by split"
    yield counts_remark({split.name: split.images for split in splits})


def counts_remark(counts: Mapping[str, int]) -> str:
    """Whether the numbers of images are those of a data set that is published."""
    told = []
    for title, known in KNOWN.items():
        shared = counts.keys() & known.keys()
        if shared and all(counts[name] == known[name] for name in shared):
            return f"the numbers of images are {title}'s"
        told.append(f"{title}'s ({', '.join(f'{n:,} {name}' for name, n in known.items())})")
    return f"the numbers of images are not {', nor '.join(told)}"


def look_at_words(found: Found, vocabulary: Vocabulary, max_words: int) -> None:
    """Lengths of captions, and whether the vocabulary is theirs."""
    parts, unknown = [], 0
    with progress(f"tokenising {found.name}", len(found.captions), "captions") as bar:
        for first in range(0, len(found.captions), CAPTION_BLOCK):
            lengths, unk = vocabulary.lengths(found.captions[first : first + CAPTION_BLOCK])
            parts.append(lengths.numpy())
            unknown += int(unk.sum())
            bar.update(len(lengths))
    found.lengths = np.concatenate(parts) if parts else None
    if found.lengths is None:
        return
    cut = int((found.lengths > max_words).sum())
    if cut:
        found.remarks.append(
            f"{found.name}: {cut} captions are longer than --max_words {max_words} and will be "
            f"cut; the longest has {found.lengths.max()} WordPieces"
        )
    share = unknown / max(1, int(found.lengths.sum()) - 2 * len(found.lengths))
    if share > UNREADABLE:
        found.faults.append(
            f"{vocabulary.path}: {100 * share:.0f} % of the WordPieces of {found.name} are [UNK]; "
            "expected the vocabulary of the captions' language"
        )
