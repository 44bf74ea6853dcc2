"""runlog.py — the logs of a training run, kept apart so that trainer.py is the training alone.

`metrics.jsonl` and TensorBoard's events get the same figures, `run.json` says how they came about.
"""

import json
import logging
import os
import platform
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from common import provenance
from common.errors import InputError, brief_repr, require
from common.files import (
    explain_os_errors,
    read_json,
    read_text,
    require_regular_file,
    write_bytes,
    write_json,
)
from common.memory import peak_memory
from evaluation import Retrieval

METRICS, RUN, LOG = "metrics.jsonl", "run.json", "train.log"
EVENTS = "events.out.tfevents.*"
LOG_LINE = re.compile(rb"\S+ \S+ \[(\d{1,18})\] ")  # date, time and step
LARGEST_NUMBER = 1e300  # of a log; a first gradient may be 1e24 long
RAN_ON = ("commit", "device", "versions")  # of run.json, by session
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "tensorboard")


class RunLog:
    """The logs in a run's folder, which is there; closed when its `with` block is left.

    A run that is resumed goes on behind `step`: later lines are dropped, and with them step's own
    validation unless `validated`.
    """

    def __init__(
        self,
        folder: Path,
        options: Mapping[str, Any],
        device: torch.device,
        step: int = 0,
        validated: bool = True,
    ) -> None:
        self.folder, self.device, self.step = folder, device, step
        self.began = time.monotonic()
        self.run = {
            "command": shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]]),
            "options": dict(options),
            "versions": {"python": platform.python_version()}
            | {package: version(package) for package in PACKAGES},
            "commit": provenance.commit(),
            "device": provenance.machine(device, f"{torch.get_num_threads()} threads"),
            "resumed_at": [],
            "earlier": [],  # what each session before ran on
        }
        self.seconds_before = 0.0
        if step:
            before, self.seconds_before = earlier_sessions(folder / RUN)
            self.run |= before
            self.run["resumed_at"].append(step)
        cut(folder / METRICS, lambda line: reached(line, step, validated))
        cut(folder / LOG, lambda line: said(line, step))

    def __enter__(self) -> "RunLog":
        with ExitStack() as opened:  # what was, is closed again where the rest cannot be
            opened.callback(setattr, threading, "excepthook", threading.excepthook)
            threading.excepthook = _hand_over
            opened.enter_context(
                explain_os_errors(self.folder, "a folder to write to")
            )  # in closing, too
            self.board = SummaryWriter(self.folder, purge_step=self.step + 1 if self.step else None)
            opened.callback(self.board.close)
            handler = _LogFile(self)
            opened.callback(handler.close)
            self.write_run()
            logging.getLogger().addHandler(handler)
            opened.callback(logging.getLogger().removeHandler, handler)
            self.opened = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.opened.close()

    def record(self, **figures: float) -> None:
        """One event at the present step: a line of metrics.jsonl, and a scalar for each figure."""
        event = {"step": self.step, **figures}
        with explain_os_errors(self.folder / METRICS, "a log to write"):
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
            for tag, value in event.items():
                self.board.add_scalar(tag, value, self.step)
            self.board.flush()

    def write_run(self, complete: bool = False) -> None:
        """Write run.json as of now: the seconds of all sessions, all else of this one.

        `complete` if the run has come to its end.
        """
        self.run |= {"step": self.step, "complete": complete}
        self.run["seconds"] = round(self.seconds_before + time.monotonic() - self.began, 1)
        self.run["peak_memory_bytes"] = peak_memory(self.device)
        write_json(self.folder / RUN, self.run)


def _hand_over(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread gives what the disk said to the next call; it needs no traceback."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


class _LogFile(logging.FileHandler):
    """train.log: each line tells the step it was written at; what cannot be written is an error."""

    def __init__(self, run: RunLog) -> None:
        super().__init__(run.folder / LOG, encoding="utf-8", errors="backslashreplace")
        self.run = run
        self.setFormatter(logging.Formatter("%(asctime)s [%(step)d] %(message)s"))

    def format(self, record: logging.LogRecord) -> str:
        record.step = self.run.step
        return super().format(record)

    def handleError(self, record: logging.LogRecord) -> None:
        with explain_os_errors(self.run.folder / LOG, "a log to write"):
            raise


class Meter:
    """Means over an epoch's steps since its last report: losses, seconds a step and its loading.

    Steps after an epoch's last report are in none, and neither are batches that were skipped.
    """

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
    for path in _logs(folder):
        remove(path)


def _logs(folder: Path) -> list[Path]:
    """The logs of a run that are there."""
    named = [folder / name for name in (METRICS, RUN, LOG)]
    return [path for path in [*named, *folder.glob(EVENTS)] if os.path.lexists(path)]


def remove(path: Path) -> None:
    """Delete a file of an earlier run, where there is one."""
    with explain_os_errors(path, "a file of an earlier run"):
        path.unlink(missing_ok=True)


def held_by_run(folder: Path) -> bool:
    """Whether a run has written its logs into the folder."""
    return bool(_logs(folder))


def earlier_sessions(path: Path) -> tuple[dict[str, list[Any]], float]:
    """The steps that a run was resumed at, what each session ran on, and their seconds."""
    if not os.path.lexists(path):
        return {"resumed_at": [], "earlier": []}, 0.0
    run = read_json(path, "what an earlier session of the run wrote")
    try:
        steps = [int(step) for step in run["resumed_at"]]
        earlier = [dict(session) for session in run.get("earlier", [])]
        earlier.append({name: run.get(name) for name in RAN_ON})
        return {"resumed_at": steps, "earlier": earlier}, float(run["seconds"])
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise InputError(f"{path}: not what a run wrote; delete it to go on without it") from error


def completed(folder: Path, step: int) -> None:
    """Have run.json say that the run is at its end, which a kill may have kept it from."""
    path = folder / RUN
    if os.path.lexists(path):
        run = read_json(path, "what an earlier session of the run wrote")
        write_json(path, run | {"step": step, "complete": True})


def events(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, in order. Raises InputError where a line is no event."""
    path = folder / METRICS
    found = []
    for number, line in enumerate(read_text(path, "the log of a run").splitlines(), 1):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        fits = isinstance(event, dict) and all(
            type(value) in (int, float) and abs(value) <= LARGEST_NUMBER for value in event.values()
        )
        require(
            fits and "step" in event,
            f"{path}: line {number}: {brief_repr(line)}; expected an event",
        )
        found.append(event)
    require(len(found) > 0, f"{path}: is empty; expected the log of a run")
    return found


def cut(path: Path, kept: Callable[[bytes], bool]) -> None:
    """Keep a log's whole lines that are to be kept."""
    if not os.path.lexists(path):
        return
    require_regular_file(path, "the log of an earlier session")
    with explain_os_errors(path, "the log of an earlier session"):
        lines = path.read_bytes().split(b"\n")[:-1]  # behind the last line feed is nothing whole
    data = b"".join(line + b"\n" for line in lines if kept(line))
    write_bytes(path, data)


def reached(line: bytes, step: int, validated: bool) -> bool:
    """Whether a line of metrics.jsonl is of the steps up to `step`."""
    try:
        event = json.loads(line)
        at, validation = event["step"], "rsum" in event
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    return type(at) is int and (at < step or (at == step and (validated or not validation)))


def said(line: bytes, step: int) -> bool:
    """Whether a line of train.log is of the steps up to `step`."""
    match = LOG_LINE.match(line)
    return match is not None and int(match[1]) <= step
