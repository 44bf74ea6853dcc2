"""compiling.py — a function of tensors, compiled at its first use, which goes on where that fails.

Kept apart from space.py, whose routing is what is compiled: eager code needs nothing of this.
"""

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

# Warnings of the compiler's own, which looks at every tensor's gradient, and of an older one's,
# which would have products rounded that are to be exact.
OWN_WARNINGS = ("The .grad attribute of a Tensor", "TensorFloat32 tensor cores")

Function = Callable[..., tuple[Tensor, ...]]


class Compiled:
    """A function, compiled; called as it is from the compiler's first failure on.

    `weights` gives what a gradient will be asked of.
    """

    def __init__(self, function: Function, weights: Callable[[], Iterable[Tensor]]) -> None:
        self.function, self.weights = function, weights
        self.compiled: Function | None = None
        self.goes_back = False  # the first step of a training may come after a validation
        self.failed = False
        for message in OWN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)

    def __call__(self, *given: Any) -> tuple[Tensor, ...]:
        """What the function gives."""
        if self.failed:
            return self.function(*given)
        try:
            return self._run(given)
        except Exception as error:  # no compiler, or one that cannot: many types, one remedy
            if is_oom(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            log.warning("not compiled, going on without: %s", reason)
            self.failed = True
            return self.function(*given)

    def _run(self, given: tuple[Any, ...]) -> tuple[Tensor, ...]:
        from torch.fx.experimental import _config as config  # torch's own affair, which may move

        # One compilation serves every size, also where two of them happen to be equal at first.
        with config.patch(use_duck_shape=False):
            if self.compiled is None:
                self.compiled = torch.compile(self.function, dynamic=True)
            if torch.is_grad_enabled() and not self.goes_back:
                self._go_back(given)
                self.goes_back = True
            return self.compiled(*given)

    def _go_back(self, given: tuple[Any, ...]) -> None:
        """One backward pass for nothing: its code, too, is compiled where a failure is caught."""
        from torch.utils._pytree import tree_map_only

        # on leaves, so that it ends there
        leaves = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), given)
        # hooks of its own, so that a checkpoint around it counts none of its tensors
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):
            total = torch.stack([part.sum() for part in self.compiled(*leaves)]).sum()
            torch.autograd.grad(total, list(self.weights()), allow_unused=True)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def gains_by_compiling(device: torch.device, precision: Precision) -> bool:
    """Whether compiled routing is faster there and torch.compile finds what it needs.

    That is Triton on a GPU, and on a processor a C++ compiler. There it saves an eighth of the time
    and more in bfloat16; in float32 less than a tenth (results/speed.json), and
    compiled code skips no closed cells.
    """
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
    return compiler and device.type == "cpu" and precision == "bf16"
