"""official.py — the authors' ("official") weights under this project's ("native") names (SPEC §10).

Native layers fuse what the official model computes in several (query, key and value; scale and
shift), and a native convolution has torch's own shape.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.config import CELLS, LAYERS
from common.errors import InputError, summarise
from model import WINDOWS

LINEAR = ("weight", "bias")
PARTS = ("img_enc", "txt_enc", "itr_module")  # the official state dicts, in their order
NEVER_USED = re.compile(r"\.glgc\.fc_2\.(weight|bias)$")
NORM = ("running_mean", "running_var", "num_batches_tracked")


def native_names(modules: Mapping[str, Mapping[str, Tensor]], source: Path) -> dict[str, Tensor]:
    """Return official weights under native names; `modules` maps PARTS to state dicts.

    Raises InputError that names a missing or surplus weight.
    """
    left = {f"{module}/{k}": v for module, part in modules.items() for k, v in part.items()}
    left = {key: value for key, value in left.items() if not NEVER_USED.search(key)}
    weights = {}
    for native, official in official_of_native("img_enc/bn.weight" in left).items():
        if absent := [key for key in official if key not in left]:
            raise InputError(f"{source}: lacks {summarise(absent)}")
        tensors = [left.pop(key) for key in official]
        try:
            weights[native] = fuse_weights(native, tensors)
        except (RuntimeError, IndexError) as error:
            shapes = [list(tensor.shape) for tensor in tensors]
            message = f"{source}: {summarise(official)}: shapes {shapes} do not fit"
            raise InputError(message) from error
    if left:
        raise InputError(f"{source}: holds {summarise(sorted(left))} too many")
    return weights


def fuse_weights(native: str, tensors: Sequence[Tensor]) -> Tensor:
    """Return the weight `native`, made of its official ones (or of their gradients)."""
    weight = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
    convolution = native.startswith("text.convs.") and native.endswith("weight")
    return weight.squeeze(1).mT if convolution else weight  # [D, 1, window, h] -> [D, h, window]


def official_of_native(with_image_norm: bool) -> dict[str, tuple[str, ...]]:
    """Map each native weight to the official ones that it fuses along the first axis."""
    return {
        f"{native}.{suffix}": tuple(f"{name}.{suffix}" for name in official)
        for native, *official in _modules(with_image_norm)
        for suffix in (LINEAR + NORM if native.endswith(".norm") else LINEAR)
    }


def _modules(with_image_norm: bool) -> Iterator[tuple[str, ...]]:
    """Yield the native name of each module and the official ones that it fuses."""
    yield "image.fc", "img_enc/fc"
    if with_image_norm:
        yield "image.norm", "img_enc/bn"
    yield "text.fc", "txt_enc/fc"
    yield "text.mapping", "txt_enc/mapping"
    for i in range(len(WINDOWS)):
        yield f"text.convs.{i}", f"txt_enc/convs1.{i}"
    for layer in range(LAYERS - 1):
        yield from _cells(f"space.layers.{layer}.cells", f"itr_module/dynamic_itr_l{layer}")
    yield from _cells("space.merge.cells", f"itr_module/dynamic_itr_l{LAYERS - 1}")
    yield "space.norm", "itr_module/bn"
    yield "space.path_mapping", "itr_module/path_mapping"


def _cells(native: str, official: str) -> Iterator[tuple[str, ...]]:
    """Yield the modules of one layer, like `_modules`."""
    for cell in CELLS:
        for i in (0, 2):  # the linear layers of a router
            yield f"{native}.{cell}.router.mlp.{i}", f"{official}.{cell}.router.mlp.{i}"
    yield f"{native}.glgc.fc", f"{official}.glgc.fc_1"
    attention, refine = f"{official}.imrc.sa", f"{official}.cmrc.refine"
    yield f"{native}.imrc.qkv", *(f"{attention}.att_layer.linears.{i}" for i in range(3))
    yield f"{native}.cmrc.scale_shift", f"{refine}.fc_scale", f"{refine}.fc_shift"
    for i in (1, 2):
        yield f"{native}.imrc.fc{i}", f"{attention}.feed_forward_layer.fc{i}"
        yield f"{native}.cmrc.fc{i}", f"{refine}.fc_{i}"
