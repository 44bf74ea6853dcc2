"""Functions and programs that tests run in several processes, connected by gloo."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.distributed import connected
from common.world import World


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def on_ranks(folder: Path, size: int, work: Callable[[World], Any]) -> list[Any]:
    """Return what `work(world)` returns in each of `size` processes: tensors and plain data."""
    port, context = free_port(), multiprocessing.get_context("fork")
    worlds = [World(rank, size, rank) for rank in range(size)]
    paths = [folder / f"rank{world.rank}_of_{size}.pt" for world in worlds]

    def run(world: World, path: Path) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        status = 1
        try:
            with connected(world, "cpu"):
                torch.save(work(world), path)
            status = 0
        except BaseException:  # also pytest's own
            traceback.print_exc()
        finally:
            os._exit(status)

    jobs = zip(worlds, paths, strict=True)
    processes = [context.Process(target=run, args=job) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0] * size
    return [torch.load(path, weights_only=True) for path in paths]
