"""train.py end to end on tiny data: runs, resumes, refusals, the files of a run."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, IMG_DIM, ROOT, Run, image_of_caption, run_program, same, tiny_train
from pytest import CaptureFixture, LogCaptureFixture, MonkeyPatch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from common.cli import parse
from data import Batch
from evaluate_models import evaluate
from evaluation import Recall, Retrieval, retrieval
from training import loop
from training.config import GROUPS, TrainConfig
from training.resume import BEST, NEWEST
from training.step import TrainStep

TAGS = {
    *("epoch", "step", "batch_time", "data_time", "lr", "Rank", "Path", "Le"),
    *("r1", "r5", "r10", "medr", "meanr", "r1i", "r5i", "r10i", "medri", "meanri", "rsum"),
}


def state(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last_line(capsys: CaptureFixture) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text and "usage:" not in text
    return text.splitlines()[-1]


# Runs and their files


def test_run_trains_resumes_and_is_not_overwritten(
    tiny: Path, run_train: Run, capsys: CaptureFixture
) -> None:
    """In processes of their own, as a user runs them."""
    argv = tiny_train(tiny, "--extra_stc", "1", "--lambda_softmax=4", "--workers", "2")
    done = run_program("train.py", *argv, "--max_steps", "3")
    assert done.returncode == 0, done.stderr
    assert re.search(r"step 2/3 .* pairs/s, 0:00:\d\d left", done.stderr)
    assert run_train(*argv) == 2 and "--resume auto" in last_line(capsys)
    assert state(tiny / "runs/i2t" / NEWEST)["step"] == 3
    resumed = run_program("train.py", *argv, "--resume", "auto", "--max_steps", "5")
    assert resumed.returncode == 0 and "step 3 of 5" in resumed.stderr
    assert state(tiny / "runs/i2t" / NEWEST)["step"] == 5
    names = {path.name for path in (tiny / "runs/i2t").iterdir()}
    assert {NEWEST, BEST, "metrics.jsonl", "run.json", "train.log"} < names


def test_overwrite_starts_a_new_run(trained: Path, run_train: Run) -> None:
    argv, folder = tiny_train(trained, "--val_step", "1", "--max_steps", "1"), trained / "runs/i2t"
    assert run_train(*argv, "--overwrite") == 0
    assert state(folder / NEWEST)["step"] == state(folder / BEST)["step"] == 1
    assert {event["step"] for event in events(folder)} == {1}
    assert len(list(folder.glob("events.*"))) == 1


def test_logs_have_the_published_tags(
    tiny: Path, run_train: Run, caplog: LogCaptureFixture
) -> None:
    argv = tiny_train(tiny, "--val_step", "5", "--max_steps", "7", "--val_captions", "17")
    assert run_train(*argv) == 0
    folder = tiny / "runs/i2t"
    logged = events(folder)
    assert [event["step"] for event in logged] == [2, 4, 5, 6, 7]
    assert [event["step"] for event in logged if "rsum" in event] == [5, 7]
    assert all(event["epoch"] == 0 for event in logged)
    # 17 captions are three whole images, all of which are among the best five.
    assert "validating on 3 dev images" in caplog.text and logged[2]["r5i"] == 100
    board = EventAccumulator(str(folder)).Reload()
    assert set(board.Tags()["scalars"]) >= TAGS
    for name in ("Rank", "rsum"):
        values = [(event["step"], event[name]) for event in logged if name in event]
        scalars = [(scalar.step, scalar.value) for scalar in board.Scalars(name)]
        np.testing.assert_allclose(scalars, values, rtol=1e-6)


def test_run_json_and_checkpoints_hold_their_provenance(trained: Path) -> None:
    run = json.loads((trained / "runs/i2t/run.json").read_text())
    assert run["options"]["embed_size"] == 8 and run["versions"]["torch"] and run["device"]
    assert run["seconds"] > 0 and run["peak_memory_bytes"] > 10**7
    assert run["commit"] == state(trained / "runs/i2t" / NEWEST)["commit"]


def test_learning_rate_falls_to_a_tenth(
    tiny: Path, run_train: Run, monkeypatch: MonkeyPatch
) -> None:
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
    tiny: Path, run_train: Run, monkeypatch: MonkeyPatch
) -> None:
    """R@1 + R@5 of both directions decide, not the rsum."""

    def result(r1: float, r5: float, r10: float) -> Retrieval:
        return Retrieval(Recall(r1, r5, r10, 1.0, 1.0), Recall(r1, r5, r10, 1.0, 1.0))

    recalls = [(10, 20, 30), (11, 21, 22), (5, 20, 99), (12, 19, 30), (11, 21, 99)]
    results = iter(result(*three) for three in recalls)  # the last is no better than the second
    monkeypatch.setattr(loop, "retrieval", lambda *_: next(results))
    assert run_train(*tiny_train(tiny, "--val_step", "1", "--max_steps", "5")) == 0
    folder = tiny / "runs/i2t"
    best, newest = state(folder / BEST), state(folder / NEWEST)
    assert best["step"] == 2 and best["best_rsum"] == 64 and best["best_r1"] == 11
    assert newest["best_rsum"] == 64 and newest["best_r1"] == 12
    for content in (best, newest):  # each holds the metrics of its own weights
        (logged,) = (e for e in events(folder) if e["step"] == content["step"] and "rsum" in e)
        assert content["metrics"].items() <= logged.items()


@pytest.mark.parametrize(
    ("direction", "extra", "regions", "steps"),
    [
        *[("t2i", 0, 7, 9), ("t2i", 1, 7, 10), ("i2t", 0, 7, 10)],
        *[("i2t", 0, 1, 9), ("i2t", 1, 1, 10)],
    ],
)
def test_last_batch_that_batch_normalisation_cannot_take_is_skipped(
    direction: str, extra: int, regions: int, steps: int, tiny: Path, run_train, caplog
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


# Resuming


@pytest.mark.parametrize(
    ("direction", "precision"), [("i2t", "fp32"), ("t2i", "fp32"), ("i2t", "bf16")]
)
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
    assert run["earlier"] == [{name: run[name] for name in ("commit", "device", "versions")}]


def test_resuming_an_older_checkpoint_makes_it_the_newest_and_cuts_the_logs(
    tiny: Path, run_train: Run
) -> None:
    argv, folder = tiny_train(tiny, "--val_step", "4"), tiny / "runs/i2t"
    assert run_train(*argv, "--max_steps", "4") == 0
    older = Path(shutil.copy(folder / NEWEST, folder / "older.pth.tar"))
    assert run_train(*argv, "--max_steps", "8", "--resume", "auto") == 0
    before = [(event["step"], event.get("Le"), event.get("rsum")) for event in events(folder)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "torn')
    # There is nothing to do up to step 4, so the later steps stay.
    assert run_train(*argv, "--max_steps", "4", "--resume", older) == 2
    assert state(folder / NEWEST)["step"] == 8
    assert run_train(*argv, "--max_steps", "8", "--resume", older) == 0
    after = [(event["step"], event.get("Le"), event.get("rsum")) for event in events(folder)]
    assert after == before
    assert run_train(*argv, "--max_steps", "5", "--resume", older) == 0
    assert state(folder / NEWEST)["step"] == 5
    assert [event["step"] for event in events(folder)] == [2, 4, 4, 5]
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
    trained: Path, run_train: Run, monkeypatch: MonkeyPatch
) -> None:
    worse = retrieval(torch.zeros(7, 35).numpy(), image_of_caption(35))
    monkeypatch.setattr(loop, "retrieval", lambda *_: worse)
    elsewhere = ["--resume", trained / "runs/i2t" / NEWEST, "--logger_name", trained / "more"]
    assert run_train(*tiny_train(trained), "--max_steps", "3", *elsewhere) == 0
    best = state(trained / "more/i2t" / BEST)
    assert best["step"] == 3 and best["best_rsum"] == 0


def another_bert(tiny: Path, content: dict) -> None:
    weights = torch.load(tiny / "bert/pytorch_model.bin", weights_only=True)
    weights["encoder.layer.0.output.dense.bias"][0] += 1
    torch.save(weights, tiny / "bert/pytorch_model.bin")


def other_captions(tiny: Path, content: dict) -> None:
    path = tiny / "data/tiny/train_caps.txt"
    path.write_text(path.read_text().replace("dog", "cat", 1))


def other_dev_features(tiny: Path, content: dict) -> None:
    spoil(tiny / "data/tiny/dev_ims.npy", 0.5)


def spoil(features: Path, value: float) -> None:
    array = np.load(features)
    array[3] = value
    np.save(features, array)


def spoil_moment(tiny: Path, content: dict) -> None:
    content["optimizer"]["state"][3]["exp_avg"] = torch.zeros(2, 2)


UNFIT = {
    "another BERT": (another_bert, "BERT"),
    "other captions": (other_captions, "train_ims.npy"),
    "other dev features": (other_dev_features, "dev_ims.npy"),
    "no fingerprint": (lambda _, content: content.pop("train_data"), "train_ims.npy"),
    "step": (lambda _, content: content.update(step=7), "step"),
    "no random state": (lambda _, content: content.pop("random"), "'random'"),
    "moment's shape": (spoil_moment, "exp_avg is [2, 2]"),
    "no Adam": (lambda _, content: content["optimizer"]["state"].clear(), "moments of 0 weights"),
    "no optimiser": (lambda _, content: content.update(optimizer=3), NEWEST),
}


@pytest.mark.parametrize("fault", UNFIT)
def test_checkpoint_that_does_not_fit_is_refused(
    trained: Path, run_train: Run, capsys: CaptureFixture, fault: str
) -> None:
    path = trained / "runs/i2t" / NEWEST
    change, named = UNFIT[fault]
    content = state(path)
    change(trained, content)
    torch.save(content, path)
    before = path.read_bytes()
    assert run_train(*tiny_train(trained), "--max_steps", "4", "--resume", path) == 2
    assert named in last_line(capsys)
    assert path.read_bytes() == before


def test_resumed_run_keeps_its_mathematics(
    trained: Path, run_train: Run, capsys: CaptureFixture
) -> None:
    path = trained / "runs/i2t" / NEWEST
    before = path.read_bytes()
    for option, value in (("--margin", "0.3"), ("--lambda_softmax_CMRC", "5"), ("--cells", "CMRC")):
        assert run_train(*tiny_train(trained, "--resume", "auto", option, value)) == 2
        assert option in last_line(capsys) and path.read_bytes() == before


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


# Options


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
    config = vars(TrainConfig())
    assert {name: config[name] for name in defaults} == defaults


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


def test_help_has_every_option_in_its_group(capsys: CaptureFixture) -> None:
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


def spoil_train(tiny: Path) -> None:
    spoil(tiny / "data/tiny/train_ims.npy", np.nan)


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
    "NaN": (spoil_train, "train_ims.npy: row 3"),
    "empty caption": (empty_caption, "train_caps.txt: line 7"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_bad_input_is_one_line_and_writes_no_checkpoint(
    tiny: Path, run_train: Run, capsys: CaptureFixture, fault: str
) -> None:
    given, named = REFUSED[fault]
    more = given if isinstance(given, list) else given(tiny) or []
    assert run_train(*tiny_train(tiny, "--max_steps", "1"), *more) == 2
    assert named in last_line(capsys)
    assert not list(tiny.glob("runs/**/*.pth.tar*"))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_nan_in_a_batch_is_one_line_and_saves_a_checkpoint(
    tiny: Path, run_train: Run, capsys: CaptureFixture, monkeypatch: MonkeyPatch, workers: str
) -> None:
    monkeypatch.setattr("data.SMALL_FILE", 0)
    monkeypatch.setattr("data.SAMPLED_ROWS", 2)  # the first image and the last
    spoil_train(tiny)
    argv = tiny_train(tiny, "--num_epochs", "1", "--workers", workers, "--log_step", "1")
    assert run_train(*argv) == 2
    assert "train_ims.npy: row 3" in last_line(capsys)
    assert events(tiny / "runs/i2t")[-1]["step"] == state(tiny / "runs/i2t" / NEWEST)["step"]


@pytest.mark.parametrize(
    "options",
    ["--routing uniform", "--routing hard", "--num_layer_routing 1 --cells GLGC,CMRC"],
)
def test_ablation_is_trained_resumed_and_evaluated(
    options: str, tiny: Path, run_train: Run, capsys: CaptureFixture
) -> None:
    ablation = options.split()
    argv = tiny_train(tiny, *ablation)
    assert run_train(*argv, "--max_steps", "2") == 0
    assert run_train(*argv, "--max_steps", "4", "--resume", "auto") == 0
    path = tiny / "runs/i2t" / NEWEST
    assert str(state(path)["options"][ablation[0][2:]]) == ablation[1]
    assert evaluate(path, split="test", workers=0).metrics.rsum > 0
    assert run_train(*tiny_train(tiny, "--max_steps", "6", "--resume", "auto")) == 2
    assert ablation[0] in last_line(capsys)


@pytest.mark.slow
def test_compiled_training_works_with_and_without_a_compiler(tiny: Path) -> None:
    done = run_program("train.py", *tiny_train(tiny, "--compile", "--max_steps", "2"))
    assert done.returncode == 0, done.stderr
    assert state(tiny / "runs/i2t" / NEWEST)["step"] == 2


# --cache_text


def test_cached_text_equals_a_bert_without_dropout(tiny: Path, run_train: Run) -> None:
    path = tiny / "bert/bert_config.json"
    config = json.loads(path.read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    path.write_text(json.dumps(config | still))
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
    tiny: Path, run_train: Run, monkeypatch: MonkeyPatch, capsys
) -> None:
    argv = tiny_train(tiny, "--cache_text", "--val_step", "50", direction="t2i")
    assert run_train(*argv, "--max_steps", "4") == 0
    with monkeypatch.context() as patch:
        patch.setattr("training.text_cache.write_blocks", None)
        assert run_train(*argv, "--max_steps", "9", "--resume", "auto") == 0
    resumed = state(tiny / "runs/t2i" / NEWEST)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    assert run_train(*argv, "--max_steps", "9", "--overwrite") == 2
    assert "63360 bytes, 100 are free" in last_line(capsys)
    monkeypatch.undo()
    assert run_train(*argv, "--max_steps", "9", "--overwrite") == 0
    assert same(resumed["weights"], state(tiny / "runs/t2i" / NEWEST)["weights"])
