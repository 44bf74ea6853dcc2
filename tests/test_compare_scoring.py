"""scripts/compare_scoring.py: ways of scoring a golden model, and the tables made of them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, Case, run_here, tiny_train

from scripts import compare_scoring, convert_checkpoint, results_table
from scripts.parts import reports

CASE = Case(GOLDEN / "i2t")


def test_ways_of_scoring_a_golden_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "scoring/i2t.json"
    path.parent.mkdir()
    argv = ["--model_path", CASE.model_path, "--data_path", CASE.data_path]
    argv += ["--bert_path", CASE.bert_path, "--ways", "fp32", "fp32-all", "bf16"]
    argv += ["--shortlist", "2", "1000", "--json", path]
    assert run_here(monkeypatch, compare_scoring.main, argv) == 0
    found = json.loads(path.read_text())
    assert found["images"] == len(CASE.expected("eval")["sims"]) and found["direction"] == "i2t"
    assert np.shape(found["closed"]) == (3, len(found["cells"]))
    rows = found["rows"]
    ways = [(row["way"], row["shortlist"]) for row in rows]
    assert ways == [(way, k) for way in ("fp32", "fp32-all", "bf16") for k in (None, 2, 1000)]
    whole, some, every = rows[:3]
    assert whole["difference"] == {"mean": 0, "largest": 0}
    assert whole["metrics"] == every["metrics"]  # with a shortlist of all
    assert every["ceiling"] == {"i2t": 100, "t2i": 100}
    assert some["pairs"] < every["pairs"] == whole["pairs"] and max(some["ceiling"].values()) < 100
    skipping, bf16 = rows[3]["difference"], rows[6]["difference"]
    assert skipping["largest"] < 1e-5 < bf16["mean"] < bf16["largest"]
    printed = capsys.readouterr().out
    assert results_table.scoring(tmp_path) == printed
    assert (
        f"| fp32 | best 2, approximate | {some['pairs']:,} |" in printed
        and "| RIC | GLGC |" in printed
    )
    assert f"; i2t, {found['images']} images of test with their captions:\n" in printed
    assert " images of dev, which selects models, with" in reports.scoring_tables(
        found | {"split": "dev"}
    )
    path.unlink()
    assert results_table.scoring(tmp_path) == "Ways of scoring: not run.\n"


def test_saved_scores_are_compared_with(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A way that could not be compiled is left out, not told under its name."""

    def broken(*given: object, **more: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    scores = CASE.expected("eval")["sims"]
    np.save(tmp_path / "scores.npy", scores)
    path = tmp_path / "found.json"
    argv = ["--model_path", CASE.model_path, "--data_path", CASE.data_path]
    argv += ["--bert_path", CASE.bert_path, "--ways", "bf16-compiled", "fp32", "--json", path]
    argv += ["--images", "3", "--shortlist", "2", "--scores", tmp_path / "scores.npy"]
    assert run_here(monkeypatch, compare_scoring.main, argv) == 0
    saved, whole, some = json.loads(path.read_text())["rows"]
    assert (saved["way"], whole["way"], some["way"]) == ("saved", "fp32", "fp32")
    assert saved["pairs"] is None and saved["seconds"] is None and whole["pairs"] == 3 * 15
    assert 0 < whole["difference"]["largest"] < 1e-5
    assert saved["metrics"] == whole["metrics"]
    assert "| saved | all |  |  |  |" in capsys.readouterr().out
    assert "bf16-compiled: left out, for it could not be compiled" in caplog.text
    alone = [*argv, "--ways", "bf16-compiled"]
    assert run_here(monkeypatch, compare_scoring.main, alone) == 2
    assert "--ways: none of them could be taken, see above" in capsys.readouterr().err
    out = tmp_path / "model.safetensors"
    model = ["--checkpoint", CASE.model_path, "--bert_path", CASE.bert_path]
    model += ["--to", "safetensors", "--out", out]
    assert run_here(monkeypatch, convert_checkpoint.main, model) == 0
    for name in ("scores.npy", "model.json"):
        taken = [*argv, "--model_path", out, "--json", tmp_path / name]
        assert run_here(monkeypatch, compare_scoring.main, taken) == 2
        assert f"{name}: is an input or another output" in capsys.readouterr().err
    np.save(tmp_path / "scores.npy", np.where(scores < np.median(scores), scores - 4, scores))
    assert run_here(monkeypatch, compare_scoring.main, argv) == 2
    assert "scores.npy: scores of a shortlist; expected all pairs'" in capsys.readouterr().err
    np.save(tmp_path / "scores.npy", scores[1:, 5:])
    assert run_here(monkeypatch, compare_scoring.main, argv) == 2
    assert f"scores.npy: scores of {len(scores) - 1} images; " in capsys.readouterr().err


def test_low_scores_are_no_shortlist_where_vectors_have_any_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is with --no_imgnorm: scores of all pairs may lie below -2 then."""
    case = Case(GOLDEN / "t2i_variant")
    scores = case.expected("eval")["sims"]
    np.save(tmp_path / "scores.npy", np.where(scores < np.median(scores), scores - 4, scores))
    argv = ["--model_path", case.model_path, "--data_path", case.data_path, "--bert_path"]
    argv += [case.bert_path, "--ways", "fp32", "--images", "2", "--shortlist", "1"]
    argv += ["--scores", tmp_path / "scores.npy"]
    assert run_here(monkeypatch, compare_scoring.main, argv) == 0


def test_a_split_that_selected_the_model_is_told(
    tiny: Path,
    run_train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert run_train(*tiny_train(tiny, "--max_steps", "1")) == 0
    own = ["--model_path", tiny / "runs/i2t/model_best.pth.tar"]
    theirs = ["--model_path", CASE.model_path, "--data_path", CASE.data_path]
    theirs += ["--bert_path", CASE.bert_path]
    few = ["--ways", "fp32", "--images", "2", "--shortlist", "1"]
    for model, split, said in (
        (own, "test", None),
        (
            own,
            "dev",
            "model_best.pth.tar: the model was selected on this split, so its figures are too good",
        ),
        (theirs, "dev", "if the model was selected on this dev split, its figures are too good"),
    ):
        caplog.clear()
        argv = [*model, "--split", split, *few]
        assert run_here(monkeypatch, compare_scoring.main, argv) == 0
        assert said in caplog.text if said else "too good" not in caplog.text
