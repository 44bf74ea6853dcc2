"""signals.py — a signal asks a program to end; the program ends where its files are consistent."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from common.world import is_first

DOUBLED_SECONDS = 1.0  # launchers pass a signal on, so that it may arrive twice within this time


class Stopped(BaseException):  # not an Exception: no error handler may continue after it
    """A signal ended the program, and its files are consistent."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[dict[int, Any]]:
    """Handle SIGINT, SIGTERM and SIGHUP in the main thread; yields the previous handlers."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it stays ignored
        numbers.append(signal.SIGHUP)
    previous: dict[int, Any] = {n: signal.signal(n, handler) for n in numbers}
    try:
        yield previous
    finally:
        for number, action in previous.items():
            signal.signal(number, action)


class Signals:
    """Notes the first signal; `check` raises Stopped where the program can end.

    A second signal, at least a second later, has its usual effect.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.since = 0.0
        self.previous: dict[int, Any] = {}
        self.handlers = ExitStack()

    def __enter__(self) -> "Signals":
        self.previous = self.handlers.enter_context(handled(self._note))
        return self

    def __exit__(self, *error: object) -> None:
        self.handlers.close()

    def _note(self, number: int, frame: object) -> None:
        if self.received is None:
            self.received, self.since = number, time.monotonic()
            name = signal.Signals(number).name
            if not is_first():
                return
            with suppress(OSError):  # standard error may be closed: the terminal, or tee, is gone
                os.write(2, f"\n{name}: ending soon; a second signal ends at once\n".encode())
        elif time.monotonic() - self.since > DOUBLED_SECONDS:
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)

    def check(self) -> None:
        """Raise Stopped if a signal came."""
        if self.received is not None:
            raise Stopped(self.received)
