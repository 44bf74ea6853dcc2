"""What ends a training early: signals, a second writer, lost workers, memory, bad batches."""

import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, same, tiny_train
from test_files import largest_file
from test_train import events, last_line, state

import data
from common import cli as options
from common.errors import InputError
from common.signals import Signals, Stopped
from common.torch_files import write_torch
from common.workers import load
from data import Batch, TrainingBatches
from evaluation import Recall, Retrieval
from model import DIME, Output
from training import log as runlog
from training import loop as trainer
from training import resume as snapshots
from training import runfolder
from training.loop import Trainer
from training.resume import BEST, NEWEST, PREVIOUS, TrainState
from training.step import TrainStep

STATE = ("weights", "optimizer", "random", "epoch", "position", "step", "best_rsum", "best_r1")


@pytest.fixture(autouse=True)
def _usual_signals() -> Iterator[None]:
    """Under nohup, or in the background of a script, some are ignored, and children inherit it."""
    before = {
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        signal.SIGTERM: signal.signal(signal.SIGTERM, signal.SIG_DFL),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def started(argv: list[str], ready: str) -> subprocess.Popen[str]:
    """train.py in a process group of its own, once it has said `ready`; its words are kept."""
    command = [sys.executable, str(ROOT / "train.py"), *argv]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
    )
    process.said = ""
    while not re.search(ready, process.said):
        line = process.stderr.readline()
        assert line, process.said
        process.said += line
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = process.said + process.communicate(timeout=120)[1]
    return process.returncode, said


LONG = ("--max_steps", "100000", "--log_step", "1", "--val_step", "50000", "--lr_update", "99999")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_finishes_the_step_and_saves(tiny: Path, name: str) -> None:
    """Sent to the whole process group, workers included, as a terminal and a cluster do."""
    argv = tiny_train(tiny, *LONG, "--num_epochs", "100000", "--save_step", "40000")
    argv += ["--workers", "2"]
    process = started(argv, "step 4/")
    os.killpg(process.pid, signal.Signals[name])
    status, said = ended(process)
    assert status == 128 + signal.Signals[name], said
    assert "Traceback" not in said
    match = re.search(rf"stopped by {name} at step (\d+); the last checkpoint is ([^\s;]+)", said)
    assert match and "--resume auto" in said.splitlines()[-1]
    steps = int(match[1])
    assert state(Path(match[2]))["step"] == steps == events(tiny / "runs/i2t")[-1]["step"] >= 4
    assert "finishing what is begun" in said
    log = (tiny / "runs/i2t/train.log").read_text().splitlines()
    assert f"[{steps}] stopped by {name}" in log[-1]


def test_a_signal_with_nobody_at_the_other_end_of_stderr_saves(tiny: Path) -> None:
    """Ctrl-C also ends the tee of `train.py 2>&1 | tee log`; a terminal can be closed."""
    argv = tiny_train(tiny, *LONG, "--num_epochs", "100000", "--save_step", "40000")
    process = started(argv, "step 4/")
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    folder = tiny / "runs/i2t"
    assert state(folder / NEWEST)["step"] == events(folder)[-1]["step"] >= 4
    assert "stopped by SIGINT" in (folder / "train.log").read_text().splitlines()[-1]


def test_the_line_of_an_error_has_nothing_that_a_terminal_obeys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def program() -> None:
        raise InputError("a\x1b[2Jb\0c\nd")

    monkeypatch.setattr(options, "tune_malloc", lambda: None)
    with pytest.raises(SystemExit):
        options.run(program)
    assert last_line(capsys).endswith(r": error: a\x1b[2Jb\x00c d")


def test_ctrl_c_before_training_has_begun_is_one_line(tmp_path: Path) -> None:
    program = "import options, time; options.run(lambda: (print('on', flush=True), time.sleep(60)))"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT},
    )
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].endswith("-c: interrupted\n")
    assert process.returncode == 130


def noted_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list of one number: the step that is being made."""
    attempt, now = Trainer._step_or_skip, [0]

    def noted(self: Trainer, batch: Batch) -> dict | None:
        now[0] = self.place.step + 1
        return attempt(self, batch)

    monkeypatch.setattr(Trainer, "_attempt", noted)
    return now


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Do something in the middle of a step."""
    step, now = TrainStep.step, noted_steps(monkeypatch)

    def acted(self: TrainStep, batch: Batch) -> dict:
        if now == [number]:
            act()
        return step(self, batch)

    monkeypatch.setattr(TrainStep, "step", acted)


def test_what_a_signal_left_goes_on_to_the_same_bits(
    tiny: Path, run_train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = tiny_train(tiny, "--extra_stc", "1", "--max_steps", "14", "--val_step", "4")
    assert run_train(*argv) == 0
    uncut = (tiny / "runs").rename(tiny / "uncut")
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: signal.raise_signal(signal.SIGTERM))
        assert run_train(*argv) == 143
    assert state(tiny / "runs/i2t" / NEWEST)["step"] == 7
    assert run_train(*argv, "--resume", "auto") == 0
    for name in (NEWEST, BEST):
        ours, theirs = state(tiny / "runs/i2t" / name), state(uncut / "i2t" / name)
        assert all(same(ours[key], theirs[key]) for key in STATE), name
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_step_whose_compiler_a_signal_ended_is_given_up(
    tiny: Path,
    run_train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As Ctrl-C does, which the compiler gets, too: what is computed without it has other bits."""
    argv, folder = tiny_train(tiny, "--max_steps", "3", "--compile"), tiny / "runs/i2t"
    caplog.set_level("INFO")

    def compile_(signalled: bool) -> None:
        def killed(*given: object) -> None:
            if signalled:
                signal.raise_signal(signal.SIGINT)
            raise RuntimeError("g++: killed")

        monkeypatch.setattr(torch, "compile", lambda function, **options: killed)

    compile_(signalled=True)
    assert run_train(*argv) == 128 + signal.SIGINT
    assert "stopped by SIGINT at step 0; no checkpoint yet; the same command" in caplog.text
    assert not (folder / NEWEST).exists()
    compile_(signalled=False)
    assert run_train(*argv, "--resume", "auto") == 0
    assert "not compiled, going on without: g++: killed" in caplog.text
    assert state(folder / NEWEST)["step"] == 3


def test_a_signal_leaves_a_validation_at_once_and_it_is_made_again(
    tiny: Path, run_train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = tiny_train(tiny, "--max_steps", "6", "--val_step", "3")
    assert run_train(*argv) == 0
    uncut = (tiny / "runs").rename(tiny / "uncut")

    def told(*args: object, **options: object) -> None:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the validation went on")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "score_split", told)
        assert run_train(*argv) == 130
    left = state(tiny / "runs/i2t" / NEWEST)
    assert left["step"] == 3 and left["validated"] == 0
    assert run_train(*argv, "--resume", "auto") == 0
    for name in (NEWEST, BEST):
        ours, theirs = state(tiny / "runs/i2t" / name), state(uncut / "i2t" / name)
        assert all(same(ours[key], theirs[key]) for key in STATE), name
    steps = [event["step"] for event in events(tiny / "runs/i2t") if "rsum" in event]
    assert steps == [3, 6]


def test_a_validation_cut_off_between_its_log_and_its_checkpoint_is_logged_once(
    tiny: Path, run_train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = tiny_train(tiny, "--max_steps", "6", "--val_step", "3")
    write = snapshots.write_checkpoint

    def cut(path: Path, *content: object, **state: object) -> None:
        if state["validated"] == 6:
            raise KeyboardInterrupt
        write(path, *content, **state)

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "write_checkpoint", cut)
        assert run_train(*argv) == 130
    steps = [event["step"] for event in events(tiny / "runs/i2t") if "rsum" in event]
    assert steps == [3, 6]
    assert run_train(*argv, "--resume", "auto") == 0
    steps = [event["step"] for event in events(tiny / "runs/i2t") if "rsum" in event]
    assert steps == [3, 6] and state(tiny / "runs/i2t" / NEWEST)["validated"] == 6


def test_checkpoints_between_validations(
    tiny: Path, run_train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    write = snapshots.write_checkpoint

    def noted(path: Path, *content: object, **state: object) -> None:
        kept.append((path.name, state["step"], state["validated"]))
        write(path, *content, **state)

    monkeypatch.setattr(snapshots, "write_checkpoint", noted)
    assert run_train(*tiny_train(tiny, "--max_steps", "7", "--save_step", "2")) == 0
    newest = [(step, validated) for name, step, validated in kept if name == NEWEST]
    assert newest == [(2, 0), (4, 0), (6, 0), (7, 0), (7, 7)]
    assert state(tiny / "runs/i2t" / PREVIOUS)["validated"] == 0


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_gone_on_with(
    tiny: Path, run_train: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    argv, folder = tiny_train(tiny, "--save_step", "2", "--max_steps", "9"), tiny / "runs/i2t"
    assert run_train(*argv) == 0
    uncut = state(folder / NEWEST)
    assert run_train(*argv, "--overwrite", "--max_steps", "5") == 0
    (folder / PREVIOUS).unlink()
    assert run_train(*argv, "--max_steps", "6", "--resume", "auto") == 0
    assert state(folder / PREVIOUS)["step"] == 6 and state(folder / PREVIOUS)["validated"] == 5
    damage(folder / NEWEST)
    caplog.clear()
    assert run_train(*argv, "--resume", "auto") == 0
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "checksum do not fit" in warnings[0] and f"from {folder / PREVIOUS}" in warnings[1]
    assert len(warnings) == 2
    assert (folder / f"{NEWEST}.damaged").exists()
    for key in ("weights", "optimizer", "random", "step"):
        assert same(state(folder / NEWEST)[key], uncut[key]), key
    (folder / NEWEST).unlink()  # as a run leaves it that ends between two names
    caplog.clear()
    assert run_train(*argv, "--resume", "auto") == 0
    assert f"{NEWEST} is damaged or missing" in caplog.text
    for path in (folder / NEWEST, folder / PREVIOUS, folder / BEST):
        damage(path)
    assert run_train(*argv, "--resume", "auto") == 2  # and nothing is begun afresh
    assert (folder / BEST).exists() and events(folder)


def test_a_full_disk_ends_the_run_and_leaves_the_last_good_checkpoint(
    tiny: Path,
    run_train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    argv, folder = tiny_train(tiny, "--save_step", "2", "--max_steps", "9"), tiny / "runs/i2t"
    assert run_train(*argv, "--max_steps", "4") == 0
    size = (folder / NEWEST).stat().st_size
    with largest_file(size // 2):
        assert run_train(*argv, "--resume", "auto") == 2
    assert re.search(r"tar: File too large", last_line(capsys))
    assert state(folder / NEWEST)["step"] == 4
    assert not list(folder.glob("*.partial"))


def test_a_newest_checkpoint_that_cannot_be_read_now_is_not_set_aside(
    tiny: Path, run_train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv, folder = tiny_train(tiny, "--save_step", "1"), tiny / "runs/i2t"
    assert run_train(*argv, "--max_steps", "2") == 0
    load = torch.load
    for error in (MemoryError(), OSError(5, "Input/output error")):
        failing = [error]

        def once(*args: object, failing: list = failing, **more: object) -> object:
            if failing:
                raise failing.pop()
            return load(*args, **more)

        monkeypatch.setattr(torch, "load", once)
        assert run_train(*argv, "--max_steps", "3", "--resume", "auto") == 2
        assert not list(folder.glob("*.damaged"))
    assert run_train(*argv, "--max_steps", "3", "--resume", "auto") == 0


SMALL_STEPS = ("--save_step", "3", "--val_step", "5", "--log_step", "1", "--extra_stc", "1")


def logged(folder: Path) -> list[tuple[int, bool]]:
    """The steps of a run's log, and which of them are validations."""
    return [(event["step"], "rsum" in event) for event in events(folder)]


def test_a_run_gone_on_with_from_an_older_checkpoint_gives_up_what_came_after_it(
    tiny: Path, run_train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is killed before it has saved anything: log and checkpoints stay together."""
    argv, folder = tiny_train(tiny, *SMALL_STEPS), tiny / "runs/i2t"
    assert run_train(*argv, "--max_steps", "14") == 0
    uncut = logged(folder)
    (folder / NEWEST).rename(folder / "later.pth.tar")
    assert state(folder / PREVIOUS)["step"] > 10
    assert run_train(*argv, "--max_steps", "10", "--overwrite") == 0
    older = (folder / NEWEST).rename(folder / "older.pth.tar")
    (folder / "later.pth.tar").rename(folder / NEWEST)
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "step", lambda *_: (_ for _ in ()).throw(MemoryError("no more")))
        assert run_train(*argv, "--max_steps", "14", "--resume", older) == 2
    assert state(folder / NEWEST)["step"] == 10
    assert not (folder / PREVIOUS).exists()
    assert run_train(*argv, "--max_steps", "14", "--resume", "auto") == 0
    assert logged(folder) == uncut


def test_a_best_model_of_steps_that_are_given_up_is_given_up(
    tiny: Path,
    run_train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    argv, folder = tiny_train(tiny), tiny / "runs/i2t"
    older = folder / "older.pth.tar"

    def trained(selection: float, *more: object) -> int:
        monkeypatch.setattr(Retrieval, "selection", property(lambda _: selection))
        return run_train(*argv, *more)

    assert trained(40.0, "--max_steps", "4") == 0
    shutil.copy(folder / NEWEST, older)
    assert trained(200.0, "--max_steps", "8", "--resume", "auto") == 0
    run = (folder / "run.json").read_bytes()
    for name in ("runs", "new"):  # where there is nothing to be done
        there = ["--max_steps", "4", "--logger_name", tiny / name]
        assert trained(50.0, *there, "--resume", older) == 2
        said = "older.pth.tar: its run is complete at step 4; expected more of --max_steps"
        assert said in last_line(capsys)
    assert (folder / "run.json").read_bytes() == run and state(folder / BEST)["step"] == 8
    with monkeypatch.context() as patch:  # cut off before its first step
        patch.setattr(TrainingBatches, "epoch", lambda *_: (_ for _ in ()).throw(InputError("no")))
        assert trained(50.0, "--max_steps", "6", "--resume", older) == 2
    assert trained(50.0, "--max_steps", "6", "--resume", "auto") == 0
    assert "model_best.pth.tar: is of step 8, which is given up; the next one" in caplog.text
    best = state(folder / BEST)
    assert (best["step"], best["best_rsum"]) == (6, 50.0)

    (folder / BEST).unlink()
    assert trained(45.0, "--max_steps", "7", "--resume", "auto") == 0
    assert "model_best.pth.tar: not found, whose R@1+R@5 was 50.0; the next one" in caplog.text
    assert state(folder / BEST)["step"] == 7


def test_what_ends_a_run_in_another_folder_finds_its_checkpoint_there(
    tiny: Path,
    run_train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert run_train(*tiny_train(tiny, "--max_steps", "4")) == 0
    argv = tiny_train(tiny, "--max_steps", "9", "--logger_name", tiny / "new")
    at_step(monkeypatch, 5, lambda: torch.empty(2**50))
    assert run_train(*argv, "--resume", tiny / "runs/i2t" / NEWEST) == 2
    assert f"the last checkpoint is {tiny / 'new/i2t' / NEWEST}" in last_line(capsys)
    assert state(tiny / "new/i2t" / NEWEST)["step"] == 4


def test_the_way_on_leaves_overwrite_out(
    tiny: Path,
    run_train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    at_step(monkeypatch, 3, lambda: torch.empty(2**50))
    assert run_train(*tiny_train(tiny, "--overwrite")) == 2
    assert "with --resume auto in place of --overwrite goes on" in last_line(capsys)


def test_what_ends_a_validation_names_the_checkpoint(
    tiny: Path,
    run_train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def lost(*given: object, **more: object) -> None:
        raise InputError("a process of --workers 1 is gone")

    monkeypatch.setattr(trainer, "score_split", lost)
    assert run_train(*tiny_train(tiny, "--max_steps", "3")) == 2
    said = last_line(capsys)
    assert "a process of --workers 1 is gone; the last checkpoint is" in said
    assert "; once that is mended, the same command with --resume auto goes on" in said


@pytest.mark.parametrize("name", ["dev", "train"])
@pytest.mark.parametrize("large", [False, True])
def test_other_data_is_refused(
    tiny: Path,
    run_train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    name: str,
    large: bool,
) -> None:
    """One number of any row is enough; of a large file, one of some rows."""
    if large:
        monkeypatch.setattr(data, "SMALL_FILE", 0)
        monkeypatch.setattr(data, "SAMPLED_ROWS", 3)  # the first, the last, the middle
    argv = tiny_train(tiny, "--max_steps", "3")
    assert run_train(*argv) == 0
    features = np.load(tiny / f"data/tiny/{name}_ims.npy")
    row = len(features) // 2 if large else 3
    features[row, 2, 1] += 1
    np.save(tiny / f"data/tiny/{name}_ims.npy", features)
    assert run_train(*argv, "--resume", "auto") == 2
    said = last_line(capsys)
    assert "was trained on other data" in said and f"{name}_ims.npy" in said


def test_the_best_model_of_another_run_is_not_believed(
    tiny: Path, run_train: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    argv, folder = tiny_train(tiny, "--max_steps", "3"), tiny / "runs/i2t"
    assert run_train(*argv) == 0
    content = torch.load(folder / BEST, weights_only=True)
    content["options"]["margin"] = 0.3
    write_torch(folder / BEST, content | {"best_rsum": 399.0})
    argv[argv.index("--max_steps") + 1] = "4"
    assert run_train(*argv, "--resume", "auto") == 0
    assert "was trained with --margin 0.3" in caplog.text
    assert state(folder / BEST)["step"] == 4


def test_a_link_to_nothing_is_no_missing_checkpoint(
    tiny: Path, run_train: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    """A disk that is not mounted must not make the run start afresh."""
    argv, folder = tiny_train(tiny, "--max_steps", "3"), tiny / "runs/i2t"
    assert run_train(*argv) == 0
    for name in (NEWEST, PREVIOUS, BEST):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tiny / "unmounted")
    assert run_train(*argv, "--resume", "auto") == 2
    assert f"{NEWEST}: not found" in last_line(capsys)
    assert (folder / "metrics.jsonl").exists()


def test_the_lock_is_no_one_elses_file(
    tiny: Path, run_train: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    (tiny / "runs/i2t").mkdir(parents=True)
    (tiny / "precious").write_text("precious")
    os.link(tiny / "precious", tiny / "runs/i2t/lock")
    assert run_train(*tiny_train(tiny)) == 2
    assert "lock: is a link" in last_line(capsys)
    assert (tiny / "precious").read_text() == "precious"


def test_a_best_model_with_a_step_beyond_all_numbers_is_no_bug(
    tiny: Path, run_train: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    argv, folder = tiny_train(tiny, "--max_steps", "3"), tiny / "runs/i2t"
    assert run_train(*argv) == 0
    content = torch.load(folder / BEST, weights_only=True)
    write_torch(folder / BEST, content | {"epoch": 2**1100})
    argv[argv.index("--max_steps") + 1] = "4"
    assert run_train(*argv, "--resume", "auto") == 0
    assert "the next one takes its place" in caplog.text


def test_epochs_without_end_can_be_told(
    tiny: Path, run_train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time left is more than a timedelta holds."""
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    argv = tiny_train(tiny, "--num_epochs", str(10**15), "--log_step", "1", "--no-compile")
    assert run_train(*argv) == 143


def test_an_error_is_told_in_a_line_of_bearable_length(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def program() -> None:
        raise InputError("x" * 3_000_000)

    monkeypatch.setattr(options, "tune_malloc", lambda: None)
    with pytest.raises(SystemExit):
        options.run(program)
    assert 1000 < len(last_line(capsys)) < 5000


def test_a_worse_model_does_not_take_the_best_ones_place(
    tiny: Path, run_train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fallback may stand before the validation that found the best model."""
    results = iter([90.0, 80.0])

    def result(*_: object) -> Retrieval:
        value = next(results)
        recall = Recall(value, value, value, 1.0, 1.0)
        return Retrieval(recall, recall)

    monkeypatch.setattr(trainer, "retrieval", result)
    argv, folder = tiny_train(tiny, "--save_step", "2"), tiny / "runs/i2t"
    assert run_train(*argv, "--max_steps", "3") == 0
    damage(folder / NEWEST)
    assert state(folder / PREVIOUS)["best_rsum"] == -1
    assert run_train(*argv, "--max_steps", "6", "--resume", "auto") == 0
    assert state(folder / BEST)["step"] == 3
    assert state(folder / NEWEST)["best_rsum"] == 360


def test_a_damaged_best_model_is_replaced_with_a_warning(
    tiny: Path, run_train: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    argv, folder = tiny_train(tiny), tiny / "runs/i2t"
    assert run_train(*argv, "--max_steps", "2") == 0
    damage(folder / BEST)
    assert run_train(*argv, "--max_steps", "4", "--resume", "auto") == 0
    assert "checksum do not fit; the next one takes its place" in caplog.text
    assert state(folder / BEST)["step"] == 4


@pytest.mark.parametrize("resume", ["auto", NEWEST])
def test_a_finished_run_without_its_best_model_is_validated_again(
    resume: str, tiny: Path, run_train: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    argv, folder = tiny_train(tiny, "--max_steps", "2"), tiny / "runs/i2t"
    assert run_train(*argv) == 0
    logged, best = events(folder), state(folder / BEST)
    (folder / BEST).unlink()
    assert run_train(*argv, "--resume", "auto" if resume == "auto" else folder / resume) == 0
    assert "not found, whose R@1+R@5 was" in caplog.text and "complete at step" not in caplog.text
    again = state(folder / BEST)
    assert (again["step"], again["best_rsum"]) == (2, best["best_rsum"])
    assert events(folder) == logged
    assert run_train(*argv, "--resume", "auto") == 0
    assert "complete at step 2" in caplog.text


@pytest.mark.parametrize("size", [5, 60, 3000])
def test_a_disk_that_is_full_from_the_start_is_one_line(tiny: Path, size: int) -> None:
    """For the lock, for TensorBoard's first event, for the logs."""
    program = (
        "import resource, options, train; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); options.run(train.main)"
    )
    command = [sys.executable, "-c", program, *tiny_train(tiny, "--max_steps", "9")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"-c: error: .*File too large", done.stderr)


def test_what_ends_a_run_behind_a_validation_keeps_its_figures(
    tiny: Path, run_train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is written once more, of the same weights; and so it is gone on with."""
    argv, folder = tiny_train(tiny, "--max_steps", "12", "--val_step", "4"), tiny / "runs/i2t"
    epoch = TrainingBatches.epoch

    def lost(self: TrainingBatches, *given: object) -> Iterator[Batch]:
        for number, batch in enumerate(epoch(self, *given)):
            if number == 4:
                raise InputError("a process of --workers is gone")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(TrainingBatches, "epoch", lost)
        assert run_train(*argv) == 2
    kept = state(folder / NEWEST)
    assert kept["step"] == kept["validated"] == 4
    assert kept["metrics"] == state(folder / BEST)["metrics"] != {}
    with monkeypatch.context() as patch:
        patch.setattr(TrainingBatches, "epoch", lambda *_: (_ for _ in ()).throw(InputError("no")))
        for source in ("auto", folder / BEST):
            assert run_train(*argv, "--resume", source) == 2
            assert state(folder / NEWEST)["metrics"] == kept["metrics"]
    assert run_train(*argv, "--resume", "auto") == 0
    assert state(folder / NEWEST)["metrics"] != kept["metrics"]


# One writer


def test_a_second_training_is_refused_while_the_first_runs(
    tiny: Path, run_train: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    """The lock of a killed program is free at once, though its workers may live a little longer."""
    argv = tiny_train(tiny, *LONG, "--num_epochs", "100000", "--workers", "2", "--save_step", "1")
    process = started(argv, "step 4/")
    before = state(tiny / "runs/i2t" / NEWEST)["step"]
    for more in (["--resume", "auto"], ["--overwrite"], []):
        assert run_train(*tiny_train(tiny), *more) == 2
        said = last_line(capsys)
        assert f"runs/i2t: another run writes there (process {process.pid} on " in said
    assert state(tiny / "runs/i2t" / NEWEST)["step"] >= before > 1  # those would be at 1
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = [int(pid) for pid in workers.read_text().split()] if workers.exists() else []
    try:
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)  # they cannot notice that their parent is gone
        process.kill()
        process.wait()
        reached = state(tiny / "runs/i2t" / NEWEST)["step"]
        assert run_train(*argv, "--resume", "auto", "--max_steps", str(reached + 1)) == 0
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        process.stderr.close()


def test_nothing_is_written_through_links_in_a_runs_folder(
    tiny: Path, run_train: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    argv, folder = tiny_train(tiny, "--max_steps", "1"), tiny / "runs/i2t"
    folder.mkdir(parents=True)
    for name in ("lock", "metrics.jsonl", "train.log"):
        (folder / name).symlink_to(tiny / "outside")
        assert run_train(*argv, "--resume", "auto") == 2
        assert f"{name}: is a link; expected a file" in last_line(capsys)
        assert not (tiny / "outside").exists()
        (folder / name).unlink()


def test_a_folder_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", none)
    with runfolder.own_folder(tmp_path / "run"):
        assert "has no locks (Function not implemented)" in caplog.text


# Workers


HANDS_OVER = """
import sys, time, multiprocessing, numpy, loader
class Large:
    def __getitem__(self, place): return numpy.zeros(10**6)
items = loader.load(Large(), range(100), 2)
next(items)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(100)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are told by Linux")
def test_workers_end_with_a_program_that_was_killed() -> None:
    """Also where they wait for it to read what a full pipe holds."""
    process = subprocess.Popen([sys.executable, "-c", HANDS_OVER], cwd=ROOT, stdout=-1, text=True)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    process.communicate()
    for _ in range(300):
        states = [Path(f"/proc/{pid}/stat") for pid in workers]
        alive = [p for p in states if p.exists() and p.read_text().split()[2] != "Z"]
        if not alive:
            return
        time.sleep(0.1)
    raise AssertionError(f"{alive} are there after half a minute")


# of torch's own iterator, which is not whole where its second worker could not be started
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_workers_that_cannot_be_started_are_one_line(
    tiny: Path, run_train: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 6, before[1]))
    try:
        assert run_train(*tiny_train(tiny, "--workers", "2", "--max_steps", "1")) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert "--workers 2: cannot be started: Too many open files" in last_line(capsys)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds workers in Linux's /proc")
def test_a_killed_worker_ends_the_run_with_a_checkpoint_and_a_line(tiny: Path) -> None:
    argv = tiny_train(tiny, *LONG, "--num_epochs", "100000", "--workers", "2")
    process = started(argv, "step 3/")
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:  # each epoch has new ones
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in children[:1]:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    status, said = ended(process)
    assert status == 2, said
    line = said.splitlines()[-1]
    assert "a process of --workers 2 is gone" in line and "--resume auto" in line
    done = events(tiny / "runs/i2t")[-1]["step"]
    assert state(tiny / "runs/i2t" / NEWEST)["step"] == done
    assert "Traceback" not in said


class BrokenSplit:
    def __getitem__(self, place: object) -> None:
        raise RuntimeError("a bug in a worker")


class Unsendable:
    def __getitem__(self, place: int) -> object:
        return threading.Lock() if place == 3 else place


def test_what_a_worker_cannot_hand_over_is_not_waited_for_without_end() -> None:
    """Shared memory or threads can be used up; an item that cannot be pickled is like them."""
    found = load(Unsendable(), [1, 2, 3, 4], workers=1)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(InputError, match="a process of --workers 1 is gone"):
        next(found)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_in_a_worker_is_no_lost_worker(workers: int) -> None:
    with pytest.raises(RuntimeError, match="a bug in a worker"):
        list(load(BrokenSplit(), [1, 2], workers))


# Memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        None,  # the allocator's own
    ],
    ids=["python", "cuda", "cpu"],
)
def test_out_of_memory_is_one_line_with_the_last_checkpoint(
    tiny: Path,
    run_train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    error: Exception | None,
) -> None:
    def act() -> None:
        if error is None:
            torch.empty(2**50)
        raise error

    at_step(monkeypatch, 4, act)
    assert run_train(*tiny_train(tiny, "--save_step", "2", "--max_steps", "9")) == 2
    said = last_line(capsys)
    assert re.search(r"step 3: out of memory \(.+\); the last checkpoint is \S+i2t/checkp", said)
    assert state(tiny / "runs/i2t" / NEWEST)["step"] == 2


def test_out_of_memory_elsewhere_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(options, "tune_malloc", lambda: None)
    with pytest.raises(SystemExit) as stop:
        options.run(lambda: torch.empty(2**50))
    assert stop.value.code == 2
    assert ": error: out of memory ([enforce fail" in last_line(capsys)


def test_another_error_of_torch_keeps_its_traceback(
    tiny: Path, run_train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 2, lambda: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        run_train(*tiny_train(tiny, "--max_steps", "3"))


# Bad batches


@pytest.fixture
def bad_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps whose batch makes the scores, and all that batch normalisation sees, no numbers."""
    bad: list[int] = []
    forward, now = DIME.forward, noted_steps(monkeypatch)

    def spoilt(self: DIME, regions: torch.Tensor, *rest: object) -> Output:
        return forward(self, regions * (torch.nan if now[0] in bad else 1), *rest)

    monkeypatch.setattr(DIME, "forward", spoilt)
    return bad


def test_bad_batches_are_skipped_up_to_a_number(
    tiny: Path,
    run_train: Callable[..., int],
    bad_steps: list[int],
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad_steps += [3, 4, 6]
    argv, folder = tiny_train(tiny, "--max_steps", "8", "--log_step", "1"), tiny / "runs/i2t"
    assert run_train(*argv) == 2
    said = last_line(capsys)
    assert re.search(
        r"step 3: the loss is nan, .* captions \d+(, \d+){5}; no checkpoint yet; ", said
    )
    assert run_train(*argv, "--overwrite", "--skip_bad_batches", "2") == 2
    assert "step 6: the loss is nan" in last_line(capsys)
    assert run_train(*argv, "--overwrite", "--skip_bad_batches", "3") == 0
    assert "skipped, 3 of 3" in caplog.text
    found = state(folder / NEWEST)
    assert found["step"] == 8 and found["skipped"] == 3
    assert all(value.isfinite().all() for value in found["weights"].values())
    assert {int(m["step"]) for m in found["optimizer"]["state"].values()} == {5}
    assert [event["step"] for event in events(folder) if "Le" in event] == [1, 2, 5, 7, 8]


def test_a_skipped_batch_is_in_no_steps_time(
    tiny: Path,
    run_train: Callable[..., int],
    bad_steps: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad_steps += [3, 4]
    clock = iter(range(10**6))  # a second passes from each look to the next
    monkeypatch.setattr(runlog, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    argv = tiny_train(tiny, "--max_steps", "6", "--log_step", "1", "--skip_bad_batches", "2")
    assert run_train(*argv) == 0
    times = [event["batch_time"] for event in events(tiny / "runs/i2t") if "Le" in event]
    assert times == [2] * 4


def test_a_gradient_that_is_no_number_is_a_bad_batch_too(
    tiny: Path,
    run_train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Its loss is a number; what it would leave in weights and statistics is not there."""
    argv, folder = tiny_train(tiny, "--max_steps", "2"), tiny / "runs/i2t"
    assert run_train(*argv) == 0
    before = state(folder / NEWEST)
    forward, now = DIME.forward, noted_steps(monkeypatch)

    def steep(self: DIME, *given: object) -> Output:
        output = forward(self, *given)
        if now == [3]:
            output.scores.register_hook(lambda gradient: gradient * torch.inf)
        return output

    monkeypatch.setattr(DIME, "forward", steep)
    more = ["--max_steps", "3", "--resume", "auto"]
    assert run_train(*argv, *more) == 2
    said = last_line(capsys)
    assert re.search(r"step 3: the loss is \d+\.\d+, its gradient's length (nan|inf), its", said)
    assert run_train(*argv, *more, "--skip_bad_batches", "1") == 0
    after = state(folder / NEWEST)
    assert after["step"] == 3 and after["skipped"] == 1
    assert same(after["weights"], before["weights"])
    assert same(after["optimizer"], before["optimizer"])


def test_skipped_batches_are_counted_over_resumes_to_the_same_bits(
    tiny: Path,
    run_train: Callable[..., int],
    bad_steps: list[int],
    capsys: pytest.CaptureFixture,
) -> None:
    bad_steps += [1, 3, 6]
    argv = tiny_train(tiny, "--max_steps", "8", "--skip_bad_batches", "3", "--save_step", "1")
    assert run_train(*argv) == 0
    uncut = state(tiny / "runs/i2t" / NEWEST)
    for steps in ("1", "4", "8"):
        more = ["--overwrite"] if steps == "1" else ["--resume", "auto"]
        assert run_train(*argv, "--max_steps", steps, *more) == 0
    cut = state(tiny / "runs/i2t" / NEWEST)
    assert all(same(cut[key], uncut[key]) for key in ("weights", "optimizer", "random", "skipped"))


# Places


@pytest.mark.parametrize(
    "change",
    [{"best_rsum": float("nan")}, {"skipped": None}, {"validated": "x"}, {"epoch": -1, "step": -9}],
)
def test_places_that_are_none_are_refused(change: dict) -> None:
    usual = {"epoch": 1, "position": 2, "step": 12, "validated": 10, "skipped": 0}
    usual |= {"best_rsum": 3.0, "best_r1": 1.0}
    assert TrainState.read(usual, 10) == TrainState(**usual)
    with pytest.raises(ValueError, match=next(iter(change))):
        TrainState.read(usual | change, 10)


def test_the_epoch_of_the_last_batch() -> None:
    assert [
        TrainState(0, 3, 3).last_epoch,
        TrainState(1, 0, 9).last_epoch,
        TrainState().last_epoch,
    ] == [0, 0, 0]
    assert TrainState(1, 4, 13).last_epoch == 1


# Signals


def test_signals_are_noted_and_obeyed() -> None:
    with Signals() as signals:
        signals.obey()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a launcher that doubles it
        with pytest.raises(Stopped) as stop:
            signals.obey()
        assert stop.value.number == signal.SIGTERM and str(stop.value) == "SIGTERM"
        signals.since -= 10
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # once more: at once
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_worker_obeys_at_once() -> None:
    """One that is told to end before torch has seen to its signals would be waited for else."""
    with Signals() as signals:
        worker = os.fork()
        if worker == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 128 + signal.SIGTERM
        signals.obey()


def test_signals_that_come_while_nothing_must_be_finished_are_obeyed_at_once() -> None:
    reached = []
    with Signals() as signals:
        with pytest.raises(Stopped), signals.at_once():
            signal.raise_signal(signal.SIGINT)
            reached.append(1)
        with pytest.raises(Stopped), signals.at_once():
            reached.append(2)
    assert reached == []


def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Signals() as signals:
        signal.raise_signal(signal.SIGHUP)
        signals.obey()


def test_an_unsealed_checkpoint_of_a_run_is_gone_on_with(
    tiny: Path, run_train: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    argv, path = tiny_train(tiny, "--max_steps", "2"), tiny / "runs/i2t" / NEWEST
    assert run_train(*argv) == 0
    torch.save(state(path), path)
    assert run_train(*argv, "--max_steps", "3", "--resume", "auto") == 0
    assert "carries no checksum" in caplog.text
    write_torch(path, state(path))
