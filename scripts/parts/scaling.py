"""scaling.py — training by several CPU processes of one thread, and by one of many threads."""

import multiprocessing
import os
import socket
import statistics
import time
from typing import Any, get_args

from common.config import Direction
from common.memory import tune_malloc
from common.world import World
from scripts.parts.tables import markdown
from scripts.parts.workload import Case, Sizes, new_train_step, training


def scaling_table(sizes: Sizes, processes: int) -> str:
    """Time both ways of using so many cores; returns a table of pairs a second."""
    head = ["", "processes", "threads of each", "pairs/s", "times as fast"]
    rows = []
    for direction in get_args(Direction):
        rates = [
            pairs_per_second(direction, sizes, size, processes // size) for size in (1, processes)
        ]
        for size, rate in zip((1, processes), rates, strict=True):
            shape = [direction, str(size), str(processes // size)]
            rows.append([*shape, f"{rate:.0f}", f"{rate / rates[0]:.2f}"])
    return markdown(head, rows)


def pairs_per_second(direction: Direction, sizes: Sizes, size: int, threads: int) -> float:
    """Return the rate of training steps, eager and in float32, of `size` processes together."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    worlds = [World(rank, size, rank) for rank in range(size)]
    ranks = [
        context.Process(target=_time, args=(direction, sizes, world, threads, port, results))
        for world in worlds
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise RuntimeError(f"processes ended with {[rank.exitcode for rank in ranks]}")
    return results.get()


def _time(
    direction: Direction, sizes: Sizes, world: World, threads: int, port: int, results: Any
) -> None:
    import torch

    from common.distributed import connected

    tune_malloc()
    torch.set_num_threads(threads)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with connected(world):
        case = Case(direction, "fp32", compiled=False, what="train")
        step = new_train_step(case, sizes, torch.device("cpu"), world)
        pairs, work = training(step, sizes)
        seconds = []
        for _ in range(sizes.warm_up + sizes.runs):
            since = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - since)
        if world.rank == 0:
            results.put(pairs / statistics.median(seconds[sizes.warm_up :]))
