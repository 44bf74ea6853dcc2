"""How training resumes: to the same bits; from older, lost and damaged checkpoints; or not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import IMG_DIM, Error, Run, events, image_of_caption, same, state, tiny_train

from common.errors import InputError
from data import TrainingBatches
from evaluation import Retrieval, retrieval
from training import loop
from training.resume import BEST, NEWEST


def fail(error: Exception) -> Callable[..., None]:
    return Mock(side_effect=error)


@pytest.mark.parametrize(("direction", "precision"), [("t2i", "fp32"), ("i2t", "bf16")])
def test_resumed_run_ends_with_the_same_bits(
    tiny: Path, run_train: Run, direction: str, precision: str
) -> None:
    """In the middle of the second epoch, with BERT's dropout and extra negatives.

    It is cut after a validation, since the end of a run validates, and the best model would differ.
    """
    extra = ("--extra_stc", "1") if direction == "i2t" else ("--extra_img", "1")
    more = ("--precision", precision, "--val_step", "7")
    argv, folder = tiny_train(tiny, *extra, *more, direction=direction), tiny / "runs" / direction
    assert run_train(*argv, "--max_steps", "16") == 0
    uncut = state(folder.rename(tiny / "uncut") / NEWEST)
    assert run_train(*argv, "--max_steps", "14") == 0
    torch.manual_seed(1234)
    assert run_train(*argv, "--max_steps", "16", "--resume", "auto", "--workers", "1") == 0
    cut = state(folder / NEWEST)
    assert cut["step"] == 16 and cut["epoch"] == 1 and cut["position"] == 6
    for key in ("weights", "optimizer", "random", "epoch", "position", "best_rsum", "best_r1"):
        assert same(cut[key], uncut[key]), key
    run = json.loads((folder / "run.json").read_text())
    assert run["resumed_at"] == [14] and (run["step"], run["complete"]) == (16, True)
    assert run["earlier"] == [
        {name: run[name] for name in ("commit", "device", "processes", "versions")}
    ]


def test_resuming_an_older_checkpoint_makes_it_the_newest_and_cuts_the_logs(
    tiny: Path, run_train: Run
) -> None:
    argv, folder = tiny_train(tiny, "--val_step", "4"), tiny / "runs/i2t"

    def logged() -> list[tuple]:
        return [(event["step"], event.get("Le"), event.get("rsum")) for event in events(folder)]

    assert run_train(*argv, "--max_steps", "4") == 0
    older = Path(shutil.copy(folder / NEWEST, folder / "older.pth.tar"))
    assert run_train(*argv, "--max_steps", "8", "--resume", "auto") == 0
    before = logged()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "torn')
    # There is nothing to do up to step 4, so the later steps stay.
    assert run_train(*argv, "--max_steps", "4", "--resume", older) == 2
    assert state(folder / NEWEST)["step"] == 8
    assert run_train(*argv, "--max_steps", "8", "--resume", older) == 0
    assert logged() == before
    assert run_train(*argv, "--max_steps", "5", "--resume", older) == 0
    assert state(folder / NEWEST)["step"] == 5
    assert [step for step, *_ in logged()] == [2, 4, 4, 5]
    assert "[8]" not in (folder / "train.log").read_text()


def test_complete_run_stays_as_it_is(trained: Path, run_train: Run) -> None:
    argv, folder = tiny_train(trained, "--max_steps", "2"), trained / "runs/i2t"
    before = (folder / NEWEST).read_bytes()
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"complete": False}))  # a kill came between
    assert run_train(*argv, "--resume", "auto") == 0
    assert (folder / NEWEST).read_bytes() == before
    assert json.loads((folder / "run.json").read_text()) == run


def test_run_resumed_in_another_folder_has_its_own_best_model(
    trained: Path, run_train: Run, monkeypatch
) -> None:
    worse = retrieval(torch.zeros(7, 35).numpy(), image_of_caption(35))
    monkeypatch.setattr(loop, "retrieval", lambda *_: worse)
    elsewhere = ["--resume", trained / "runs/i2t" / NEWEST, "--logger_name", trained / "more"]
    assert run_train(*tiny_train(trained), "--max_steps", "3", *elsewhere) == 0
    best = state(trained / "more/i2t" / BEST)
    assert best["step"] == 3 and best["best_rsum"] == 0


def another_bert(tiny: Path, content: dict) -> None:
    weights = state(tiny / "bert/pytorch_model.bin")
    weights["encoder.layer.0.output.dense.bias"][0] += 1
    torch.save(weights, tiny / "bert/pytorch_model.bin")


def other_captions(tiny: Path, content: dict) -> None:
    path = tiny / "data/tiny/train_caps.txt"
    path.write_text(path.read_text().replace("dog", "cat", 1))


def other_dev_features(tiny: Path, content: dict) -> None:
    path = tiny / "data/tiny/dev_ims.npy"
    np.save(path, np.load(path) / 2)


def other_moment(tiny: Path, content: dict) -> None:
    content["optimizer"]["state"][3]["exp_avg"] = torch.zeros(2, 2)


def complex_step(_: object, content: dict) -> None:
    moment = content["optimizer"]["state"][3]
    moment["step"] = moment["step"].to(torch.complex64)


def moment_of_nan(tiny: Path, content: dict) -> None:
    content["optimizer"]["state"][3]["exp_avg_sq"].fill_(torch.nan)


UNFIT = {
    "another BERT": (another_bert, "BERT"),
    "other captions": (other_captions, "train_ims.npy"),
    "other dev features": (other_dev_features, "dev_ims.npy"),
    "no fingerprint": (lambda _, content: content.pop("train_data"), "train_ims.npy"),
    "step": (lambda _, content: content.update(step=7), "step"),
    "no random state": (lambda _, content: content.pop("random"), "'random'"),
    "moment's shape": (other_moment, "shape [2, 2]"),
    "complex step of Adam": (complex_step, "step is torch.complex64"),
    "NaN in a moment": (moment_of_nan, "exp_avg_sq holds NaN"),
    "no Adam": (lambda _, content: content["optimizer"]["state"].clear(), "moments of 0 weights"),
    "no optimiser": (lambda _, content: content.update(optimizer=3), NEWEST),
}


@pytest.mark.parametrize("problem", UNFIT)
def test_checkpoint_that_does_not_fit_is_refused(
    trained: Path, train_error: Error, problem: str
) -> None:
    path, (change, named) = trained / "runs/i2t" / NEWEST, UNFIT[problem]
    content = state(path)
    change(trained, content)
    torch.save(content, path)
    before = path.read_bytes()
    assert named in train_error(*tiny_train(trained), "--max_steps", "4", "--resume", path)
    assert path.read_bytes() == before


def test_resumed_run_keeps_its_mathematics(trained: Path, train_error: Error) -> None:
    path = trained / "runs/i2t" / NEWEST
    before = path.read_bytes()
    for option, value in (("--margin", "0.3"), ("--lambda_softmax_CMRC", "5"), ("--cells", "CMRC")):
        assert option in train_error(*tiny_train(trained, "--resume", "auto", option, value))
        assert path.read_bytes() == before


def test_options_that_a_resumed_run_may_change(trained: Path, run_train: Run) -> None:
    path = trained / "runs/i2t" / NEWEST
    (trained / "data").rename(trained / "elsewhere")
    content = state(path)
    assert content["options"]["img_dim"] == IMG_DIM  # the width of the data
    content["options"]["memory"] = 2.5  # an option of earlier versions
    torch.save(content, path)
    more = ["--data_path", trained / "elsewhere", "--workers", "1", "--device", "cpu"]
    more += ["--num_epochs", "40", "--log_step", "3", "--val_step", "9", "--drop", "0.5"]
    more += ["--activation_checkpointing", "--img_dim", IMG_DIM]
    assert run_train(*tiny_train(trained), "--max_steps", "3", "--resume", "auto", *more) == 0
    assert state(path)["step"] == 3


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"optimizer")] ^= 1  # not a byte between two records, which no CRC covers
    path.write_bytes(data)


def test_damaged_newest_checkpoint_falls_back_to_the_best_model(
    trained: Path, run_train: Run, caplog
) -> None:
    argv, folder = tiny_train(trained, "--max_steps", "4"), trained / "runs/i2t"
    damage(folder / NEWEST)
    assert run_train(*argv, "--resume", "auto") == 0
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert str(folder / NEWEST) in warning and BEST in warning
    resumed = state(folder / NEWEST)
    damage(folder / NEWEST)
    damage(folder / BEST)
    assert run_train(*argv, "--resume", "auto") == 2  # and no new run is started
    assert (folder / BEST).exists() and events(folder)
    assert run_train(*argv, "--overwrite") == 0
    for key in ("weights", "optimizer", "random", "step"):
        assert same(resumed[key], state(folder / NEWEST)[key]), key


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error")])
def test_checkpoint_that_cannot_be_read_for_now_is_not_replaced(
    error: Exception, trained: Path, run_train: Run, monkeypatch
) -> None:
    """A run does not start again if a disk fails or is not mounted."""
    argv, path = tiny_train(trained, "--max_steps", "3"), trained / "runs/i2t" / NEWEST
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail(error))
        assert run_train(*argv, "--resume", "auto") == 2
    assert path.read_bytes() == before
    path.unlink()
    path.symlink_to(trained / "unmounted")
    assert run_train(*argv, "--resume", "auto") == 2
    assert path.is_symlink()


def test_best_model_of_a_later_step_is_discarded(
    tiny: Path, run_train: Run, monkeypatch, caplog
) -> None:
    argv, folder = tiny_train(tiny), tiny / "runs/i2t"

    def train(selection: float, *more: object) -> int:
        monkeypatch.setattr(Retrieval, "selection", property(lambda _: selection))
        return run_train(*argv, *more)

    assert train(40.0, "--max_steps", "4") == 0
    older = Path(shutil.copy(folder / NEWEST, folder / "older.pth.tar"))
    assert train(200.0, "--max_steps", "8", "--resume", "auto") == 0
    with monkeypatch.context() as patch:  # cut off before its first step
        patch.setattr(TrainingBatches, "epoch", fail(InputError("no")))
        assert train(50.0, "--max_steps", "6", "--resume", older) == 2
    assert state(folder / NEWEST)["step"] == 4 and not (folder / BEST).exists()
    assert train(50.0, "--max_steps", "6", "--resume", "auto") == 0
    best = state(folder / BEST)
    assert (best["step"], best["best_rsum"]) == (6, 50.0)
    damage(folder / BEST)
    assert train(45.0, "--max_steps", "7", "--resume", "auto") == 0
    assert str(folder / BEST) in caplog.text and state(folder / BEST)["step"] == 7


def test_finished_run_without_its_best_model_is_validated_again(
    trained: Path, run_train: Run
) -> None:
    folder = trained / "runs/i2t"
    before, best = events(folder), state(folder / BEST)
    (folder / BEST).unlink()
    assert run_train(*tiny_train(trained), "--max_steps", "2", "--resume", "auto") == 0
    again = state(folder / BEST)
    assert (again["step"], again["best_rsum"]) == (2, best["best_rsum"])
    assert events(folder) == before
