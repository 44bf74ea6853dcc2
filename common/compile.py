"""compile.py — a function of tensors, compiled at its first use; if that fails, it runs eagerly."""

import importlib.util
import logging
import math
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
Shapes = tuple[torch.Size, ...]


def needs_fixed_shapes(device: torch.device) -> bool:
    """Return whether tensors should always have the same shapes on a device: on all but a CPU.

    On a GPU, compiled code is faster for one shape than for all, and to ask for the longest caption
    the host would have to wait. On a CPU, smaller tensors save time.
    """
    return device.type != "cpu"


class Compiled:
    """A compiled function; after the compiler's first failure it calls the eager one.

    One compilation serves all shapes, unless they are `fixed`: then code is made for one shape
    only, and other ones run eagerly. Without gradients it is the first shape. With gradients it is
    the largest, because a resumed run may begin with the smaller last batch of an epoch. Once
    memory runs out it is the next shape, that of a halved chunk.
    `parameters` returns the weights that a backward pass asks gradients of.
    """

    def __init__(
        self, function: Function, parameters: Callable[[], Iterable[Tensor]], fixed: bool = False
    ) -> None:
        self.function, self.parameters, self.fixed = function, parameters, fixed
        self.compiled: Function | None = None
        self.shapes: dict[bool, Shapes] = {}  # the compiled ones, without and with gradients
        self.failed = False
        for message in OWN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)

    def __call__(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Return `function(*inputs)`. Out of memory raises as in eager code."""
        shapes = self._shapes(inputs)
        if self.failed or not self._serves(shapes):
            return self.function(*inputs)
        try:
            return self._run(inputs, shapes)
        except Exception as error:  # compilers fail with many types of exception; one remedy
            if is_oom(error):
                self.shapes.pop(torch.is_grad_enabled(), None)
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            log.warning("not compiled, using eager code: %s", reason)
            self.failed = True
            return self.function(*inputs)

    def _shapes(self, inputs: tuple[Any, ...]) -> Shapes:
        """Return the shapes that code for fixed shapes is bound to."""
        from torch.utils._pytree import tree_leaves

        if not self.fixed:
            return ()
        return tuple(leaf.shape for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))

    def _serves(self, shapes: Shapes) -> bool:
        """Return whether there is, or should be, compiled code for inputs of these shapes."""
        grad = torch.is_grad_enabled()
        held = self.shapes.get(grad)
        return held is None or shapes == held or (grad and _numbers(shapes) > _numbers(held))

    def _run(self, inputs: tuple[Any, ...], shapes: Shapes) -> tuple[Tensor, Tensor]:
        from torch.fx.experimental import _config as config

        # Two sizes that happen to be equal at first may differ later: without duck shapes, one
        # compilation serves every size.
        with config.patch(use_duck_shape=False):  # type: ignore[attr-defined]  # added at import
            if self.compiled is None:
                self.compiled = torch.compile(self.function, dynamic=not self.fixed)
            grad = torch.is_grad_enabled()
            if self.shapes.get(grad) != shapes:
                if grad:
                    self._run_backward(inputs)
                self.shapes[grad] = shapes
            return self.compiled(*inputs)

    def _run_backward(self, inputs: tuple[Any, ...]) -> None:
        """Run a throw-away backward pass, so that its compile errors are caught here."""
        from torch.utils._pytree import tree_map_only

        assert self.compiled is not None
        # On leaves, so that the backward pass ends there. Compiled code is also bound to which
        # inputs are the same tensor, so such inputs share a leaf.
        leaf_of: dict[int, Tensor] = {}

        def leaf(t: Tensor) -> Tensor:
            return leaf_of.setdefault(id(t), t.detach().requires_grad_(t.requires_grad))

        leaves = tree_map_only(Tensor, leaf, inputs)
        # Under hooks of its own: a surrounding activation checkpoint must not count its tensors.
        with torch.autograd.graph.saved_tensors_hooks(_identity, _identity):
            total = torch.stack([output.sum() for output in self.compiled(*leaves)]).sum()
            torch.autograd.grad(total, list(self.parameters()), allow_unused=True)


def _numbers(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes))


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
