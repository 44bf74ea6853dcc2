"""operators.py — what kind of operation the time of some work goes to.

Kept apart from benchmark.py, which tells how fast the work is: this tells why.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler import profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's recorder prints lines of its own

WEIGHTS = "products with weights"
BATCHED = "batched products"  # attention, contexts, and the mixing of paths
SOFTMAX, REDUCTIONS, COPIES, ELEMENTWISE = "softmax", "reductions", "copies", "elementwise"
DISPATCH = "dispatch"  # Python, and what torch does before and after an operation
KINDS = (WEIGHTS, BATCHED, SOFTMAX, REDUCTIONS, COPIES, ELEMENTWISE, DISPATCH)
BY_NAME = {
    **dict.fromkeys(("mm", "addmm", "mkldnn_convolution", "convolution_backward"), WEIGHTS),
    **dict.fromkeys(("bmm", "baddbmm"), BATCHED),
    **dict.fromkeys(("_softmax", "_softmax_backward_data"), SOFTMAX),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "any", "linalg_vector_norm"), REDUCTIONS),
    **dict.fromkeys(("copy_", "cat", "fill_", "zero_", "index", "index_put_"), COPIES),
    # which torch does not mark as such
    **dict.fromkeys(("masked_fill_", "leaky_relu_backward"), ELEMENTWISE),
}


def kind_of(operator: str) -> str:
    """The kind that an operator's own time counts as, by its name in a profile, `aten::addmm`."""
    name = operator.removeprefix("aten::")
    if name in BY_NAME:
        return BY_NAME[name]
    packet = getattr(torch.ops.aten, name, None) if name != operator else None
    tags = [tag for o in packet.overloads() for tag in getattr(packet, o).tags] if packet else []
    return ELEMENTWISE if torch.Tag.pointwise in tags else DISPATCH


def shares(work: Callable[[], Any]) -> dict[str, float]:
    """The share of a CPU's time that each of KINDS takes in some work, 1 in all.

    What no operator takes is DISPATCH. The work is done once, and recorded.
    """
    with profile() as recorded:
        since = time.perf_counter()
        work()
        seconds = time.perf_counter() - since
    found = dict.fromkeys(KINDS, 0.0)
    for event in recorded.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / seconds
    found[DISPATCH] += 1 - sum(found.values())
    return {kind: round(share, 4) for kind, share in found.items()}
