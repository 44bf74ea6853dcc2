"""tsv_row.py — one row of a TSV file of region features: its fields, and the types of its numbers.

Bottom-up attention, its ports to PyTorch and LXMERT write such rows. No field says what type the
numbers have, and almost all bytes can be read as almost any type. Without a choice they are read as
float32, unless they look like another type.
"""

import base64
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from common.numbers import is_feature, look_like

FIELDS = {
    6: ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features"),
    10: (
        *("image_id", "image_h", "image_w", "objects_id", "objects_conf", "attrs_id"),
        *("attrs_conf", "num_boxes", "boxes", "features"),  # LXMERT
    ),
}
DType = Literal["float16", "float32", "float64"]
BOX_TYPES = {16: "<f4", 32: "<f8"}  # by the bytes of a box


@dataclass(frozen=True)
class Row:
    """A complete row, its numbers as float32."""

    image_id: str
    features: np.ndarray  # [boxes, width]
    boxes: np.ndarray  # [boxes, 4]


class OtherType(Exception):
    """The features look like numbers of another type."""


def parse_row(line: bytes, dtype: DType | None = None) -> Row:
    """Parse a row whose features have this type; None is float32 if they do not look otherwise.

    Raises ValueError if the row is damaged, and OtherType, which names the likely types.
    """
    fields = line.rstrip(b"\r\n").split(b"\t")
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
        field = field[2:-1]
    return base64.b64decode(field, validate=True)


def _read(data: bytes, count: int, dtype: DType | None) -> np.ndarray:
    """Return features `[count, width]`. Raises ValueError or OtherType."""
    wanted = dtype or "float32"
    readings = {}
    for name in get_args(DType):
        size = np.dtype(name).itemsize
        if data and len(data) % (count * size) == 0:
            values = np.frombuffer(data, np.dtype(name).newbyteorder("<")).reshape(count, -1)
            if is_feature(values):
                readings[name] = values
    likely = readings.keys() & look_like(data, count)
    is_right = wanted in (likely or readings)
    if is_right and (dtype or len(likely) < 2):
        return readings[wanted]
    if likely:
        options = " or ".join(f"--tsv_dtype {name}" for name in sorted(likely))
        raise OtherType(f"its features do not look like {wanted}; expected {options}")
    others = ", ".join(sorted(readings)) or "no other type"
    raise ValueError(f"{len(data)} bytes of {count} features are not {wanted}, but {others}")
