"""runlog.py: names, means and what is left of a torn log."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import provenance
from common.errors import InputError
from evaluation import Recall, Retrieval
from training import log as runlog


def test_every_figure_has_its_published_name() -> None:
    result = Retrieval(Recall(1.0, 2.0, 3.0, 4.0, 5.0), Recall(6.0, 7.0, 8.0, 9.0, 10.0))
    assert runlog.tags(result) == {
        **{"r1": 1, "r5": 2, "r10": 3, "medr": 4, "meanr": 5},
        **{"r1i": 6, "r5i": 7, "r10i": 8, "medri": 9, "meanri": 10},
        **{"rsum": 1 + 2 + 3 + 6 + 7 + 8, "r1r5": 1 + 2 + 6 + 7},
    }


def test_a_window_means_losses_and_leaves_pauses_out() -> None:
    window = runlog.Meter()
    for loss in (1.0, 4.0):
        window.loaded()
        window.stepped({"Le": torch.tensor(loss)})
        time.sleep(0.3)
        window.resumed()
    window.loaded()
    window.stepped({"Le": torch.tensor(2.5)})
    window.loaded()
    time.sleep(0.05)
    window.stepped({"Le": torch.tensor(2.5)})
    mean = window.mean()
    assert mean["Le"] == 2.5
    assert 0 <= mean["data_time"] <= mean["batch_time"]
    assert 0.05 / 4 <= mean["batch_time"] < 0.05  # four steps, of which one took 0.05 seconds


def write_log(folder: Path, start: int, losses: dict[int, float]) -> None:
    with runlog.RunLog(folder, {}, torch.device("cpu"), start) as log:
        for log.step, loss in losses.items():
            log.record(Le=loss)


def test_the_command_names_no_folder_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py", "--data_path", "my data"])
    write_log(tmp_path, 0, {})
    command = json.loads((tmp_path / runlog.RUN).read_text())["command"]
    assert command == "python train.py --data_path 'my data'"


def test_a_log_goes_on_behind_its_step_without_torn_lines(tmp_path: Path) -> None:
    write_log(tmp_path, 0, {step: step / 2 for step in range(1, 6)})
    path = tmp_path / runlog.METRICS
    whole = path.read_text()
    for torn in ('{"step": 3, "Le', '{"step": 3, "Le": 1.5}', '{"step": "x"}\n', "[]\n"):
        path.write_text(whole + torn)
        write_log(tmp_path, 3, {4: 9.0})
        found = [json.loads(line) for line in path.read_text().splitlines()]
        expected = [{"step": step, "Le": step / 2} for step in (1, 2, 3)]
        assert found == [*expected, {"step": 4, "Le": 9.0}]
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in board.Scalars("Le")] == [1, 2, 3, 4]
    run = json.loads((tmp_path / runlog.RUN).read_text())
    assert run["resumed_at"] == [3] * 4


def test_seconds_add_up_over_resumes(tmp_path: Path) -> None:
    for step in (0, 1, 2):
        with runlog.RunLog(tmp_path, {}, torch.device("cpu"), step) as log:
            log.began -= 100
            log.write_run()
    run = json.loads((tmp_path / runlog.RUN).read_text())
    assert 300 <= run["seconds"] < 320 and run["resumed_at"] == [1, 2]


def test_what_earlier_sessions_ran_on_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of the present one whether it came to the run's end."""
    for step, commit in ((0, "a"), (1, "b"), (2, "c")):
        monkeypatch.setattr(provenance, "commit", lambda commit=commit: commit)
        with runlog.RunLog(tmp_path, {}, torch.device("cpu"), step) as log:
            log.step += 1
            log.write_run(complete=step == 2)
            run = json.loads((tmp_path / runlog.RUN).read_text())
            assert (run["step"], run["complete"]) == (step + 1, step == 2)
    assert run["commit"] == "c" and [each["commit"] for each in run["earlier"]] == ["a", "b"]
    assert all(each["device"] and each["versions"]["torch"] for each in run["earlier"])
    (tmp_path / runlog.RUN).write_text('{"resumed_at": [1], "seconds": 1}')  # of an older version
    with runlog.RunLog(tmp_path, {}, torch.device("cpu"), 3) as log:
        assert log.run["earlier"] == [{"commit": None, "device": None, "versions": None}]
        assert not json.loads((tmp_path / runlog.RUN).read_text())["complete"]


def test_a_spoilt_run_json_is_named(tmp_path: Path) -> None:
    for content in (
        "[",
        "{}",
        '{"resumed_at": 3, "seconds": 1}',
        '{"resumed_at": [], "seconds": "x"}',
        '{"resumed_at": [1e999], "seconds": 1}',
        '{"resumed_at": [], "earlier": 3, "seconds": 1}',
        '{"resumed_at": [], "earlier": [3], "seconds": 1}',
    ):
        (tmp_path / runlog.RUN).write_text(content)
        with pytest.raises(InputError, match=r"run\.json"):
            runlog.RunLog(tmp_path, {}, torch.device("cpu"), step=1)


def test_a_step_of_a_thousand_digits_is_none(tmp_path: Path) -> None:
    path = tmp_path / runlog.LOG
    path.write_bytes(b"2026-01-01 10:00 [2] a\n2026-01-01 10:00 [" + b"9" * 5000 + b"] b\n")
    runlog.cut(path, lambda line: runlog.said(line, 3))
    assert path.read_bytes() == b"2026-01-01 10:00 [2] a\n"


def test_a_pipe_in_a_runs_folder_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / runlog.METRICS)
    with pytest.raises(InputError, match="is a pipe or a device"):
        runlog.cut(tmp_path / runlog.METRICS, lambda line: True)
