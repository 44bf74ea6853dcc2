"""published.py — the published model's weights under this project's names (SPEC §10).

Kept apart from checkpoint.py, which reads files, because it is a table: what was one product in
several layers there is one layer here, and a convolution has torch's own shape.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.config import CELLS, LAYERS
from common.errors import InputError, require, summarise
from model import WINDOWS

LINEAR = ("weight", "bias")
PARTS = ("img_enc", "txt_enc", "itr_module")  # in the order of the published state dicts
NEVER_USED = re.compile(r"\.glgc\.fc_2\.(weight|bias)$")
NORM = ("running_mean", "running_var", "num_batches_tracked")


def native_names(modules: Mapping[str, Mapping[str, Tensor]], source: Path) -> dict[str, Tensor]:
    """Published weights under this project's names.

    Raises InputError that names a key which is missing or too many.
    """
    left = {f"{module}/{k}": v for module, part in modules.items() for k, v in part.items()}
    for key in [key for key in left if NEVER_USED.search(key)]:
        del left[key]
    weights = {}
    for own, published in official_of_native(with_image_norm="img_enc/bn.weight" in left).items():
        absent = [key for key in published if key not in left]
        require(not absent, f"{source}: lacks {summarise(absent)}")
        tensors = [left.pop(key) for key in published]
        try:
            weights[own] = fuse_weights(own, tensors)
        except (RuntimeError, IndexError) as error:
            shapes = [list(tensor.shape) for tensor in tensors]
            message = f"{source}: {summarise(published)}: shapes {shapes} do not fit"
            raise InputError(message) from error
    require(not left, f"{source}: holds {summarise(sorted(left))} too many")
    return weights


def fuse_weights(own: str, tensors: Sequence[Tensor]) -> Tensor:
    """The weight `own` from the published ones that it joins (or their gradients)."""
    weight = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
    convolution = own.startswith("text.convs.") and own.endswith("weight")
    return weight.squeeze(1).mT if convolution else weight  # [D, 1, window, h] -> [D, h, window]


def split_weight(own: str, weight: Tensor, parts: int) -> list[Tensor]:
    """The published weights that the weight `own` joins, each with memory of its own."""
    convolution = own.startswith("text.convs.") and own.endswith("weight")
    weight = weight.mT.unsqueeze(1) if convolution else weight  # -> [D, 1, window, h]
    tensors = weight.chunk(parts) if parts > 1 else [weight]
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]


def official_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This project's weights under the published names, `module/name`; BERT's are not among them.

    What the published model has and never uses is there, too: zeros, and a normalisation that
    changes nothing.
    """
    names = official_of_native(with_image_norm="image.norm.weight" in weights)
    found = {}
    for own, published in names.items():
        found |= zip(published, split_weight(own, weights[own], len(published)), strict=True)
    for key in [key for key in found if ".glgc.fc_1." in key]:
        found[key.replace("fc_1", "fc_2")] = torch.zeros_like(found[key])
    if "image.norm.weight" not in weights:
        norm = torch.nn.BatchNorm1d(len(weights["image.fc.bias"]))
        found |= {f"img_enc/bn.{key}": value for key, value in norm.state_dict().items()}
    return found


def official_of_native(with_image_norm: bool) -> dict[str, tuple[str, ...]]:
    """Own name of every weight -> the published ones that it joins along the first axis."""
    return {
        f"{own}.{suffix}": tuple(f"{name}.{suffix}" for name in published)
        for own, *published in _modules(with_image_norm)
        for suffix in (LINEAR + NORM if own.endswith(".norm") else LINEAR)
    }


def _modules(with_image_norm: bool) -> Iterator[tuple[str, ...]]:
    """Own name of every module, and the published ones that it joins."""
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


def _cells(own: str, published: str) -> Iterator[tuple[str, ...]]:
    """The modules of one layer."""
    for cell in CELLS:
        for i in (0, 2):  # the linear layers of a router
            yield f"{own}.{cell}.router.mlp.{i}", f"{published}.{cell}.router.mlp.{i}"
    yield f"{own}.glgc.fc", f"{published}.glgc.fc_1"
    attention, refine = f"{published}.imrc.sa", f"{published}.cmrc.refine"
    yield f"{own}.imrc.qkv", *(f"{attention}.att_layer.linears.{i}" for i in range(3))
    yield f"{own}.cmrc.scale_shift", f"{refine}.fc_scale", f"{refine}.fc_shift"
    for i in (1, 2):
        yield f"{own}.imrc.fc{i}", f"{attention}.feed_forward_layer.fc{i}"
        yield f"{own}.cmrc.fc{i}", f"{refine}.fc_{i}"
