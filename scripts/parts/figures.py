"""figures.py — what drawings have in common: colours, a data set's pictures, whole files."""

import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from common.files import write_bytes
from common.layout import SplitName, check_named, ids_file, read_ids, read_names
from scripts.parts.images import find_images, read_image

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SIDE = 320  # pixels of a picture that is shown, at most
matplotlib.rcParams["svg.hashsalt"] = "dime"  # the same curves give the same file


def picture_files(data: Path, split: SplitName, images: int, pictures: Path) -> tuple[Path, ...]:
    """The file of each image of a split that has so many, in the folder `pictures`.

    Raises InputError where ids and names in the data set's folder do not tell.
    """
    path, names = ids_file(data, split), read_names(data)
    ids = read_ids(path, images)
    check_named(path, ids, names)
    files = find_images(pictures, names)
    return tuple(files[key] for key in ids)


def shown(path: Path) -> Image.Image:
    """A picture, small. Raises InputError where it cannot be read."""
    picture = read_image(path)
    picture.thumbnail((SIDE, SIDE))
    return picture


def write_figure(picture: Figure, path: Path) -> None:
    """Write a picture in the format of its name, whole or not at all."""
    data = io.BytesIO()
    kind = path.suffix[1:]
    picture.savefig(data, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    write_bytes(path, data.getbuffer())
