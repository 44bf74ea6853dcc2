"""fuzz.py: a few inputs for each reader."""

import warnings
from pathlib import Path

import pytest

from tests import fuzz

INPUTS = 60


@pytest.mark.parametrize("name", fuzz.READERS)
def test_a_reader_raises_nothing_but_input_errors(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = fuzz.fuzz(name, INPUTS)
    assert report["faults"] == []
    assert report["inputs"] >= INPUTS and report["read"] > 0


@pytest.mark.parametrize("slowest", [fuzz.SLOWEST, -1.0])
def test_the_harness_finds_faults(monkeypatch, slowest: float) -> None:
    def careless(folder: Path, changes: list, values: list) -> None:
        if len(changes) == 3:
            raise KeyError("missing")

    monkeypatch.setattr(fuzz, "SLOWEST", slowest)
    monkeypatch.setitem(fuzz.READERS, "careless", lambda folder: careless)
    faults = " ".join(fuzz.fuzz("careless", 100)["faults"])
    assert "KeyError: 'missing'" in faults and ("seconds" in faults) == (slowest < 0)
