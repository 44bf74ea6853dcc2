"""Several processes score one matrix: it equals that of one process bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, Run, events, state, tiny_train, write_split
from ranks import on_ranks

import evaluate_models
import evaluation
import train
from checkpoint.checkpoint import read_checkpoint
from checkpoint.evaluated import EvaluatedModel
from common.cli import parse
from common.errors import InputError
from common.signals import Stopped
from common.world import ALONE, World
from evaluate_models import EvaluateConfig
from evaluation import encode_split, score_all
from training.config import TrainConfig
from training.loop import Trainer

CPU = torch.device("cpu")
MODELS = {name: str(GOLDEN / name / "checkpoint.pth.tar") for name in ("i2t", "t2i")}


def evaluate(folder: Path, world: World = ALONE, name: str = "own", **options: object) -> None:
    """Evaluate as the program does, in one of several processes; writes N.npy and N.json."""
    outputs = {"save_scores": f"{folder}/{world.size}.npy", "json": f"{folder}/{world.size}.json"}
    where = {"data_path": str(folder), "data_name": name, "bert_path": str(GOLDEN / "i2t/bert")}
    defaults = {"model_path": list(MODELS.values()), "device": "cpu", "workers": 0}
    evaluate_models._run(EvaluateConfig(**where | outputs | defaults | options), world)


def results(folder: Path, size: int) -> tuple[np.ndarray, dict]:
    content = json.loads((folder / f"{size}.json").read_text())
    assert content.pop("seconds") > 0
    return np.load(folder / f"{size}.npy"), content


def assert_equal(folder: Path, size: int) -> None:
    """Compare what `size` processes and one wrote."""
    (alone, expected), (scores, result) = results(folder, 1), results(folder, size)
    assert scores.dtype == np.float32 and np.array_equal(scores, alone) and result == expected
    assert np.unique(alone).size > alone.size / 4


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten images with 50 captions: 3 x 13 tiles, in several bands."""
    write_split(tmp_path / "own", "test", 10, width=20)
    return tmp_path


def small_tiles() -> None:
    """Make tiles of four images and captions, in this process."""
    evaluation.TILE = evaluation.IMAGE_BLOCK = 4
    evaluation.BAND = 40


# What each process does. A function of a module can be sent to it.


def share(folder: Path, tile: int, options: list[dict], world: World) -> None:
    """Evaluate with this rank's options, or with those of all."""
    small_tiles()
    evaluation.TILE = tile
    evaluate(folder, world, **options[world.rank % len(options)])


def refused(work: Callable[[World], object], world: World) -> str:
    with pytest.raises(InputError) as raised:
        work(world)
    return str(raised.value)


def share_with_nan(folder: Path, world: World) -> None:
    """Evaluate, with scores of NaN in process 1."""
    if world.rank == 1:
        score = evaluation._score_tile
        evaluation._score_tile = lambda *args: (score(*args)[0] * np.nan, 9)
    share(folder, 4, [{}], world)


def count_stops(folder: Path, world: World) -> int:
    small_tiles()
    place = (folder / "own", "test", CPU, GOLDEN / "i2t/bert")
    opened = EvaluatedModel.open(read_checkpoint(MODELS["i2t"]), *place)
    encoded = encode_split(opened.model, opened.split, opened.bert.vocabulary, device=CPU)
    calls: list[int] = []
    score_all(opened.model, encoded, CPU, stop=lambda: calls.append(1), world=world)
    return len(calls)


def validate(folder: Path, world: World) -> dict[str, object]:
    """Validate a new model in a run; returns what each process knows of it."""
    with validation(folder, world) as trainer:
        trainer._validate()
    return trainer.metrics | asdict(trainer.state)


def stop_validation(folder: Path, world: World) -> tuple[int, int]:
    """Send process 1 a signal in its third tile; returns tiles done and the signal."""
    tiles: list[int] = []
    with validation(folder, world) as trainer, pytest.raises(Stopped) as stopped:
        score = evaluation._score_tile

        def score_until_signal(*args: object) -> tuple:
            tiles.append(1)
            if world.rank == 1 and len(tiles) == 3:
                trainer.signals.received = signal.SIGTERM
            return score(*args)

        evaluation._score_tile = score_until_signal
        trainer._validate()
    return len(tiles), int(stopped.value.number)


@contextmanager
def validation(folder: Path, world: World) -> Iterator[Trainer]:
    small_tiles()
    argv = [*tiny_train(folder, direction="t2i"), "--device", "cpu"]
    trainer = train.new_trainer(parse(TrainConfig, argv, ""), world)
    trainer.state = replace(trainer.state, step=1)
    with trainer.log.open(1, False):
        yield trainer


CASES: dict[str, dict[str, object]] = {
    "i2t": {"model_path": [MODELS["i2t"]]},
    "t2i": {"model_path": [MODELS["t2i"]], "bootstrap": 100},
    "ensemble": {"fold5": True},
    "shortlist": {"shortlist": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_the_matrix_and_the_result_are_those_of_one_process(data: Path, case: str) -> None:
    for size in (1, 2, 3):
        on_ranks(data, size, partial(share, data, 4, [CASES[case]]))
        assert_equal(data, size)


def test_there_may_be_more_processes_than_tiles(data: Path) -> None:
    for size in (1, 3):
        on_ranks(data, size, partial(share, data, 128, [{}]))
    assert_equal(data, 3)


def errors(folder: Path, size: int, work: Callable[[World], object]) -> list[str]:
    """Return the InputError that `work` raises in each process."""
    return on_ranks(folder, size, partial(refused, work))


def test_nan_in_one_process_ends_all(data: Path) -> None:
    first, second, third = errors(data, 3, partial(share_with_nan, data))
    assert first == third == f"process 1: {second}" and MODELS["i2t"] in second


def test_processes_with_other_data_or_models_are_refused(data: Path) -> None:
    write_split(data / "other", "test", 10, width=20, seed=1)
    names = [{"name": name} for name in ("own", "other")]
    models = [{"model_path": [path]} for path in MODELS.values()]
    for options, named in ((names, "data"), (models, "models")):
        for message in errors(data, 2, partial(share, data, 4, options)):
            assert message.startswith(f"process 1: {named}")


def test_an_output_that_cannot_be_written_ends_all(data: Path) -> None:
    first, second = errors(data, 2, partial(share, data, 4, [{"json": str(data)}]))
    assert first == second and first.startswith(f"{data}: ")


def test_every_process_is_asked_to_stop_equally_often(data: Path) -> None:
    """Though of 39 tiles, two processes have 20 and 19."""
    first, second = on_ranks(data, 2, partial(count_stops, data))
    assert first == second >= 20


def test_every_process_knows_the_metrics_of_a_validation_and_one_writes(tiny: Path) -> None:
    (alone,) = on_ranks(tiny, 1, partial(validate, tiny))
    written = state(tiny / "runs/t2i/model_best.pth.tar")["metrics"]
    shutil.rmtree(tiny / "runs")
    assert on_ranks(tiny, 3, partial(validate, tiny)) == [alone] * 3
    assert (
        alone["validated"] == 1 and alone["best_rsum"] > 0 and len(events(tiny / "runs/t2i")) == 1
    )
    assert state(tiny / "runs/t2i/model_best.pth.tar")["metrics"] == written


def test_signal_to_one_process_stops_the_validation_of_all_at_one_tile(tiny: Path) -> None:
    assert on_ranks(tiny, 2, partial(stop_validation, tiny)) == [(3, signal.SIGTERM)] * 2


def test_torchrun_prints_and_writes_once(tmp_path: Path, run_evaluate: Run, capsys) -> None:
    """The program: 130 images are two tiles."""
    write_split(tmp_path / "own", "test", 130, counts=[1] * 130, width=20, longest=1)
    paths = ["--data_path", tmp_path, "--data_name", "own", "--bert_path", GOLDEN / "i2t/bert"]
    argv = ["--model_path", *MODELS.values(), *paths, "--workers", 0, "--fold5"]

    def outputs(size: int) -> list[object]:
        return ["--save_scores", tmp_path / f"{size}.npy", "--json", tmp_path / f"{size}.json"]

    assert run_evaluate(*argv, *outputs(1)) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2]
    command += [ROOT / "evaluate_models.py", *argv, *outputs(2)]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == capsys.readouterr().out
    assert done.stderr.count("130 images") == 2  # a line a model
    (alone, expected), (scores, result) = results(tmp_path, 1), results(tmp_path, 2)
    assert np.array_equal(scores, alone) and result == expected


@pytest.fixture
def second(monkeypatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setitem(os.environ, name, value)


def test_a_part_is_not_divided_further(tmp_path: Path, second, monkeypatch) -> None:
    argv = ["--model_path", "m", "--part", "1/2", "--save_scores", f"{tmp_path}/a.safetensors"]
    with pytest.raises(InputError, match="--part 1/2"):
        evaluate_models.main(argv)


def test_saved_scores_are_evaluated_by_the_first_process(
    tmp_path: Path, second, run_evaluate: Run, capsys
) -> None:
    assert run_evaluate("--scores", tmp_path / "none.npy") == 0
    assert capsys.readouterr().out == ""
