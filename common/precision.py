"""precision.py — how exact products are, and on which devices. Imports no torch at first.

A model's `precision` is fp32, tf32 or bf16. In fp32 no product or convolution is rounded to TF32.
In tf32 a CUDA GPU rounds their inputs to 10 bits of mantissa; tensors stay float32. bf16 is
torch.autocast, in model.py.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import Precision

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86 and ARM processors in /proc/cpuinfo


@contextmanager
def product_precision(precision: Precision) -> Iterator[None]:
    """Allow TF32 in products and convolutions if `precision` is tf32; otherwise forbid it.

    Forward and backward passes belong inside. Afterwards the process's flags are as before.
    """
    import torch

    # torch 2.9 also has `fp32_precision`. This API works in every version, and a process must not
    # mix the two.
    flags: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = precision == "tf32"
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def keep_float32() -> None:
    """Make all convolutions of the process compute in float32; on a GPU torch defaults to TF32."""
    import torch

    torch.backends.cudnn.allow_tf32 = False


def has_tf32(device: "torch.device") -> bool:
    """Return whether a device can round products to TF32."""
    return device.type == "cuda"


def warn_if_bf16_is_slow(precision: Precision, device: "torch.device") -> None:
    """Warn if the processor has no bfloat16 instructions and emulates them."""
    if precision == "bf16" and not has_fast_bf16(device):
        log.warning("--precision bf16: this processor emulates bfloat16; fp32 is faster")


def has_fast_bf16(device: "torch.device", cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return False if `device` is a CPU whose flags lack bfloat16 (only Linux lists them)."""
    if device.type != "cpu" or not cpuinfo.exists():
        return True
    return bool(BF16_FLAGS & set(cpuinfo.read_text().split()))
