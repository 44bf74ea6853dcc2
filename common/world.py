"""world.py — which of the processes that torchrun started this one is. Imports no torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import InputError


@dataclass(frozen=True)
class World:
    """All processes of a program, and this one's place among them: rank 0 alone logs and writes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> "World":
        """Return the world that torchrun describes; without torchrun, one process.

        Raises InputError if the variables are wrong.
        """
        if "WORLD_SIZE" not in environment or "RANK" not in environment:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        text = " ".join(f"{name}={environment.get(name, '')}" for name in names)
        try:
            rank, size, local = (int(environment.get(name, "0")) for name in names)
        except ValueError as error:
            raise InputError(f"environment {text}: expected numbers, as torchrun sets") from error
        if not 0 <= local <= rank < size:
            raise InputError(f"environment {text}: expected LOCAL_RANK <= RANK < WORLD_SIZE")
        return cls(rank, size, local)

    def share(self, items: int, rank: int | None = None) -> range:
        """Return which of some items are those of a rank (default: this process)."""
        rank = self.rank if rank is None else rank
        return range(rank * items // self.size, (rank + 1) * items // self.size)

    def largest_share(self, items: int) -> int:
        """Return how many items the rank with the most has."""
        return -(-items // self.size)

    def padded_share(self, items: int) -> list[int]:
        """Return this process's share; the last item fills it up to the largest share.

        So tensors have the same shape on all ranks, and a rank without items computes, too.
        """
        first = self.share(items).start
        return [min(i, items - 1) for i in range(first, first + self.largest_share(items))]


ALONE = World()


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process may print; of several ones, rank 0 alone does."""
    return "WORLD_SIZE" not in environment or environment.get("RANK", "0") == "0"
