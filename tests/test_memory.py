"""memory.py: a process tells of itself."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

OWN = """
import torch
from memory import peak_memory, used_memory

cpu = torch.device("cpu")
print(used_memory(cpu), peak_memory(cpu))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="told by Linux")
def test_a_peak_is_not_that_of_the_process_that_started_it() -> None:
    """As `ru_maxrss` is: it begins at what the starting process had held."""
    held = np.ones(2 * 10**9, np.uint8)
    done = subprocess.run([sys.executable, "-c", OWN], cwd=ROOT, capture_output=True, check=True)
    used, peak = map(int, done.stdout.split())
    assert used > 0 and 0.9 * used < peak < 1.5 * used < held.nbytes
