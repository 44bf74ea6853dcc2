"""How training ends early: signals, kills, a second run, lost workers, full disks, bad batches."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Error, Run, events, same, state, tiny_train
from test_files import largest_file
from test_resume import fail

from common.errors import InputError
from common.lock import only_writer
from common.signals import Signals, Stopped
from data import Batch, TrainingBatches
from model import DIME, Output
from training import loop, resume
from training.loop import Trainer
from training.resume import BEST, NEWEST
from training.step import TrainStep

STATE = ("weights", "optimizer", "random", "epoch", "position", "step", "best_rsum", "best_r1")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads processes from /proc")


@pytest.fixture(autouse=True)
def _usual_signals() -> Iterator[None]:
    """Under nohup, or in the background of a script, some are ignored, and children inherit it."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL}
    usual[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


LONG = ("--max_steps", "100000", "--num_epochs", "100000", "--log_step", "1")
LONG += ("--val_step", "50000", "--lr_update", "99999", "--save_step", "40000")


class Running:
    """train.py in a process group of its own, once its standard error matches `ready`."""

    def __init__(self, argv: list[str], ready: str) -> None:
        command = [sys.executable, str(ROOT / "train.py"), *argv]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
        )
        self.text = ""
        while not re.search(ready, self.text):
            line = self.process.stderr.readline()
            assert line, self.text
            self.text += line

    def workers(self) -> list[int]:
        pid = self.process.pid
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def end(self) -> int:
        """Wait for the end; returns the exit status."""
        self.text += self.process.communicate(timeout=120)[1]
        return self.process.returncode


def current_step(monkeypatch) -> Callable[[], int]:
    """Returns a function that gives the step in progress."""
    trainers, train = [], Trainer.train

    def noted(self: Trainer) -> None:
        trainers.append(self)
        train(self)

    monkeypatch.setattr(Trainer, "train", noted)
    return lambda: trainers[-1].state.step + 1


def at_step(monkeypatch, number: int, act: Callable[[], None]) -> None:
    """Do something in the middle of a step."""
    current, step = current_step(monkeypatch), TrainStep.step

    def acted(self: TrainStep, batch: Batch) -> dict:
        if current() == number:
            act()
        return step(self, batch)

    monkeypatch.setattr(TrainStep, "step", acted)


@pytest.mark.parametrize(("name", "closed"), [("SIGTERM", False), ("SIGINT", True)])
def test_signal_finishes_the_step_and_saves(tiny: Path, name: str, closed: bool) -> None:
    """Sent to the whole process group, workers included, as a terminal and a cluster do.

    Standard error may be closed: Ctrl-C also ends the tee of `train.py 2>&1 | tee log`.
    """
    running = Running(tiny_train(tiny, *LONG, "--workers", "2"), "step 4/")
    if closed:
        running.process.stderr.close()
    os.killpg(running.process.pid, signal.Signals[name])
    status = running.process.wait(timeout=120) if closed else running.end()
    assert status == 128 + signal.Signals[name] and "Traceback" not in running.text
    folder = tiny / "runs/i2t"
    last = (folder / "train.log").read_text().splitlines()[-1]
    step = state(folder / NEWEST)["step"]
    assert step == events(folder)[-1]["step"] >= 4
    assert f"[{step}] stopped by {name}" in last and NEWEST in last and "--resume auto" in last


def test_run_stopped_by_a_signal_resumes_to_the_same_bits(
    tiny: Path, run_train: Run, monkeypatch
) -> None:
    """In a step, and in a validation, which is made again."""
    argv = tiny_train(tiny, "--extra_stc", "1", "--max_steps", "14", "--val_step", "4")
    assert run_train(*argv) == 0
    uncut, folder = (tiny / "runs").rename(tiny / "uncut") / "i2t", tiny / "runs/i2t"
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: signal.raise_signal(signal.SIGTERM))
        assert run_train(*argv) == 143
    assert state(folder / NEWEST)["step"] == 7
    score = DIME.score

    def signalled(self: DIME, *args: object, **options: object) -> object:
        if not self.training:
            signal.raise_signal(signal.SIGINT)
        return score(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("evaluation.TILE", 4)  # several tiles, of which the first is scored
        patch.setattr(DIME, "score", signalled)
        assert run_train(*argv, "--resume", "auto") == 130
    left = state(folder / NEWEST)
    assert left["step"] == 8 and left["validated"] == 4
    assert run_train(*argv, "--resume", "auto") == 0
    for name in (NEWEST, BEST):
        ours, theirs = state(folder / name), state(uncut / name)
        assert all(same(ours[key], theirs[key]) for key in STATE), name
    assert logged(folder) == logged(uncut)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def logged(folder: Path) -> list[tuple[int, bool]]:
    """The steps of a run's log, and which of them are validations."""
    return [(event["step"], "rsum" in event) for event in events(folder)]


def test_second_signal_ends_at_once() -> None:
    with Signals() as signals:
        signals.check()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a launcher that doubles it
        with pytest.raises(Stopped) as stop:
            signals.check()
        assert stop.value.number == signal.SIGTERM
        signals.since -= 10
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Signals() as signals:
        signal.raise_signal(signal.SIGHUP)
        signals.check()


def test_killed_run_resumes_to_the_same_bits(tiny: Path, run_train: Run) -> None:
    argv = tiny_train(tiny, "--extra_stc", "1", "--val_step", "7", "--save_step", "3")
    argv += ["--log_step", "1", "--workers", "2", "--num_epochs", "100000"]
    running = Running(argv, "step 17/")
    running.process.kill()
    running.end()
    folder = tiny / "runs/i2t"
    step = state(folder / NEWEST)["step"]
    assert step >= 15
    argv += ["--max_steps", str(step // 7 * 7 + 7)]  # ends with a validation that was due anyway
    assert run_train(*argv, "--resume", "auto") == 0
    cut, lines = state(folder / NEWEST), logged(folder)
    assert run_train(*argv, "--overwrite") == 0
    assert all(same(cut[key], state(folder / NEWEST)[key]) for key in STATE)
    assert lines == logged(folder)


def test_validation_cut_off_before_its_checkpoint_is_logged_once(
    tiny: Path, run_train: Run, monkeypatch
) -> None:
    argv = tiny_train(tiny, "--max_steps", "6", "--val_step", "3")
    write, written = resume.write_checkpoint, []

    def cut(path: Path, *content: object, **state: object) -> None:
        written.append((path.name, state["step"], state["validated"]))
        if state["validated"] == 6:
            raise KeyboardInterrupt
        write(path, *content, **state)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "write_checkpoint", cut)
        assert run_train(*argv) == 130
    # Each validation saves before it, and after it the best model and the newest.
    assert written[:3] == [(NEWEST, 3, 0), (BEST, 3, 3), (NEWEST, 3, 3)]
    before = logged(tiny / "runs/i2t")
    assert run_train(*argv, "--resume", "auto") == 0
    assert logged(tiny / "runs/i2t") == before and (6, True) in before
    assert state(tiny / "runs/i2t" / NEWEST)["validated"] == 6


@LINUX
def test_second_run_is_refused_while_the_first_one_lives(
    tiny: Path, run_train: Run, train_error: Error
) -> None:
    """The lock of a killed program is free at once, even if its workers still live."""
    argv = tiny_train(tiny, *LONG, "--workers", "2", "--save_step", "1")
    running = Running(argv, "step 4/")
    for more in (["--resume", "auto"], ["--overwrite"], []):
        assert f"process {running.process.pid} " in train_error(*tiny_train(tiny), *more)
    workers = running.workers()
    try:
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)  # so that they do not notice their parent's end
        running.process.kill()
        running.process.wait()
        step = state(tiny / "runs/i2t" / NEWEST)["step"]
        assert run_train(*argv, "--resume", "auto", "--max_steps", str(step + 1)) == 0
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        running.process.stderr.close()


def test_folder_without_locks_is_a_warning(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(fcntl, "lockf", fail(OSError(38, "Function not implemented")))
    with only_writer(tmp_path / "run/lock"):
        assert "Function not implemented" in caplog.text


@LINUX
def test_killed_worker_ends_the_run_with_a_checkpoint_and_one_line(tiny: Path) -> None:
    running = Running(tiny_train(tiny, *LONG, "--workers", "2"), "step 3/")
    deadline = time.monotonic() + 60
    while running.process.poll() is None and time.monotonic() < deadline:  # each epoch has new ones
        for pid in running.workers()[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    assert running.end() == 2, running.text
    line = running.text.splitlines()[-1]
    assert "--workers 2" in line and "--resume auto" in line and "Traceback" not in running.text
    folder = tiny / "runs/i2t"
    assert state(folder / NEWEST)["step"] == events(folder)[-1]["step"]


# Memory and disks


def test_out_of_memory_is_one_line_that_names_what_needs_less(
    trained: Path, run_train: Run, train_error: Error, monkeypatch
) -> None:
    argv = tiny_train(trained, "--resume", "auto", "--max_steps", "9")
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: torch.empty(2**50))
        line = train_error(*argv)
    for part in ("step 4", "--activation_checkpointing", "--batch_size", f"i2t/{NEWEST}"):
        assert part in line
    assert state(trained / "runs/i2t" / NEWEST)["step"] == 2
    at_step(monkeypatch, 3, lambda: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):  # another error of torch
        run_train(*argv)


def test_full_disk_ends_the_run_and_leaves_the_last_checkpoint(
    trained: Path, train_error: Error
) -> None:
    folder = trained / "runs/i2t"
    with largest_file((folder / NEWEST).stat().st_size // 2):
        line = train_error(*tiny_train(trained), "--max_steps", "4", "--resume", "auto")
    assert f"{NEWEST}: File too large" in line
    assert state(folder / NEWEST)["step"] == 2
    assert not list(folder.glob("*.partial"))


def test_error_in_a_validation_names_the_checkpoint(
    tiny: Path, train_error: Error, monkeypatch
) -> None:
    line = train_error(*tiny_train(tiny, "--learning_rate", "1e30", "--max_steps", "1"))
    assert "step 1: " in line and "NaN" in line
    monkeypatch.setattr(loop, "score_split", fail(InputError("--workers 1: died")))
    line = train_error(*tiny_train(tiny, "--max_steps", "1", "--overwrite"))
    assert "step 1: --workers 1: died" in line and NEWEST in line and "--resume auto" in line


def spoil(monkeypatch, *steps: int) -> None:
    """Make the losses of some steps NaN."""
    forward, current = DIME.forward, current_step(monkeypatch)

    def spoilt(self: DIME, regions: torch.Tensor, *rest: object) -> Output:
        return forward(self, regions * (torch.nan if current() in steps else 1), *rest)

    monkeypatch.setattr(DIME, "forward", spoilt)


def test_bad_batches_are_skipped_up_to_a_number(
    tiny: Path, run_train: Run, train_error: Error, monkeypatch
) -> None:
    spoil(monkeypatch, 3, 4, 6)
    argv, folder = tiny_train(tiny, "--val_step", "4", "--log_step", "1"), tiny / "runs/i2t"
    argv += ["--max_steps", "8", "--skip_bad_batches"]
    line = train_error(*argv, "2")
    assert "step 6: loss nan" in line and "--skip_bad_batches" in line
    assert run_train(*argv, "3", "--overwrite") == 0
    uncut = state(folder / NEWEST)
    assert uncut["step"] == 8 and uncut["skipped"] == 3
    assert all(value.isfinite().all() for value in uncut["weights"].values())
    assert {int(m["step"]) for m in uncut["optimizer"]["state"].values()} == {5}
    assert [event["step"] for event in events(folder) if "Le" in event] == [1, 2, 5, 7, 8]
    assert run_train(*argv, "3", "--overwrite", "--max_steps", "4") == 0
    assert run_train(*argv, "3", "--resume", "auto", "--log_step", "9") == 0  # over resumes, too
    cut = state(folder / NEWEST)
    assert all(same(cut[key], uncut[key]) for key in (*STATE, "skipped"))


def test_bad_batch_is_found_before_the_next_checkpoint(
    tiny: Path, run_train: Run, train_error: Error, monkeypatch
) -> None:
    """Not at once: the figures of several steps are fetched together."""
    spoil(monkeypatch, 4)
    batches = []
    epoch = TrainingBatches.epoch
    monkeypatch.setattr(
        TrainingBatches, "epoch", lambda *args: (batches.append(b) or b for b in epoch(*args))
    )
    argv, folder = tiny_train(tiny, "--max_steps", "9", "--log_step", "50"), tiny / "runs/i2t"
    line = train_error(*argv, "--save_step", "3")
    captions = ", ".join(map(str, batches[3].captions.tolist()))
    assert "step 4: loss nan" in line and captions in line
    assert len(batches) == 6 and state(folder / NEWEST)["step"] == 3
    assert run_train(*argv, "--overwrite", "--skip_bad_batches", "1") == 0
    assert state(folder / NEWEST)["skipped"] == 1
    assert "step 4: loss nan" in (folder / "train.log").read_text()


def test_infinite_gradient_is_a_bad_batch_and_changes_nothing(
    trained: Path, run_train: Run, train_error: Error, monkeypatch
) -> None:
    argv, path = tiny_train(trained, "--max_steps", "3"), trained / "runs/i2t" / NEWEST
    before, forward = state(path), DIME.forward

    def steep(self: DIME, *args: object) -> Output:
        output = forward(self, *args)
        output.scores.register_hook(lambda gradient: gradient * torch.inf)
        return output

    monkeypatch.setattr(DIME, "forward", steep)
    line = train_error(*argv, "--resume", "auto")
    assert re.search(r"step 3: loss \d+\.\d+, gradient norm (nan|inf)", line)
    assert run_train(*argv, "--resume", "auto", "--skip_bad_batches", "1") == 0
    after = state(path)
    assert after["step"] == 3 and after["skipped"] == 1
    assert same(after["weights"], before["weights"])
    assert same(after["optimizer"], before["optimizer"])
