"""errors.py — the one error of bad input, and what its messages are made of."""

import math
from collections.abc import Iterable, Sequence

PLAIN = str | int | float | None  # what an option can be


class InputError(Exception):
    """The one error of input: names the file or option, what was found and what was expected."""


def require(fact: bool, message: str) -> None:
    """Raise InputError(message) unless `fact` holds."""
    if not fact:
        raise InputError(message)


def raise_first(faults: Iterable[str]) -> None:
    """Raise InputError with the first fault, if there is one."""
    for fault in faults:
        raise InputError(fault)


def check_range(options: object, names: Sequence[str], least: int, most: float = math.inf) -> None:
    """Raise InputError where an option of these names is given and out of bounds."""
    bounds = f"{least} or more" if most == math.inf else f"{least} to {most}"
    for name in names:
        value = getattr(options, name)
        fits = value is None or least <= value <= most
        require(fits, f"--{name} {value}: expected {bounds}")


def summarise(names: Sequence[str]) -> str:
    """A few of many names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def brief_repr(value: object) -> str:
    """What is said of a value that a file holds: of a list of lists of lists its type."""
    return repr(value)[:99] if isinstance(value, PLAIN) else type(value).__name__
