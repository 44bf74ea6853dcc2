"""What a training step and the scoring of a chunk may cost on a GPU, counted without one.

The budget is the table of the last counts, `python -m tests.counting --json results/counts.json`.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from conftest import ROOT
from functorch.compile import make_boxed_func
from test_model import small_batch, small_model
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from common.config import Precision
from common.files import read_json
from tests.counting import Case, Count, cases, count, row_of

ROWS = read_json(ROOT / "results/counts.json", "counts")["rows"]
MARGIN = 1.01  # versions of torch and transformers differ a little
MOST_GB = {"step": 8, "step_checkpointing": 3, "chunk": 8}  # alive at once


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: "-".join(vars(case).values()))
def test_costs_stay_within_the_budget(case: Case) -> None:
    [budget] = [row for row in ROWS if vars(case).items() <= row.items()]
    counter = count(case)
    assert not counter.syncs
    for name, value in row_of(case, counter).items():
        if name not in vars(case):
            assert value <= MARGIN * budget[name], (name, value, budget[name])
    assert budget["peak_gb"] <= MOST_GB[case.what]


@pytest.mark.parametrize(("direction", "precision"), [("i2t", "fp32"), ("t2i", "bf16")])
def test_compiled_routing_is_one_graph_that_never_waits(
    direction: str, precision: Precision
) -> None:
    """A graph of the forward pass and one of the backward pass: a break would be an error."""
    counters: list[Count] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        counters.append(counter := Count())

        def run(*values: Tensor) -> Sequence[Tensor]:
            with counter:
                return graph(*values)

        return make_boxed_func(run)

    model, batch = small_model(direction, num_layer_routing=2).train(), small_batch()
    model.precision = precision
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    torch.compiler.reset()
    model.space.compile_routes()
    compiled = model.space.compiled
    compiled.compiled = torch.compile(model.space.route, backend=backend, fullgraph=True)
    output = model(*batch, 3)
    (output.scores.sum() + output.paths.sum()).backward()
    assert not compiled.failed
    assert len(counters) == 2
    for counter in counters:
        assert counter.kernels.total() > 100 and not counter.syncs


def test_kernels_bytes_and_memory_are_counted() -> None:
    a, index = torch.ones(1000), torch.tensor([3, 4])  # 4,000 bytes
    with Count() as counter:
        counter.track([a])
        b = a.view(10, 100).expand(5, 10, 100) * 2  # a view, an expansion of it, one kernel
        b.add_(1)
        del b
        c = a[index]
        c.zero_()
        torch.add(a, 1, out=a)
    assert counter.kernels == {"aten::mul": 1, "aten::add_": 1, "aten::index": 1} | {
        "aten::zero_": 1,
        "aten::add": 1,
    }
    assert counter.bytes["aten::mul"] == 4000 + 20000 and counter.bytes["aten::add_"] == 2 * 20000
    assert counter.bytes["aten::index"] == 2 * 8 + 2 * 2 * 4 and counter.bytes["aten::zero_"] == 8
    assert counter.bytes["aten::add"] == 2 * 4000
    assert counter.peak == 4000 + 20000 and counter.live == 4000 + 8
    assert not counter.syncs


@pytest.mark.parametrize(
    "question",
    [
        lambda x: bool(x.any()),
        lambda x: int(x.sum()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x + 1),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.tolist(),
        lambda x: x.index_put_((x > 0,), torch.tensor(1.0)),
    ],
)
def test_what_waits_for_the_device_is_counted(question) -> None:
    with Count() as counter:
        question(torch.ones(3))
    assert counter.syncs
