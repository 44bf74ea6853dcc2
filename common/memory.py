"""memory.py — how much memory there is, what keeps it, and which errors say that it is used up.

Kept apart from options.py because every room that does long work asks for it. Imports none of them.
"""

import ctypes
import errno
import os
import resource
import sys
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
KILOBYTE = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss
# What libraries call it: torch, Python's threads, oneDNN, CUDA, cuBLAS and cuDNN.
NO_MEMORY = (
    *("DefaultCPUAllocator", "can't start new thread", "could not create a primitive"),
    *("CUDA error: out of memory", "STATUS_ALLOC_FAILED"),
)
# Pairs worked on at a time, times a token's width: a slice's tensors should fit a processor's
# caches, and fill a GPU. In a model of the published width that is 96 and 8,192 pairs.
CPU_SLICE, GPU_SLICE = 96 * 256, 8192 * 256
NARROW = 64  # below it heads and hidden layers count more than the width does
CGROUP = Path("/sys/fs/cgroup")  # a container's limits


def tune_malloc() -> None:
    """Tell glibc to keep freed memory: a training step on a CPU is three times as fast with it.

    By default every step gives gigabytes back to the system and faults them in again (20 s against
    7 s on two cores). Other C libraries lack `mallopt` and go without.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)


def is_oom(error: BaseException | None) -> bool:
    """Whether an error says that the machine's memory, or a GPU's, is used up, or comes of it."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def no_memory(error: BaseException) -> str:
    """What is said of it, in one line."""
    return f"out of memory ({(str(error) or type(error).__name__).splitlines()[0]})"


def chunk_size(device: torch.device, dim: int) -> int:
    """Pairs of an image and a caption that are best worked on at a time, by a token's width."""
    return max(1, (CPU_SLICE if device.type == "cpu" else GPU_SLICE) // max(dim, NARROW))


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process held: on the GPU where it uses one, else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # asked first, since Linux's ru_maxrss begins at the peak of the process that started this one
    own = _linux("self/status", "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE if own is None else own


def used_memory(device: torch.device) -> int:
    """Bytes that this process holds now, where `free_memory` counts."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = _pages(1)
    return peak_memory(device) if pages is None else pages * resource.getpagesize()


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: on the GPU where it uses one, else in main memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = [_available()]
    limit, used = (_number(CGROUP / f"memory.{name}") for name in ("max", "current"))
    if limit is not None and used is not None:
        free.append(limit - used + _reclaimable())
    for kind, column in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and (pages := _pages(column)) is not None:
            free.append(limit - pages * resource.getpagesize())
    return max(0, min(free))


def _available() -> int:
    """What the system has to give."""
    available = _linux("meminfo", "MemAvailable")
    if available is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return available


def _linux(name: str, key: str) -> int | None:
    """Bytes that a file under /proc gives, in kilobytes, for a key; None on other systems."""
    path = Path("/proc") / name
    lines = path.read_text().splitlines() if path.exists() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(found[0]) * 1024 if found else None


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.exists() else "max"
    return int(text) if text.isdigit() else None


def _reclaimable() -> int:
    """What a container's memory holds of files, such as features, and gives up at need."""
    path = CGROUP / "memory.stat"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def _pages(column: int) -> int | None:
    """A figure of Linux's: 0 is this process's address space, 1 what is in memory, 5 its data."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[column]) if path.exists() else None
