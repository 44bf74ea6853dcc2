"""weights.py — named weights, and modules that are filled with them strictly.

Knows nothing of files, BERT or DIME.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from common.errors import brief_repr, require, summarise

Weights = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)


def check_named(weights: Any, path: Path) -> None:
    """Raise InputError unless these are weights by their names."""
    require(isinstance(weights, dict), f"{path}: expected a dictionary of named weights")
    for name, value in weights.items():
        fits = isinstance(name, str) and isinstance(value, Tensor)
        require(fits, f"{path}: {brief_repr(name)} is {type(value).__name__}; expected a weight")


def check_finite(weights: Weights, source: Path) -> None:
    """Raise InputError unless all weights are numbers."""
    for name, value in weights.items():
        whole = not value.is_floating_point() or bool(value.isfinite().all())
        require(whole, f"{source}: {name} holds NaN or infinite numbers")


def build_with_weights(
    make: Callable[[], Module], weights: Weights, source: Path, keep: str = ""
) -> Module:
    """The module that `make` makes, with these weights, held to them as `load_strictly` does.

    A file's word for its sizes is not taken: they are compared before memory is.
    """
    with torch.device("meta"):
        check_fit(make(), weights, source, keep)
    module = make()
    module.load_state_dict(weights, strict=False)
    return module


def load_state_dict_strict(
    model: nn.Module, weights: Weights, source: Path, keep: str = ""
) -> None:
    """Fill `model`; a missing, surplus or wrongly shaped key is an InputError that names it.

    Keys of the model that start with `keep` stay as they are.
    """
    check_fit(model, weights, source, keep)
    model.load_state_dict(weights, strict=False)


def check_fit(model: nn.Module, weights: Weights, source: Path, keep: str = "") -> None:
    """Raise InputError unless `model` and `weights` have the same keys, shapes and kinds of number.

    Keys of the model that start with `keep` do not count.
    """
    # DEVIATION: a missing or surplus weight is an error (the published code skipped it in silence).
    wanted = {k: v for k, v in model.state_dict().items() if not (keep and k.startswith(keep))}
    missing, surplus = sorted(wanted.keys() - weights), sorted(weights.keys() - wanted)
    require(not missing, f"{source}: lacks {summarise(missing)}")
    require(not surplus, f"{source}: holds {summarise(surplus)} too many")
    for name, value in wanted.items():
        found, expected = list(weights[name].shape), list(value.shape)
        require(found == expected, f"{source}: {name} is {found}, expected {expected}")
        floats = weights[name].is_floating_point() and value.is_floating_point()
        fits = floats or weights[name].dtype == value.dtype
        require(fits, f"{source}: {name} is {weights[name].dtype}; expected {value.dtype}")
