"""errors.py — the one error for bad input, and helpers for its messages."""

import math
from collections.abc import Sequence

PLAIN = str | int | float | None  # types of an option's value


class InputError(Exception):
    """Bad input: the message names the file or option, its value and the expected value."""


def require(condition: bool, message: str) -> None:
    """Raise InputError(message) unless `condition` holds."""
    if not condition:
        raise InputError(message)


def check_range(options: object, names: Sequence[str], low: int, high: float = math.inf) -> None:
    """Raise InputError if one of these options is set and not in `low` to `high`, inclusive."""
    expected = f"{low} or more" if high == math.inf else f"{low} to {high}"
    for name in names:
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name} {value}: expected {expected}")


def summarise(names: Sequence[str]) -> str:
    """Return the first three names and the number of the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def brief_repr(value: object) -> str:
    """Return a short repr for a message; of nested values, which may be huge, only the type."""
    return repr(value)[:99] if isinstance(value, PLAIN) else type(value).__name__


def printable(text: str) -> str:
    """Return `text` with its unprintable characters escaped, as file names may hold them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
