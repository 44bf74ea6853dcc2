"""memory.py: a process tells of itself, and which errors say that memory is used up."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from common import memory
from common.memory import free_memory, is_oom

OWN = """
import torch
from common.memory import peak_memory, used_memory

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


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="told by Linux")
def test_free_is_what_the_narrowest_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's limit counts files that it read, which are given up at need."""
    cpu, system = torch.device("cpu"), free_memory(torch.device("cpu"))
    assert system > 10**8
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("700000000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(cpu) > 10**8
    (tmp_path / "memory.max").write_text("750000000\n")
    assert free_memory(cpu) == 50_000_000
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 30000000\nactive_file 9\n")
    assert free_memory(cpu) == 80_000_000
    (tmp_path / "memory.current").write_text("999000000\n")
    assert free_memory(cpu) == 0
    (tmp_path / "memory.current").write_text("0\n")
    program = (
        "import resource, torch; from memory import free_memory, used_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (6 * 10**9,) * 2)\n"
        "print(free_memory(torch.device('cpu')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True
    )
    assert 0 < int(done.stdout) < 6 * 10**9 - 10**7  # less than the limit by what is taken


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
    assert is_oom(RuntimeError(said)) == found
    wrapped = ValueError("of something else")
    wrapped.__cause__ = RuntimeError(said)
    assert is_oom(wrapped) == found
