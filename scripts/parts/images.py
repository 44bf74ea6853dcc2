"""pictures.py — a user's picture, from a file of any kind to upright RGB of eight bits.

Kept apart from regions.py because a picture is a stranger's file: only decoders that run nothing
are asked, and its size is looked at before its pixels are.
"""

import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.errors import InputError, require, summarise
from common.files import explain_os_errors, require_regular_file
from common.memory import is_oom

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # EPS would start Ghostscript
MOST_PIXELS = 2**26  # 200 MB in memory; a camera's picture has half of it
MOST_BYTES = 2**30  # of a file; four colours of 16 bits a pixel have half of it
SMALLEST = 8  # pixels of the shorter side: nothing can be told apart in less
NARROWEST = 100  # times that a side may be longer: a detector would shrink the other to nothing
SIXTEEN_BITS = 257  # 65535 / 255


def find_pictures(folder: Path, names: Mapping[str, str]) -> dict[str, Path]:
    """Where the pictures of these names are: in their subfolders, or all in `folder` itself.

    Raises InputError where there is no such subfolder, and names are the same without it.
    """
    require(os.path.isdir(folder), f"{folder}: not found; expected the folder of the pictures")
    paths = {key: PurePosixPath(name) for key, name in names.items()}
    absent = {p for p in {path.parent for path in paths.values()} if not os.path.isdir(folder / p)}
    found: dict[PurePosixPath, PurePosixPath] = {}
    for path in paths.values():
        place = PurePosixPath(path.name) if path.parent in absent else path
        other = found.setdefault(place, path)
        message = (
            f"{folder}: has no folder {summarise(sorted(map(str, absent)))}, without which {other}"
        )
        require(other == path, f"{message} and {path} would be the same picture")
    return {
        key: folder / (path.name if path.parent in absent else path) for key, path in paths.items()
    }


def read_picture(path: Path) -> Image.Image:
    """The picture as it is meant to be seen: RGB, turned as its EXIF says, on white, first frame.

    Raises InputError that names the file where it is broken, cut off, too small or too large.
    """
    size = require_regular_file(path, "a picture")
    require(size <= MOST_BYTES, f"{path}: {size} bytes; expected {MOST_BYTES} at most")
    # a decoder that reads the file would take the memory that a part of it claims
    with explain_os_errors(path, "a picture"):
        data = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a decoder puts right
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                _check_size(path, *picture.size)
                return _rgb(ImageOps.exif_transpose(picture))
        except InputError:
            raise
        except UnidentifiedImageError as error:
            raise InputError(f"{path}: no whole picture of {', '.join(FORMATS)}") from error
        except Exception as error:  # a decoder of a damaged file can fail in any way
            if is_oom(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: no whole picture: {reason}") from error


def _check_size(path: Path, width: int, height: int) -> None:
    found = f"{path}: {width} x {height} pixels"
    least, most = sorted((width, height))
    require(width * height <= MOST_PIXELS, f"{found}; expected {MOST_PIXELS} at most")
    require(least >= SMALLEST, f"{found}; expected sides of {SMALLEST} at least")
    require(
        most <= NARROWEST * least, f"{found}; expected sides that differ {NARROWEST} times at most"
    )


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("its pixels are floats, whose white is unknown")
    if picture.mode.startswith("I"):  # Pillow would cut everything above 255 off
        levels = np.asarray(picture).astype(np.float64)
        deep = picture.mode.startswith("I;16") or levels.max() > 255
        levels /= SIXTEEN_BITS if deep else 1
        picture = Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        seen = picture.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        return Image.alpha_composite(white, seen).convert("RGB")
    return picture.convert("RGB")
