"""common/memory.py: which errors mean out of memory, and the peak of a process."""

import errno
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from common.memory import describe_oom, is_oom, storage_device


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("could not create a primitive"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (allocated: 9 GB)"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_errors_that_mean_out_of_memory(error: Exception) -> None:
    assert is_oom(error) and "\n" not in describe_oom(error)
    try:
        raise ValueError("cannot read") from error
    except ValueError as outer:
        assert is_oom(outer)


@pytest.mark.parametrize(
    "error", [RuntimeError("sizes do not match"), OSError(errno.ENOENT, "x"), ValueError("x"), None]
)
def test_other_errors_do_not(error: Exception | None) -> None:
    assert not is_oom(error)


@pytest.mark.parametrize(
    ("device", "size", "place"),
    [("cuda:1", 500, "cuda:1"), ("cuda:1", 501, "cpu"), ("cpu", 1, "cpu"), ("mps", 1, "cpu")],
)
def test_a_gpu_keeps_what_fits_half_of_its_free_memory(
    device: str, size: int, place: str, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    assert storage_device(torch.device(device), size) == torch.device(place)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is a parent's there too")
def test_the_peak_is_that_of_the_process_itself() -> None:
    """Not that of the process which started it."""
    block = bytearray(300_000_000)
    plain, large = (peak_of(program) for program in ("", "x = bytearray(400_000_000); "))
    assert len(block) and large - plain == pytest.approx(400e6, rel=0.2)


def peak_of(program: str) -> int:
    program += "import torch; from common.memory import peak_memory as p"
    program += "; print(p(torch.device('cpu')))"
    return int(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT))
