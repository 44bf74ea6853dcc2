"""cli.py — command lines: options from a dataclass, exit statuses, the device, progress.

Imports no torch, so that `--help` answers at once.
"""

import argparse
import dataclasses
import logging
import os
import signal
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tqdm import tqdm

from common.config import Precision
from common.errors import InputError, printable, require
from common.memory import describe_oom, is_oom, tune_malloc
from common.precision import has_tf32, keep_float32
from common.signals import Stopped
from common.world import World, is_first

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Options = TypeVar("Options")

BAD_INPUT = 2  # exit status after an InputError
LARGEST_FLOAT = 1e30  # float32 holds the product of two options up to this size
LONGEST_MESSAGE = 4000  # characters
LOG_SECONDS = 30  # between two progress lines if there is no terminal

tqdm.monitor_interval = 0  # starts no thread: the workers that read data are forked


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]  # argparse exits here
        raise InputError(f"{message} (see --help)")


def parse(
    cls: type[Options],
    argv: Sequence[str] | None,
    description: str,
    program: str | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Options:
    """Return the options of dataclass `cls` as the command line gives them, one option a field.

    A field is `Annotated[type, help, *other spellings]`. A field without a default is required. A
    spelling without dashes makes the option positional. Booleans get a `--no-` twin unless their
    name starts with `no_`, literals become choices, lists take one or more values.

    `program` is the name in the help (default: the file's name). `groups` maps the title of each
    argument group to the names of its fields, all of them. Raises InputError if an option is wrong
    or abbreviated.
    """
    parser = _Parser(
        prog=program,
        allow_abbrev=False,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # cls is a dataclass
    for title, names in (groups or {"": list(fields)}).items():
        group = parser.add_argument_group(title) if title else parser
        for name in names:
            kind, text, *spellings = get_args(hints[name])
            option = _argument(fields[name], kind, text)
            if spellings and not spellings[0].startswith("-"):
                known = {"help", "type", "nargs", "default"}
                positional = {key: option[key] for key in option.keys() & known}
                if "default" in positional:
                    positional["nargs"] = "?"
                group.add_argument(name, metavar=spellings[0], **positional)
            else:
                group.add_argument(f"--{name}", *spellings, **option)
    return cls(**vars(parser.parse_args(argv)))


def parse_in_all(read: Callable[[], Options], world: World) -> Options:
    """Return the options that `read` parses; if it raises InputError in one process, all do."""
    try:
        return read()
    except InputError:
        if world.size > 1:
            from common.distributed import agreed, connected

            with connected(world), agreed(world):  # the others would wait for this process
                raise
        raise


def _argument(field: dataclasses.Field, kind: Any, text: str) -> dict[str, Any]:
    """Return the keywords of `add_argument` for one field."""
    option: dict[str, Any] = {"dest": field.name, "help": text}
    if field.default is dataclasses.MISSING:
        option["required"] = True
    else:
        option["default"] = field.default
        if field.default not in (None, ""):
            values = field.default if isinstance(field.default, tuple) else (field.default,)
            option["help"] = f"{text} (default: {' '.join(map(str, values))})"
    if get_origin(kind) in (Union, types.UnionType):  # X | None
        kind = get_args(kind)[0]
        if kind is str:
            return option | {"type": nonempty_text}
    if kind is bool:
        negative = field.name.startswith("no_")
        return option | {"action": "store_true" if negative else argparse.BooleanOptionalAction}
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
        option["nargs"] = "+"
    if get_origin(kind) is Literal:
        return option | {"choices": get_args(kind)}
    return option | {"type": {float: finite_number, str: printable_text}.get(kind, kind)}


# argparse names these functions in its messages.


def finite_number(text: str) -> float:
    number = float(text)
    if not abs(number) <= LARGEST_FLOAT:
        raise ValueError(text)
    return number


def printable_text(text: str) -> str:
    if not text.isprintable():  # the readers of checkpoints and run.json refuse such options
        raise ValueError(text)
    return text


def nonempty_text(text: str) -> str:
    if not text:  # as `--data_path "$UNSET"` passes it
        raise ValueError(text)
    return printable_text(text)


def pick_device(name: str, precision: Precision | None = None) -> "torch.device":
    """Return the device called `name` and make it the current one; `auto` is a GPU if there is one.

    Raises InputError if it cannot be used, or does not have the precision that a user asks for.
    """
    import torch

    keep_float32()
    device = _device(name)
    problem = f"--precision tf32: expected a CUDA GPU; the device is {device}"
    require(precision != "tf32" or has_tf32(device), problem)
    if device.type == "cuda":  # pinned memory, too, belongs to the current GPU
        torch.cuda.set_device(device)
    return device


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_known = name.split(":")[0] in ("cpu", "cuda", "mps")
    require(is_known, f"--device {name}: expected auto, cpu, cuda, cuda:1, mps, ...")
    has_device = not name.startswith("mps") or torch.backends.mps.is_available()
    require(has_device, f"--device {name}: cannot be used here: it needs torch on an Apple GPU")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: cannot be used here: {reason}") from error


def run(program: Callable[[], None]) -> None:
    """Run `program` and exit: with 0, or with 2 and one line on standard error for InputError.

    Running out of memory counts as bad input. A signal exits with 128 plus its number. Any other
    exception is a bug and keeps its traceback. Of the processes of torchrun, the first one alone
    prints the line of an InputError and the log; others log errors that they alone know.
    """
    tune_malloc()
    level = logging.INFO if is_first() else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    status, message = 0, ""
    try:
        program()
    except InputError as error:
        status, message = BAD_INPUT, f"error: {error}"
    except Stopped as stop:
        status = 128 + stop.number
    except KeyboardInterrupt:
        status, message = 128 + signal.SIGINT, "interrupted"
    except Exception as error:
        if not is_oom(error):
            raise
        status, message = BAD_INPUT, f"error: {describe_oom(error)}"
    try:
        if message and is_first():
            sys.stderr.write(f"{Path(sys.argv[0]).name}: {_one_line(message)}\n")
        sys.stderr.flush()
    except OSError:  # nobody reads standard error: `2>&1 | tee` whose tee has gone
        _discard_output(2)
    if status == BAD_INPUT and _is_connected():
        os._exit(status)  # at a usual exit, NCCL waits for messages of a process that has ended
    if status:
        sys.exit(status)


def _is_connected() -> bool:
    """Return whether this process is connected to others."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _one_line(text: str) -> str:
    """Return `text` shortened to one line, with control characters escaped."""
    line = " ".join(text[:LONGEST_MESSAGE].split()) + "..." * (len(text) > LONGEST_MESSAGE)
    return printable(line)


def print_line(text: str) -> None:
    """Print to standard output. Raises InputError if it is closed or its disk is full."""
    require(sys.stdout is not None, "standard output: is closed")
    try:
        print(text, end="" if text.endswith("\n") else "\n", flush=True)  # noqa: T201  # a product
    except OSError as error:
        _discard_output(1)
        raise InputError(f"standard output: {error.strerror or error}") from error


def _discard_output(descriptor: int) -> None:
    """Send a stream to /dev/null; otherwise Python flushes it again at exit and fails."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def progress(what: str, total: int, unit: str) -> tqdm:
    """Return a progress bar; without a terminal it logs a line every half minute instead.

    Of the processes of torchrun, the first one alone shows it.
    """
    if not is_first():
        return tqdm(total=total, disable=True)
    if sys.stderr.isatty():
        # A bar of less than a second, of one query say, would only flicker.
        return tqdm(desc=what, total=total, unit=unit, unit_scale=True, leave=False, delay=1)
    line = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"
    return _LoggedProgress(
        desc=what, total=total, unit=unit, mininterval=LOG_SECONDS, miniters=1, bar_format=line
    )


class _LoggedProgress(tqdm):
    """A tqdm that logs lines and draws no bar."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.total is not None and 0 < self.n < self.total:
            log.info(str(self))

    def close(self) -> None:
        self.disable = True
