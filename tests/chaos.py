"""chaos.py — kill-and-resume cycles: a run stopped anywhere ends like one that was never stopped.

    python -m tests.chaos --cycles 1000 --json results/reliability.json

A cycle starts `train.py --resume auto` on tiny data (with BERT's dropout, extra negatives and two
workers), ends it at a random moment in a random way, and compares its files with an uncut run:
weights, Adam's moments, random state and best scores of that step, bit for bit, and at the end of a
run its logs, too. Steps that have to be done twice are counted.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

import torch

import train
from checkpoint.checkpoint import read_checkpoint
from common import cli as options
from common.lock import LOCK
from tests import conftest
from training import resume
from training.resume import BEST, NEWEST

log = logging.getLogger("chaos")

STEPS, SAVE_STEP, VAL_STEP = 40, 3, 7  # an epoch has 10 steps, or 9 where the last is skipped
MORE_MEMORY = 2**25  # bytes that a program without memory may still take, at most
LONGEST = 120.0  # seconds; a program that takes longer hangs
WAYS = {"SIGKILL": 12, "SIGTERM": 3, "SIGINT": 3, "worker": 3, "memory": 2, "disk": 2}
# Exit statuses; of the other ways it is 2. SIGTERM gives -15 before training has begun.
EXPECTED = {"SIGKILL": {-9}, "SIGTERM": {143, -15}, "SIGINT": {130}}
TIMES = ("batch_time", "data_time", "pairs_per_s")
FORK = multiprocessing.get_context("forkserver")  # torch is imported once for all cycles
FORK.set_forkserver_preload(["tests.conftest", "training.loop"])
os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)  # for the fork server's import


@dataclass(frozen=True)
class Options:
    cycles: Annotated[int, "kill-and-resume cycles"] = 10
    seed: Annotated[int, "seed of ways and moments"] = 0
    json: Annotated[str | None, "file whose part 'chaos' is to hold the report"] = None


def arguments(folder: Path, direction: str, *more: str) -> list[str]:
    extra = {"i2t": "--extra_stc", "t2i": "--extra_img"}[direction]
    steps = {"max_steps": STEPS, "save_step": SAVE_STEP, "val_step": VAL_STEP, "log_step": 1}
    rest = [x for name, v in steps.items() for x in (f"--{name}", str(v))]
    argv = conftest.tiny_train(folder, extra, "1", *rest, "--workers", "2", direction=direction)
    return [*argv, "--resume", "auto", *more]


def program(argv: list[str], output: Path, states: Path | None = None) -> None:
    """Run train.py; append its errors to `output`, and digests of its checkpoints to `states`."""
    multiprocessing.set_start_method("fork", force=True)  # Linux's default, for loader workers
    with output.open("ab") as file:
        os.dup2(file.fileno(), 2)
    sys.argv = ["train.py", *argv]
    torch.set_num_threads(1)
    if states is not None:
        write = resume.write_checkpoint

        def recorded(path: Path, *content: Any, **state: Any) -> None:
            write(path, *content, **state)
            with states.open("a") as file:
                file.write(digest(path) + "\n")

        resume.write_checkpoint = recorded
    options.run(train.main)


def digest(path: Path) -> str:
    """Return step, last validation and a hash of all that a run resumes from."""
    checkpoint = read_checkpoint(path)
    kept = {k: v for k, v in checkpoint.state.items() if k != "commit"}  # the files may change
    hashed = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            hashed.update(f"{value.dtype}{list(value.shape)}".encode())
            hashed.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                hashed.update(str(key).encode())
                walk(value[key])
        else:
            hashed.update(repr(value).encode())

    walk(checkpoint.weights)
    walk(kept)
    return f"{kept['step']} {kept['validated']} {hashed.hexdigest()}"


def events(folder: Path) -> list[dict[str, Any]]:
    """Return the whole lines of metrics.jsonl, without times."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


@dataclass
class Uncut:
    """A run that nobody stopped: its checkpoints, best model and events."""

    states: set[str]
    best: str
    events: list[dict[str, Any]]
    seconds: float  # of its training, start-up apart


def uncut_run(folder: Path, direction: str) -> Uncut:
    states = folder / f"states_{direction}"
    argv = arguments(folder, direction, "--save_step", "1")
    process = FORK.Process(target=program, args=(argv, folder / "output", states))
    process.start()
    process.join(LONGEST)
    assert process.exitcode == 0, (folder / "output").read_text()
    run = folder / "runs" / direction
    seconds = json.loads((run / "run.json").read_text())["seconds"]
    uncut = Uncut(set(states.read_text().split("\n")), digest(run / BEST), events(run), seconds)
    shutil.rmtree(run)
    return uncut


@dataclass
class Report:
    """Results of the cycles."""

    cycles: int = 0
    survived: int = 0
    runs_completed: int = 0
    save_step: int = SAVE_STEP
    steps_done_twice: int = 0
    most_steps_done_twice: int = 0
    ways: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, way: str, status: str, twice: int) -> None:
        """Count a cycle, and the steps that have to be done again after it."""
        self.cycles += 1
        self.runs_completed += status == "0"
        self.ways[way] += 1
        self.exits[f"{way} {status}"] += 1
        self.steps_done_twice += twice
        self.most_steps_done_twice = max(self.most_steps_done_twice, twice)


def strike(way: str, pid: int, chance: random.Random) -> bool:
    """End a process in one of the WAYS. Returns False if it had ended already."""
    try:
        if way == "worker":
            workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if workers:
                os.kill(int(chance.choice(workers)), signal.SIGKILL)
            return bool(workers)
        if way == "memory":
            conftest.limit_memory(pid, chance.randrange(MORE_MEMORY))
        elif way == "disk":
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
        else:
            os.kill(pid, signal.Signals[way])
    except (ProcessLookupError, FileNotFoundError):
        return False
    return True


def cut_off(process: BaseProcess, run: Path, way: str, most: float, chance: random.Random) -> str:
    """End a program after `most` seconds or less. Returns its exit status, or a problem."""
    while process.is_alive():
        lock = run / LOCK
        if lock.exists() and f"process {process.pid} " in lock.read_text():
            break
        time.sleep(0.001)
    process.join(chance.uniform(0, most))
    struck = strike(way, process.pid, chance)
    process.join(LONGEST)
    if process.exitcode is None:
        process.kill()
        return "hangs"
    if process.exitcode not in {0} | (EXPECTED.get(way, {2}) if struck else set()):
        return f"unexpected {process.exitcode}"
    return str(process.exitcode)


def step_of(run: Path) -> int:
    """Return the step of a run's newest checkpoint."""
    return read_checkpoint(run / NEWEST).state["step"] if (run / NEWEST).exists() else 0


def problem_of(run: Path, uncut: Uncut, status: str, output: str, lost: int) -> str:
    """Return a problem of the files that a program left, or ""."""
    if not status.lstrip("-").isdecimal():
        return status
    if status == "2" and not output.splitlines()[-1].startswith("train.py: error: "):
        return "the last line is not an error"
    if (run / NEWEST).exists() and digest(run / NEWEST) not in uncut.states:
        return "another state than that of the uncut run"
    if lost > SAVE_STEP:
        return f"{lost} steps lost"
    if status == "0" and (digest(run / BEST) != uncut.best or events(run) != uncut.events):
        return "another best model or other logs than the uncut run's"
    return ""


def cycles(options: Options, folder: Path) -> Iterator[Report]:
    """Yield the report after each cycle."""
    report, chance = Report(), random.Random(options.seed)
    uncut = {direction: uncut_run(folder, direction) for direction in ("i2t", "t2i")}
    direction, output = "i2t", folder / "output"
    while report.cycles < options.cycles:
        run, expected = folder / "runs" / direction, uncut[direction]
        way = chance.choices(list(WAYS), list(WAYS.values()))[0]
        output.write_bytes(b"")
        before = written_at(run)
        process = FORK.Process(target=program, args=(arguments(folder, direction), output))
        process.start()
        most = expected.seconds * (1 - step_of(run) / STEPS)
        status = cut_off(process, run, way, most, chance)
        lost = max([event["step"] for event in events(run)], default=0) - step_of(run)
        problem = problem_of(run, expected, status, output.read_text(), lost)
        report.add(way, status, lost if written_at(run) != before else 0)
        report.survived += not problem
        if problem:
            tail = output.read_text()[-2000:]
            report.failures.append(f"cycle {report.cycles}, {direction} {way}: {problem}: {tail}")
            log.warning(report.failures[-1])
        if status == "0" or problem:
            shutil.rmtree(run)
            direction = {"i2t": "t2i", "t2i": "i2t"}[direction]
        yield report


def written_at(run: Path) -> int:
    """Return when metrics.jsonl was written last, so that lost steps are counted once."""
    path = run / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


def main() -> None:
    chosen = options.parse(Options, None, __doc__)
    since = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        conftest.write_tiny(Path(folder))
        for report in cycles(chosen, Path(folder)):
            if report.cycles % 10 == 0:
                log.info("%d cycles, %d survived", report.cycles, report.survived)
    seconds = round(time.monotonic() - since, 1)
    results = vars(report) | {"seconds": seconds, "steps": STEPS}
    log.info("%s", results)
    if chosen.json:
        conftest.report("chaos", results, Path(chosen.json))
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    options.run(main)
