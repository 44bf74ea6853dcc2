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
from scripts.parts.workload import Case, Sizes, new_train_step, training


def scaling_rows(sizes: Sizes, processes: int) -> list[dict[str, Any]]:
    """Time both ways of using so many cores, in both directions."""
    return [
        {
            "direction": direction,
            "processes": size,
            "threads": processes // size,
            "pairs_per_s": round(pairs_per_second(direction, sizes, size, processes // size), 1),
        }
        for direction in get_args(Direction)
        for size in (1, processes)
    ]


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
