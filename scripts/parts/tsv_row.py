"""tsv_row.py — one row of a TSV file of region features: its fields, and the types of its numbers.

Bottom-up attention, its ports to PyTorch and LXMERT write such rows. No field says what type the
numbers have, and almost all bytes can be read as almost any type: the numbers themselves show it.
"""

import base64
import codecs
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from common.numbers import is_feature, is_whole

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


def parse_row(line: bytes, dtype: DType = "float32") -> Row:
    """Parse a row whose features have this type.

    Raises ValueError if the row is damaged, and OtherType, which names the type they have.
    """
    fields = line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n").split(b"\t")
    if len(fields) not in FIELDS:
        raise ValueError(f"{len(fields)} fields, not 6 or 10")
    row = dict(zip(FIELDS[len(fields)], fields, strict=True))
    image_id, count = row["image_id"].decode().strip(), int(row["num_boxes"])
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
