"""chaos.py, a few cycles of it."""

import sys
from pathlib import Path

import pytest

from tests import chaos, conftest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits other processes")
def test_ten_runs_that_are_cut_off_go_on_as_if_they_were_not(tmp_path: Path) -> None:
    conftest.write_tiny(tmp_path)
    report = list(chaos.cycles(chaos.Options(cycles=10, seed=5), tmp_path))[-1]
    assert report.failures == []
    assert report.survived == report.cycles == 10 and report.runs_completed > 0
    assert report.most_steps_done_twice <= chaos.SAVE_STEP
