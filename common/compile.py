"""compile.py — a function of tensors, compiled at its first use; if that fails, it runs eagerly."""

import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from common.config import Precision
from common.memory import is_oom

log = logging.getLogger(__name__)

# Warnings that the compiler causes by itself: it reads `.grad` of every tensor, and older versions
# recommend TF32, which would round products that must be exact.
OWN_WARNINGS = ("The .grad attribute of a Tensor", "TensorFloat32 tensor cores")
WORTH_COMPILING = 2_000_000  # from so many pairs on, compiling saves more time than it takes

Function = Callable[..., tuple[Tensor, Tensor]]


def needs_fixed_shapes(device: torch.device) -> bool:
    """Return whether tensors should always have the same shapes on a device: on all but a CPU.

    On a GPU, compiled code is faster for one shape than for all, and to ask for the longest caption
    the host would have to wait. On a CPU, smaller tensors save time.
    """
    return device.type != "cpu"


class Compiled:
    """A compiled function; after the compiler's first failure it calls the eager one.

    `parameters` returns the weights that a backward pass asks gradients of.
    """

    def __init__(self, function: Function, parameters: Callable[[], Iterable[Tensor]]) -> None:
        self.function, self.parameters = function, parameters
        self.compiled: Function | None = None
        self.backward_compiled = False
        self.failed = False
        for message in OWN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)

    def __call__(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Return `function(*inputs)`. Out of memory raises as in eager code."""
        if self.failed:
            return self.function(*inputs)
        try:
            return self._run(inputs)
        except Exception as error:  # compilers fail with many types of exception; one remedy
            if is_oom(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            log.warning("not compiled, using eager code: %s", reason)
            self.failed = True
            return self.function(*inputs)

    def _run(self, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        from torch.fx.experimental import _config as config

        # Two sizes that happen to be equal at first may differ later: without duck shapes, one
        # compilation serves every size.
        with config.patch(use_duck_shape=False):  # type: ignore[attr-defined]  # added at import
            if self.compiled is None:
                self.compiled = torch.compile(self.function, dynamic=True)
            if torch.is_grad_enabled() and not self.backward_compiled:
                self._run_backward(inputs)
                self.backward_compiled = True
            return self.compiled(*inputs)

    def _run_backward(self, inputs: tuple[Any, ...]) -> None:
        """Run a throw-away backward pass, so that its compile errors are caught here."""
        from torch.utils._pytree import tree_map_only

        assert self.compiled is not None
        # On leaves, so that the backward pass ends there.
        leaves = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), inputs)
        # Under hooks of its own: a surrounding activation checkpoint must not count its tensors.
        with torch.autograd.graph.saved_tensors_hooks(_identity, _identity):
            total = torch.stack([output.sum() for output in self.compiled(*leaves)]).sum()
            torch.autograd.grad(total, list(self.parameters()), allow_unused=True)


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def compiling_pays(device: str, precision: Precision, pairs: int) -> bool:
    """Return whether compiled routing saves time on a device type, for so many pairs.

    It needs Triton on a GPU and a C++ compiler on a CPU. On a CPU it saves an eighth of the time or
    more in bfloat16; in float32 a sixth on an Intel processor, hardly any on an AMD one.
    """
    if pairs < WORTH_COMPILING:
        return False
    if device == "cuda":
        return importlib.util.find_spec("triton") is not None
    has_compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
    return has_compiler and device == "cpu" and precision == "bf16"
