"""signals.py — a program that is told to end finishes what is begun.

Kept apart from options.py, which only has to know that a program was stopped.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

FINISHING = "finishing what is begun; a second signal, a second later, ends at once"
SAME_SECONDS = 1.0  # a launcher that passes a signal on may double it


class Stopped(BaseException):  # no Exception: what goes on after a failure must not go on after it
    """A signal ended a program that has left everything in order."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[dict[int, Any]]:
    """SIGINT, SIGTERM and SIGHUP go to a handler, in the main thread; what they had before."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored, and means it
        numbers.append(signal.SIGHUP)
    usual = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield usual
    finally:
        for number, before in usual.items():
            signal.signal(number, before)


class Signals:
    """SIGINT, SIGTERM and SIGHUP are noted, not obeyed at once, so that work can be finished.

    `obey` raises Stopped for a signal that came; within `at_once` it is raised as one comes. A
    second signal has its usual effect. Elsewhere than in the main thread nothing is noted.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.process = os.getpid()
        self.waits = True
        self.heard, self.usual = ExitStack(), {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self.usual = self.heard.enter_context(handled(self._note))
        return self

    def __exit__(self, *error: object) -> None:
        self.heard.close()

    def _note(self, number: int, frame: object) -> None:
        if os.getpid() != self.process:  # a worker, which is told to end
            os._exit(128 + number)
        if self.number is None:
            self.number, self.since = number, time.monotonic()
            if not self.waits:
                self.obey()
            with suppress(OSError):  # nobody reads it any more: the terminal is closed, tee gone
                os.write(2, f"\n{signal.Signals(number).name}: {FINISHING}\n".encode())
        elif time.monotonic() - self.since > SAME_SECONDS:
            signal.signal(number, self.usual[number])
            signal.raise_signal(number)

    def obey(self) -> None:
        """Raise Stopped where a signal has come."""
        if self.number is not None:
            raise Stopped(self.number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that may be left in the middle."""
        self.obey()
        self.waits = False
        try:
            yield
        finally:
            self.waits = True
        self.obey()
