"""fuzz.py, a few hundred inputs for each reader."""

import warnings
from pathlib import Path

import pytest

from tests import fuzz

READERS = (
    *("published_checkpoint", "own_checkpoint", "resume", "newest"),
    *("arrays_checkpoint", "arrays_json"),
    *("bert_weights", "bert_arrays", "bert_sizes", "bert_words"),
    *("scores", "ids", "names", "annotations", "tsv", "extraction", "picture"),
    *("captions", "features", "run_json", "metrics", "train_log", "command_line"),
)


def test_the_readers_are_these(tmp_path: Path) -> None:
    assert set(fuzz.readers(tmp_path)) == set(READERS)


@pytest.mark.parametrize("name", READERS)
def test_only_the_projects_own_error_comes_out(tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fuzz.fuzz(name, 200, tmp_path)
    assert found["faults"] == []
    assert found["inputs"] >= 200 and found["read"] > 0


def test_a_fault_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: a reader that lets an error out, or takes its time."""

    def careless(folder: Path, changes: list, values: list) -> None:
        if len(changes) == 3:
            raise KeyError("missing")

    monkeypatch.setattr(fuzz, "readers", lambda folder: {"careless": lambda: careless})
    found = fuzz.fuzz("careless", 100, tmp_path)
    assert len(found["faults"]) == 1 and "KeyError: 'missing'" in found["faults"][0]
    monkeypatch.setattr(fuzz, "SLOWEST", -1.0)
    assert "seconds" in " ".join(fuzz.fuzz("careless", 100, tmp_path)["faults"])
