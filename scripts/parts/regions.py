"""regions.py — what sources of region features have in common, and images as a source.

A source reads one image at a time, in worker processes, and encodes some of them at once. Sources
are image files with a backbone (lite2.py, detector.py, vision_model.py), TSV files (tsv.py) and
files of arrays (array_files.py).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.errors import InputError, require
from common.workers import load
from scripts.parts.images import read_image

log = logging.getLogger(__name__)

GRID = 6  # cells of a side
REGIONS = GRID**2  # of a backbone; files may have another number
BACKBONES = ("efficientnet_lite2", "fasterrcnn", "hf")

Arrays = tuple[np.ndarray, ...]  # features [images, regions, width], boxes [images, regions, 4]
DecodedImage = tuple[np.ndarray, tuple[int, int]]  # pixels [height, width, 3]; width and height


class Source(Protocol):
    """Features and, if `shapes` has two entries, boxes: x1 y1 x2 y2 in pixels of the upright image.

    `about` is what they depend on, as JSON has it. `shapes` are those of one image's arrays.
    """

    about: dict[str, Any]
    shapes: list[tuple[int, int]]  # (regions, width), (regions, 4)

    def read(self, key: str) -> Any:
        """Return what `encode` takes of the image with id `key`. Raises InputError."""

    def encode(self, items: Sequence[Any]) -> Arrays:
        """Return features, and boxes if there are any, of some images. Raises InputError."""


class Backbone(Protocol):
    """A frozen model that turns images into REGIONS features of `width` numbers, and boxes."""

    about: dict[str, Any]  # model, weights, processor
    width: int
    resize: tuple[int, int] | None  # side of its input and Pillow's filter; None: any size

    def encode(self, items: Sequence[DecodedImage]) -> Arrays:
        """Return features `[images, 36, width]` and boxes `[images, 36, 4]`, float32."""


class ImageFiles:
    """Image files by id, encoded by a backbone."""

    def __init__(self, files: Mapping[str, Path], backbone: Backbone) -> None:
        self.read = partial(decode, files, backbone.resize)
        self.encode, self.about = backbone.encode, backbone.about
        self.shapes = [(REGIONS, backbone.width), (REGIONS, 4)]


def decode(files: Mapping[str, Path], resize: tuple[int, int] | None, key: str) -> DecodedImage:
    """Return the pixels of the image with id `key`, resized both ways, and its own size."""
    return to_pixels(read_image(files[key]), resize)


def to_pixels(image: Image.Image, resize: tuple[int, int] | None) -> DecodedImage:
    """Return the pixels of an upright image, resized both ways, and its own size."""
    size = image.size
    if resize:
        image = image.resize((resize[0], resize[0]), Image.Resampling(resize[1]))
    return np.array(image), size  # a copy: torch warns of arrays that it may not write to


@dataclass(frozen=True)
class Batches(Dataset):
    """`self[ids]` is what `read` returns, or raises as InputError, for each of these ids."""

    read: Callable[[str], Any]

    def __getitem__(self, ids: Sequence[str]) -> list[Any]:
        items: list[Any] = []
        for key in ids:
            try:
                items.append(self.read(key))
            except InputError as error:
                items.append(error)
        return items


# What backbones share


def pool_cells(maps: Tensor) -> np.ndarray:
    """Pool maps `[images, width, height, width]` to the features of 6 x 6 cells, row by row."""
    cells = F.adaptive_avg_pool2d(maps, GRID)  # [images, width, 6, 6]
    return cells.flatten(2).transpose(1, 2).cpu().numpy()  # [images, 36, width]


def grid_boxes(width: int, height: int) -> np.ndarray:
    """Return the boxes of an image's 6 x 6 cells in pixels, `[36, 4]` float32, row by row."""
    y, x = np.divmod(np.arange(REGIONS), GRID)
    boxes = np.stack([x, y, x + 1, y + 1], 1) / GRID
    return (boxes * [width, height, width, height]).astype(np.float32)


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load a file of torch or safetensors into a frozen model. Raises InputError unless it fits."""
    from checkpoint.weights import check_finite
    from common.torch_files import read_safetensors, read_torch

    arrays = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    require(isinstance(arrays, dict), f"{path}: expected arrays by name")
    try:
        model.load_state_dict(arrays)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not the weights of this model: {str(error)[:300]}") from error
    check_finite(model.state_dict(), path)
    return model.eval().requires_grad_(False)


def open_backbone(model: str, weights: Path, device: torch.device) -> Backbone:
    """Open the backbone `--model` with its file or folder of weights. Raises InputError."""
    # Each of them imports packages that take seconds.
    if model == "fasterrcnn":
        from scripts.parts.detector import Detector

        return Detector(weights, device)
    if model == "hf":
        from scripts.parts.vision_model import VisionModel

        return VisionModel(weights, device)
    from scripts.parts.lite2 import Lite2

    return Lite2(device)


def require_backbone(about: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return what made features, as `source` says. Raises InputError unless it is a backbone."""
    has_backbone = about["model"] in BACKBONES
    problem = f"{source}: names no backbone, so that no other image can be encoded"
    require(has_backbone, f"{problem}; expected features of {', '.join(BACKBONES)}")
    return about


def reopen_backbone(
    about: Mapping[str, Any], weights: Path, device: torch.device, source: Path
) -> Backbone:
    """Open the backbone that `about` describes, to encode new images in the same way.

    `source` is the file that describes it. Raises InputError if it is another backbone today.
    """
    backbone = open_backbone(about["model"], weights, device)
    check_same_backbone(backbone, about, source)
    return backbone


def check_same_backbone(backbone: Backbone, about: Mapping[str, Any], source: Path) -> None:
    """Raise InputError if `backbone` is not the one that `source` describes, `about`."""
    changed = [name for name, value in backbone.about.items() if about.get(name) != value]
    problem = f"backbone {backbone.about['model']}: another {', '.join(changed)}"
    require(not changed, f"{problem} than in {source}, which names {about['model']}")


def read_batches(
    source: Source, keys: Sequence[str], done: int, size: int, workers: int, skip_broken: bool
) -> Iterator[tuple[int, list[Any], list[int]]]:
    """Read the images from number `done` on, `size` at a time.

    Yields of each batch the number of images, those that `encode` takes, and the numbers of those
    that cannot be read. Raises InputError at the first of them unless `skip_broken`.
    """
    batches = [keys[row : row + size] for row in range(done, len(keys), size)]
    loaded = load(Batches(source.read), batches, workers)
    for first, items in zip(range(done, len(keys), size), loaded, strict=True):
        left_out = []
        for row, item in enumerate(items, first):
            if isinstance(item, InputError):
                require(skip_broken, f"{item} (--skip_broken leaves it out)")
                log.warning("left out: %s: %s", keys[row], item)
                left_out.append(row)
        whole = [item for item in items if not isinstance(item, InputError)]
        yield len(items), whole, left_out
