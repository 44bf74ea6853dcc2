"""layout.py — a data set's folder as SCAN laid it out: names, readers and faults (SPEC §10).

    {split}_ims.npy     region features (rows, regions, width), a row an image or a caption
    {split}_caps.txt    captions, one a line, five an image in the images' order
    {split}_ids.txt     ids, one a line, an image's or (five times) a caption's; need not be there
    id_mapping.json     the file of each id's picture; need not be there

What can be wrong with a file is told by functions that end in `_faults`: each gives all that it
finds, one sentence a fault, for scripts/check_data.py; readers refuse the first.
"""

import hashlib
import mmap
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from common.errors import brief_repr, raise_first, require, summarise
from common.files import map_array, read_json, read_text

SplitName = Literal["train", "dev", "test", "testall"]

CAPTIONS_PER_IMAGE = 5
LONGEST_CAPTION = 10_000  # characters; a longer one is no caption, and takes long to tokenise


def split_files(folder: str | Path, name: SplitName) -> tuple[Path, Path]:
    """The files of a split: features and captions."""
    return Path(folder) / f"{name}_ims.npy", Path(folder) / f"{name}_caps.txt"


def ids_file(folder: str | Path, name: SplitName) -> Path:
    """The file of a split's ids."""
    return Path(folder) / f"{name}_ids.txt"


def boxes_file(folder: str | Path, name: SplitName) -> Path:
    """The file of the regions' boxes, where they are known."""
    return Path(folder) / f"{name}_boxes.npy"


def extraction_file(folder: str | Path, name: SplitName) -> Path:
    """The file that says how far extract_regions.py came, and of which pictures."""
    return Path(folder) / f"{name}_regions.json"


def names_file(folder: str | Path) -> Path:
    """The file that names the picture of each id, of all splits."""
    return Path(folder) / "id_mapping.json"


def files_of(folder: str | Path, name: SplitName) -> list[Path]:
    """Every file that a split may have, and that no result may take the place of."""
    of_regions = [file(folder, name) for file in (ids_file, boxes_file, extraction_file)]
    return [*split_files(folder, name), *of_regions, names_file(folder)]


def read_captions(path: Path, allow_empty: bool = True) -> tuple[str, ...]:
    """Captions of a UTF-8 file, one a line. Raises InputError where one of them is none."""
    captions = read_lines(path, "captions, one a line")
    raise_first(caption_problems(path, captions, allow_empty))
    return captions


def read_lines(path: Path, wanted: str) -> tuple[str, ...]:
    """Lines of a UTF-8 file, stripped. Only a line feed ends a line (§10).

    Raises InputError where there is none.
    """
    text = read_text(path, wanted)
    require(len(text) > 0, f"{path}: is empty; expected {wanted}")
    return tuple(line.strip() for line in text.removesuffix("\n").split("\n"))


def caption_problems(path: Path, captions: Sequence[str], allow_empty: bool) -> Iterator[str]:
    """Captions that are none: too long, or empty."""
    long = [c for c, caption in enumerate(captions) if len(caption) > LONGEST_CAPTION]
    if long:
        yield (
            f"{path}: line {_lines(long)} has {len(captions[long[0]])} characters; expected a "
            f"caption, of {LONGEST_CAPTION} characters at most"
        )
    empty = [] if allow_empty else [c for c, caption in enumerate(captions) if not caption]
    if empty:
        yield f"{path}: line {_lines(empty)} is empty; expected a caption"


def _lines(places: Sequence[int]) -> str:
    return summarise([str(place + 1) for place in places])


def count_images(path: Path, captions: Sequence[str]) -> int:
    """Images that the captions of file `path` are of. Raises InputError unless five an image."""
    whole = len(captions) % CAPTIONS_PER_IMAGE == 0
    require(whole, f"{path}: {len(captions)} captions; expected five an image")
    return len(captions) // CAPTIONS_PER_IMAGE


def read_ids(path: Path, images: int) -> tuple[str, ...]:
    """The id of each image, from a file with a line an image or a caption. Raises InputError."""
    ids = read_lines(path, "ids, one a line")
    raise_first(id_problems(path, ids, images))
    return one_an_image(ids, images)


def one_an_image(ids: tuple[str, ...], images: int) -> tuple[str, ...]:
    """Ids of images, where each may be there once a caption."""
    return ids if len(ids) == images else ids[::CAPTIONS_PER_IMAGE]


def id_problems(path: Path, ids: tuple[str, ...], images: int) -> Iterator[str]:
    """Ids that do not tell the images apart."""
    if len(ids) not in (images, images * CAPTIONS_PER_IMAGE):
        yield (
            f"{path}: {len(ids)} ids for {images} images; expected one an image, or one a caption"
        )
        return
    if "" in ids:
        yield f"{path}: line {ids.index('') + 1} is empty; expected an id"
    for number, found in enumerate(ids if len(ids) > images else ()):
        first = ids[number - number % CAPTIONS_PER_IMAGE]
        if found != first:
            yield (
                f"{path}: line {number + 1} is {brief_repr(found)}; expected {brief_repr(first)} "
                "as in the lines of that image before it"
            )
            break
    twice = [i for i, n in Counter(one_an_image(ids, images)).items() if n > 1]
    if twice:
        yield f"{path}: {summarise(twice)} is there twice; expected an image once"


def read_names(folder: Path) -> dict[str, str]:
    """The picture's file of each id, a name inside the pictures' folder. Raises InputError."""
    path = names_file(folder)
    names = read_json(path, "the file name of each id")
    raise_first(name_problems(path, names))
    return names


def name_problems(path: Path, names: Mapping[str, Any]) -> Iterator[str]:
    """Ids whose file is none in the pictures' folder."""
    for key, name in names.items():
        if not stays_inside(name):
            yield f"{path}: {key} is {brief_repr(name)}; expected a file in the pictures' folder"


def nameless_problems(path: Path, names: Container[str], ids: Sequence[str]) -> Iterator[str]:
    """Ids of the file `path` that have no name."""
    absent = [key for key in ids if key not in names]
    if absent:
        yield f"{names_file(path.parent)}: lacks {summarise(absent)} of {path.name}"


def pictures_digest(ids: Sequence[str], names: Mapping[str, str]) -> str:
    """SHA-256 of which pictures a split's rows are of, and in which order."""
    lines = [f"{key} {names[key]}" for key in ids]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def stays_inside(name: Any) -> bool:
    """Whether a name is one of a file in a folder or its subfolders: a stranger's may lead out."""
    if not isinstance(name, str) or not name.isprintable() or "\\" in name:
        return False
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def map_features(path: Path) -> np.memmap:
    """Region features `(rows, regions, img_dim)` by memory map. Raises InputError."""
    features = map_array(path, "region features, a .npy file")
    raise_first(kind_problems(path, features))
    return features


def kind_problems(path: Path, features: np.ndarray) -> Iterator[str]:
    """An array that is none of region features."""
    if features.ndim != 3 or features.size == 0:
        yield f"{path}: shape {features.shape}; expected (rows, regions, img_dim)"
    if features.dtype.kind != "f" or features.dtype.itemsize not in (2, 4):
        yield f"{path}: {features.dtype} features; expected float32 or float16"


def width_problems(path: Path, features: np.ndarray, img_dim: int | None) -> Iterator[str]:
    """Features of another width than the model's; any will do where `img_dim` is None."""
    width = features.shape[2]
    if img_dim not in (None, width):
        yield f"{path}: features are {width} wide; expected {img_dim}, the model's --img_dim"


def count_problems(path: Path, rows: int, captions: int) -> Iterator[str]:
    """Features and captions that do not fit each other."""
    if captions % CAPTIONS_PER_IMAGE or not rows_per_image(rows, captions):
        yield (
            f"{path}: {rows} rows for {captions} captions; expected five captions an image, "
            "and a row for each image or one for each caption"
        )


def rows_per_image(rows: int, captions: int) -> int:
    """5 where each image's row is repeated for its captions, 1 where it is not, else 0."""
    fits = {captions: CAPTIONS_PER_IMAGE, captions // CAPTIONS_PER_IMAGE: 1}
    return fits.get(rows, 0)


def read_rows(features: np.memmap, rows: np.ndarray) -> np.ndarray:
    """Some rows of mapped features, `[rows, L, img_dim]` float32, in memory of their own."""
    found = np.ascontiguousarray(features[rows], dtype=np.float32)
    # What was read of a map counts as this process's memory until it is given back.
    if hasattr(mmap, "MADV_DONTNEED") and isinstance(features.base, mmap.mmap):
        features.base.madvise(mmap.MADV_DONTNEED)
    return found


def finite_rows(features: np.ndarray) -> np.ndarray:
    """Which rows `[rows]` of features `[rows, L, img_dim]` hold nothing but numbers."""
    return np.isfinite(features).all((1, 2))


def number_problems(path: Path, bad: Sequence[int] | np.ndarray) -> Iterator[str]:
    """Rows whose features are no numbers."""
    if len(bad):
        yield f"{path}: row {summarise([str(row) for row in bad])} holds NaN or infinite features"
