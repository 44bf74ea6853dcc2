"""distributed.py — what the processes of torchrun do together: start, agree, gather, add up.

With one process every function returns its input, and torch.distributed is not used at all.

Let L be the loss, of which each of N ranks computes an equal copy. The ranks together minimise the
sum of L / N. So the adjoint of a gather adds up the gradients that all ranks have for a row, and
the gradient of a weight is the sum over all ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.errors import InputError, brief_repr, require
from common.world import World

# How long a process waits for another one, which may save or encode meanwhile. One that dies closes
# its connections, and nobody waits for it.
TIMEOUT = timedelta(minutes=30)


def device_name(name: str, world: World) -> str:
    """Return the device of this process; among several, each takes the GPU of its local rank.

    Raises InputError if `name` is one GPU, or has no collectives.
    """
    if world.size == 1:
        return name
    expected = "expected auto, cuda or cpu under torchrun, which gives each process its own GPU"
    require(name in ("auto", "cuda", "cpu"), f"--device {name}: {expected}")
    is_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return f"cuda:{world.local_rank}" if is_cuda else "cpu"


class ProcessLost(InputError):
    """Another process has ended, and none can go on without it."""


@contextmanager
def connected(world: World) -> Iterator[None]:
    """Connect the processes: NCCL for tensors on CUDA GPUs, gloo for those in main memory.

    Raises InputError if they cannot be connected.
    """
    if world.size == 1:
        yield
        return
    from torch import distributed

    has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
            timeout=TIMEOUT,
            rank=world.rank,
            world_size=world.size,
        )
    except (RuntimeError, ValueError) as error:  # of many types: network, store, back end
        reason = str(error).splitlines()[0]
        raise InputError(f"torchrun: the processes cannot connect: {reason}") from error
    yield
    distributed.destroy_process_group()  # after an error, others may not answer any more


@contextmanager
def _naming_loss() -> Iterator[None]:
    """Raise ProcessLost if a collective fails, because another process has ended."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split("] ")[-1].split(". ")[0]
        ended = "another process has ended, and torchrun's report names it"
        raise ProcessLost(f"{ended} ({reason})") from error


def gather_objects(world: World, item: Any) -> list[Any]:
    """Return the items of all ranks, in their order."""
    items = [item] * world.size
    if world.size > 1:
        with _naming_loss():
            torch.distributed.all_gather_object(items, item)
    return items


@contextmanager
def agreed(world: World) -> Iterator[None]:
    """Within, a process does its own work; if it raises InputError in one, it does so in all."""
    own: InputError | None = None
    try:
        yield
    except InputError as error:
        own = error
    reasons = gather_objects(world, own and str(own))
    if own is not None and (world.rank == 0 or reasons[0] is None):
        raise own
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise InputError(f"process {rank}: {reason}" if rank else reason) from own


def check_equal(world: World, facts: Mapping[str, Any]) -> None:
    """Raise InputError in all processes if a fact of one is not that of process 0."""
    first, *others = gather_objects(world, dict(facts))
    for rank, theirs in enumerate(others, 1):
        for name, fact in theirs.items():
            problem = f"process {rank}: {name}: {brief_repr(fact)}"
            require(
                fact == first[name],
                f"{problem}; expected {brief_repr(first[name])}, as in process 0",
            )


def largest(world: World, number: int) -> int:
    """Return the largest of the numbers of all ranks. Asks no GPU."""
    if world.size == 1:
        return number
    tensor = torch.tensor(number)
    with _naming_loss():
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return int(tensor)


def add_up(world: World, tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, without gradient; the tensor is overwritten."""
    if world.size > 1:
        with _naming_loss():
            torch.distributed.all_reduce(tensor)
    return tensor


def send_from_first(world: World, tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors by those of rank 0."""
    for tensor in tensors if world.size > 1 else ():
        with _naming_loss():
            torch.distributed.broadcast(tensor, 0)


def gather_at_first(world: World, own: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Return at rank 0 the vectors of all ranks, of so many numbers each; nothing elsewhere.

    They are in main memory.
    """
    every = [own, *(own.new_empty(count) for count in counts[1:])] if world.rank == 0 else []
    with _naming_loss():
        for rank in range(1, world.size):
            if world.rank == rank and counts[rank]:
                torch.distributed.send(own, 0)
            elif world.rank == 0 and counts[rank]:
                torch.distributed.recv(every[rank], rank)
    return every


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, world: World) -> Tensor:  # type: ignore[override]
        ctx.world = world
        every = own.new_empty(world.size, *own.shape)
        with _naming_loss():
            torch.distributed.all_gather(list(every.unbind()), own.contiguous())
        return every

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return add_up(ctx.world, gradient.contiguous().clone())[ctx.world.rank], None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, world: World) -> Tensor:  # type: ignore[override]
        ctx.world = world
        return add_up(world, own.contiguous().clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return add_up(ctx.world, gradient.contiguous().clone()), None


@dataclass(frozen=True)
class Rows:
    """Rows that are shared out to the processes, in one block or in several.

    Each rank holds its padded share of the first block, then that of the second one, and so on.
    """

    world: World
    counts: tuple[int, ...]  # rows of each block, of all ranks together

    @property
    def count(self) -> int:
        """Number of rows."""
        return sum(self.counts)

    def gather(self, own: Tensor) -> Tensor:
        """Return all rows, with gradient: those of the first block of all ranks come first."""
        flags = own.byte() if own.dtype == torch.bool else own  # gloo has no bool
        every = _Gather.apply(flags, self.world)  # [ranks, rows of a rank, ...]
        parts, first = [], 0
        for count in self.counts:
            for rank in range(self.world.size):
                parts.append(every[rank, first : first + len(self.world.share(count, rank))])
            first += self.world.largest_share(count)
        return torch.cat(parts).to(own.dtype)

    def mean(self, own: Tensor) -> Tensor:
        """Return the mean `[D]` over all rows and columns of `own` `[rows of a rank, columns, D]`.

        There is one block of rows.
        """
        (count,) = self.counts
        real = own[: len(self.world.share(count))]  # the others are padding
        return _Sum.apply(real.sum((0, 1)), self.world) / (count * own.shape[1])


@dataclass(frozen=True)
class SharedBatch:
    """How a batch is shared out: pairs, then the extra negatives of its contexts."""

    world: World
    pairs: int  # of all ranks together
    extras: int

    @property
    def queries(self) -> Rows:
        """The rows of the queries."""
        return Rows(self.world, (self.pairs,))

    @property
    def contexts(self) -> Rows:
        """The rows of the contexts."""
        return Rows(self.world, (self.pairs, self.extras))
