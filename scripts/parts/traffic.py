"""traffic.py — what the processes of a training step send each other, from sizes, and how long.

Each process sends to its neighbour in a ring of N: of gathered bytes the share (N-1)/N, of summed
ones twice that. The ring crosses each cable between machines once in each direction, so the
slowest cable sets the time, however many processes a machine has.
"""

from dataclasses import dataclass

from common.config import Direction
from common.world import World
from scripts.parts.tables import markdown
from scripts.parts.workload import FLOPS, REGIONS, TRAINING, WORDS

FLOAT = 4  # bytes
PATHS = 128  # width of a path embedding
CABLES = {"10 GbE": 1.25e9, "100 GbE": 12.5e9, "NVLink": 200e9}  # bytes a second, one direction
FLOP_RATE = 50e12  # of a GPU in such a step; an assumption


@dataclass(frozen=True)
class Step:
    """A training step of several processes, with as many extra negatives as pairs."""

    direction: Direction
    batch: int
    processes: int
    dim: int = 256
    hidden: int = 768  # of BERT
    weights: int = 6_069_668  # of t2i; i2t lacks a batch normalisation
    regions: int = REGIONS
    words: int = WORDS

    @property
    def _queries(self) -> int:  # padded, so that every process has as many
        return self.processes * World(0, self.processes).largest_share(self.batch)

    @property
    def gathered(self) -> int:
        """Bytes of all gathered rows: contexts, then scores and what the path loss compares."""
        tokens = self.regions if self.direction == "t2i" else self.words
        contexts = 2 * self._queries
        encoded = contexts * ((tokens + 1) * self.dim * FLOAT + tokens)  # pooled vector, mask
        return encoded + self._queries * (2 * self.batch + PATHS + self.hidden) * FLOAT

    @property
    def summed(self) -> int:
        """Bytes of all sums: gradients of gathered rows, batch statistics, gradients of weights."""
        tokens = self.regions if self.direction == "t2i" else self.words
        encoded = 2 * self._queries * (tokens + 1) * self.dim * FLOAT
        scores = self._queries * (2 * self.batch + PATHS) * FLOAT
        return encoded + scores + (4 * self.dim + self.weights) * FLOAT

    @property
    def sent(self) -> float:
        """Bytes that a process sends."""
        return (self.gathered + 2 * self.summed) * (self.processes - 1) / self.processes

    @property
    def operations(self) -> float:
        """Floating-point operations of a process in the routing space."""
        pairs = 2 * self.batch**2 / self.processes
        return FLOPS[self.direction] * TRAINING * pairs


def traffic_table() -> str:
    """Return the table of docs/training.md."""
    head = ["", "GPUs", "batch", "TFLOP a GPU", f"ms at {FLOP_RATE / 1e12:.0f} TFLOP/s"]
    head += ["MB sent by a GPU", *(f"ms by {name}" for name in CABLES)]
    rows = []
    for processes, batch in ((8, 32), (8, 256), (16, 256), (16, 512)):
        for direction in FLOPS:
            step = Step(direction, batch, processes)
            milliseconds = [1e3 * step.sent / rate for rate in CABLES.values()]
            rows.append(
                [
                    *(direction, str(processes), str(batch), f"{step.operations / 1e12:.2f}"),
                    f"{1e3 * step.operations / FLOP_RATE:.1f}",
                    f"{step.sent / 1e6:.0f}",
                    *(f"{each:.1f}" for each in milliseconds),
                ]
            )
    return markdown(head, rows)
