"""chaos.py: ten cycles."""

import sys
from pathlib import Path

import pytest

from tests import chaos, conftest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits other processes")
def test_ten_cut_runs_resume_to_the_same_bits(tmp_path: Path) -> None:
    conftest.write_tiny(tmp_path)
    report = list(chaos.cycles(chaos.Options(cycles=10, seed=5), tmp_path))[-1]
    assert report.failures == []
    assert report.survived == report.cycles == 10 and report.runs_completed > 0
    assert report.most_steps_done_twice <= chaos.SAVE_STEP
