"""vision_model.py — a local vision model of transformers as a backbone, pooled to 6 x 6 cells.

ViT, DINOv2, the vision towers of CLIP and SigLIP, Swin, ConvNeXt and others whose output is a map
or the tokens of patches. Nothing is downloaded, and no code of the folder runs.
"""

import json
from collections.abc import Sequence
from math import isqrt, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from checkpoint.weights import check_finite
from common.errors import InputError, require, summarise
from common.files import read_json, sha256_of
from common.memory import is_oom
from common.torch_files import read_torch
from scripts.parts.regions import GRID, Arrays, DecodedImage, grid_boxes, pool_cells

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
UNUSED = ("pooler", "head.")  # what only makes a vector of the whole image
NUMBERS = (  # of an image processor, all that features depend on
    *("size", "do_center_crop", "crop_size", "resample"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
LARGEST_SIDE = 5000  # pixels of a model's input
BILINEAR = 2  # as Pillow and image processors call it
TOWER = "vision_model."  # CLIP and SigLIP have a tower of text beside it


class VisionModel:
    """The model of a folder that `save_pretrained` wrote, with its image processor.

    Raises InputError if the folder holds none, or a weight is missing or of another shape.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        read_json(folder / "config.json", "a vision model, saved by transformers")
        self.folder, self.device = folder, device
        try:
            self.model, self.processor, problems = load(folder)
            require(not problems, f"{folder}: missing or misshapen weights: {summarise(problems)}")
            check_finite(self.model.state_dict(), folder)
            self.model.to(device)
            numbers = {name: self.processor.to_dict().get(name) for name in NUMBERS}
            numbers = json.loads(json.dumps(numbers))  # as the record will hold them
            resample = BILINEAR if numbers["resample"] is None else numbers["resample"]
            side = self._input_side(numbers)
            self.resize: tuple[int, int] | None = (side, int(Image.Resampling(resample)))
            blank = np.zeros((side, side, 3), np.uint8)
            self.width = self.encode([(blank, (GRID, GRID))])[0].shape[2]
        except InputError:
            raise
        except Exception as error:  # transformers raises errors of many types
            if is_oom(error):
                raise
            reason = [*str(error).strip().splitlines(), type(error).__name__][0]
            problem = f"{folder}: not a vision model with its image processor"
            raise InputError(f"{problem}: {reason}") from error
        self.about = {
            "model": "hf",
            "architecture": self.model.config.model_type,
            "weights": {path.name: sha256_of(path) for path in weight_files(folder)},
            "processor": numbers,
        }

    def _input_side(self, numbers: dict[str, Any]) -> int:
        """Return the side of the model's input in pixels."""
        size = numbers.get("crop_size" if numbers.get("do_center_crop") else "size") or {}
        sides: list[Any] = [
            size.get(name) or size.get("shortest_edge") for name in ("height", "width")
        ]
        is_square = type(sides[0]) is int and 0 < sides[0] == sides[1] < LARGEST_SIDE
        require(is_square, f"{self.folder}: images of {size}; expected one size, a square")
        return sides[0]

    @torch.no_grad()
    def encode(self, items: Sequence[DecodedImage]) -> Arrays:
        """Return features and boxes of the cells, row by row from the top."""
        # The whole image was resized to the model's input: if the processor cropped its centre, the
        # cells would be parts of the centre, and the boxes wrong.
        pixels = self.processor(
            images=[pixels for pixels, _ in items],
            do_resize=False,
            do_center_crop=False,
            input_data_format="channels_last",
            return_tensors="pt",
        )["pixel_values"]
        maps = self.model(pixel_values=pixels.to(self.device)).last_hidden_state
        if maps.ndim == 3:
            rows, columns = self._grid(maps.shape[1], pixels.shape[-1])
            maps = maps[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
        problem = f"{self.folder}: a map of {list(maps.shape[2:])} cells"
        is_map = maps.ndim == 4 and min(maps.shape[2:]) >= GRID
        require(is_map, f"{problem}; expected {GRID} or more a side")
        return pool_cells(maps), np.stack([grid_boxes(*size) for _, size in items])

    def _grid(self, tokens: int, side: int) -> list[int]:
        """Return rows and columns of the map whose cells are the last of an image's `tokens`.

        A token belongs to each patch, row by row, after those of the class, of distillation and of
        registers. Swin has merged patches and has no other tokens. A model whose sizes of patches
        are unknown may have a token of the class.
        """
        config = self.model.config
        patch = getattr(config, "patch_size", None)
        grid = [side // size for size in ([patch] * 2 if isinstance(patch, int) else patch or [])]
        others = 2 + getattr(config, "num_register_tokens", 0)
        if not grid or prod(grid) > tokens:
            grid, others = [isqrt(tokens)] * 2, 0 if grid else 1
        problem = f"{self.folder}: {tokens} tokens of no square map"
        require(len(grid) == 2 and tokens - prod(grid) <= others, problem)
        return grid


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights, safetensors if there are any, and of sizes."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return [folder / "config.json", *weights]


def load(folder: Path) -> tuple[Any, Any, list[str]]:
    """Return the frozen vision model, its processor, and the weights that are missing or misfit."""
    from transformers import AutoImageProcessor, AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    files = [path for path in weight_files(folder)[1:] if path.suffix == ".bin"]
    for path in files:
        read_torch(path)  # refuses code, and what transformers does not notice: changed bits
    processor = AutoImageProcessor.from_pretrained(folder, **LOCAL)
    # Eager attention is there for every model and fetches no kernel.
    model, info = AutoModel.from_pretrained(
        folder,
        **LOCAL,
        use_safetensors=not files,
        attn_implementation="eager",
        output_loading_info=True,
    )
    tower = getattr(model, TOWER[:-1], model)
    if tower.main_input_name != "pixel_values":
        raise ValueError(f"{type(model).__name__} takes no images")
    prefix = "" if tower is model else TOWER
    missing = [name for name in info["missing_keys"] if name.startswith(prefix)]
    missing = [name for name in missing if not name.removeprefix(prefix).startswith(UNUSED)]
    misfit = [str(name) for name in info["mismatched_keys"]]
    return tower.float().eval().requires_grad_(False), processor, sorted(missing + misfit)
