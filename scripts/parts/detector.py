"""detector.py — torchvision's Faster R-CNN as a backbone: the 36 best boxes of an image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.files import sha256_of
from scripts.parts.regions import REGIONS, Arrays, DecodedImage, load_weights

CLASSES = 91  # of torchvision's detectors
SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels that torchvision's detectors were trained with
SAME_BOX = 0.5  # of two boxes that overlap more, the less certain one comes after all others


class Detector:
    """Faster R-CNN (ResNet-50, FPN): the 36 best boxes and the features of its box head."""

    width = 1024
    resize: tuple[int, int] | None = None

    def __init__(self, weights: Path, device: torch.device) -> None:
        from torchvision.models.detection import FasterRCNN
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

        # Nothing is downloaded: neither the detector's weights nor its backbone's.
        backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None)
        model = FasterRCNN(backbone, CLASSES, min_size=SHORT_SIDE, max_size=LONG_SIDE)
        for module in model.modules():
            if hasattr(module, "running_var"):
                module.eps = 0.0  # as torchvision sets it for these weights
        self.model: Any = load_weights(model, weights).to(device)
        self.device = device
        self.about = {"model": "fasterrcnn", "weights": sha256_of(weights)}

    @torch.no_grad()
    def encode(self, items: Sequence[DecodedImage]) -> Arrays:
        """Return features and boxes, the most certain first."""
        from torchvision.models.detection.transform import resize_boxes

        images = [torch.from_numpy(pixels).permute(2, 0, 1) / 255 for pixels, _ in items]
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
