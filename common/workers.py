"""workers.py — items of a dataset, read ahead by worker processes."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import active_children, parent_process
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from common.errors import InputError


def load(dataset: Dataset, keys: Sequence[Any], workers: int, pin: bool = False) -> Iterator[Any]:
    """Yield `dataset[key]` for each key in order, read by worker processes.

    Raises InputError if the dataset does or if a worker dies, always between two items.
    """
    loader = DataLoader(
        _ErrorsAsItems(dataset),
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=pin,
        worker_init_fn=_prepare_worker,
        # Torch draws the workers' seeds; the global generator is left to BERT's dropout.
        generator=torch.Generator(),
    )
    try:
        for item in _iterate(loader):
            if isinstance(item, InputError):
                raise item
            yield item
    except (RuntimeError, OSError, EOFError) as error:
        if not workers or str(error).startswith("Caught "):  # an error of the dataset itself
            raise
        reason = f"a process died or could not be started: {str(error) or type(error).__name__}"
        raise InputError(f"--workers {workers}: {reason} (--workers 0 needs none)") from error


def _iterate(loader: DataLoader) -> Iterator[Any]:
    """Return the loader's iterator without torch's SIGCHLD handler.

    That handler raises as soon as a worker dies, in the middle of an optimiser step for example.
    Without it the iterator raises when the next item is asked for.
    """
    handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    items = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return items


def _identity(item: Any) -> Any:
    return item


def _prepare_worker(worker: int) -> None:
    # A terminal sends these to every process of the program, which ends its workers itself.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_workers(error: Exception, item: object) -> None:
    """End this process if it is a worker, otherwise its workers."""
    if get_worker_info() is not None:
        os._exit(1)
    for process in active_children():
        process.terminate()


# Called by the thread that sends items, in workers and in the program. By default it drops an item
# that cannot be sent, for lack of memory say, and the program waits for it forever: 3 of 200 cycles
# of tests.chaos hung. A worker that has ended is noticed.
Queue._on_queue_feeder_error = staticmethod(_end_workers)  # type: ignore[attr-defined]


def _end_with_parent() -> None:
    """End this process within a second of its parent's end.

    A worker of a killed program would otherwise wait forever to write into a full pipe.
    """
    parent = parent_process()
    while parent is not None and os.getppid() == parent.pid:
        time.sleep(1)
    os._exit(1)


@dataclass(frozen=True)
class _ErrorsAsItems(Dataset):
    """Returns an InputError as an item, since an exception would lose its type in a worker."""

    dataset: Dataset

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except InputError as error:
            return error
