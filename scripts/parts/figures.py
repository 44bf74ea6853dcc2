"""figures.py — what drawings share: colours, the images of a data set, files written at once.

matplotlib is imported when a figure is made, so that `--help` answers at once.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import require
from common.files import check_writable, write_bytes
from common.layout import SplitName, check_named, ids_file, read_ids, read_names
from scripts.parts.fonts import set_fonts
from scripts.parts.images import find_images, read_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

# Okabe and Ito's colours, which colour-blind people can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SIDE = 320  # largest side of an image in a drawing, in pixels


def image_files(data: Path, split: SplitName, images: int, folder: Path) -> tuple[Path, ...]:
    """Return the file of each image of a split. Raises InputError if ids or names are missing."""
    path, names = ids_file(data, split), read_names(data)
    ids = read_ids(path, images)
    check_named(path, ids, names)
    files = find_images(folder, names)
    return tuple(files[key] for key in ids)


def thumbnail(path: Path) -> Image.Image:
    """Return an image, small. Raises InputError if it cannot be read."""
    image = read_image(path)
    image.thumbnail((SIDE, SIDE))
    return image


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of inches; no text is read as a formula, since captions may hold $."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False
    return Figure(figsize=(width, height), layout="constrained")


def check_figure(path: Path, inputs: Iterable[str | Path] = ()) -> None:
    """Raise InputError if `path` is no .png, cannot be written or is one of `inputs`."""
    require(path.suffix == ".png", f"--out {path}: expected a name that ends in .png")
    check_writable(path, inputs)


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    write_bytes(path, png_of(figure))


def png_of(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    set_fonts(figure)
    data = io.BytesIO()
    with warnings.catch_warnings():  # one for each missing letter; set_fonts has logged them
        warnings.filterwarnings("ignore", "Glyph |Matplotlib currently does not support")
        figure.savefig(data, format="png", dpi=120)
    return data.getvalue()
