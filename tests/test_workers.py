"""workers.py: workers end with the program, and their errors and a full /dev/shm are reported."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from common.errors import InputError
from common.workers import _explain, load

FULL_PIPE = """
import multiprocessing, numpy, sys, time
from common.workers import load
class Large:
    def __getitem__(self, key): return numpy.zeros(10**6)
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    items = load(Large(), range(100), 2)
    next(items)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(100)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads processes from /proc")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_read_and_end_with_a_killed_program(method: str, tmp_path: Path) -> None:
    """However they are started; also if they wait for it to read from a full pipe."""
    program = tmp_path / "program.py"
    program.write_text(FULL_PIPE)
    command, environment = [sys.executable, program, method], os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while alive := [pid for pid in workers if is_alive(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().split()[2] != "Z"


class BrokenDataset:
    def __getitem__(self, key: object) -> None:
        raise RuntimeError("a bug in a worker")


@pytest.mark.parametrize("workers", [0, 1])
def test_bug_in_a_dataset_keeps_its_traceback(workers: int) -> None:
    with pytest.raises(RuntimeError, match="a bug in a worker"):
        list(load(BrokenDataset(), [1, 2], workers))


class FullSharedMemory:
    """As a dataset, its items kill the worker; as an item, it cannot be sent."""

    def __getitem__(self, key: str) -> object:
        return self if key == "send" else os.kill(os.getpid(), signal.SIGBUS)

    def __reduce__(self) -> None:
        reason = (
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device"
        )
        raise RuntimeError(reason)


@pytest.mark.parametrize("key", ["send", "touch"])
def test_full_shared_memory_is_named_with_its_remedies(key: str) -> None:
    """A container has 64 MB of it unless it is given more."""
    with pytest.raises(InputError, match=r"--workers 1: .*--shm-size.*--ipc=host.*--workers 0"):
        list(load(FullSharedMemory(), [key], workers=1))


def test_a_bus_error_that_torch_reports_is_full_shared_memory() -> None:
    """As torch's own handler of SIGCHLD reports it."""
    text = (
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader"
    )
    assert "--shm-size" in _explain(RuntimeError(text), [])
    assert "--shm-size" not in _explain(RuntimeError("DataLoader worker (pid 7) exited"), [])


class Unsendable:
    """As a dataset, its second item cannot be pickled; as a key, it cannot be pickled at all."""

    def __getitem__(self, key: int) -> object:
        return key if key == 0 else lambda: key

    def __reduce__(self) -> None:
        raise MemoryError


@pytest.mark.parametrize("keys", [[0, 1], [0, 0, 0, 0, Unsendable()]])
def test_an_item_or_key_that_cannot_be_sent_ends_the_workers(keys: list) -> None:
    """By default, the program would wait for it forever."""
    items = load(Unsendable(), keys, workers=1)
    assert next(items) == 0
    with pytest.raises(InputError, match="--workers 1"):
        list(items)
