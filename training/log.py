"""log.py — the logs of a training run: metrics.jsonl, TensorBoard events, run.json, train.log."""

import json
import logging
import os
import platform
import re
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common import provenance
from common.errors import InputError, brief_repr, require
from common.files import explain_os_errors, read_json, read_text, write_bytes, write_json
from common.memory import peak_memory
from data import Batch
from evaluation import Retrieval

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

METRICS, RUN, LOG = "metrics.jsonl", "run.json", "train.log"
EVENTS = "events.out.tfevents.*"
LOG_LINE = re.compile(rb"\S+ \S+ \[(\d{1,18})\] ")  # date, time and step
RAN_ON = (
    "commit",
    "device",
    "processes",
    "versions",
)  # keys of run.json that may differ between sessions
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "tensorboard")


class RunLog:
    """Writes the logs of a run into its folder, inside `with log.open(...):`."""

    def __init__(self, folder: Path, options: Mapping[str, Any], device: torch.device) -> None:
        self.folder, self.device, self.step = folder, device, 0
        self.began, self.seconds_before = time.monotonic(), 0.0
        self.board: SummaryWriter | None = None
        self.run: dict[str, Any] = {
            "command": shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]]),
            "options": dict(options),
            "versions": {"python": platform.python_version()}
            | {package: _version(package) for package in PACKAGES},
            "commit": provenance.commit(),
            "device": provenance.machine(device, f"{torch.get_num_threads()} threads"),
            "resumed_at": [],  # steps
            "earlier": [],  # commit, device and versions of each session before this one
            "init_sha256": None,  # of the file of --init
        }

    @contextmanager
    def open(self, step: int = 0, validated: bool = True) -> Iterator[None]:
        """Open the logs to continue after `step`, and delete the lines of later steps.

        If that step is not `validated`, its validation is done again, so its line is deleted, too.
        """
        self.step = step
        if step:
            earlier, self.seconds_before = _earlier_sessions(self.folder / RUN)
            self.run |= earlier
            self.run["resumed_at"].append(step)
        _keep_lines(self.folder / METRICS, lambda line: _is_event_until(line, step, validated))
        _keep_lines(self.folder / LOG, lambda line: _is_log_until(line, step))
        with explain_os_errors(self.folder, "a folder to write to"):
            self.board = _new_board(self.folder, step)
            path = self.folder / LOG
            file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s [%(step)d] %(message)s"))
        file.addFilter(lambda record: vars(record).update(step=self.step) is None)
        logging.getLogger().addHandler(file)
        try:
            self.write_run()
            yield
        finally:
            logging.getLogger().removeHandler(file)
            file.close()
            if self.board is not None:
                with explain_os_errors(self.folder, "a folder to write to"):
                    self.board.close()

    def record(self, **values: float) -> None:
        """Log an event at the present step: a line of metrics.jsonl, a scalar for each value."""
        event = {"step": self.step, **values}
        with explain_os_errors(self.folder / METRICS, "a log to write"):
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
            if self.board is not None:
                for tag, value in event.items():
                    self.board.add_scalar(tag, value, self.step)
                self.board.flush()

    def write_run(self, complete: bool = False) -> None:
        """Write run.json; `seconds` is the sum over all sessions of the run."""
        self.run |= {"step": self.step, "complete": complete}
        self.run["seconds"] = round(self.seconds_before + time.monotonic() - self.began, 1)
        self.run["peak_memory_bytes"] = peak_memory(self.device)
        write_json(self.folder / RUN, self.run)


class NoLog(RunLog):
    """The log of a process that writes none, because another one of the same run does."""

    @contextmanager
    def open(self, step: int = 0, validated: bool = True) -> Iterator[None]:
        self.step = step
        yield

    def record(self, **values: float) -> None:
        pass

    def write_run(self, complete: bool = False) -> None:
        pass


@dataclass(frozen=True)
class Step:
    """A step whose figures are on the device until they are fetched."""

    number: int
    captions: Tensor  # [T] of its batch, index in the split
    figures: Mapping[str, Tensor]  # scalars; "finite" says whether the batch counts
    numbers: Mapping[str, float]  # that the host knows


class Meter:
    """Means over the steps since the last report: losses, pairs, seconds, seconds of loading."""

    def __init__(self) -> None:
        self.steps = 0
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.pending: list[Step] = []
        self.start()

    def start(self) -> None:
        """Start the clock of a step, so that validation and saving are left out."""
        self.started = self.loaded = time.monotonic()

    def note_loaded(self) -> None:
        """Note that the batch is loaded."""
        self.loaded = time.monotonic()

    def add(self, number: int, batch: Batch, figures: Mapping[str, Tensor]) -> None:
        """Add a step that just ended, or was just launched; nothing is asked of the device."""
        times = {
            "batch_time": time.monotonic() - self.started,
            "data_time": self.loaded - self.started,
        }
        numbers = times | {"pairs": batch.pairs * (batch.pairs + batch.extras)}
        self.pending.append(Step(number, batch.captions, figures, numbers))

    def fetch(self) -> list[str]:
        """Fetch the figures of the steps added since the last time, all at once.

        Steps whose loss or gradient are not finite count in no mean. Returns a message for each.
        """
        pending, self.pending = self.pending, []
        if not pending:
            return []
        since, bad = time.monotonic(), []
        rows = torch.stack([torch.stack([*step.figures.values()]) for step in pending]).tolist()
        for step, row in zip(pending, rows, strict=True):
            figures = dict(zip(step.figures, row, strict=True))
            if figures.pop("finite"):
                for name, value in (figures | dict(step.numbers)).items():
                    self.sums[name] += value
                self.steps += 1
            else:
                losses = f"loss {figures['Le']}, gradient norm {figures['grad_norm']}"
                captions = ", ".join(map(str, step.captions.tolist()))
                bad.append(f"step {step.number}: {losses} for the captions {captions}")
        # It has waited for the steps that were only launched.
        self.sums["batch_time"] += time.monotonic() - since
        return bad

    def means(self) -> dict[str, float]:
        """Return the means over the steps whose figures are fetched."""
        return {name: total / self.steps for name, total in self.sums.items()}


def tags(result: Retrieval) -> dict[str, float]:
    """Return the metrics under the published trainer's names; text-to-image ones end in "i"."""
    both = asdict(result.i2t) | {f"{name}i": v for name, v in asdict(result.t2i).items()}
    return both | {"rsum": result.rsum, "r1r5": result.selection}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _new_board(folder: Path, step: int) -> "SummaryWriter | None":
    """Return a writer of TensorBoard's events that hides those after `step`.

    Warns and returns None if tensorboard is not installed: metrics.jsonl has the same figures.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning("tensorboard is not installed; no event files")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _earlier_sessions(path: Path) -> tuple[dict[str, Any], float]:
    """Return what run.json keeps of a run's sessions so far, and their seconds."""
    if not os.path.lexists(path):
        return {"resumed_at": [], "earlier": []}, 0.0
    run = read_json(path, "the record of an earlier session")
    try:
        steps = [int(step) for step in run["resumed_at"]]
        earlier = [dict(session) for session in run.get("earlier", [])]
        earlier.append({name: run.get(name) for name in RAN_ON})
        kept = {"resumed_at": steps, "earlier": earlier, "init_sha256": run.get("init_sha256")}
        return kept, float(run["seconds"])
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise InputError(f"{path}: damaged; delete it to resume without it") from error


def mark_complete(folder: Path, step: int) -> None:
    """Set `complete` in run.json, which a killed run may have failed to do."""
    path = folder / RUN
    if os.path.lexists(path):
        run = read_json(path, "the record of an earlier session")
        write_json(path, run | {"step": step, "complete": True})


def events(folder: Path) -> list[dict[str, Any]]:
    """Return the events of metrics.jsonl, in order. Raises InputError if a line is not an event."""
    path = folder / METRICS
    lines = read_text(path, "the log of a run").splitlines()
    require(len(lines) > 0, f"{path}: is empty; expected the log of a run")
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict) or "step" not in event or not _are_finite(event.values()):
            raise InputError(f"{path}: line {number}: {brief_repr(line)}; expected an event")
        parsed.append(event)
    return parsed


def _are_finite(values: Any) -> bool:
    return all(type(v) in (int, float) and abs(v) <= sys.float_info.max for v in values)


def _keep_lines(path: Path, keep: Callable[[bytes], bool]) -> None:
    """Delete the other lines of a log, and a last line without a line feed."""
    if not os.path.lexists(path):
        return
    with explain_os_errors(path, "the log of an earlier session"):
        lines = path.read_bytes().split(b"\n")[:-1]
    write_bytes(path, b"".join(line + b"\n" for line in lines if keep(line)))


def _is_event_until(line: bytes, step: int, validated: bool) -> bool:
    """Return whether a line of metrics.jsonl is an event of the steps up to `step`.

    The last event of a step is its validation, which counts only if the step is `validated`.
    """
    try:
        event = json.loads(line)
        return (event["step"], "rsum" in event) <= (step, validated)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _is_log_until(line: bytes, step: int) -> bool:
    """Return whether a line of train.log was written at a step up to `step`."""
    match = LOG_LINE.match(line)
    return match is not None and int(match[1]) <= step
