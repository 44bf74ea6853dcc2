"""scripts/train_gpu.sh: what it runs, how it resumes, and a time limit."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT

from common.cli import parse
from evaluate_models import EvaluateConfig
from training.config import TrainConfig

# Stands for Python: notes its command, and writes the files that the program would.
PYTHON = """#!{python}
import json, os, pathlib, signal, sys, time
program, *options = sys.argv[1:]
program = pathlib.Path(program).name
value = lambda name: options[options.index(name) + 1]
def note(*more):
    with open("calls.jsonl", "a") as file:
        file.write(json.dumps([program, *options, *more]) + "\\n")
if program == "train.py":
    folder = pathlib.Path(value("--logger_name"), value("--direction"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.log").write_text("a log")
    (folder / "model_best.pth.tar").write_text("weights")
    def stop(*_):
        note("stopped")
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    time.sleep(float(os.environ.get("TRAINING", 0)))
note()
if program == "convert_checkpoint.py":
    assert not os.path.exists(value("--out"))
    pathlib.Path(value("--out")).write_text("half")
    pathlib.Path(value("--out")).with_suffix(".json").write_text("{{}}")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data/small").mkdir(parents=True)
    (tmp_path / "data/small/train_ims.npy").touch()
    (tmp_path / "python").write_text(PYTHON.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def run(folder: Path, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts/train_gpu.sh"), "data/small/", "bert", "out", *more]
    environment = os.environ | {"DIME_PYTHON": str(folder / "python")} | variables
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def calls(folder: Path) -> list[list[str]]:
    """Return the programs that ran since the last time, each with its options."""
    path = folder / "calls.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [json.loads(line) for line in lines]


def test_both_directions_have_the_published_options(folder: Path) -> None:
    done = run(folder, "both", "--batch_size", "16", DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    every = calls(folder)
    three = ["train.py", "convert_checkpoint.py", "evaluate_models.py"]
    assert [name for name, *_ in every] == [*three, *three, "evaluate_models.py"]
    i2t, t2i = (parse(TrainConfig, options, "") for _, *options in (every[0], every[3]))
    assert (i2t.direction, i2t.extra_stc, i2t.lambda_softmax_CMRC) == ("i2t", 1, 4)
    assert (t2i.direction, t2i.extra_img, t2i.lambda_softmax_CMRC) == ("t2i", 1, 9)
    for config in (i2t, t2i):
        assert (config.num_epochs, config.resume, config.precision) == (30, "auto", "bf16")
        assert (config.data_path, config.data_name) == ("data", "small")
        assert (config.bert_path, config.batch_size, config.device) == ("bert", 16, "cpu")
    ensemble = parse(EvaluateConfig, every[-1][1:], "")
    assert ensemble.model_path == ["out/i2t.safetensors", "out/t2i.safetensors"]
    assert (ensemble.split, ensemble.json) == ("dev", "out/ensemble_result.json")
    with tarfile.open(folder / "out/logs.tar.gz") as logs:
        assert {Path(name) for name in logs.getnames()} == {
            Path("i2t/train.log"),
            Path("t2i/train.log"),
        }


def test_what_is_done_is_not_trained_again(folder: Path) -> None:
    (folder / "data/small/test_ims.npy").touch()
    assert run(folder, "i2t").returncode == 0
    assert [name for name, *_ in calls(folder)][-1] == "evaluate_models.py"
    (folder / "out/t2i.safetensors").write_text("a conversion that was cut off")
    assert run(folder, "both").returncode == 0
    every = calls(folder)
    trained = [o[o.index("--direction") + 1] for name, *o in every if name == "train.py"]
    assert trained == ["t2i"] and len(every) == 5
    assert "test" in every[-1]  # the split


def test_training_ends_when_the_time_is_over(folder: Path) -> None:
    done = run(folder, MINUTES="0.1", TRAINING="60")
    assert done.returncode == 124 and "0.1 minutes" in done.stderr
    ((program, *_, end),) = calls(folder)
    assert (program, end) == ("train.py", "stopped")
    assert (folder / "out/logs.tar.gz").exists() and not (folder / "out/i2t.json").exists()
    assert run(folder, MINUTES="0").returncode == 124 and calls(folder) == []


def test_wrong_arguments_are_refused(folder: Path) -> None:
    assert run(folder, "t2t").returncode == 2
    assert "t2t" in run(folder, "t2t").stderr
    (folder / "data/small/train_ims.npy").unlink()
    done = run(folder)
    assert done.returncode == 2 and "data/small" in done.stderr and calls(folder) == []


@pytest.mark.slow
def test_a_tiny_training_with_its_evaluation(tiny: Path) -> None:
    sizes = "--embed_size 8 --max_words 12 --num_head_IMRC 2 --hid_IMRC 6 --hid_router 5"
    small = "--batch_size 6 --max_steps 4 --workers 0 --no-compile"
    command = ["bash", str(ROOT / "scripts/train_gpu.sh"), "data/tiny", "bert", "out", "both"]
    command += [*sizes.split(), *small.split()]
    environment = os.environ | {"DIME_PYTHON": sys.executable}
    for steps in ("2", "4"):  # resumed
        done = subprocess.run(
            [*command, "--max_steps", steps], cwd=tiny, env=environment, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        for name in ("i2t", "t2i"):
            about = json.loads((tiny / f"out/{name}.json").read_text())
            assert about["step"] <= int(steps)
            (tiny / f"out/{name}.json").unlink()
    for name in ("i2t", "t2i", "ensemble"):
        result = json.loads((tiny / f"out/{name}_result.json").read_text())
        assert result["images"] == 10
    run_json = json.loads((tiny / "out/runs/t2i/run.json").read_text())
    assert run_json["complete"] and run_json["resumed_at"] == [2]
