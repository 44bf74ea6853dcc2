"""runlog.py — the logs of a training run, kept apart so that train.py is the training alone.

`metrics.jsonl` and TensorBoard's events get the same figures, `run.json` says how they came about.
"""

import json
import logging
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from evaluation import Retrieval
from options import InputError, require, whole_file

METRICS, RUN, LOG = "metrics.jsonl", "run.json", "train.log"
EVENTS = "events.out.tfevents.*"
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "tensorboard")
KILOBYTE = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss


class RunLog:
    """The logs in a run's folder, which is there, going on behind `step` where a run is resumed."""

    def __init__(
        self, folder: Path, options: Mapping[str, Any], device: torch.device, step: int = 0
    ) -> None:
        self.folder, self.device = folder, device
        self.began = time.monotonic()
        before = _read_run(folder / RUN) if step else {}
        self.run = {
            "command": shlex.join(["python", *sys.argv]),
            "options": dict(options),
            "versions": {"python": platform.python_version()}
            | {package: version(package) for package in PACKAGES},
            "commit": _commit(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
            "resumed_at": [*before.get("resumed_at", []), *([step] if step else [])],
            "seconds": 0.0,
            "peak_memory_bytes": 0,
        }
        self.seconds_before = before.get("seconds", 0.0)
        _cut(folder / METRICS, step)
        self.handler = logging.FileHandler(folder / LOG, encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logging.getLogger().addHandler(self.handler)
        self.board = SummaryWriter(folder, purge_step=step + 1 if step else None)
        self.write_run()

    def record(self, step: int, **figures: float) -> None:
        """One event at a global step: a line of metrics.jsonl, and a scalar for each figure."""
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        for tag, value in {"step": step, **figures}.items():
            self.board.add_scalar(tag, value, step)
        self.board.flush()

    def write_run(self) -> None:
        """Write run.json as of now: seconds of all sessions, peak memory of this one."""
        self.run["seconds"] = round(self.seconds_before + time.monotonic() - self.began, 1)
        self.run["peak_memory_bytes"] = peak_memory(self.device)
        with whole_file(self.folder / RUN) as file:
            file.write(json.dumps(self.run, indent=1).encode() + b"\n")

    def close(self) -> None:
        """Write what is still held."""
        self.write_run()
        self.board.close()
        logging.getLogger().removeHandler(self.handler)
        self.handler.close()


def make_folder(folder: Path) -> None:
    """Make a run's folder. Raises InputError where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror}") from error


class Window:
    """Means over the steps since the last report: losses, and seconds a step and its loading."""

    def __init__(self) -> None:
        self.steps = 0
        self.sums: dict[str, Tensor | float] = {"batch_time": 0.0, "data_time": 0.0}
        self.since = time.monotonic()

    def loaded(self) -> None:
        self.loading = time.monotonic() - self.since

    def stepped(self, figures: dict[str, Tensor]) -> None:
        now = time.monotonic()
        times = {"batch_time": now - self.since, "data_time": self.loading}
        for name, value in (times | figures).items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1
        self.since = now

    def resumed(self) -> None:
        """Leave out what was done between two steps: validation, saving."""
        self.since = time.monotonic()

    def mean(self) -> dict[str, float]:
        return {name: float(total) / self.steps for name, total in self.sums.items()}


def tags(result: Retrieval) -> dict[str, float]:
    """Figures under the published trainer's names: image-to-text plain, text-to-image with an i."""
    both = asdict(result.i2t) | {f"{name}i": v for name, v in asdict(result.t2i).items()}
    return both | {"rsum": result.rsum, "r1r5": result.selection}


def clear(folder: Path) -> None:
    """Delete the logs of an earlier run."""
    for path in [folder / METRICS, folder / RUN, folder / LOG, *folder.glob(EVENTS)]:
        path.unlink(missing_ok=True)


def held_by_run(folder: Path) -> bool:
    """Whether a run has written its logs into the folder."""
    return any((folder / name).exists() for name in (METRICS, RUN)) or any(folder.glob(EVENTS))


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process held: on the GPU where it uses one, else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE


def _read_run(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        run = json.loads(path.read_bytes())
    except ValueError:
        run = None
    require(isinstance(run, dict), f"{path}: no JSON object; delete it to go on without it")
    return run


def _cut(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl that lie behind `step`, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(event, dict) and event.get("step", step) <= step:
            kept.append(line)
    with whole_file(path) as file:
        file.writelines(kept)


def _commit() -> str | None:
    """The project's commit, with a + where tracked files differ from it; None without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=False)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False)
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.decode().strip() + "+" * (changed.returncode != 0)


def _processor() -> str:
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
