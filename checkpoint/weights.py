"""weights.py — named weights, and modules that are filled with them strictly (SPEC §10)."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.errors import InputError, brief_repr, summarise
from common.memory import is_oom

Weights = dict[str, Tensor]


def check_named(weights: Any, path: Path) -> None:
    """Raise InputError unless `weights` maps names to tensors."""
    if not isinstance(weights, dict):
        raise InputError(f"{path}: expected a dictionary of named weights")
    for name, value in weights.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            kind = type(value).__name__
            raise InputError(f"{path}: {brief_repr(name)} is {kind}; expected a weight")


def check_finite(weights: Weights, source: Path) -> None:
    """Raise InputError if a weight holds NaN or an infinite number."""
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"{source}: {name} holds NaN or infinite numbers")


def load_state_dict_strict(
    model: nn.Module, weights: Weights, source: Path, keep: str = ""
) -> None:
    """Load weights; a missing, surplus, misshapen or not finite one is an InputError that names it.

    Weights of the model whose names start with `keep` stay as they are.
    """
    # DEVIATION: a missing or surplus weight is an error (the published code skipped it in silence).
    wanted = {k: v for k, v in model.state_dict().items() if not (keep and k.startswith(keep))}
    if missing := sorted(wanted.keys() - weights):
        raise InputError(f"{source}: lacks {summarise(missing)}")
    if surplus := sorted(weights.keys() - wanted):
        raise InputError(f"{source}: holds {summarise(surplus)} too many")
    for name, value in wanted.items():
        shape, expected = list(weights[name].shape), list(value.shape)
        if shape != expected:
            raise InputError(f"{source}: {name} is {shape}; expected {expected}")
        both_float = weights[name].is_floating_point() and value.is_floating_point()
        if not both_float and weights[name].dtype != value.dtype:
            raise InputError(f"{source}: {name} is {weights[name].dtype}; expected {value.dtype}")
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # a sparse tensor, or one without numbers
        if is_oom(error):
            raise
        raise InputError(f"{source}: {str(error).splitlines()[-1].strip()}") from error
    check_finite(wanted, source)  # which shares its memory with the model
