"""train.py end to end on tiny data: runs and their files, options, refusals."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    GOLDEN,
    ROOT,
    Error,
    Run,
    events,
    run_here,
    run_program,
    same,
    state,
    tiny_train,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from common.cli import parse
from common.results import Recall
from data import Batch
from evaluate_models import evaluate
from evaluation import Retrieval
from scripts import convert_checkpoint
from training import loop
from training.config import GROUPS, TrainConfig
from training.resume import BEST, NEWEST
from training.step import TrainStep

TAGS = {
    *("epoch", "step", "batch_time", "data_time", "lr", "Rank", "Path", "Le"),
    *("r1", "r5", "r10", "medr", "meanr", "r1i", "r5i", "r10i", "medri", "meanri", "rsum"),
}


def test_run_trains_resumes_and_is_not_overwritten(tiny: Path, train_error: Error) -> None:
    """In processes of their own, as a user runs them."""
    argv = tiny_train(tiny, "--extra_stc", "1", "--lambda_softmax=4", "--workers", "2")
    folder = tiny / "runs/i2t"
    done = run_program("train.py", *argv, "--max_steps", "3")
    assert done.returncode == 0, done.stderr
    assert re.search(r"step 2/3 .* pairs/s, 0:00:\d\d left", done.stderr)
    assert "--resume auto" in train_error(*argv)
    assert state(folder / NEWEST)["step"] == 3
    resumed = run_program("train.py", *argv, "--resume", "auto", "--max_steps", "5")
    assert resumed.returncode == 0 and "step 3 of 5" in resumed.stderr
    assert state(folder / NEWEST)["step"] == 5
    names = {path.name for path in folder.iterdir()}
    assert {NEWEST, BEST, "metrics.jsonl", "run.json", "train.log"} < names
    run = json.loads((folder / "run.json").read_text())
    assert run["options"]["embed_size"] == 8 and run["peak_memory_bytes"] > 10**7
    assert run["commit"] == state(folder / NEWEST)["commit"]


def test_overwrite_starts_a_new_run(trained: Path, run_train: Run) -> None:
    argv, folder = tiny_train(trained, "--val_step", "1", "--max_steps", "1"), trained / "runs/i2t"
    assert run_train(*argv, "--overwrite") == 0
    assert state(folder / NEWEST)["step"] == state(folder / BEST)["step"] == 1
    assert {event["step"] for event in events(folder)} == {1}
    assert len(list(folder.glob("events.*"))) == 1


def test_logs_have_the_published_tags(tiny: Path, run_train: Run, caplog) -> None:
    argv = tiny_train(tiny, "--val_step", "5", "--max_steps", "7", "--val_captions", "17")
    assert run_train(*argv) == 0
    folder = tiny / "runs/i2t"
    logged = events(folder)
    assert [event["step"] for event in logged] == [2, 4, 5, 6, 7]
    assert [event["step"] for event in logged if "rsum" in event] == [5, 7]
    assert all(event["epoch"] == 0 for event in logged)
    # 17 captions are three whole images, all of which are among the best five.
    assert "3 dev images" in caplog.text and logged[2]["r5i"] == 100
    board = EventAccumulator(str(folder)).Reload()
    assert set(board.Tags()["scalars"]) >= TAGS
    for name in ("Rank", "rsum"):
        values = [(event["step"], event[name]) for event in logged if name in event]
        scalars = [(scalar.step, scalar.value) for scalar in board.Scalars(name)]
        np.testing.assert_allclose(scalars, values, rtol=1e-6)


def test_learning_rate_falls_to_a_tenth(tiny: Path, run_train: Run, monkeypatch) -> None:
    used, step = [], TrainStep.step

    def noted(self: TrainStep, batch: Batch) -> dict:
        used.append(self.optimizer.param_groups[0]["lr"])
        return step(self, batch)

    monkeypatch.setattr(TrainStep, "step", noted)
    argv = tiny_train(tiny, "--lr_update", "2", "--num_epochs", "3", "--log_step", "10")
    assert run_train(*argv) == 0
    logged = events(tiny / "runs/i2t")
    assert used == pytest.approx([2e-4] * 20 + [2e-5] * 10)
    assert [event["lr"] for event in logged if "lr" in event] == used[::10]
    validations = [(e["step"], e["epoch"]) for e in logged if "rsum" in e]
    assert validations == [(10, 0), (20, 1), (30, 2)]  # after each epoch


def test_best_model_has_the_largest_sum_of_four_recalls(
    tiny: Path, run_train: Run, monkeypatch
) -> None:
    """R@1 + R@5 of both directions decide, not the rsum."""
    recalls = [(10, 20, 30), (11, 21, 22), (5, 20, 99), (12, 19, 30), (11, 21, 99)]
    # the last is no better than the second
    results = iter(Retrieval(*[Recall(*three, 1.0, 1.0)] * 2) for three in recalls)
    monkeypatch.setattr(loop, "retrieval", lambda *_: next(results))
    assert run_train(*tiny_train(tiny, "--val_step", "1", "--max_steps", "5")) == 0
    folder = tiny / "runs/i2t"
    best, newest = state(folder / BEST), state(folder / NEWEST)
    assert best["step"] == 2 and best["best_rsum"] == 64 and best["best_r1"] == 11
    assert newest["best_rsum"] == 64 and newest["best_r1"] == 12
    for content in (best, newest):  # each holds the metrics of its own weights
        (logged,) = (e for e in events(folder) if e["step"] == content["step"] and "rsum" in e)
        assert content["metrics"].items() <= logged.items()


def test_patience_ends_a_run_whose_dev_results_stay_behind(
    tiny: Path, run_train: Run, monkeypatch
) -> None:
    """Epochs have 10 steps; the second is the best, the fourth is the second without a gain."""
    figures = [Recall(r1, 50.0, 60.0, 1.0, 1.0) for r1 in (10.0, 20.0, 19.0, 20.0, 15.0)]
    left = iter([Retrieval(recall, recall) for recall in figures])
    monkeypatch.setattr(loop, "retrieval", lambda *_: next(left))
    argv, folder = tiny_train(tiny, "--num_epochs", "9", "--patience", "2"), tiny / "runs/i2t"
    assert run_train(*argv) == 0
    assert [e["step"] for e in events(folder) if "rsum" in e] == [10, 20, 30, 40]
    assert (
        state(folder / BEST)["step"] == 20
        and json.loads((folder / "run.json").read_text())["complete"]
    )
    assert run_train(*argv, "--resume", "auto") == 0  # is complete: nothing is trained
    assert state(folder / NEWEST)["step"] == 40
    argv[argv.index("--patience") + 1] = "3"
    assert run_train(*argv, "--resume", "auto") == 0
    assert state(folder / NEWEST)["step"] == 50  # one more, without a gain either


@pytest.mark.parametrize(
    ("direction", "extra", "regions", "steps"),
    [("t2i", 0, 7, 9), ("t2i", 1, 7, 10), ("i2t", 0, 7, 10), ("i2t", 0, 1, 9), ("i2t", 1, 1, 10)],
)
def test_last_batch_that_batch_normalisation_cannot_take_is_skipped(
    direction: str, extra: int, regions: int, steps: int, tiny: Path, run_train: Run, caplog
) -> None:
    """55 captions in batches of 6: the tenth batch has one, in i2t a single token at worst."""
    for name in ("train", "dev"):
        path = tiny / f"data/tiny/{name}_ims.npy"
        np.save(path, np.load(path)[:, :regions])
    option = "--extra_stc" if direction == "i2t" else "--extra_img"
    argv = tiny_train(tiny, "--num_epochs", "1", option, str(extra), direction=direction)
    assert run_train(*argv) == 0
    assert state(tiny / "runs" / direction / NEWEST)["step"] == steps
    assert ("is skipped" in caplog.text) == (steps == 9)


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_regions_of_zeros_train(direction: str, tiny: Path, run_train: Run) -> None:
    """Their gradient is 1e12 and more in the first step, and is clipped."""
    path = tiny / "data/tiny/train_ims.npy"
    features = np.load(path)
    features[:, 0] = 0
    np.save(path, features)
    argv = tiny_train(tiny, "--max_steps", "2", "--log_step", "1", "--direction", direction)
    assert run_train(*argv) == 0
    first, second = (e["grad_norm"] for e in events(tiny / "runs" / direction) if "Le" in e)
    assert first > 1e10 and second < 1e6


def test_which_options_change_the_weights(tiny: Path, run_train: Run) -> None:
    def weights(options: str) -> dict:
        """Weights after three steps in t2i with further options."""
        argv = tiny_train(tiny, "--extra_img", "1", "--overwrite", direction="t2i")
        assert run_train(*argv, "--max_steps", "3", *options.split()) == 0
        return state(tiny / "runs/t2i" / NEWEST)["weights"]

    usual = weights("")
    for options in (
        *("--margin 0.4", "--trade_off 0", "--no-max_violation", "--learning_rate 1e-3"),
        *("--grad_clip 1e-3", "--lambda_softmax 9", "--raw_feature_norm_CMRC softmax"),
        *("--use_abs", "--no_imgnorm", "--seed 1", "--precision bf16", "--max_words 9"),
        *("--batch_size 5", "--extra_img 2"),
    ):
        changed = weights(options)
        assert not same(changed, usual), options
        assert {value.dtype for value in changed.values()} == {torch.float32, torch.int64}
    for options in (
        "--drop 0.5 --measure order --finetune --use_restval --reset_train",
        "--workers 1 --log_step 1 --val_step 1 --val_captions 10 --num_epochs 7",
        "--features_on_device",
        "--lr_update 1 --activation_checkpointing",  # the first epoch has more than three steps
    ):
        assert same(weights(options), usual), options
    assert same(weights("--grad_clip 0"), weights("--grad_clip 1e9"))


def test_published_defaults() -> None:
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
    assert defaults.items() <= vars(TrainConfig()).items()


def test_commands_of_the_published_models() -> None:
    """They parse as SPEC §9 has them, and stand in the README."""
    readme, spec = ((ROOT / name).read_text() for name in ("README.md", "docs/SPEC.md"))
    commands = re.findall(r"python train\.py (--data_path \$DATA_PATH .*)", spec)
    assert len(commands) == 4
    for command in commands:
        assert f"python train.py {command}\n" in readme
        config = parse(TrainConfig, command.split(), "")
        i2t = config.direction == "i2t"
        assert config.lambda_softmax_CMRC == (4.0 if i2t else 9.0)
        assert (config.extra_stc, config.extra_img) == ((1, 0) if i2t else (0, 1))


def test_help_has_every_option_in_its_group(capsys) -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(vars(TrainConfig()))
    with pytest.raises(SystemExit):
        train.main(["--help"])
    ignored = capsys.readouterr().out.split("accepted and ignored:")[1]
    assert all(f"--{name}" in ignored for name in ("drop", "measure", "finetune", "use_restval"))


PUBLISHED = ["--resume", str(GOLDEN / "i2t/checkpoint.pth.tar")]


def another_run(tiny: Path) -> list[str]:
    (tiny / "runs/i2t").mkdir(parents=True)
    (tiny / "runs/i2t/metrics.jsonl").write_text("")
    return PUBLISHED


def add_nan(tiny: Path) -> None:
    features = np.load(tiny / "data/tiny/train_ims.npy")
    features[3] = np.nan
    np.save(tiny / "data/tiny/train_ims.npy", features)


def empty_caption(tiny: Path) -> None:
    path = tiny / "data/tiny/train_caps.txt"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:6], "  ", *lines[7:]]))


REFUSED = {
    "extra_img in i2t": (["--extra_img", "1"], "--extra_img"),
    "negative": (["--margin", "-1"], "--margin"),
    "device": (["--device", "vulkan"], "--device vulkan"),
    "width": (["--img_dim", "14"], "--img_dim"),
    "words": (["--max_words", "65"], "--max_words 65"),
    "few captions": (["--val_captions", "4"], "--val_captions 4"),
    "one image": (["--direction", "t2i", "--batch_size", "1"], "--batch_size 1"),
    "no data": (["--data_name", "nowhere"], "nowhere/train_caps.txt"),
    "no BERT": (lambda tiny: ["--bert_path", tiny / "data"], "data"),
    "no checkpoint": (lambda tiny: ["--resume", tiny / "no"], "no: not found"),
    "published checkpoint": (PUBLISHED, "checkpoint.pth.tar"),
    "another run": (another_run, "--logger_name"),
    "NaN": (add_nan, "train_ims.npy: row 3"),
    "empty caption": (empty_caption, "train_caps.txt: line 7"),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_bad_input_is_one_line_and_writes_no_checkpoint(
    tiny: Path, train_error: Error, problem: str
) -> None:
    given, named = REFUSED[problem]
    more = given if isinstance(given, list) else given(tiny) or []
    assert named in train_error(*tiny_train(tiny, "--max_steps", "1"), *more)
    assert not list(tiny.glob("runs/**/*.pth.tar*"))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_nan_in_a_batch_is_one_line_and_saves_a_checkpoint(
    tiny: Path, train_error: Error, monkeypatch, workers: str
) -> None:
    monkeypatch.setattr("data.SMALL_FILE", 0)
    monkeypatch.setattr("data.SAMPLED_ROWS", 2)  # the first image and the last
    add_nan(tiny)
    argv = tiny_train(tiny, "--num_epochs", "1", "--workers", workers, "--log_step", "1")
    assert "train_ims.npy: row 3" in train_error(*argv)
    assert events(tiny / "runs/i2t")[-1]["step"] == state(tiny / "runs/i2t" / NEWEST)["step"]


@pytest.mark.parametrize(
    "options",
    [
        *("--routing uniform", "--routing hard", "--num_layer_routing 1 --cells GLGC,CMRC"),
        "--num_layer_routing 0 --activation_checkpointing --compile",
    ],
)
def test_ablation_is_trained_resumed_and_evaluated(
    options: str, tiny: Path, run_train: Run, train_error: Error
) -> None:
    argv, option = tiny_train(tiny, *options.split()), options.split()[0]
    assert run_train(*argv, "--max_steps", "2") == 0
    assert run_train(*argv, "--max_steps", "4", "--resume", "auto") == 0
    assert evaluate(tiny / "runs/i2t" / NEWEST, split="test", workers=0).metrics.rsum > 0
    assert option in train_error(*tiny_train(tiny, "--max_steps", "6", "--resume", "auto"))


def test_encoders_alone_join_an_ensemble_and_other_forms(
    trained: Path, run_train: Run, monkeypatch
) -> None:
    alone = ["--num_layer_routing", "0", "--logger_name", trained / "alone", "--max_steps", "2"]
    assert run_train(*tiny_train(trained), *alone) == 0
    model, arrays = trained / "alone/i2t" / NEWEST, trained / "alone.safetensors"
    argv = ["--checkpoint", model, "--out", arrays]
    assert run_here(monkeypatch, convert_checkpoint.main, argv) == 0
    dime, file = trained / "runs/i2t" / NEWEST, trained / "scores.npy"
    scores = []
    options = {"data_path": trained / "data", "split": "test", "workers": 0}
    for models in (dime, model, arrays, [dime, arrays]):
        evaluate(models, save_scores=str(file), **options)
        scores.append(np.load(file))
    np.testing.assert_array_equal(scores[1], scores[2])
    np.testing.assert_allclose(scores[3], (scores[0] + scores[1]) / 2, atol=1e-6)
    short, whole = (evaluate(model, shortlist=count, **options) for count in (3, 50))
    assert short.metrics.i2t.r1 == whole.metrics.i2t.r1  # the shortlist is by the same products


@pytest.mark.slow
def test_compiled_training_works_with_and_without_a_compiler(tiny: Path) -> None:
    done = run_program("train.py", *tiny_train(tiny, "--compile", "--max_steps", "2"))
    assert done.returncode == 0, done.stderr
    assert state(tiny / "runs/i2t" / NEWEST)["step"] == 2


def test_cached_text_equals_a_bert_without_dropout(tiny: Path, run_train: Run) -> None:
    path = tiny / "bert/bert_config.json"
    path.write_text(path.read_text().replace('_prob": 0.1', '_prob": 0.0'))
    argv = tiny_train(tiny, "--max_steps", "7", "--extra_stc", "1")
    assert run_train(*argv) == 0
    usual = state(tiny / "runs/i2t" / NEWEST)["weights"]
    for workers in ("0", "2"):
        assert run_train(*argv, "--cache_text", "--overwrite", "--workers", workers) == 0
        cached = state(tiny / "runs/i2t" / NEWEST)["weights"]
        for name, value in usual.items():
            torch.testing.assert_close(cached[name], value, atol=2e-4, rtol=1e-3, msg=name)
    (path,) = (tiny / "runs/i2t").glob("text_states_*.npy")
    states = np.load(path, mmap_mode="r")
    assert states.shape == (55, 12, 24) and states.dtype == np.float32


def test_cached_text_is_written_once_and_belongs_to_its_run(
    tiny: Path, run_train: Run, train_error: Error, monkeypatch
) -> None:
    argv = tiny_train(tiny, "--cache_text", "--val_step", "50", direction="t2i")
    assert run_train(*argv, "--max_steps", "4") == 0
    argv += ["--max_steps", "9"]
    with monkeypatch.context() as patch:
        patch.setattr("training.text_cache.write_blocks", None)
        assert run_train(*argv, "--resume", "auto") == 0
    resumed = state(tiny / "runs/t2i" / NEWEST)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
        assert "63360 bytes" in train_error(*argv, "--overwrite")
    assert run_train(*argv, "--overwrite") == 0
    assert same(resumed["weights"], state(tiny / "runs/t2i" / NEWEST)["weights"])
