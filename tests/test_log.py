"""log.py: names, means, and what resuming keeps of a log."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from common import provenance
from common.errors import InputError
from common.results import Recall
from data import Batch
from evaluation import Retrieval
from training import log
from training.log import RunLog

CPU = torch.device("cpu")


def read_run(folder: Path) -> dict:
    return json.loads((folder / log.RUN).read_text())


def test_metrics_have_their_published_names() -> None:
    result = Retrieval(Recall(1.0, 2.0, 3.0, 4.0, 5.0), Recall(6.0, 7.0, 8.0, 9.0, 10.0))
    assert log.tags(result) == {
        **{"r1": 1, "r5": 2, "r10": 3, "medr": 4, "meanr": 5},
        **{"r1i": 6, "r5i": 7, "r10i": 8, "medri": 9, "meanri": 10},
        **{"rsum": 1 + 2 + 3 + 6 + 7 + 8, "r1r5": 1 + 2 + 6 + 7},
    }


def add(meter: log.Meter, number: int, loss: float, finite: bool = True) -> None:
    """Add a step of 2 x 3 pairs; its captions are 0, 1 and its number."""
    batch = Batch(
        torch.zeros(2, 4, 5), torch.zeros(3, 6), None, torch.tensor([0, 1, number]), 2, None, 1
    )
    figures = {"Le": loss, "grad_norm": 2 * loss, "finite": float(finite)}
    meter.add(number, batch, {name: torch.tensor(value) for name, value in figures.items()})


def test_meter_averages_losses_and_leaves_pauses_out() -> None:
    meter = log.Meter()
    for number, loss in enumerate((1.0, 4.0)):
        add(meter, number, loss)
        time.sleep(0.3)
        meter.start()
    meter.note_loaded()
    time.sleep(0.05)
    add(meter, 3, 2.5)
    assert meter.fetch() == [] and meter.fetch() == []
    means = meter.means()
    assert means["Le"] == 2.5 and means["grad_norm"] == 5 and means["pairs"] == 6
    assert 0 <= means["data_time"] <= means["batch_time"]
    assert 0.05 / 3 <= means["batch_time"] < 0.1  # of three steps, one took 0.05 seconds


def test_meter_names_bad_batches_and_leaves_them_out() -> None:
    meter = log.Meter()
    add(meter, 7, 1.0)
    add(meter, 8, torch.nan, finite=False)
    (first,) = meter.fetch()
    add(meter, 9, 3.0)
    add(meter, 10, 5.0, finite=False)  # the sum of loss and norm may be infinite, neither of them
    (second,) = meter.fetch()
    assert "step 8" in first and "nan" in first and "0, 1, 8" in first
    assert "step 10" in second and "5.0" in second and "0, 1, 10" in second
    assert meter.steps == 2 and meter.means()["Le"] == 2 and "finite" not in meter.means()


def test_resumed_log_continues_behind_its_step_without_torn_lines(
    tmp_path: Path, monkeypatch
) -> None:
    # Files of one second are read by their number as text, in which 10 comes before 9. Sessions of
    # a run have a process each, so theirs is always 0.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(10))

    def write_log(start: int, losses: dict[int, float]) -> None:
        run_log = RunLog(tmp_path, {}, CPU)
        with run_log.open(start):
            for run_log.step, loss in losses.items():
                run_log.record(Le=loss)

    write_log(0, {step: step / 2 for step in range(1, 6)})
    path = tmp_path / log.METRICS
    whole = path.read_text()
    for torn in ('{"step": 3, "Le', '{"step": 3, "Le": 1.5}', '{"step": "x"}\n', "[]\n"):
        path.write_text(whole + torn)
        (tmp_path / log.LOG).write_text("2026-01-01 10:00 [2] a\n2026-01-01 10:00 [4] b\n[3")
        write_log(3, {4: 9.0})
        expected = [{"step": step, "Le": step / 2} for step in (1, 2, 3)]
        assert log.events(tmp_path) == [*expected, {"step": 4, "Le": 9.0}]
        assert (tmp_path / log.LOG).read_text() == "2026-01-01 10:00 [2] a\n"
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in board.Scalars("Le")] == [1, 2, 3, 4]
    assert read_run(tmp_path)["resumed_at"] == [3] * 4


def test_run_json_covers_all_sessions(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py", "--data_path", "my data"])
    for step, commit in ((0, "a"), (1, "b"), (2, "c")):
        monkeypatch.setattr(provenance, "commit", lambda commit=commit: commit)
        run_log = RunLog(tmp_path, {}, CPU)
        run_log.began -= 100
        with run_log.open(step):
            run_log.step += 1
            run_log.write_run(complete=step == 2)
        run = read_run(tmp_path)
        assert (run["step"], run["complete"]) == (step + 1, step == 2)
    assert run["command"] == "python train.py --data_path 'my data'"  # without a folder
    assert 300 <= run["seconds"] < 320 and run["resumed_at"] == [1, 2]
    assert run["commit"] == "c" and [each["commit"] for each in run["earlier"]] == ["a", "b"]
    assert all(each["device"] and each["versions"]["torch"] for each in run["earlier"])


def test_a_run_needs_no_tensorboard(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run_log = RunLog(tmp_path, {}, CPU)
    with run_log.open():
        run_log.record(Le=2.5)
    assert log.events(tmp_path) == [{"step": 0, "Le": 2.5}]
    assert not list(tmp_path.glob(log.EVENTS))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "tensorboard" in caplog.text


def test_a_package_that_is_missing_has_no_version(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(log, "PACKAGES", ("torch", "no-such-package"))
    versions = RunLog(tmp_path, {}, CPU).run["versions"]
    assert versions["torch"] and versions["no-such-package"] is None


@pytest.mark.parametrize("content", ["[", "{}", '{"resumed_at": [1e999], "seconds": 1}'])
def test_damaged_run_json_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / log.RUN).write_text(content)
    with pytest.raises(InputError, match=r"run\.json"), RunLog(tmp_path, {}, CPU).open(step=1):
        pass
