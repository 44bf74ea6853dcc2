"""scripts/benchmark.py: the operations of a pair, and the rows of a small run."""

import json
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
from scripts.benchmark import FLOPS, Case, cases, measure, seconds_of

D = 256


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
    """The cost of one more pair of encoded items; attention, mixing and routers add to it."""
    model = DIME(ModelConfig(direction=direction, img_dim=9), tiny_bert()).eval()
    a, b, c, d = (flops(model, q, n, tokens, words) for q, n in ((2, 3), (2, 5), (4, 3), (4, 5)))
    pair = (d - c - b + a) / 4  # without the work for each item
    product = 2 * tokens * D * D
    attention = 2 * 2 * 2 * tokens * tokens * D  # two layers; weights and what they sum
    crossed = 3 * (2 * tokens * words * D + 2 * tokens * words * 2 * D)
    mixing = 2 * (4 * 4) * 2 * tokens * D + 4 * 2 * tokens * D
    routers = 4 * 2 * D * 512 * 2 + 4 * 2 * 512 * (4 + 1)
    assert pair == 22 * product + attention + crossed + mixing + routers
    assert pair == pytest.approx(FLOPS[direction], rel=0.03)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little work, in this process."""
    sizes = {"RUNS": 1, "PRODUCT": (64, 8, 8), "BATCH": 2, "QUERIES": 2, "CONTEXTS": 3}
    for name, value in sizes.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(benchmark, "tune_malloc", lambda: None)
    monkeypatch.setattr(benchmark, "in_new_process", lambda function, *given: function(*given))


def test_rows_of_a_small_run(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "speed.json"
    assert run_here(monkeypatch, benchmark.main, ["--only", "eager", "fp32", "--json", path]) == 0
    report = json.loads(path.read_text())
    assert "--only eager fp32" in report["command"] and report["not_run"] == []
    rows = report["rows"]
    assert len({(r["direction"], r["precision"], r["what"]) for r in rows}) == len(rows) == 2 * 3
    assert all(row["pairs_per_s"] > 0 and row["peak_gb"] > 0.1 for row in rows)
    assert "| train_checkpointing |" in capsys.readouterr().out


def test_words_choose_rows() -> None:
    assert len(list(cases())) == 2 * 2 * 2 * 3
    assert len(list(cases(["i2t", "score", "train"]))) == 2 * 2 * 2
    assert list(cases(["t2i", "bf16", "compiled", "score"])) == [Case("t2i", "bf16", True, "score")]


def test_a_failed_compilation_is_no_row(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*inputs: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    assert measure(Case("i2t", "fp32", True, "score"), torch.device("cpu")) is None


def test_bfloat16_is_not_measured_if_it_is_emulated(monkeypatch, capsys) -> None:
    monkeypatch.setattr(benchmark, "has_fast_bf16", lambda device: False)
    assert run_here(monkeypatch, benchmark.main, ["--only", "i2t", "bf16", "eager", "score"]) == 0
    assert "Not run: i2t bf16 score" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_gpu_is_waited_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda *_: calls.append("waited"))
    assert seconds_of(lambda: calls.append("worked"), torch.device(kind)) >= 0
    assert calls == ["worked", "waited"]
