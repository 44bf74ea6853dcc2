"""scripts/benchmark.py: what a pair costs, and the rows of a small run."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import run_here
from test_model import tiny_bert
from torch.utils.flop_counter import FlopCounterMode

from common.config import ModelConfig
from model import DIME
from router import Modality
from scripts import benchmark
from scripts.benchmark import FLOPS, cases
from scripts.parts import workloads
from scripts.parts.operators import (
    BATCHED,
    COPIES,
    DISPATCH,
    ELEMENTWISE,
    REDUCTIONS,
    SOFTMAX,
    WEIGHTS,
    kind_of,
    shares,
)
from scripts.parts.workloads import Case

D, CPU = 256, torch.device("cpu")


def flops(model: DIME, queries: int, contexts: int, tokens: int, words: int) -> int:
    """Floating-point operations of the products that scoring so many pairs takes."""
    query, context = (
        Modality(torch.randn(n, m, D), torch.randn(n, D), torch.ones(n, m, dtype=torch.bool))
        for n, m in ((queries, tokens), (contexts, words))
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.space(query, context, queries * contexts)
    return counter.get_total_flops()


@pytest.mark.parametrize(("direction", "tokens", "words"), [("i2t", 36, 16), ("t2i", 32, 36)])
def test_a_pair_costs_22_products(direction: str, tokens: int, words: int) -> None:
    """What a further pair of known items adds; attention, mixing and routers beside them."""
    # a new one, whose gates are all open
    model = DIME(ModelConfig(direction=direction, img_dim=9), tiny_bert()).eval()
    a, b, c, d = (flops(model, q, n, tokens, words) for q, n in ((2, 3), (2, 5), (4, 3), (4, 5)))
    found = (d - c - b + a) / 4  # of a pair, without what is done once an item
    product = 2 * tokens * D * D
    attention = 2 * 2 * 2 * tokens * tokens * D  # two layers; weights and what they sum
    crossed = 3 * (2 * tokens * words * D + 2 * tokens * words * 2 * D)
    mixing = 2 * (4 * 4) * 2 * tokens * D + 4 * 2 * tokens * D
    routers = 4 * 2 * D * 512 * 2 + 4 * 2 * 512 * (4 + 1)
    assert found == 22 * product + attention + crossed + mixing + routers
    assert found == pytest.approx(FLOPS[direction], rel=0.03)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little work, in this process."""
    for name, value in {"RANKED": (30, 150), "RUNS": 1, "PRODUCT": (64, 8, 8)}.items():
        monkeypatch.setattr(benchmark, name, value)
    for name, value in {"BATCH": 2, "QUERIES": 2, "CONTEXTS": 3, "PLAIN": 2}.items():
        monkeypatch.setattr(workloads, name, value)
    monkeypatch.setattr(benchmark, "tune_malloc", lambda: None)
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", Here)


def test_rows_of_a_small_run(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(benchmark, "has_fast_bf16", lambda device: True)
    path = tmp_path / "speed.json"
    assert run_here(monkeypatch, benchmark.main, ["--only", "eager", "fp32", "--json", path]) == 0
    found = json.loads(path.read_text())
    assert found["ranks"]["images"] == 30 and found["ranks"]["seconds"] > 0
    assert found["machine"] and "--only eager fp32" in found["command"]
    assert found["minutes"] >= 0 and found["not_run"] == []
    kinds = {(r["direction"], r["precision"], r["what"], r["bert"]) for r in found["rows"]}
    assert len(kinds) == len(found["rows"]) == 2 * 5
    names = {"direction", "precision", "compiled", "bert", "what", "pairs_per_s", "seconds"}
    for row in found["rows"]:
        assert row.keys() == names | {"share", "peak_gb", "product_gflops"}
        assert row["pairs_per_s"] > 0 and row["peak_gb"] > 0.1
    assert [(p["direction"], p["what"]) for p in found["profiles"]] == [
        *(("i2t", "score"), ("i2t", "train"), ("t2i", "score"), ("t2i", "train"))
    ]
    for profile in found["profiles"]:
        assert sum(profile["shares"].values()) == pytest.approx(1, abs=1e-3)
        assert all(share > 0 for share in profile["shares"].values())
    printed = capsys.readouterr().out
    assert "| plain |" in printed and "| products with weights |" in printed


def test_kinds_of_operators() -> None:
    kinds = {
        WEIGHTS: ("aten::addmm", "aten::mm"),
        BATCHED: ("aten::bmm",),
        SOFTMAX: ("aten::_softmax",),
        REDUCTIONS: ("aten::mean", "aten::amax"),
        COPIES: ("aten::cat", "aten::copy_"),
        ELEMENTWISE: ("aten::mul", "aten::add_", "aten::threshold_backward"),
        DISPATCH: ("aten::view", "AddmmBackward0", "autograd::engine::x: AddmmBackward0", "add"),
    }
    assert {name: kind_of(name) for names in kinds.values() for name in names} == {
        name: kind for kind, names in kinds.items() for name in names
    }


def test_most_of_a_large_products_time_is_the_products() -> None:
    a, b = torch.randn(500, 500), torch.randn(500, 500)
    found = shares(lambda: [a @ b for _ in range(20)])
    assert found[WEIGHTS] > 0.5 and sum(found.values()) == pytest.approx(1, abs=1e-3)


class Here:
    """A pool of no process."""

    def __init__(self, *given: object, **options: object) -> None: ...

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *error: object) -> None: ...

    def submit(self, function, *given):
        self.found = function(*given)
        return self

    def result(self):
        return self.found


def test_a_processor_without_bfloat16_leaves_it_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(benchmark, "apart", lambda *given: {})
    monkeypatch.setattr(benchmark, "has_fast_bf16", lambda device: False)
    monkeypatch.setattr(benchmark, "tune_malloc", lambda: None)
    assert run_here(monkeypatch, benchmark.main, ["--only", "bf16", "score"]) == 0
    assert "Not run: bfloat16, which this processor emulates" in capsys.readouterr().out


def test_some_cases() -> None:
    assert list(cases(["i2t", "fp32", "score"], CPU)) == [
        Case("i2t", "fp32", False, ("score",), CPU),
        Case("i2t", "fp32", True, ("score",), CPU),
    ]


@pytest.mark.parametrize("compiler", [False, True])
def test_every_row_there_is(compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training within a limit of memory is told of as it is done: compiled where that pays."""
    monkeypatch.setattr(
        benchmark, "gains_by_compiling", lambda device, precision: compiler and precision == "bf16"
    )
    found = {
        (c.direction, c.precision, c.compiled, kind) for c in cases(None, CPU) for kind in c.kinds
    }
    every = set(product(("i2t", "t2i"), ("fp32", "bf16"), (False, True), ("score", "train")))
    every |= set(product(("i2t", "t2i"), ("fp32", "bf16"), (False,), ("plain",)))
    for precision in ("fp32", "bf16"):
        usual = compiler and precision == "bf16"
        every |= {(d, precision, usual, "train_under_2.5GB") for d in ("i2t", "t2i")}
    assert found == every


def test_what_failed_to_compile_is_not_run(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(*given: object, **more: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    asked = ["--only", "i2t", "fp32", "score"]
    assert run_here(monkeypatch, benchmark.main, asked) == 0
    said = capsys.readouterr().out
    assert said.count("| score |") == 1 and "| eager |" in said
    assert "Not run: i2t fp32 compiled, which failed to compile.\n" in said
