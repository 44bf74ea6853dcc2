"""scripts/benchmark.py: the operations of a pair, and the rows of a small run."""

import json
import re
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_here
from test_model import tiny_bert
from torch.utils.flop_counter import FlopCounterMode

from common.config import ModelConfig
from model import DIME
from router import Modality
from scripts import benchmark
from scripts.benchmark import FLOPS, cases, measure, seconds_of
from scripts.parts import feeding
from scripts.parts.tables import scaling_table, speed_rows
from scripts.parts.workload import SIZES, Case, new_train_step
from training import device_features

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


TINY = SIZES["tiny"]
CPU = torch.device("cpu")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool:
        def __init__(self, *given: object) -> None:
            self.shutdown = lambda: None

        def submit(self, function: Callable, *inputs: object) -> Future:
            future: Future = Future()
            try:
                future.set_result(function(*inputs))
            except Exception as error:
                future.set_exception(error)
            return future

    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(benchmark, "tune_malloc", lambda: None)


def run_tiny(monkeypatch: pytest.MonkeyPatch, *more: object) -> int:
    return run_here(monkeypatch, benchmark.main, ["--sizes", "tiny", *more])


def test_rows_of_a_small_run(
    in_this_process: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    path = tmp_path / "speed.json"
    assert run_tiny(monkeypatch, "--only", "eager", "fp32", "--json", path) == 0
    report = json.loads(path.read_text())
    assert "--only eager fp32" in report["command"] and report["not_run"] == []
    rows = report["rows"]
    assert len({(r["direction"], r["precision"], r["what"]) for r in rows}) == len(rows) == 2 * 3
    assert all(row["pairs_per_s"] > 0 and row["peak_gb"] > 0.1 for row in rows)
    assert all(row["share"] > 0 and row["copy_share"] > 0 for row in rows)
    loop = {f"{name}_pairs_per_s" for name in ("bare", "workers")}
    for row in rows:  # a CPU has its features in main memory
        assert loop & row.keys() == (loop if row["what"] == "train" else set())
        assert "on_device_pairs_per_s" not in row and all(row[key] > 0 for key in loop & row.keys())
    assert "| train_checkpointing |" in capsys.readouterr().out
    words = ["i2t", "eager", "fp32", "train"]
    assert run_tiny(monkeypatch, "--only", *words, "--no-loop", "--json", path) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert not loop & row.keys()


def test_the_table_has_the_loop_of_train_py_if_it_was_measured() -> None:
    speed = ROOT / "results/speed.json"
    (row, *_) = (r for r in json.loads(speed.read_text())["rows"] if r["what"] == "train")
    row = {key: value for key, value in row.items() if not key.startswith(("bare", "work", "on_"))}
    assert "train.py" not in speed_rows([row])
    loop = {"bare_pairs_per_s": 200.0, "workers_pairs_per_s": 150.0}
    head, _, without, with_loop = speed_rows([row, row | loop]).splitlines()
    assert "train.py, workers" in head and "on_device" not in head
    assert without.endswith("|  |") and with_loop.endswith("| 150, 75 % |")


def test_a_gpu_holds_the_features_of_the_loop_too(tmp_path: Path, monkeypatch) -> None:
    train_step = new_train_step(Case("t2i", "fp32", False, "train"), TINY, CPU)
    data, taken = feeding.write_data(tmp_path, TINY.images), []
    load = device_features.load_features
    monkeypatch.setattr(device_features, "load_features", lambda *given: load(*given[:2], True))
    step = train_step.step
    monkeypatch.setattr(train_step, "step", lambda batch: taken.append(batch) or step(batch))
    steps = dict(feeding.loops(train_step, lambda: taken.append(None), TINY, data))
    assert list(steps) == ["bare", "workers", "on_device"]
    warm_up = len(taken)
    for work in steps.values():
        work()
    assert len(taken) == warm_up + 3 * TINY.steps
    read, gathered = taken[-2 * TINY.steps : -TINY.steps], taken[-TINY.steps :]
    assert all(torch.equal(a.regions, b.regions) for a, b in zip(read, gathered, strict=True))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(read, gathered, strict=True))
    assert gathered[0].mask.sum(1).min() >= 9 and gathered[0].mask.sum(1).max() <= 21


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_bytes_are_the_counted_ones(precision: str) -> None:
    chunk, step = (
        benchmark.bytes_moved(Case("t2i", precision, True, what), 1000)
        for what in ("score", "train_checkpointing")
    )
    assert 2e9 < chunk < step < 100e9  # of 1,000 pairs


def test_words_choose_rows() -> None:
    assert len(list(cases())) == 2 * 3 * 2 * 3
    assert len(list(cases(["i2t", "score", "train"]))) == 3 * 2 * 2
    assert list(cases(["t2i", "bf16", "compiled", "score"])) == [Case("t2i", "bf16", True, "score")]


def test_a_failed_compilation_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*inputs: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    monkeypatch.setattr(benchmark, "tune_malloc", lambda: None)
    assert measure(Case("i2t", "fp32", True, "score"), TINY, CPU, Path()) is None


def test_a_row_that_fails_is_named_and_the_others_are_measured(
    in_this_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*inputs: object) -> None:
        raise RuntimeError("no memory\nat all")

    monkeypatch.setattr(benchmark, "scoring", fail)
    path = tmp_path / "speed.json"
    rows = ["i2t", "fp32", "eager", "score", "train"]
    assert run_tiny(monkeypatch, "--only", *rows, "--json", path) == 0
    report = json.loads(path.read_text())
    assert report["not_run"] == ["i2t fp32 eager score: no memory"]
    assert [row["what"] for row in report["rows"]] == ["train"]


@pytest.mark.parametrize(("kind", "processes"), [("cpu", 3), ("cuda", 2)])
def test_a_gpu_measures_in_one_process_until_a_row_fails(
    kind: str, processes: int, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    pool = benchmark.ProcessPoolExecutor
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda *_: started.append(1) or pool())
    results = iter([{"row": 1}, None, {"row": 2}])
    monkeypatch.setattr(benchmark, "measure", lambda *_: next(results))
    rows = benchmark.Rows(SIZES["minilm"], torch.device(kind), Path())
    case = Case("i2t", "fp32", True, "score")
    assert [rows.measure(case) for _ in range(3)] == [{"row": 1}, "the compiler fails", {"row": 2}]
    assert len(started) == processes


def test_bfloat16_is_not_measured_if_it_is_emulated(monkeypatch, capsys) -> None:
    monkeypatch.setattr(benchmark, "has_fast_bf16", lambda device: False)
    assert run_tiny(monkeypatch, "--only", "i2t", "bf16", "eager", "score") == 0
    assert "Not run: i2t bf16 eager score" in capsys.readouterr().out


def test_an_apple_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda *_: calls.append("waited"))
    assert seconds_of(lambda: calls.append("worked"), torch.device("mps")) >= 0
    assert calls == ["worked", "waited"]


def test_a_cuda_gpu_times_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("recorded")

        def synchronize(self) -> None:
            calls.append("waited")

        def elapsed_time(self, end: "Event") -> float:
            return 2500.0 if end is not self else 0.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert seconds_of(lambda: calls.append("worked"), torch.device("cuda")) == 2.5
    assert calls == ["recorded", "worked", "recorded", "waited"]


@pytest.mark.slow
def test_processes_are_compared_with_threads(capsys, monkeypatch, tmp_path: Path) -> None:
    path = tmp_path / "scaling.json"
    assert run_tiny(monkeypatch, "--processes", "2", "--json", path) == 0
    report = json.loads(path.read_text())
    shapes = [(r["direction"], r["processes"], r["threads"]) for r in report["rows"]]
    assert shapes == [("i2t", 1, 2), ("i2t", 2, 1), ("t2i", 1, 2), ("t2i", 2, 1)]
    assert all(row["pairs_per_s"] > 0 for row in report["rows"])
    assert capsys.readouterr().out == scaling_table(report)


def test_processes_are_compared_within_a_direction() -> None:
    about = {"command": "c", "machine": "m", "torch": "t", "commit": "d"}
    rates = {("i2t", 1): 100.0, ("i2t", 2): 150.0, ("t2i", 1): 200.0, ("t2i", 2): 100.0}
    rows = [
        {"direction": way, "processes": count, "threads": 2 // count, "pairs_per_s": rate}
        for (way, count), rate in rates.items()
    ]
    lines = scaling_table(about | {"rows": rows}).splitlines()[4:]
    times = [re.split(r" *\| *", line)[5] for line in lines]
    assert times == ["1.00", "1.50", "1.00", "0.50"]


@pytest.mark.parametrize("more", [["--device", "cuda"], ["--only", "i2t"]])
def test_processes_are_of_a_cpu_and_have_no_rows(capsys, monkeypatch, more: list[str]) -> None:
    assert run_tiny(monkeypatch, "--processes", "2", *more) == 2
    assert more[0] in capsys.readouterr().err
