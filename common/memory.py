"""memory.py — what keeps memory, and which errors mean that it is used up. Imports no torch."""

import ctypes
import errno
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
KILOBYTE = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss
# Messages of torch, Python's threads, oneDNN, CUDA, cuBLAS and cuDNN.
OOM_MESSAGES = (
    *("DefaultCPUAllocator", "can't start new thread", "could not create a primitive"),
    *("out of memory", "STATUS_ALLOC_FAILED"),
)
# Pairs routed at a time, times the width of a token: the tensors of a chunk should fit the caches
# of a CPU, or fill a GPU. A model of the published width (256) routes 96 or 8,192 pairs at a time.
CPU_CHUNK, GPU_CHUNK = 96 * 256, 8192 * 256
# With activation checkpointing one chunk's activations are held at a time: a training batch of
# 2,048 pairs then takes a third of the memory.
RECOMPUTED_CHUNK = 512 * 256
NARROW = 64  # in narrower models, heads and hidden layers need more than the tokens do


def tune_malloc() -> None:
    """Make glibc keep freed memory, if the C library is glibc.

    By default every training step returns gigabytes to the system and faults them in again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)


def is_oom(error: BaseException | None) -> bool:
    """Return whether an error, or a cause of it, means that main memory or a GPU's is used up."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in OOM_MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe_oom(error: BaseException) -> str:
    """Return one line for an out-of-memory error."""
    return f"out of memory ({(str(error) or type(error).__name__).splitlines()[0]})"


def chunk_size(device: str, dim: int, recomputed: bool = False) -> int:
    """Return how many pairs to route at a time on a device type, for tokens of width `dim`.

    The chunk is smaller if its activations are `recomputed`.
    """
    size = CPU_CHUNK if device == "cpu" else GPU_CHUNK
    return max(1, (min(size, RECOMPUTED_CHUNK) if recomputed else size) // max(dim, NARROW))


def storage_device(device: "torch.device", size: int) -> "torch.device":
    """Return where to keep `size` bytes that a device reads again and again.

    It is a GPU itself if half of its free memory holds them, otherwise main memory.
    """
    import torch

    fits = device.type == "cuda" and size <= free_memory(device) // 2
    return device if fits else torch.device("cpu")


def free_memory(device: "torch.device") -> int:
    """Return how many bytes are free: on a CUDA GPU, otherwise in main memory.

    Only Linux says how much of main memory is free; elsewhere all of it counts.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device: "torch.device") -> int:
    """Return the most bytes that this process held: on its GPU, otherwise in main memory."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_reserved(device)  # with what a CUDA graph keeps
    # Linux's ru_maxrss starts at the peak of the parent process; /proc has this process's own.
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE
