"""images.py — find a user's images, and decode them to upright 8-bit RGB.

An image is a stranger's file: only decoders that run no code are used, and its size is checked
before its pixels are decoded.
"""

import io
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NoReturn

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.errors import InputError, require
from common.files import explain_os_errors, require_regular_file
from common.memory import is_oom

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # EPS would start Ghostscript
ENDINGS = (  # of files with these formats
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
MOST_PIXELS = 2**26  # 200 MB in memory; a camera's image has half of it
MOST_BYTES = 2**30  # of a file; four channels of 16 bits have half of it
SHORTEST_SIDE = 8  # pixels; smaller images show nothing
MOST_NARROW = 100  # ratio of the sides; a detector would shrink the shorter one to nothing
LEVELS_16_BIT = 257  # 65535 / 255


def find_images(folder: Path, names: Mapping[str, str]) -> dict[str, Path]:
    """Return the path of each id's image: in its subfolder if there is one, else in `folder`.

    Raises InputError if two images would be the same file because a subfolder is missing, or if two
    files have the name of an image, each in another Unicode form.
    """
    require(folder.is_dir(), f"{folder}: not found; expected the folder of the images")
    folders: dict[Path, dict[str, list[str]]] = {}
    paths = {}
    for name in names.values():
        paths[name] = _as_on_disk(folder / name, folder, folders)
        if not paths[name].parent.is_dir():
            paths[name] = _as_on_disk(folder / PurePosixPath(name).name, folder, folders)
    path, count = Counter(paths.values()).most_common(1)[0]
    problem = f"{folder}: {count} images would all be {path}; expected subfolders, as the names say"
    require(count == 1, problem)
    return {key: paths[name] for key, name in names.items()}


def _as_on_disk(path: Path, top: Path, folders: dict[Path, dict[str, list[str]]]) -> Path:
    """Return `path`, or the file or folder that has this name in another Unicode form.

    macOS writes é as e and an accent. `folders` keeps what is in a folder below `top`, by NFC form.
    """
    if path == top or str(path).isascii() or os.path.exists(path):
        return path
    folder = _as_on_disk(path.parent, top, folders)
    if folder not in folders:
        folders[folder] = {}
        for name in os.listdir(folder) if folder.is_dir() else ():
            folders[folder].setdefault(unicodedata.normalize("NFC", name), []).append(name)
    same = folders[folder].get(unicodedata.normalize("NFC", path.name), [path.name])
    problem = f"{path}: {len(same)} files have this name, in other Unicode forms; expected one"
    require(len(same) == 1, problem)
    return folder / same[0]


def list_images(folder: Path) -> list[str]:
    """Return the images in a folder and its subfolders, relative to it, sorted.

    They are known by their ending. Hidden files and folders are left out, and links to folders are
    not followed. Raises InputError if there is none, or a folder cannot be read.
    """

    def refuse(error: OSError) -> NoReturn:
        raise error

    require(folder.is_dir(), f"{folder}: not found; expected a folder of images")
    names = []
    with explain_os_errors(folder, "a folder of images"):
        for parent, folders, files in os.walk(folder, onerror=refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]
            names += [
                Path(parent, name).relative_to(folder).as_posix()
                for name in files
                if name.lower().endswith(ENDINGS) and not name.startswith(".")
            ]
    require(
        bool(names), f"{folder}: holds no image; expected files like a.jpg ({', '.join(ENDINGS)})"
    )
    return sorted(names)


def read_image(path: Path) -> Image.Image:
    """Return the image as it is meant to be seen: RGB, upright by its EXIF, on white, frame 1.

    Raises InputError that names the file if it is broken, cut off, too small or too large.
    """
    size = require_regular_file(path, "an image")
    require(size <= MOST_BYTES, f"{path}: {size} bytes; expected at most {MOST_BYTES}")
    # A decoder that reads from the file would allocate whatever size a part of the file claims.
    with explain_os_errors(path, "an image"):
        data = path.read_bytes()
    with _explained(path), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return _upright(image, path)


def make_upright(image: Image.Image, name: str) -> Image.Image:
    """Return an open image as `read_image` does; `name` is its name in messages."""
    with _explained(name):
        return _upright(image, name)


@contextmanager
def _explained(name: str | Path) -> Iterator[None]:
    """Turn a decoder's errors into an InputError that names the image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about defects that a decoder repairs
        try:
            yield
        except InputError:
            raise
        except Image.DecompressionBombError as error:  # Pillow's own limit is higher
            size = str(error).split(" exceeds")[0]
            raise InputError(f"{name}: {size}; expected at most {MOST_PIXELS} pixels") from error
        except Exception as error:  # decoders of damaged files raise errors of many types
            if is_oom(error):
                raise
            is_known = not isinstance(error, UnidentifiedImageError)  # which names no file
            reason = (str(error) or type(error).__name__).splitlines()[0]
            reason = reason if is_known else "cannot be identified"
            expected = f"expected a complete image ({', '.join(FORMATS)})"
            raise InputError(f"{name}: {reason}; {expected}") from error


def _upright(image: Image.Image, name: str | Path) -> Image.Image:
    _check_size(name, *image.size)
    return _rgb(ImageOps.exif_transpose(image))


def _check_size(name: str | Path, width: int, height: int) -> None:
    short, long = sorted((width, height))
    if width * height > MOST_PIXELS or short < SHORTEST_SIDE or long > MOST_NARROW * short:
        raise InputError(
            f"{name}: {width} x {height} pixels; expected at most {MOST_PIXELS}, and sides of at "
            f"least {SHORTEST_SIDE} that differ at most {MOST_NARROW} times"
        )


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose white is unknown")
    if image.mode.startswith("I"):  # Pillow would clip all levels above 255
        levels = np.asarray(image).astype(np.float64)
        is_16_bit = image.mode.startswith("I;16") or levels.max() > 255
        levels /= LEVELS_16_BIT if is_16_bit else 1
        image = Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        foreground = image.convert("RGBA")
        white = Image.new("RGBA", foreground.size, "white")
        return Image.alpha_composite(white, foreground).convert("RGB")
    return image.convert("RGB")
