"""pickles.py — what a torch file's pickle would make, found out before it is made (SPEC §10).

`torch.load(weights_only=True)` executes nothing, but takes memory and time on the pickle's word.
Kept apart from files.py because it is a machine of its own: it goes through the instructions with a
stack of shadows, and allows what checkpoints are made of.
"""

import math
import pickletools
from mmap import mmap
from typing import IO, Any

KINDS = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
STORAGES = {f"torch {kind}Storage" for kind in KINDS}
TENSORS = {"torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2"}
PARAMETER, ORDERED, NAMESPACE = (
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    "argparse Namespace",
)
ALLOWED = {*STORAGES, *TENSORS, PARAMETER, ORDERED, NAMESPACE}

NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1"}
ATOMS = {"NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# Shadows of what is neither a number, a list nor a tuple, which are their own.
ATOM, STORAGE, TENSOR, DICT = "atom", "storage", "tensor", "dict"


class CodeAsked(ValueError):
    """A pickle names something else than what checkpoints are made of."""


class _Machine:
    """The shadows of one pickle's stack and memo, for a file of `size` bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def popped(self, count: int | None = None) -> list[Any]:
        """The topmost `count` shadows, or those above the last mark."""
        first = self.marks.pop() if count is None else len(self.stack) - count
        if first < 0 or first > len(self.stack):
            raise ValueError("its stack is empty")
        found, self.stack[first:] = self.stack[first:], []
        return found

    def step(self, name: str, argument: Any) -> None:
        """One instruction. Raises ValueError, IndexError or KeyError where it cannot be one."""
        stack = self.stack
        if name in NUMBERS:
            stack.append(argument)
        elif name in ATOMS:
            stack.append(ATOM)
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "GLOBAL":
            if argument not in ALLOWED:
                raise CodeAsked(argument.replace(" ", "."))
            stack.append(argument)
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append(DICT)
        elif name == "TUPLE" or name in TUPLES:
            stack.append(tuple(self.popped(TUPLES.get(name))))
        elif name in ("APPEND", "APPENDS"):
            items = self.popped(1 if name == "APPEND" else None)
            if not isinstance(stack[-1], list):
                raise ValueError("adds to what is no list")
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            for key in self.popped(2 if name == "SETITEM" else None)[::2]:
                _check_key(key)
        elif name == "BINPERSID":
            self.check_storage(*self.popped(1))
            stack.append(STORAGE)
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(self.made(*self.popped(2)))
        elif name == "BUILD":
            self.popped(1)
            if stack[-1] not in (ORDERED, NAMESPACE):
                raise ValueError("gives attributes to what has none")
        else:
            raise ValueError(f"holds the instruction {name}")

    def check_storage(self, asked: Any) -> None:
        """Raise ValueError unless a storage of no more numbers than the file has bytes is asked."""
        fits = isinstance(asked, tuple) and len(asked) in (5, 6) and asked[1] in STORAGES
        if not (fits and type(asked[4]) is int and 0 <= asked[4] <= self.size):
            raise ValueError(f"claims numbers that a file of {self.size} bytes cannot hold")

    def made(self, function: Any, arguments: Any) -> str:
        """The shadow of what a function of ALLOWED makes."""
        if not isinstance(function, str):
            raise ValueError("calls what cannot be called")
        if function in TENSORS:
            storage, offset, shape, strides = arguments[:4]
            sizes = (offset, *shape, *strides)
            if storage != STORAGE or not all(type(n) is int and n >= 0 for n in sizes):
                raise ValueError("holds an array without numbers or shape")
            if math.prod(shape) > self.size:
                raise ValueError(f"claims an array of shape {[*shape]} in {self.size} bytes")
            return TENSOR
        if function == PARAMETER and arguments[0] == TENSOR:
            return TENSOR
        if function == ORDERED:
            for pairs in arguments:  # Python 2 gives them here, Python 3 sets them afterwards
                for key, _ in pairs:
                    _check_key(key)
            return ORDERED
        if function == NAMESPACE and not arguments:
            return NAMESPACE
        raise ValueError("calls what cannot be called")


def _check_key(key: Any) -> None:
    """Raise ValueError where a dictionary's key is more than a text or a number."""
    # a tuple's hash takes time without bound, or the whole stack, if it is nested well
    if not (key == ATOM or type(key) is int):
        raise ValueError("has a key that is neither text nor number")


def check_pickle(file: IO[bytes] | mmap, size: int) -> None:
    """Go through a pickle in a file of `size` bytes, to its end.

    Raises CodeAsked, which names it, or ValueError, IndexError, KeyError or TypeError.
    """
    machine = _Machine(size)
    for instruction, argument, _ in pickletools.genops(file):
        if instruction.name not in ("PROTO", "STOP"):
            machine.step(instruction.name, argument)
