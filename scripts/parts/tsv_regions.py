"""tsv_regions.py — region features from the TSV files that bottom-up attention writes.

A source of scripts/extract_regions.py, as those of regions.py that look at pictures.
"""

import base64
import binascii
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from common.errors import InputError, require, summarise
from common.files import explain_os_errors, require_regular_file
from scripts.parts.regions import REGIONS

log = logging.getLogger(__name__)

FIELDS = 6  # image_id image_w image_h num_boxes boxes features
LONGEST_ROW = 2**24  # bytes; 36 regions of 2048 numbers are 400 KB


@dataclass(frozen=True)
class Row:
    """A row of a TSV file."""

    features: np.ndarray  # [36, width] float32
    boxes: np.ndarray  # [36, 4] float32


@dataclass(frozen=True)
class TrainState:
    """Where a TSV file has the row of an id."""

    path: Path
    line: int
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.path}: line {self.line}"


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of bottom-up attention's TSV files by their places."""

    places: dict[str, TrainState]  # by image_id
    width: int

    def __call__(self, key: str) -> Row:
        """The row of an image_id. Raises InputError where there is none, or a damaged one."""
        place = self.places.get(key)
        require(place is not None, f"{key}: has no whole row in the TSV files")
        with explain_os_errors(place.path, "a TSV file"), place.path.open("rb") as file:
            file.seek(place.offset)
            fields = file.read(place.length).split(b"\t")
        try:
            boxes, features = (_numbers(field) for field in fields[4:])
            row = Row(features.reshape(REGIONS, self.width), boxes.reshape(REGIONS, 4))
        except (ValueError, binascii.Error) as error:
            message = f"{place}, image_id {key}: is damaged: {error}"
            raise InputError(message) from error
        return row


def _numbers(field: bytes) -> np.ndarray:
    """Float32 numbers in base64. Raises ValueError where they are none."""
    numbers = np.frombuffer(base64.b64decode(field.strip(), validate=True), dtype="<f4")
    if not np.isfinite(numbers).all():
        raise ValueError("holds NaN or infinite numbers")
    return numbers


class Tsv:
    """Rows of bottom-up attention's TSV files, in any order; of an id the first whole line counts.

    `by_name`: their image_id is the name of the picture's file without its ending, not its id.
    """

    def __init__(self, paths: Sequence[Path], by_name: bool) -> None:
        rows: list[tuple[str, int, TrainState]] = []  # image_id, width of its features, place
        damaged: list[str] = []
        digest = hashlib.sha256()
        for path in paths:
            digest.update(f"{require_regular_file(path, 'a TSV file')} ".encode())
            for place, line in rows_of(path):
                digest.update(hashlib.sha256(line).digest())
                try:
                    rows.append((*_head(line), place))
                except ValueError as error:
                    damaged.append(f"{place} ({error})")
        widths = Counter(width for _, width, _ in rows)
        self.width = widths.most_common(1)[0][0] if rows else 0
        damaged += [f"{p} ({w} wide, not {self.width})" for _, w, p in rows if w != self.width]
        _warn("damaged and left out", damaged)
        require(bool(rows), f"{paths[0]}: no row of bottom-up attention's six fields")
        places: dict[str, TrainState] = {}
        repeated: list[str] = []
        for key, width, place in rows:
            if width == self.width:
                repeated += [f"{place} (image_id {key})"] * (key in places)
                places.setdefault(key, place)
        _warn("repeated, the first counts", repeated)
        self.by_name, self.reader = by_name, RowReader(places, self.width)
        self.about = {"model": "tsv", "weights": digest.hexdigest(), "by_name": str(by_name)}

    def find(self, names: Mapping[str, str]) -> dict[str, str]:
        """The image_id of each. Raises InputError where two pictures have the same."""
        if not self.by_name:
            return {key: key for key in names}
        found = {key: PurePosixPath(name).stem for key, name in names.items()}
        stem, times = Counter(found.values()).most_common(1)[0]
        require(
            times == 1, f"--tsv_key name: {stem} is {times} pictures' name; expected --tsv_key id"
        )
        return found

    def encode(self, items: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Features and boxes as the file has them."""
        return np.stack([row.features for row in items]), np.stack([row.boxes for row in items])


def _warn(what: str, rows: list[str]) -> None:
    if rows:
        log.warning("%d rows are %s: %s", len(rows), what, summarise(rows))


def rows_of(path: Path) -> Iterator[tuple[TrainState, bytes]]:
    """Place and content of each line of a file. Raises InputError where a line is no row."""
    with explain_os_errors(path, "a TSV file"), path.open("rb") as file:
        line, offset = 1, 0
        while content := file.readline(LONGEST_ROW):
            require(
                len(content) < LONGEST_ROW,
                f"{path}: line {line} has {LONGEST_ROW} bytes or more; expected a row",
            )
            yield TrainState(path, line, offset, len(content)), content
            line, offset = line + 1, offset + len(content)


def _head(line: bytes) -> tuple[str, int]:
    """The id of a row and the width of its features. Raises ValueError where it is damaged."""
    fields = line.rstrip(b"\r\n").split(b"\t")
    if len(fields) != FIELDS:
        raise ValueError(f"{len(fields)} fields, not {FIELDS}")
    key, count = fields[0].decode().strip(), int(fields[3])
    if not key:
        raise ValueError("no image_id")
    if count != REGIONS:
        raise ValueError(f"{count} boxes, not {REGIONS}")
    sizes = [len(field) // 4 * 3 - field[-2:].count(b"=") for field in fields[4:]]
    found, rest = divmod(sizes[1], 4 * REGIONS)
    if sizes[0] != 16 * REGIONS or rest or not found:
        raise ValueError(f"{sizes[0]} and {sizes[1]} bytes of boxes and features")
    return key, found
