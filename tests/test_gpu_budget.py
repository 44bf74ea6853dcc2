"""What a training step and the scoring of a chunk may cost on a GPU, counted without one.

The budget is the table of the last counts, `python -m tests.counting --json results/counts.json`.
"""

from functools import cache

import pytest
import torch
from conftest import ROOT

from common.files import read_json
from tests.counting import Case, Count, cases, count, row_of

ROWS = read_json(ROOT / "results/counts.json", "counts")["rows"]
MARGIN = 1.01  # versions of torch and transformers differ a little
counted = cache(count)


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: "-".join(vars(case).values()))
def test_costs_stay_within_the_budget(case: Case) -> None:
    [budget] = [row for row in ROWS if vars(case).items() <= row.items()]
    for name, value in row_of(case, counted(case)).items():
        if name not in vars(case):
            assert value <= MARGIN * budget[name], (name, value, budget[name])


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
