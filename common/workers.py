"""loader.py — items of a dataset, read by worker processes that leave nothing behind.

Kept apart from data.py because pictures are read by it, too. It knows nothing of what it reads.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from common.errors import InputError

log = logging.getLogger(__name__)


def load(dataset: Dataset, places: Sequence[Any], workers: int, pin: bool = False) -> Iterator[Any]:
    """`dataset[place]` for each place in order, read ahead by worker processes.

    Raises InputError, also for a worker that is gone: between two items, never within other work.
    """
    loader = DataLoader(
        _Messages(dataset),
        batch_size=None,
        sampler=places,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        worker_init_fn=_prepare_worker,
        # An iterator seeds its workers; the global generator is BERT's dropout's alone.
        generator=torch.Generator(),
    )
    return _delivered(loader)


def _delivered(loader: DataLoader) -> Iterator[Any]:
    # Torch would raise from a signal's handler in the middle of whatever runs when a worker ends,
    # an optimiser's step say; without it the loader finds out when the next item is asked for.
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        items = iter(loader)
    except OSError as error:
        reason = f"{loader.num_workers}: cannot be started: {error.strerror or error}"
        raise InputError(f"--workers {reason}; --workers 0 needs none") from error
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not loader.num_workers or str(error).startswith("Caught "):  # a bug, here or there
                raise
            message = f"a process of --workers {loader.num_workers} is gone: killed, or no memory"
            raise InputError(f"{message} (see the system's log; --workers 0 needs none)") from error
        if isinstance(item, InputError):
            raise item
        yield item


def end_with_parent() -> None:
    """In a process that another one started: end when that one has, within a second."""

    def watch(parent: int) -> None:
        # A parent that was killed tells nobody, and a full pipe to it is waited for without end.
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, args=(parent_process().pid,), daemon=True).start()


def _prepare_worker(worker: int) -> None:
    end_with_parent()
    # Ctrl-C and a closed terminal tell every process; the program ends its workers itself.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # An item that cannot be sent would be dropped with a traceback, and waited for without end.
    Queue._on_queue_feeder_error = staticmethod(_end_worker)


def _end_worker(error: Exception, item: object) -> None:
    log.error("what was read cannot be handed over: %s", str(error) or type(error).__name__)
    os._exit(1)  # which the program notices


def _as_it_is(item: Any) -> Any:
    return item


@dataclass(frozen=True)
class _Messages(Dataset):
    """A dataset that hands an InputError over as an item: it leaves a worker as it is."""

    dataset: Dataset

    def __getitem__(self, place: Any) -> Any:
        try:
            return self.dataset[place]
        except InputError as error:
            return error
        except MemoryError:
            return InputError("out of memory while features were read; fewer --workers take less")
