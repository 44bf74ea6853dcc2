"""provenance.py — how figures came about: the command, the machine, torch and the commit.

For all that writes figures into a file: training, evaluation, the benchmark, chaos and fuzzing.
"""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

CODE = (".", ":!results", ":!README.md")  # as git names files


def commit(folder: Path = Path(__file__).parent.parent) -> str | None:
    """The folder's commit, with a + where tracked files differ from it; None without git.

    None, too, in a repository that does not track the folder.

    Results and the README's tables do not count: they are what is written of that commit.
    """
    try:
        head, tracked = _git(folder, "rev-parse", "HEAD"), _git(folder, "ls-files")
    except OSError:
        return None
    if head.returncode or not tracked.stdout:
        return None
    changed = _git(folder, "diff", "--quiet", "HEAD", "--", *CODE).returncode
    return head.stdout.decode().strip() + "+" * (changed != 0)


def _git(folder: Path, *command: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(folder), *command], capture_output=True, check=False)


def of(command: str, device: torch.device | None = None) -> dict[str, Any]:
    """How figures came about: the command, and where it was run."""
    return {"command": command} | surroundings(device)


def surroundings(device: torch.device | None = None) -> dict[str, Any]:
    """Machine, torch and commit; `device` if it is not the processor."""
    found = machine(device, f"{os.cpu_count()} cores")
    return {"machine": found, "torch": torch.__version__, "commit": commit()}


def machine(device: torch.device | None, extent: str) -> str:
    """The GPU's name; of the processor with its extent, the cores that it has or threads used."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {extent}"


def processor() -> str:
    """What Linux calls the processor, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
