"""tsv.py — TSV files of region features as a source.

Bottom-up attention, its ports to PyTorch and LXMERT write them. No field says what type the numbers
have, and almost all bytes can be read as almost any type: the numbers themselves show it.
"""

import base64
import codecs
import hashlib
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from common.errors import InputError, require, summarise
from common.files import explain_os_errors, require_regular_file
from common.numbers import is_feature, is_whole
from scripts.parts.regions import Arrays

log = logging.getLogger(__name__)

LONGEST_ROW = 2**24  # bytes; 100 regions of 2048 float64 are 2 MB
FIXED = "the files of 36 or of 100 boxes an image that bottom-up attention offers"
FIELDS = {
    6: ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features"),
    10: (
        *("image_id", "image_h", "image_w", "objects_id", "objects_conf", "attrs_id"),
        *("attrs_conf", "num_boxes", "boxes", "features"),  # LXMERT
    ),
}
DType = Literal["float16", "float32", "float64"]
BOX_TYPES = {16: "<f4", 32: "<f8"}  # by the bytes of a box
URL_SAFE = bytes.maketrans(b"-_", b"+/")


@dataclass(frozen=True)
class Row:
    """A complete row, its numbers as float32."""

    image_id: str
    features: np.ndarray  # [boxes, width]
    boxes: np.ndarray  # [boxes, 4]


class OtherType(Exception):
    """The features are numbers of another type."""


class Tsv:
    """Rows of TSV files, in any order. The first complete row of an image counts.

    `image_ids` are the files' image_id by id. Raises InputError if no row is complete, or if rows
    differ in their number of boxes, or hold numbers of another type.
    """

    def __init__(
        self, paths: Sequence[Path], image_ids: Mapping[str, str], dtype: DType = "float32"
    ) -> None:
        self.image_ids = {key: one_form(image_id) for key, image_id in image_ids.items()}
        self.dtype = dtype
        self.rows: dict[str, tuple[Path, int, int]] = {}  # file, offset, bytes; by image_id
        self.shape: tuple[int, int] = (0, 0)  # the first complete row decides
        self.counts: set[int] = set()  # of boxes
        self.skipped: list[str] = []
        digest = hashlib.sha256()
        for path in paths:
            digest.update(f"{require_regular_file(path, 'a TSV file')} ".encode())
            self._index(path, digest)
        problem = f"{paths[0]}: none of {len(self.skipped)} rows is complete"
        require(bool(self.rows), f"{problem}: {summarise(self.skipped)}")
        here, there = next(iter(self.rows)), set(image_ids.values())
        problem = f"{paths[0]}: no row of these images: it has {here}, and not {min(there)}"
        require(not there.isdisjoint(self.rows), f"{problem}; expected a file called as --key says")
        if self.skipped:
            log.warning("%d rows are skipped: %s", len(self.skipped), summarise(self.skipped))
        problem = f"{paths[0]}: rows have {min(self.counts)} to {max(self.counts)} boxes"
        require(len(self.counts) == 1, f"{problem}; expected one number, as in {FIXED}")
        self.shapes = [self.shape, (self.shape[0], 4)]
        self.about = {"model": "tsv", "weights": digest.hexdigest(), "tsv_dtype": dtype}

    def _index(self, path: Path, digest: Any) -> None:
        """Note where the rows of a file are, and why others are skipped."""
        line = offset = 0
        with explain_os_errors(path, "a TSV file"), path.open("rb") as file:
            while content := file.readline(LONGEST_ROW):
                line += 1
                if len(content) == LONGEST_ROW:
                    raise InputError(f"{path}: line {line} has {LONGEST_ROW} bytes; expected a row")
                digest.update(hashlib.sha256(content).digest())
                try:
                    self._check(parse_row(content, self.dtype), (path, offset, len(content)))
                except OtherType as error:
                    raise InputError(f"{path}: line {line}: {error}") from error
                except ValueError as error:
                    self.skipped.append(f"{path}: line {line} ({error})")
                offset += len(content)

    def _check(self, row: Row, place: tuple[Path, int, int]) -> None:
        """Note the place of a complete row. Raises ValueError if it has to be skipped."""
        count, width = row.features.shape
        self.counts.add(count)
        known = self.shape[1] or width
        if width in (2 * known, known / 2):
            raise OtherType(f"its features are {width} wide, others {known}; expected one type")
        if width != known:
            raise ValueError(f"{width} wide, not {known}")
        if row.image_id in self.rows:
            raise ValueError(f"image_id {row.image_id} again")
        self.shape = self.shape if self.rows else (count, width)
        self.rows[row.image_id] = place

    def read(self, key: str) -> Row:
        """Return the row of an id. Raises InputError."""
        image_id = self.image_ids[key]
        require(image_id in self.rows, f"{image_id}: no complete row in the TSV files")
        path, offset, length = self.rows[image_id]
        with explain_os_errors(path, "a TSV file"), path.open("rb") as file:
            file.seek(offset)
            content = file.read(length)
        try:
            return parse_row(content, self.dtype)
        except (ValueError, OtherType) as error:
            raise InputError(f"{path}: image_id {image_id} is damaged: {error}") from error

    def encode(self, items: Sequence[Row]) -> Arrays:
        """Return features and boxes as the files have them, float32."""
        return np.stack([row.features for row in items]), np.stack([row.boxes for row in items])


# One row


def parse_row(line: bytes, dtype: DType = "float32") -> Row:
    """Parse a row whose features have this type.

    Raises ValueError if the row is damaged, and OtherType, which names the type they have.
    """
    fields = line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n").split(b"\t")
    if len(fields) not in FIELDS:
        raise ValueError(f"{len(fields)} fields, not 6 or 10")
    row = dict(zip(FIELDS[len(fields)], fields, strict=True))
    image_id, count = one_form(row["image_id"].decode()), int(row["num_boxes"])
    if not image_id or count < 1:
        raise ValueError(f"image_id {image_id!r} with {count} boxes")
    coded = decode(row["boxes"])
    if len(coded) not in [count * size for size in BOX_TYPES]:
        raise ValueError(f"{len(coded)} bytes of {count} boxes, not 16 or 32 a box")
    boxes = np.frombuffer(coded, BOX_TYPES[len(coded) // count]).reshape(count, 4)
    if not is_feature(boxes):
        raise ValueError("its boxes hold numbers that are no pixels")
    features = _read(decode(row["features"]), count, dtype)
    return Row(image_id, features.astype(np.float32), boxes.astype(np.float32))


def one_form(image_id: str) -> str:
    """Return an image_id in one Unicode form (macOS writes é as e and an accent)."""
    return unicodedata.normalize("NFC", image_id.strip())


def decode(field: bytes) -> bytes:
    """Return the bytes of a base64 field, which may be the text b'...' of Python 3."""
    field = field.strip()
    if field[:2] in (b"b'", b'b"'):
        field = field[2:-1].replace(b"\\n", b"")  # base64.encodebytes writes lines
    return base64.b64decode(field.translate(URL_SAFE), validate=True)


def _read(data: bytes, count: int, dtype: DType) -> np.ndarray:
    """Return features `[count, width]`. Raises ValueError or OtherType."""
    readings = {}
    for name in get_args(DType):  # from narrow to wide
        size = np.dtype(name).itemsize
        if data and len(data) % (count * size) == 0:
            values = np.frombuffer(data, np.dtype(name).newbyteorder("<")).reshape(count, -1)
            if is_feature(values):
                readings[name] = values
    actual = next((name for name, values in readings.items() if is_whole(values)), dtype)
    if actual != dtype:
        raise OtherType(f"its features are not {dtype}; expected --tsv_dtype {actual}")
    if dtype in readings:
        return readings[dtype]
    others = ", ".join(readings) or "no other type"
    raise ValueError(f"{len(data)} bytes of {count} features are not {dtype}, but {others}")
