"""workers.py — items of a dataset, read ahead by worker processes."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, parent_process
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

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
    """Return the loader's iterator, which raises at the next item if a worker has died.

    Torch's SIGCHLD handler would raise at once, in the middle of an optimiser step for example.
    """
    handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    others, workers = active_children(), []  # type: ignore[var-annotated]

    def end_workers(error: Exception, key: object) -> None:
        for worker in workers:
            worker.terminate()

    with _on_unsendable(end_workers):
        items = iter(loader)
    workers += [process for process in active_children() if process not in others]
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return items


@contextmanager
def _on_unsendable(handler: Callable[[Exception, object], None]) -> Iterator[None]:
    """Call `handler` if a queue that is made meanwhile cannot send an item.

    By default such an item is dropped, for lack of memory say, and its receiver waits for it
    forever: 3 of 200 cycles of tests.chaos hung.
    """
    usual = vars(Queue)["_on_queue_feeder_error"]
    Queue._on_queue_feeder_error = staticmethod(handler)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        Queue._on_queue_feeder_error = usual  # type: ignore[attr-defined]


def _identity(item: Any) -> Any:
    return item


def _prepare_worker(worker: int) -> None:
    # A terminal sends these to every process of the program, which ends its workers itself.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _end_worker(error: Exception, item: object) -> None:
    os._exit(1)  # which the program notices


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
