"""options.py — what every program shares with its user, and nothing of the model.

A frozen dataclass is the command line (`parse`), one error type ends a program with one line and
exit status 2 (`InputError`, `run`), `--device` is looked up (`pick_device`), and long work tells
how far it is (`progress`).
"""

import argparse
import dataclasses
import logging
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from tqdm import tqdm

from common.config import Precision
from common.errors import InputError, require
from common.memory import is_oom, no_memory, tune_malloc
from common.signals import Stopped

log = logging.getLogger(__name__)

Options = TypeVar("Options")

DEVICES = ("cpu", "cuda")
BAD_INPUT = 2  # exit status of a program that was given something it cannot use
tqdm.monitor_interval = 0  # no thread of its own: the loader's workers are forked
SLOW = 4.0  # times that a product in bfloat16 may take of one in float32 before it is said
PRODUCTS = 5  # of which the quickest tells
LARGEST_FLOAT = 1e30  # whose products still are numbers
LONGEST_LINE = 4000  # characters of an error's text
QUIET_SECONDS = 30  # without a terminal, long work says how far it is this often


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message} (see --help)")


def parse(
    cls: type[Options], argv: Sequence[str] | None, description: str, program: str | None = None
) -> Options:
    """Read the options of dataclass `cls` from the command line; one option a field.

    `program` is what the help calls it (default: the file's name).

    A field is `Annotated[type, help, *further spellings]`; one without a default is required. With
    a spelling without dashes it goes by its place, and is called so in the help.
    Booleans get a `--no-` twin unless their name is negative already, literals become choices,
    lists take one or more values. Raises InputError on a wrong or abbreviated option.
    """
    parser = _Parser(
        prog=program,
        allow_abbrev=False,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        kind, text, *spellings = get_args(hints[field.name])
        option = _argument(field, kind, text)
        if spellings and not spellings[0].startswith("-"):
            by_place = {key: option[key] for key in option.keys() & {"help", "type", "nargs"}}
            parser.add_argument(field.name, metavar=spellings[0], **by_place)
        else:
            parser.add_argument(f"--{field.name}", *spellings, **option)
    return cls(**vars(parser.parse_args(argv)))


def _argument(field: dataclasses.Field, kind: Any, text: str) -> dict[str, Any]:
    """The keywords of `add_argument` for one field."""
    option: dict[str, Any] = {"dest": field.name, "help": text}
    if field.default is dataclasses.MISSING:
        option["required"] = True
    else:
        option["default"] = field.default
        if field.default not in (None, ""):
            several = field.default if isinstance(field.default, tuple) else (field.default,)
            option["help"] = f"{text} (default: {' '.join(map(str, several))})"
    if get_origin(kind) in (Union, types.UnionType):  # X | None
        kind = next(k for k in get_args(kind) if k is not type(None))
        if kind is str:
            return option | {"type": _given}
    if kind is bool:
        negative = field.name.startswith("no_")
        return option | {"action": "store_true" if negative else argparse.BooleanOptionalAction}
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        if get_origin(item) is Literal:
            return option | {"nargs": "+", "choices": get_args(item)}
        return option | {"nargs": "+", "type": item}
    if get_origin(kind) is Literal:
        return option | {"choices": get_args(kind)}
    return option | {"type": {float: _finite, str: _text}.get(kind, kind)}


def _finite(text: str) -> float:
    number = float(text)
    if not abs(number) <= LARGEST_FLOAT:
        raise ValueError(text)
    return number


def _given(text: str) -> str:
    if not text:  # of a variable that is not set, say
        raise ValueError(text)
    return _text(text)


def _text(text: str) -> str:
    if not text.isprintable():
        raise ValueError(text)
    return text


# As argparse calls them.
_finite.__name__, _text.__name__, _given.__name__ = "finite number", "printable text", "text"


def keep_float32() -> None:
    """Have all convolutions of the process compute in float32.

    On a GPU torch would round their factors to 10 bits (TF32).
    """
    torch.backends.cudnn.allow_tf32 = False


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU where there is one. Raises InputError."""
    keep_float32()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = ", ".join(("auto", *DEVICES))
    require(name.split(":")[0] in DEVICES, f"--device {name}: expected one of {kinds}")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: cannot be used here: {reason}") from error


def warn_of_slow(precision: Precision, device: torch.device) -> None:
    """Say so where a processor has no units for bfloat16 and imitates them."""
    factor = slowness(device) if precision == "bf16" else 1
    if factor > SLOW:
        log.warning("--precision bf16: on this processor %.0f times slower than fp32", factor)


def slowness(device: torch.device) -> float:
    """How many times slower products in bfloat16 are than in float32; 1 for a GPU."""
    if device.type != "cpu":
        return 1
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 256, dtype=dtype)
        a @ a  # what is done once is not timed
        times = []
        for _ in range(PRODUCTS):
            since = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - since)
        seconds[dtype] = min(times)  # another program may have come between
    return seconds[torch.bfloat16] / seconds[torch.float32]


def run(program: Callable[[], None]) -> None:
    """Run a program to its exit status: 0, or 2 after one line on standard error for InputError.

    So it is when memory is used up. A signal gives 128 and its number; a bug keeps its traceback.
    """
    tune_malloc()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        program()
        status, said = 0, ""
    except InputError as error:
        status, said = BAD_INPUT, f"error: {error}"
    except Stopped as stop:
        status, said = 128 + stop.number, ""
    except KeyboardInterrupt:
        status, said = 128 + signal.SIGINT, "interrupted"
    except Exception as error:
        if not is_oom(error):
            raise
        status, said = BAD_INPUT, f"error: {no_memory(error)}"
    try:
        if said:
            sys.stderr.write(f"{Path(sys.argv[0]).name}: {_one_line(said)}\n")
        sys.stderr.flush()
    except OSError:  # nobody reads it; Python would make another exit status of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if status:
        sys.exit(status)


def _one_line(text: str) -> str:
    """A text without line feeds, and without what a terminal would obey, of bearable length."""
    line = " ".join(text[:LONGEST_LINE].split()) + "..." * (len(text) > LONGEST_LINE)
    return _visible(line)


def _visible(text: str, kept: str = "") -> str:
    """A text with nothing that a terminal would obey, or a stream could not take, but `kept`."""
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)


def print_line(text: str) -> None:
    """Write to standard output. Raises InputError where nobody takes it."""
    try:
        if sys.stdout is None:
            raise OSError("is closed")
        encoding = sys.stdout.encoding or "utf-8"  # which may have no such letters
        shown = _visible(text, "\n\t").encode(encoding, "backslashreplace")
        sys.stdout.write(shown.decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        if sys.stdout is not None:  # Python would try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise InputError(f"standard output: {error.strerror or error}") from error


def progress(what: str, total: int, unit: str) -> tqdm:
    """How far long work is: a bar on a terminal, elsewhere a log line every half minute."""
    if sys.stderr.isatty():
        return tqdm(desc=what, total=total, unit=unit, unit_scale=True, leave=False)
    return _ProgressLines(
        desc=what,
        total=total,
        unit=unit,
        mininterval=QUIET_SECONDS,
        miniters=1,
        bar_format="{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left",
    )


class _ProgressLines(tqdm):
    """tqdm that logs lines instead of drawing a bar."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if 0 < self.n < self.total:
            log.info(str(self))

    def close(self) -> None:
        self.disable = True
