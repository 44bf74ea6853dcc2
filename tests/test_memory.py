"""memory.py: a process tells of itself, and which errors say that memory is used up."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from memory import out_of_memory

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


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("could not create a primitive", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", False),
    ],
)
def test_what_libraries_say_of_memory_that_is_used_up(said: str, found: bool) -> None:
    assert out_of_memory(RuntimeError(said)) == found
    wrapped = ValueError("of something else")
    wrapped.__cause__ = RuntimeError(said)
    assert out_of_memory(wrapped) == found
