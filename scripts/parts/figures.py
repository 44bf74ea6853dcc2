"""figures.py — what drawings share: colours, the images of a data set, files written at once.

matplotlib is imported when a figure is written, so that `--help` answers at once.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import write_bytes
from common.layout import SplitName, check_named, ids_file, read_ids, read_names
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


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    write_bytes(path, data.getbuffer())
