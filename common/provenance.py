"""provenance.py — where results come from: command, machine, torch version and commit."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CODE = (".", ":!results", ":!README.md", ":!docs")  # git pathspec: tables are made from results


def commit(folder: Path = Path(__file__).parent.parent) -> str | None:
    """Return the folder's commit, with a "+" if tracked code differs from it.

    Without git, or if the repository does not track the folder, it is what DIME_COMMIT says.
    """
    return _commit_of_git(folder) or os.environ.get("DIME_COMMIT") or None


def _commit_of_git(folder: Path) -> str | None:
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


def of(command: str, device: "torch.device | None" = None) -> dict[str, Any]:
    """Return the provenance of results: the command and its surroundings."""
    return {"command": command} | surroundings(device)


def surroundings(device: "torch.device | None" = None) -> dict[str, Any]:
    """Return machine, torch version and commit."""
    cores = f"{os.cpu_count()} cores"
    return {"machine": machine(device, cores), "torch": version("torch"), "commit": commit()}


def machine(device: "torch.device | None", extent: str) -> str:
    """Return the GPU's name, or the processor's name and `extent` (its cores or threads)."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {extent}"
