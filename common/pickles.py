"""pickles.py — what a torch file's pickle would make, found out before it is made (SPEC §10).

`torch.load(weights_only=True)` executes nothing, but takes memory and time on the pickle's word.
Kept apart from torchfiles.py because it is a machine of its own: it goes through the instructions
with a stack of shadows, and allows what checkpoints are made of.
"""

import math
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import IO, Any

BYTES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}
BYTES |= {"Char": 1, "Byte": 1, "Bool": 1}
STORAGES = {f"torch {kind}Storage": size for kind, size in BYTES.items()}  # bytes of a number
TENSORS = {"torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2"}
PARAMETER, ORDERED, NAMESPACE = (
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    "argparse Namespace",
)
ALLOWED = {*STORAGES, *TENSORS, PARAMETER, ORDERED, NAMESPACE}

NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1"}
TEXTS = {"BINUNICODE", "SHORT_BINSTRING"}
ATOMS = {"NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT"}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MOST_AXES = 64  # of an array; torch has no more
# Shadows of what is neither a number, a list nor a tuple, which are their own.
ATOM, STORAGE, TENSOR = "atom", "storage", "tensor"


@dataclass(frozen=True)
class _Text:
    """The shadow of a text."""

    value: str


@dataclass
class _Dictionary:
    """The shadow of a dictionary, or of what has one: how many entries it has."""

    kind: str  # "dict", ORDERED or NAMESPACE
    entries: int = 0


class CodeAsked(ValueError):
    """A pickle names something else than what checkpoints are made of."""


class _Machine:
    """The shadows of one pickle's stack and memo, for a file of `size` bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0  # entries of dictionaries, from lists and dictionaries that may be shared
        self.storages: dict[str, int] = {}  # bytes by key

    def popped(self, count: int | None = None) -> list[Any]:
        """The topmost `count` shadows, or those above the last mark."""
        first = self.marks.pop() if count is None else len(self.stack) - count
        if first < 0 or first > len(self.stack):
            raise ValueError("its stack is empty")
        found, self.stack[first:] = self.stack[first:], []
        return found

    def step(self, name: str, argument: Any) -> None:
        """One instruction. Raises ValueError, IndexError or KeyError where it cannot be one."""
        if not (self._put(name, argument) or self._change(name)):
            raise ValueError(f"holds the instruction {name}")

    def _put(self, name: str, argument: Any) -> bool:
        """One that puts something on the stack, or notes what is there; False for another."""
        stack = self.stack
        if name in NUMBERS:
            stack.append(argument)
        elif name in ATOMS:
            stack.append(ATOM)
        elif name in TEXTS:
            stack.append(_Text(argument))
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
            stack.append(_Dictionary("dict"))
        else:
            return False
        return True

    def _change(self, name: str) -> bool:
        """One that makes something of what is on the stack; False for another."""
        stack = self.stack
        if name == "TUPLE" or name in TUPLES:
            stack.append(tuple(self.popped(TUPLES.get(name))))
        elif name in ("APPEND", "APPENDS"):
            items = self.popped(1 if name == "APPEND" else None)
            if not isinstance(stack[-1], list):
                raise ValueError("adds to what is no list")
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            keys = self.popped(2 if name == "SETITEM" else None)[::2]
            self.fill(stack[-1], keys)
        elif name == "BINPERSID":
            self.check_storage(*self.popped(1))
            stack.append(STORAGE)
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(self.made(*self.popped(2)))
        elif name == "BUILD":
            (state,) = self.popped(1)
            has = isinstance(stack[-1], _Dictionary) and stack[-1].kind in (ORDERED, NAMESPACE)
            if not (has and isinstance(state, _Dictionary)):
                raise ValueError("gives attributes to what has none")
            self.copy(state.entries)
        else:
            return False
        return True

    def fill(self, found: Any, keys: Sequence[Any]) -> None:
        """Set entries. Raise ValueError where it is no dictionary, or a key cannot be one."""
        if not (isinstance(found, _Dictionary) and found.kind in ("dict", ORDERED)):
            raise ValueError("sets entries of what is no dictionary")
        for key in keys:
            # a tuple's hash takes time without bound, or the whole stack, if it is nested well
            if not (isinstance(key, _Text) or key == ATOM or type(key) is int):
                raise ValueError("has a key that is neither text nor number")
        found.entries += len(keys)

    def copy(self, entries: int) -> None:
        """Raise ValueError where more entries are copied than a file can mean."""
        self.copied += entries
        if self.copied > self.size:
            raise ValueError(f"claims {self.copied} entries in a file of {self.size} bytes")

    def check_storage(self, asked: Any) -> None:
        """Raise ValueError unless a storage of no more numbers than the file has bytes is asked."""
        fits = isinstance(asked, tuple) and len(asked) in (5, 6) and asked[1] in STORAGES
        fits = fits and isinstance(asked[2], _Text)
        if not (fits and type(asked[4]) is int and 0 <= asked[4] <= self.size):
            raise ValueError(f"claims numbers that a file of {self.size} bytes cannot hold")
        claimed = asked[4] * STORAGES[asked[1]]
        if self.storages.setdefault(asked[2].value, claimed) != claimed:
            raise ValueError("claims the same numbers twice, in two sizes")

    def made(self, function: Any, arguments: Any) -> Any:
        """The shadow of what a function of ALLOWED makes."""
        if not isinstance(function, str):
            raise ValueError("calls what cannot be called")
        if function in TENSORS:
            self.check_array(*arguments[:4])
            return TENSOR
        if function == PARAMETER and arguments[0] == TENSOR:
            return TENSOR
        if function == ORDERED:
            ordered = _Dictionary(ORDERED)
            for pairs in arguments:  # Python 2 gives them here, Python 3 sets them afterwards
                self.copy(len(pairs))
                self.fill(ordered, [key for key, _ in pairs])
            return ordered
        if function == NAMESPACE and not arguments:
            return _Dictionary(NAMESPACE)
        raise ValueError("calls what cannot be called")

    def check_array(self, storage: Any, offset: Any, shape: Any, strides: Any) -> None:
        """Raise ValueError where an array is not one of a storage, within the file's size."""
        if storage != STORAGE or not len(shape) == len(strides) <= MOST_AXES:
            raise ValueError("holds an array without numbers or shape")
        sizes = (offset, *shape, *strides)
        fits = all(type(n) is int and 0 <= n <= self.size for n in sizes)
        if not fits or math.prod(shape) > self.size:
            raise ValueError(f"claims an array that {self.size} bytes cannot hold")


def check_pickle(file: IO[bytes] | mmap, size: int) -> dict[str, int]:
    """Go through a pickle in a file of `size` bytes, to its end; the bytes of storages by key.

    Raises CodeAsked, which names it, or ValueError, IndexError, KeyError or TypeError.
    """
    machine = _Machine(size)
    for instruction, argument, _ in pickletools.genops(file):
        if instruction.name not in ("PROTO", "STOP"):
            machine.step(instruction.name, argument)
    return machine.storages
