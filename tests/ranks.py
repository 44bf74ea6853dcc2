"""Functions and programs that tests run in several processes, as torchrun starts them."""

import logging
import multiprocessing
import multiprocessing.process
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from common import cli
from common.distributed import connected
from common.world import World

LONGEST = 240  # seconds

context = multiprocessing.get_context("fork")  # what a test has changed holds in the processes


def start(
    folder: Path, size: int, target: Callable[..., None], *args: Any
) -> list[multiprocessing.process.BaseProcess]:
    """Start `target(folder, *args)` in `size` processes with the variables that torchrun sets."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    processes = []
    for rank in range(size):
        world = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank}
        environment = world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = context.Process(target=_run, args=(environment, target, folder, *args))
        process.start()
        processes.append(process)
    return processes


def _run(environment: dict[str, Any], target: Callable[..., None], *args: Any) -> None:
    os.environ |= {name: str(value) for name, value in environment.items()}
    torch.set_num_threads(1)
    target(*args)


def end(processes: Sequence[multiprocessing.process.BaseProcess]) -> list[int]:
    """Wait for the end of all processes; returns their exit statuses."""
    deadline = time.monotonic() + LONGEST
    for process in processes:
        process.join(timeout=max(0, deadline - time.monotonic()))
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return statuses


def on_ranks(folder: Path, size: int, work: Callable[[World], Any]) -> list[Any]:
    """Return what `work(world)` returns in each of `size` connected processes.

    They are tensors and plain data.
    """
    assert end(start(folder, size, _save, work)) == [0] * size
    return [torch.load(folder / f"{rank}_of_{size}.pt", weights_only=True) for rank in range(size)]


def _save(folder: Path, work: Callable[[World], Any]) -> None:
    world = World.of(os.environ)
    with connected(world):
        torch.save(work(world), folder / f"{world.rank}_of_{world.size}.pt")


class Programs:
    """A program in several processes, which have their standard errors in files."""

    def __init__(
        self, folder: Path, size: int, main: Callable[[], None], argvs: Sequence[Sequence[str]]
    ) -> None:
        """Start `main` with a command line for each process, or with one for all of them."""
        self.folder = folder
        self.processes = start(folder, size, _program, main, argvs)

    def end(self) -> list[int]:
        """Wait for the end; returns the exit statuses."""
        return end(self.processes)

    def errors(self, rank: int = 0) -> str:
        """Return what a process has written to its standard error."""
        path = self.folder / f"stderr{rank}.txt"
        return path.read_text() if path.exists() else ""

    def wait_for(self, text: str) -> None:
        """Wait until process 0 has written a text."""
        deadline = time.monotonic() + LONGEST
        while text not in self.errors():
            assert time.monotonic() < deadline and self.processes[0].is_alive(), self.errors()
            time.sleep(0.02)


def _program(folder: Path, main: Callable[[], None], argvs: Sequence[Sequence[str]]) -> None:
    rank = int(os.environ["RANK"])
    sys.stderr = (folder / f"stderr{rank}.txt").open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    sys.argv = [f"{main.__module__}.py", *map(str, argvs[rank % len(argvs)])]
    logging.getLogger().handlers.clear()
    cli.run(main)
