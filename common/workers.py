"""workers.py — items of a dataset, read ahead by worker processes."""

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import active_children, parent_process
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from common.errors import InputError

# Messages of torch, in the worker or in the program, if /dev/shm is full: workers pass tensors on
# in shared memory.
SHM_MESSAGES = ("shared memory", "Bus error", "unable to mmap", "No space left on device")
NO_SHM = errno.ENOSPC  # exit status of such a worker


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
    processes: list[BaseProcess] = []
    try:
        for item in _iterate(loader, processes):
            if isinstance(item, InputError):
                raise item
            yield item
    except (RuntimeError, OSError, EOFError) as error:
        if not workers or str(error).startswith("Caught "):  # an error of the dataset itself
            raise
        reason = _explain(error, processes)
        raise InputError(f"--workers {workers}: {reason} (--workers 0 needs none)") from error


def _iterate(loader: DataLoader, processes: list[BaseProcess]) -> Iterator[Any]:
    """Return the loader's iterator, which raises at the next item if a worker has died.

    The workers are added to `processes`. Torch's SIGCHLD handler would raise at once, in the middle
    of an optimiser step for example.
    """
    handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    others = active_children()

    def end_workers(error: Exception, key: object) -> None:
        for process in processes:
            process.terminate()

    # By default, a queue drops an item that it cannot send, for lack of memory say, and its
    # receiver waits for it forever: 3 of 200 cycles of tests.chaos hung.
    usual = vars(Queue)["_on_queue_feeder_error"]
    Queue._on_queue_feeder_error = staticmethod(end_workers)  # type: ignore[attr-defined]
    try:
        items = iter(loader)
    finally:
        Queue._on_queue_feeder_error = usual  # type: ignore[attr-defined]
    processes += [process for process in active_children() if process not in others]
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return items


def _explain(error: Exception, processes: Sequence[BaseProcess]) -> str:
    """Return why reading failed."""
    wait([process.sentinel for process in processes], timeout=1)  # until it has an exit status
    full = any(process.exitcode in (NO_SHM, -signal.SIGBUS) for process in processes)
    if full or _is_out_of_shm(error):
        return "no shared memory is left in /dev/shm; a container needs --shm-size 8g or --ipc=host"
    return f"a process died or could not be started: {str(error) or type(error).__name__}"


def _is_out_of_shm(error: Exception) -> bool:
    return any(text in str(error) for text in SHM_MESSAGES)


def _identity(item: Any) -> Any:
    return item


def _prepare_worker(worker: int) -> None:
    # A terminal sends these to every process of the program, which ends its workers itself.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_program, args=[os.getppid()], daemon=True).start()
    Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _end_worker(error: Exception, item: object) -> None:
    os._exit(NO_SHM if _is_out_of_shm(error) else 1)  # which the program notices


def _end_with_program(parent: int) -> None:
    """End this process within a second of the program's end; `parent` is its parent process.

    A worker of a killed program would otherwise wait forever to write into a full pipe. A parent
    may be a fork server, and another process may have inherited what `is_alive` asks.
    """
    program = parent_process()
    while program is not None and program.is_alive() and os.getppid() == parent:
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
