"""train.py in several processes: one run, one writer, one line for bad input, no hang."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, events, same, state, tiny_train
from ranks import Programs

import train
from common.lock import LOCK, only_writer
from common.world import World
from training.config import TrainConfig
from training.loop import Trainer
from training.resume import BEST, NEWEST, TrainState

LONG = ("--max_steps", "100000", "--num_epochs", "100000", "--log_step", "1")
LONG += ("--val_step", "50000", "--lr_update", "99999", "--save_step", "40000")
EXTRA = ("--extra_stc", "1")


def run(tiny: Path, size: int, *more: str) -> Programs:
    return Programs(tiny, size, train.main, [tiny_train(tiny, *EXTRA, *more)])


def refused(tiny: Path, programs: Programs) -> str:
    """Return the line in which process 0 has refused its input; the others are quiet."""
    statuses = programs.end()
    assert statuses == [2] * len(statuses)
    assert not any(programs.errors(rank) for rank in range(1, len(statuses)))
    assert "Traceback" not in programs.errors()
    return programs.errors().splitlines()[-1]


def test_torchrun_trains_and_any_number_of_processes_resumes(tiny: Path) -> None:
    argv = [*tiny_train(tiny, *EXTRA, "--max_steps", "4"), "--device", "cpu"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, ROOT / "train.py", *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tiny / "runs/i2t"
    assert done.stderr.count("step 4/4") == 1  # one process logs
    for size, steps in ((1, 6), (3, 8)):
        programs = run(tiny, size, "--max_steps", str(steps), "--resume", "auto")
        assert programs.end() == [0] * size
        assert state(folder / NEWEST)["step"] == steps
    run_json = json.loads((folder / "run.json").read_text())
    assert run_json["processes"] == 3 and run_json["resumed_at"] == [4, 6]
    assert [session["processes"] for session in run_json["earlier"]] == [2, 1]
    assert [e["step"] for e in events(folder) if "Le" in e] == [2, 4, 6, 8]
    assert (folder / BEST).exists() and len(list(folder.glob("events.out.*"))) == 3


def test_resumed_run_of_two_processes_ends_with_the_same_bits(tiny: Path) -> None:
    """With BERT's dropout, which no random state of a checkpoint changes."""
    folder = tiny / "runs/i2t"
    assert run(tiny, 2, "--max_steps", "4").end() == [0, 0]
    uncut = state(folder.rename(tiny / "uncut") / NEWEST)
    assert run(tiny, 2, "--max_steps", "2").end() == [0, 0]
    newest = state(folder / NEWEST)
    newest["random"]["cpu"] = torch.Generator().manual_seed(9).get_state()  # of one process, unused
    torch.save(newest, folder / NEWEST)
    assert run(tiny, 2, "--max_steps", "4", "--resume", "auto").end() == [0, 0]
    cut = state(folder / NEWEST)
    assert same(cut["weights"], uncut["weights"]) and same(cut["optimizer"], uncut["optimizer"])


def test_dropout_has_a_seed_of_its_own_for_each_step_and_process() -> None:
    config, drawn = TrainConfig(), set()
    for step, rank in itertools.product(range(3), range(2)):
        trainer = SimpleNamespace(config=config, state=TrainState(step), world=World(rank, 2))
        Trainer._seed_dropout(trainer)
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 6


def test_features_in_memory_and_cached_text_serve_each_process(tiny: Path) -> None:
    programs = run(tiny, 2, "--max_steps", "2", "--cache_text", "--features_on_device")
    assert programs.end() == [0, 0] and programs.errors(1) == ""
    assert len(list((tiny / "runs/i2t").glob("text_states_*.npy"))) == 1


@pytest.mark.parametrize("signalled", [[0, 1], [1]])
def test_signal_stops_every_process_at_one_step_with_one_checkpoint(
    tiny: Path, signalled: list[int]
) -> None:
    programs = run(tiny, 2, *LONG)
    programs.wait_for("step 3/")
    for rank in signalled:
        os.kill(programs.processes[rank].pid, signal.SIGTERM)
    assert programs.end() == [128 + signal.SIGTERM] * 2
    folder = tiny / "runs/i2t"
    last = (folder / "train.log").read_text().splitlines()[-1]
    assert "stopped by SIGTERM" in last and f"[{state(folder / NEWEST)['step']}]" in last
    assert programs.errors(1) == ""


def test_process_that_dies_ends_the_others_soon(tiny: Path) -> None:
    programs = run(tiny, 3, *LONG)
    programs.wait_for("step 3/")
    programs.processes[1].kill()
    since = time.monotonic()
    assert programs.end() == [2, -signal.SIGKILL, 2]
    assert time.monotonic() - since < 30
    assert programs.errors(2) == "" and "Traceback" not in programs.errors()
    line = programs.errors().splitlines()[-1]
    assert "another process has ended" in line and "no checkpoint yet" in line


def test_file_that_one_process_cannot_read_is_named(tiny: Path) -> None:
    """In training: process 1 meets it, and process 0 does not know it."""
    path = tiny / "data/tiny/train_ims.npy"
    programs = run(tiny, 2, *LONG)
    programs.wait_for("step 3/")
    features = np.load(path, mmap_mode="r+")
    features[:] = np.nan
    assert programs.end() == [2, 2]
    both = programs.errors(0) + programs.errors(1)
    assert str(path) in both and "Traceback" not in both


def test_second_run_in_the_folder_is_refused(tiny: Path) -> None:
    with only_writer(tiny / "runs/i2t" / LOCK):
        assert f"process {os.getpid()} " in refused(tiny, run(tiny, 2))


def test_other_data_of_one_process_is_named(tiny: Path) -> None:
    """Whether it differs, or cannot be opened."""
    path = tiny / "other/tiny/train_caps.txt"
    shutil.copytree(tiny / "data", tiny / "other")
    path.write_text(path.read_text().replace("a ", "b ", 1))
    own = tiny_train(tiny, "--max_steps", "4")
    other = [*own, "--data_path", str(tiny / "other")]
    line = refused(tiny, Programs(tiny, 3, train.main, [own, own, other]))
    assert re.search("process 2: training data", line)
    path.unlink()
    line = refused(tiny, Programs(tiny, 3, train.main, [own, own, other]))
    assert f"process 2: {path}" in line
    assert not (tiny / "runs/i2t/train.log").exists()


@pytest.mark.parametrize(
    ("size", "option", "value"), [(2, "--device", "cuda:1"), (3, "--batch_size", "2")]
)
def test_options_that_do_not_fit_several_processes_are_refused(
    tiny: Path, size: int, option: str, value: str
) -> None:
    assert f"{option} {value}" in refused(tiny, run(tiny, size, option, value))


def test_wrong_option_of_one_process_ends_all(tiny: Path) -> None:
    """On another machine, say. The others must not wait for it."""
    own = tiny_train(tiny, *EXTRA)
    programs = Programs(tiny, 2, train.main, [own, [*own, "--unknown"]])
    assert re.search("process 1: .*--unknown", refused(tiny, programs))
