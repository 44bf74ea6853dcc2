"""train.py end to end on tiny data: runs, resumes, what is refused, what is left behind."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import space
import torch
from conftest import GOLDEN, IMG_DIM, ROOT, run_program, same, tiny_train, write_split
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import provenance
from common.cli import parse
from data import Batch
from evaluate_models import evaluate
from evaluation import image_of_caption, retrieval
from training import loop as trainer
from training.config import FREE, TrainConfig
from training.runfolder import BEST, NEWEST, PREVIOUS
from training.step import TrainStep

TAGS = {
    *("epoch", "step", "batch_time", "data_time", "lr", "Rank", "Path", "Le"),
    *("r1", "r5", "r10", "medr", "meanr", "r1i", "r5i", "r10i", "medri", "meanri", "rsum"),
}


def state(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_both_directions_resume_and_refuse_to_write_over(tiny: Path) -> None:
    """The story of a user, each command in a process of its own."""
    i2t = tiny_train(tiny, "--extra_stc", "1", "--lambda_softmax=4", "--workers", "2")
    t2i = tiny_train(tiny, "--extra_img", "1", "--lambda_softmax=9", direction="t2i")
    for argv in ([*i2t, "--max_steps", "3"], [*t2i, "--num_epochs", "1"]):
        done = run_program("train.py", *argv)
        assert done.returncode == 0, done.stderr
        assert re.search(r"step 2/\d+ loss .* pairs/s, 0:00:\d\d left", done.stderr)
    again = run_program("train.py", *i2t)
    assert again.returncode == 2 and "holds a run" in again.stderr.splitlines()[-1]
    assert state(tiny / "runs/i2t" / NEWEST)["step"] == 3
    assert state(tiny / "runs/t2i" / NEWEST)["step"] == 10
    resumed = run_program("train.py", *i2t, "--resume", "auto", "--max_steps", "5")
    assert resumed.returncode == 0 and "step 3 of 5" in resumed.stderr
    assert state(tiny / "runs/i2t" / NEWEST)["step"] == 5
    for direction in ("i2t", "t2i"):
        names = {path.name for path in (tiny / "runs" / direction).iterdir()}
        assert {NEWEST, BEST, "metrics.jsonl", "run.json", "train.log"} < names


@pytest.mark.parametrize(
    ("direction", "precision"), [("i2t", "fp32"), ("t2i", "fp32"), ("i2t", "bf16")]
)
def test_a_run_cut_off_and_resumed_ends_with_the_same_bits(
    tiny: Path, run_train: Callable[..., int], direction: str, precision: str
) -> None:
    """In the middle of the second epoch, BERT's dropout and extra negatives included.

    After a validation, since the end of a run validates, and what is best would differ.
    """
    extra = ("--extra_stc", "1") if direction == "i2t" else ("--extra_img", "1")
    more = ("--precision", precision, "--val_step", "7")
    argv = tiny_train(tiny, *extra, *more, direction=direction)
    assert run_train(*argv, "--max_steps", "16") == 0
    whole = tiny / "runs" / direction
    whole = whole.rename(tiny / "whole")
    assert run_train(*argv, "--max_steps", "14") == 0
    torch.manual_seed(1234)
    assert run_train(*argv, "--max_steps", "16", "--resume", "auto", "--workers", "1") == 0
    cut, uncut = state(tiny / "runs" / direction / NEWEST), state(whole / NEWEST)
    assert cut["step"] == 16 and cut["epoch"] == 1 and cut["position"] == 6
    for key in ("weights", "optimizer", "random", "epoch", "position", "best_rsum", "best_r1"):
        assert same(cut[key], uncut[key]), key
    run = json.loads((tiny / "runs" / direction / "run.json").read_text())
    assert run["resumed_at"] == [14] and (run["step"], run["complete"]) == (16, True)
    assert run["earlier"] == [{name: run[name] for name in ("commit", "device", "versions")}]


def test_resuming_an_older_checkpoint_cuts_the_log(
    tiny: Path, run_train: Callable[..., int]
) -> None:
    argv, folder = tiny_train(tiny, "--val_step", "4"), tiny / "runs/i2t"
    assert run_train(*argv, "--max_steps", "4") == 0
    shutil.copy(folder / NEWEST, tiny / "runs/i2t/early.pth.tar")
    assert run_train(*argv, "--max_steps", "8", "--resume", "auto") == 0
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "torn')
    before = events_without_times(folder, 8)
    early = folder / "early.pth.tar"
    assert run_train(*argv, "--max_steps", "8", "--resume", early) == 0
    assert events_without_times(folder, 8) == before


def events_without_times(folder: Path, last: int) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines if line.endswith("}")]
    assert all(event["step"] <= last for event in found)
    times = ("batch_time", "data_time", "pairs_per_s")
    return [{key: v for key, v in event.items() if key not in times} for event in found]


def test_a_complete_run_is_left_as_it_is(tiny: Path, run_train: Callable[..., int]) -> None:
    argv = tiny_train(tiny, "--num_epochs", "1")
    assert run_train(*argv) == 0
    before = (tiny / "runs/i2t" / NEWEST).read_bytes()
    assert run_train(*argv, "--resume", "auto") == 0
    assert (tiny / "runs/i2t" / NEWEST).read_bytes() == before


def test_resume_auto_starts_afresh_where_there_is_nothing(
    tiny: Path, run_train: Callable[..., int]
) -> None:
    assert run_train(*tiny_train(tiny, "--resume", "auto", "--max_steps", "1")) == 0
    assert state(tiny / "runs/i2t" / NEWEST)["step"] == 1


def test_a_run_goes_on_in_another_folder_with_a_best_model_of_its_own(
    tiny: Path, run_train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = tiny_train(tiny)
    assert run_train(*argv, "--max_steps", "1") == 0
    worse = retrieval(torch.zeros(7, 35), image_of_caption(35))
    monkeypatch.setattr(trainer, "retrieval", lambda *_: worse)
    elsewhere = ["--resume", tiny / "runs/i2t" / NEWEST, "--logger_name", tiny / "more"]
    assert run_train(*argv, "--max_steps", "2", *elsewhere) == 0
    best = state(tiny / "more/i2t" / BEST)
    assert best["step"] == 2 and best["best_rsum"] == 0
    (tiny / "more/i2t" / NEWEST).unlink()  # auto takes what is left
    again = ["--resume", "auto", "--logger_name", tiny / "more"]
    assert run_train(*argv, "--max_steps", "3", *again) == 0
    assert state(tiny / "more/i2t" / NEWEST)["step"] == 3


def test_one_region_an_image(tiny: Path, run_train: Callable[..., int]) -> None:
    """A last batch of one item is then a single token, unless there are extra captions."""
    for name in ("train", "dev"):
        path = tiny / f"data/tiny/{name}_ims.npy"
        np.save(path, np.load(path)[:, :1])
    for extra, steps in (("0", 9), ("1", 10)):
        argv = tiny_train(tiny, "--num_epochs", "1", "--extra_stc", extra, "--overwrite")
        assert run_train(*argv) == 0
        assert state(tiny / "runs/i2t" / NEWEST)["step"] == steps


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_regions_of_zeros_train(direction: str, tiny: Path, run_train: Callable[..., int]) -> None:
    """They have a gradient of 1e12 and more in the first step, which is clipped."""
    path = tiny / "data/tiny/train_ims.npy"
    features = np.load(path)
    features[:, 0] = 0
    np.save(path, features)
    argv = tiny_train(tiny, "--max_steps", "2", "--log_step", "1", "--direction", direction)
    assert run_train(*argv) == 0
    first, second = (e["grad_norm"] for e in events(tiny / "runs" / direction) if "Le" in e)
    assert first > 1e10 and second < 1e6


def test_a_loss_that_is_no_number_ends_the_run(
    tiny: Path, run_train: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    argv = tiny_train(tiny, "--learning_rate", "1e30", "--num_epochs", "1")
    assert run_train(*argv) == 2
    said = last_line(capsys)
    assert re.search(
        r"step 2: the loss is nan, .* captions \d+(, \d+){5}; no checkpoint yet; --skip", said
    )


def test_scores_of_dev_that_are_no_numbers_name_the_step(
    tiny: Path, run_train: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    assert run_train(*tiny_train(tiny, "--learning_rate", "1e30", "--max_steps", "1")) == 2
    said = last_line(capsys)
    assert "step 1: the model gives scores of NaN or inf, so its checkpoint is no good" in said
    assert said.endswith("there is no other")


def another_bert(tiny: Path, content: dict) -> None:
    weights = torch.load(tiny / "bert/pytorch_model.bin", weights_only=True)
    weights["encoder.layer.0.output.dense.bias"][0] += 1
    torch.save(weights, tiny / "bert/pytorch_model.bin")


def more_images(tiny: Path, content: dict) -> None:
    write_split(tiny / "data/tiny", "train", 12)


def other_captions(tiny: Path, content: dict) -> None:
    path = tiny / "data/tiny/train_caps.txt"
    path.write_text(path.read_text().replace("dog", "cat", 1))


def change(key: str, value: object) -> Callable[[Path, dict], None]:
    return lambda tiny, content: content.update({key: value})


def spoil_moment(tiny: Path, content: dict) -> None:
    content["optimizer"]["state"][3]["exp_avg"] = torch.zeros(2, 2)


def forget_moment(tiny: Path, content: dict) -> None:
    del content["optimizer"]["state"][3]["exp_avg_sq"]


def forget_adam(tiny: Path, content: dict) -> None:
    content["optimizer"]["state"] = {}


DAMAGED = {
    "another BERT": (another_bert, "another BERT"),
    "more images": (more_images, "was trained on other data than"),
    "no fingerprint": (change("bert", None), "fingerprint"),
    "no epoch": (change("epoch", None), "epoch is None"),
    "fraction": (change("step", 2.0), "step is 2.0"),
    "position": (change("position", 999), "position 999"),
    "step": (change("step", 7), "step 7"),
    "text": (change("best_rsum", "a"), "best_rsum is 'a'"),
    "no random state": (change("random", {}), "'cpu'"),
    "moment's shape": (spoil_moment, "exp_avg is [2, 2]"),
    "no moment": (forget_moment, "exp_avg_sq"),
    "no Adam": (forget_adam, "moments of 0 weights after 2 steps"),
    "no optimiser": (change("optimizer", 3), "cannot be gone on with"),
    "other captions": (other_captions, "was trained on other data than"),
    "a tensor for the data": (change("train_data", torch.zeros(2)), "was trained on other data"),
    "a tensor for an option": (
        lambda tiny, content: content["options"].update(margin=torch.zeros(0)),
        "option margin is Tensor; expected text or a number",
    ),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_checkpoint_that_cannot_be_gone_on_with_is_refused(
    tiny: Path, run_train: Callable[..., int], capsys: pytest.CaptureFixture, fault: str
) -> None:
    argv, path = tiny_train(tiny), tiny / "runs/i2t" / NEWEST
    assert run_train(*argv, "--max_steps", "2") == 0
    damage, said = DAMAGED[fault]
    content = state(path)
    damage(tiny, content)
    torch.save(content, path)
    before = path.read_bytes()
    assert run_train(*argv, "--max_steps", "4", "--resume", path) == 2
    assert said in last_line(capsys)
    assert path.read_bytes() == before


def test_overwrite_starts_again(tiny: Path, run_train: Callable[..., int]) -> None:
    argv = tiny_train(tiny, "--val_step", "2")
    assert run_train(*argv, "--max_steps", "6") == 0
    assert run_train(*argv, "--max_steps", "2", "--overwrite") == 0
    folder = tiny / "runs/i2t"
    assert state(folder / NEWEST)["step"] == state(folder / BEST)["step"] == 2
    assert {event["step"] for event in events(folder)} == {2}
    assert len(list(folder.glob("events.*"))) == 1


def test_logs_have_the_published_tags(
    tiny: Path, run_train: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    argv = tiny_train(tiny, "--val_step", "5", "--max_steps", "7", "--val_captions", "17")
    assert run_train(*argv) == 0
    folder = tiny / "runs/i2t"
    found = events(folder)
    assert [event["step"] for event in found] == [2, 4, 5, 6, 7]
    assert all(type(event["step"]) is int for event in found)
    validations = [event for event in found if "rsum" in event]
    assert [event["step"] for event in validations] == [5, 7]
    assert all(event["epoch"] == 0 for event in found)
    # 17 captions are three whole images, of which five are found by any order
    assert "step 5: validating on 3 dev images" in caplog.text
    assert validations[0]["r5i"] == 100
    board = EventAccumulator(str(folder)).Reload()
    assert set(board.Tags()["scalars"]) >= TAGS
    for name in ("Rank", "rsum"):
        logged = [(event["step"], event[name]) for event in found if name in event]
        scalars = [(scalar.step, scalar.value) for scalar in board.Scalars(name)]
        assert [step for step, _ in scalars] == [step for step, _ in logged]
        np.testing.assert_allclose(*([value for _, value in part] for part in (scalars, logged)))


def test_run_json_says_how_it_came_about(tiny: Path, run_train: Callable[..., int]) -> None:
    argv = tiny_train(tiny, "--max_steps", "2")
    assert run_train(*argv) == 0
    run = json.loads((tiny / "runs/i2t/run.json").read_text())
    assert run["command"].startswith("python ") and "--max_steps 2" in run["command"]
    assert run["options"]["embed_size"] == 8 and run["options"]["seed"] == 0
    # the package of the CPU wheel is 2.13.0+cpu, that of PyPI 2.14.1 where torch says 2.14.1+cu130
    assert torch.__version__.startswith(run["versions"]["torch"])
    assert run["seconds"] > 0 and run["peak_memory_bytes"] > 10**7
    assert run["device"] and run["resumed_at"] == run["earlier"] == []
    assert run["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", run["commit"])


def test_the_learning_rate_falls_to_a_tenth(
    tiny: Path, run_train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    used, step = [], TrainStep.step

    def noted(self: TrainStep, batch: Batch) -> dict:
        used.append(self.optimizer.param_groups[0]["lr"])
        return step(self, batch)

    monkeypatch.setattr(TrainStep, "step", noted)
    argv = tiny_train(tiny, "--lr_update", "2", "--num_epochs", "5", "--log_step", "10")
    assert run_train(*argv) == 0
    rates = [2e-4, 2e-4, 2e-5, 2e-5, 2e-6]
    logged = [event["lr"] for event in events(tiny / "runs/i2t") if "lr" in event]
    np.testing.assert_allclose(logged, rates)
    np.testing.assert_allclose(used, np.repeat(rates, 10))


def test_every_epoch_ends_with_a_validation(tiny: Path, run_train: Callable[..., int]) -> None:
    argv = tiny_train(tiny, "--num_epochs", "3", "--val_step", "2000")
    assert run_train(*argv) == 0
    found = [(e["step"], e["epoch"]) for e in events(tiny / "runs/i2t") if "rsum" in e]
    assert found == [(10, 0), (20, 1), (30, 2)]


def test_the_best_model_has_most_of_four_recalls(
    tiny: Path, run_train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """R@1 + R@5 both ways decide, not the rsum."""
    from evaluation import Recall, Retrieval

    def result(r1: float, r5: float, r10: float) -> Retrieval:
        return Retrieval(Recall(r1, r5, r10, 1.0, 1.0), Recall(r1, r5, r10, 1.0, 1.0))

    recalls = [(10, 20, 30), (11, 21, 22), (5, 20, 99), (12, 19, 30), (11, 21, 99)]
    results = iter(result(*three) for three in recalls)  # the last is no better than the second
    monkeypatch.setattr(trainer, "retrieval", lambda *_: next(results))
    assert run_train(*tiny_train(tiny, "--val_step", "1", "--max_steps", "5")) == 0
    folder = tiny / "runs/i2t"
    best = state(folder / BEST)
    assert best["step"] == 2 and best["best_rsum"] == 64 and best["best_r1"] == 11
    assert state(folder / NEWEST)["best_rsum"] == 64 and state(folder / NEWEST)["best_r1"] == 12
    for name, step in ((BEST, 2), (NEWEST, 5)):  # each names the figures of its own weights
        (logged,) = (e for e in events(folder) if e["step"] == step and "rsum" in e)
        assert state(folder / name)["metrics"].items() <= logged.items()
        assert state(folder / name)["metrics"]["r1"] == 11


def test_a_checkpoint_names_its_commit_and_no_figures_of_others(
    tiny: Path, run_train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two validations there are none."""
    monkeypatch.setattr(provenance, "commit", lambda: "c0ffee")
    argv = tiny_train(tiny, "--val_step", "2", "--max_steps", "3", "--save_step", "1")
    assert run_train(*argv) == 0
    found = {name: state(tiny / "runs/i2t" / name) for name in (NEWEST, PREVIOUS, BEST)}
    assert {content["commit"] for content in found.values()} == {"c0ffee"}
    assert found[NEWEST]["step"] == found[PREVIOUS]["step"] == 3
    assert found[NEWEST]["metrics"]["rsum"] > 0 and found[PREVIOUS]["metrics"] is None


def test_a_last_batch_of_one_is_skipped_in_t2i_alone(
    tiny: Path, run_train: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    """55 captions in batches of 6: the tenth holds one."""
    caplog.set_level("INFO")
    for direction, steps in (("t2i", 9), ("i2t", 10)):
        caplog.clear()
        assert run_train(*tiny_train(tiny, "--num_epochs", "1", direction=direction)) == 0
        assert state(tiny / "runs" / direction / NEWEST)["step"] == steps
        assert ("skipped" in caplog.text) == (direction == "t2i")


def test_a_batch_of_one_trains_with_extras(tiny: Path, run_train: Callable[..., int]) -> None:
    argv = tiny_train(tiny, "--extra_img", "1", "--num_epochs", "1", direction="t2i")
    assert run_train(*argv) == 0
    assert state(tiny / "runs/t2i" / NEWEST)["step"] == 10


@pytest.fixture
def weights_after(tiny: Path, run_train: Callable[..., int]) -> Callable[..., dict]:
    """Weights after three steps in t2i with further options."""

    def weights(*options: str) -> dict:
        argv = tiny_train(tiny, "--extra_img", "1", "--overwrite", direction="t2i")
        assert run_train(*argv, "--max_steps", "3", *options) == 0
        return state(tiny / "runs/t2i" / NEWEST)["weights"]

    return weights


def test_every_option_of_the_mathematics_reaches_it(weights_after: Callable[..., dict]) -> None:
    usual = weights_after()
    for options in (
        *("--margin 0.4", "--trade_off 0", "--no-max_violation", "--learning_rate 1e-3"),
        *("--grad_clip 1e-3", "--lambda_softmax 9", "--raw_feature_norm_CMRC softmax"),
        *("--use_abs", "--no_imgnorm", "--seed 1", "--precision bf16", "--max_words 9"),
        *("--batch_size 5", "--extra_img 2"),
    ):
        assert not same(weights_after(*options.split()), usual), options


def test_every_other_option_does_not(weights_after: Callable[..., dict]) -> None:
    usual = weights_after()
    for options in (
        *("--drop 0.5", "--measure order", "--finetune", "--use_restval", "--reset_train"),
        *("--workers 1", "--log_step 1", "--val_step 1", "--val_captions 10", "--num_epochs 7"),
        "--lr_update 1",  # within the first epoch
    ):
        assert same(weights_after(*options.split()), usual), options


def test_gradients_are_not_clipped_at_zero(tiny: Path, run_train: Callable[..., int]) -> None:
    weights = []
    for clip in ("0", "1e9", "1e-3"):
        argv = tiny_train(tiny, "--grad_clip", clip, "--max_steps", "3", "--overwrite")
        assert run_train(*argv) == 0
        weights.append(state(tiny / "runs/i2t" / NEWEST)["weights"])
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])


def test_bfloat16_trains(tiny: Path, run_train: Callable[..., int]) -> None:
    argv = tiny_train(tiny, "--precision", "bf16", "--max_steps", "2")
    assert run_train(*argv) == 0
    weights = state(tiny / "runs/i2t" / NEWEST)["weights"]
    assert {v.dtype for v in weights.values()} == {torch.float32, torch.int64}


def last_line(capsys: pytest.CaptureFixture) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text and "usage:" not in text
    return text.splitlines()[-1]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--margin", "0.3"], "--margin"),
        (["--lambda_softmax", "5"], "--lambda_softmax_CMRC"),
        (["--batch_size", "5"], "--batch_size"),
        (["--seed", "1"], "--seed"),
        (["--precision", "bf16"], "--precision"),
        (["--hid_IMRC", "8"], "--hid_IMRC"),
    ],
)
def test_a_resumed_run_keeps_its_mathematics(
    tiny: Path,
    run_train: Callable[..., int],
    capsys: pytest.CaptureFixture,
    changed: list[str],
    said: str,
) -> None:
    argv = tiny_train(tiny, "--max_steps", "1")
    assert run_train(*argv) == 0
    before = (tiny / "runs/i2t" / NEWEST).read_bytes()
    assert run_train(*argv, "--resume", "auto", *changed) == 2
    assert said in last_line(capsys)
    assert (tiny / "runs/i2t" / NEWEST).read_bytes() == before


def test_what_a_resumed_run_may_change(tiny: Path, run_train: Callable[..., int]) -> None:
    argv = tiny_train(tiny)
    assert run_train(*argv, "--max_steps", "1") == 0
    (tiny / "data").rename(tiny / "elsewhere")
    moved = ["--data_path", str(tiny / "elsewhere"), "--workers", "1", "--device", "cpu"]
    more = ["--num_epochs", "40", "--log_step", "3", "--val_step", "9", "--drop", "0.5"]
    assert run_train(*argv, "--max_steps", "2", "--resume", "auto", *moved, *more) == 0
    assert state(tiny / "runs/i2t" / NEWEST)["step"] == 2


def published(tiny: Path) -> list[str]:
    return ["--resume", str(GOLDEN / "i2t/checkpoint.pth.tar")]


def another_run(tiny: Path) -> list[str]:
    (tiny / "runs/i2t").mkdir(parents=True)
    (tiny / "runs/i2t/metrics.jsonl").write_text("")
    return ["--resume", str(GOLDEN / "i2t/checkpoint.pth.tar")]


def spoil_features(tiny: Path) -> list[str]:
    path = tiny / "data/tiny/train_ims.npy"
    features = np.load(path)
    features[3] = np.nan
    np.save(path, features)
    return []


def empty_caption(tiny: Path) -> list[str]:
    path = tiny / "data/tiny/train_caps.txt"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:6], "  ", *lines[7:]]))
    return []


def file_in_the_way(tiny: Path) -> list[str]:
    (tiny / "file").write_text("")
    return ["--logger_name", str(tiny / "file/runs")]


REFUSED = {
    "no folder": (file_in_the_way, "file/runs/i2t: Not a directory"),
    "extra_img in i2t": (lambda t: ["--extra_img", "1"], "--extra_img"),
    "extra_stc in t2i": (lambda t: ["--direction", "t2i", "--extra_stc", "1"], "--extra_stc"),
    "abbreviated": (lambda t: ["--max_step", "1"], "--max_step"),
    "no number": (lambda t: ["--margin", "wide"], "wide"),
    "negative": (lambda t: ["--margin", "-1"], "--margin"),
    "infinite": (lambda t: ["--margin", "inf"], "invalid finite number value: 'inf'"),
    "seed": (lambda t: ["--seed", "9" * 20], "--seed 9999"),
    "vulkan": (lambda t: ["--device", "vulkan"], "expected one of auto, cpu, cuda"),
    "nowhere": (lambda t: ["--logger_name", ""], "--logger_name is empty"),
    "huge": (lambda t: ["--extra_stc", "4611686018427387904"], "--extra_stc 4611686018427387904"),
    "wide": (lambda t: ["--hid_router", "999999999999"], "--hid_router 999999999999"),
    "meta": (lambda t: ["--device", "meta"], "--device meta: expected one of"),
    "both": (lambda t: ["--resume", "auto", "--overwrite"], "--overwrite"),
    "no width": (lambda t: ["--img_dim", "14"], "expected 14, the model's --img_dim"),
    "heads": (lambda t: ["--num_head_IMRC", "3"], "--num_head_IMRC 3"),
    "words": (lambda t: ["--max_words", "65"], "--max_words 65"),
    "few captions": (lambda t: ["--val_captions", "4"], "--val_captions 4"),
    "one image": (lambda t: ["--direction", "t2i", "--batch_size", "1"], "--batch_size 1"),
    "no device": (lambda t: ["--device", "abacus"], "--device abacus"),
    "no data": (lambda t: ["--data_name", "nowhere"], "nowhere/train_caps.txt: not found"),
    "no BERT": (lambda t: ["--bert_path", str(t / "data")], "data: holds no model.safetensors"),
    "no checkpoint": (lambda t: ["--resume", str(t / "no")], "no: not found"),
    "published": (published, "holds no optimiser"),
    "another run": (another_run, "holds another run"),
    "NaN": (spoil_features, "train_ims.npy: row 3"),
    "empty caption": (empty_caption, "train_caps.txt: line 7"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_bad_input_is_one_line_and_leaves_no_checkpoint(
    tiny: Path, run_train: Callable[..., int], capsys: pytest.CaptureFixture, fault: str
) -> None:
    change, said = REFUSED[fault]
    argv = [*tiny_train(tiny, "--max_steps", "1"), *change(tiny)]
    assert run_train(*argv) == 2
    assert said in last_line(capsys)
    assert not list(tiny.glob("runs/**/*.pth.tar*"))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_nan_met_in_a_batch_ends_the_program_with_its_line(
    tiny: Path,
    run_train: Callable[..., int],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    workers: str,
) -> None:
    monkeypatch.setattr("data.SMALL_FILE", 0)
    spoil_features(tiny)
    assert run_train(*tiny_train(tiny, "--num_epochs", "1", "--workers", workers)) == 2
    assert "train_ims.npy: row 3 holds NaN or infinite features; the last" in last_line(capsys)
    steps = events(tiny / "runs/i2t")[-1]["step"]
    assert steps <= state(tiny / "runs/i2t" / NEWEST)["step"] <= steps + 1  # none of them is lost


def test_the_width_of_features_is_read_from_the_data_or_must_be_that(
    tiny: Path, run_train: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    assert run_train(*tiny_train(tiny, "--max_steps", "1")) == 0
    assert state(tiny / "runs/i2t" / NEWEST)["options"]["img_dim"] == IMG_DIM
    argv = tiny_train(tiny, "--max_steps", "2", "--resume", "auto")
    assert run_train(*argv, "--img_dim", str(IMG_DIM)) == 0
    assert run_train(*argv, "--img_dim", "14") == 2
    assert "train_ims.npy: features are 13 wide; expected 14" in last_line(capsys)


def test_training_in_float32_on_a_processor_compiles_by_wish_only(
    tiny: Path, run_train: Callable[..., int], monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setattr(space, "WORTH_COMPILING", 0)
    monkeypatch.setattr(space.RoutingSpace, "compile_routes", lambda self: None)
    assert run_train(*tiny_train(tiny, "--max_steps", "1", "--device", "cpu")) == 0
    assert "compiling" not in caplog.text
    argv = tiny_train(tiny, "--max_steps", "1", "--device", "cpu", "--compile", "--overwrite")
    assert run_train(*argv) == 0
    assert "compiling the routing" in caplog.text


@pytest.mark.parametrize(
    "ablation",
    [
        ["--routing", "uniform"],
        ["--routing", "hard"],
        ["--num_layer_routing", "1", "--cells", "GLGC,CMRC"],
        ["--num_layer_routing", "4", "--trade_off", "0"],
    ],
    ids=" ".join,
)
def test_an_ablation_is_trained_resumed_and_evaluated(
    ablation: list[str], tiny: Path, run_train: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    argv = tiny_train(tiny, "--max_steps", "2", *ablation)
    assert run_train(*argv) == 0
    again = [*argv, "--max_steps", "4", "--resume", "auto"]
    assert run_train(*again) == 0
    path = tiny / "runs/i2t" / NEWEST
    assert state(path)["options"][ablation[0][2:]] == type_of(ablation[1])
    assert evaluate(path, split="test", workers=0)["metrics"]["rsum"] > 0
    assert run_train(*tiny_train(tiny, "--max_steps", "6", "--resume", "auto")) == 2
    assert f"was trained with {ablation[0]} {ablation[1]}, not" in last_line(capsys)


def type_of(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def test_the_published_defaults() -> None:
    defaults = {
        **{"logger_name": "runs/runX", "data_path": "/data", "data_name": "precomp"},
        **{"bert_path": "./", "max_words": 32, "extra_stc": 0, "extra_img": 0, "num_epochs": 30},
        **{"batch_size": 32, "learning_rate": 0.0002, "lr_update": 15, "grad_clip": 2.0},
        **{"drop": 0.0, "margin": 0.2, "max_violation": True, "trade_off": 0.5},
        **{"embed_size": 256, "direction": "i2t", "workers": 2, "log_step": 10, "val_step": 2000},
        **{"resume": "", "finetune": False, "use_restval": False, "measure": "cosine"},
        **{"use_abs": False, "no_imgnorm": False, "reset_train": False, "num_head_IMRC": 16},
        **{"hid_IMRC": 512, "raw_feature_norm_CMRC": "clipped_l2norm"},
        **{"lambda_softmax_CMRC": 4.0, "hid_router": 512},
    }
    config = vars(TrainConfig())
    assert {name: config[name] for name in defaults} == defaults


def test_the_commands_of_the_published_models() -> None:
    """They work as SPEC has them, and stand so in the README."""
    readme, spec = ((ROOT / name).read_text() for name in ("README.md", "docs/SPEC.md"))
    commands = re.findall(r"python train\.py (--data_path \$DATA_PATH .*)", spec)
    assert len(commands) == 4
    for command in commands:
        assert f"python train.py {command}\n" in readme
        config = parse(TrainConfig, command.split(), "")
        i2t = config.direction == "i2t"
        assert config.lambda_softmax_CMRC == (4.0 if i2t else 9.0)
        assert (config.extra_stc, config.extra_img) == ((1, 0) if i2t else (0, 1))


def test_options_without_effect_say_so(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--help"], "")
    said = " ".join(capsys.readouterr().out.split())
    for name in ("drop", "measure", "finetune", "use_restval", "reset_train"):
        assert re.search(rf"--{name}\b[^-]*(--no-{name} )?accepted for", said), name


def test_what_a_resumed_run_may_not_change() -> None:
    """All that the numbers of a run depend on."""
    fixed = {
        *("data_name", "direction", "seed", "precision", "cache_text", "batch_size"),
        *("extra_stc", "extra_img", "learning_rate", "lr_update", "grad_clip", "margin"),
        *("max_violation", "trade_off", "val_captions", "embed_size", "img_dim", "max_words"),
        *("num_head_IMRC", "hid_IMRC", "raw_feature_norm_CMRC", "lambda_softmax_CMRC"),
        *("hid_router", "use_abs", "no_imgnorm", "routing", "num_layer_routing", "cells"),
    }
    assert vars(TrainConfig()).keys() - FREE == fixed
    assert vars(TrainConfig()).keys() >= FREE


@pytest.mark.slow
def test_compiled_training_goes_on_with_or_without_a_compiler(tiny: Path) -> None:
    """One whole command; where no compiler is found it warns and trains all the same."""
    done = run_program("train.py", *tiny_train(tiny, "--compile", "--max_steps", "2"))
    assert done.returncode == 0, done.stderr
    found = shutil.which(os.environ.get("CXX", "g++")) is not None
    assert ("not compiled, going on without" in done.stderr) != found
    assert state(tiny / "runs/i2t" / NEWEST)["step"] == 2


def test_cached_text_is_what_bert_says_without_dropout(
    tiny: Path, run_train: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    """A BERT that has no dropout gives the same run, cached or not, workers or not."""
    path = tiny / "bert/bert_config.json"
    config = json.loads(path.read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    path.write_text(json.dumps(config | still))
    argv = tiny_train(tiny, "--max_steps", "7", "--extra_stc", "1")
    assert run_train(*argv) == 0
    plain = state(tiny / "runs/i2t" / NEWEST)["weights"]
    for workers in ("0", "2"):
        assert run_train(*argv, "--cache_text", "--overwrite", "--workers", workers) == 0
        cached = state(tiny / "runs/i2t" / NEWEST)["weights"]
        for name, value in plain.items():
            torch.testing.assert_close(cached[name], value, atol=2e-4, rtol=1e-3, msg=name)
    (path,) = (tiny / "runs/i2t").glob("text_states_*.npy")
    states = np.load(path, mmap_mode="r")
    assert states.shape == (55, 12, 24) and states.dtype == np.float32
    assert "reading all captions once, into" in caplog.text


def test_cached_text_is_read_once_and_goes_with_its_run(
    tiny: Path,
    run_train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """BERT's dropout is not what it was, so a run without the cache is another run."""
    argv = tiny_train(tiny, "--cache_text", "--val_step", "50", direction="t2i")
    assert run_train(*argv, "--max_steps", "4") == 0
    assert run_train(*tiny_train(tiny, "--resume", "auto", direction="t2i")) == 2
    assert "--cache_text" in last_line(capsys)
    with monkeypatch.context() as patch:
        patch.setattr("training.text_cache.write_blocks", None)
        assert run_train(*argv, "--max_steps", "9", "--resume", "auto") == 0
    resumed = state(tiny / "runs/t2i" / NEWEST)
    assert run_train(*argv, "--max_steps", "9", "--overwrite") == 0
    assert same(resumed["weights"], state(tiny / "runs/t2i" / NEWEST)["weights"])


def test_a_cache_that_the_disk_has_no_room_for_is_not_begun(
    tiny: Path,
    run_train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    assert run_train(*tiny_train(tiny, "--cache_text")) == 2
    assert re.search(r"text_states_\w+\.npy needs 63360 bytes, 100 are free", last_line(capsys))


def test_little_memory_gives_the_same_weights(
    tiny: Path, run_train: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    argv = tiny_train(tiny, "--max_steps", "6", "--extra_stc", "1")
    assert run_train(*argv) == 0
    plain = state(tiny / "runs/i2t" / NEWEST)
    assert run_train(*argv, "--overwrite", "--memory", "0.1") == 0
    assert "activations of 100 % of the pairs are computed twice" in caplog.text
    assert same(state(tiny / "runs/i2t" / NEWEST)["weights"], plain["weights"])
