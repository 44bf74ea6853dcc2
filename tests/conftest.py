"""Shared by the tests: the golden cases, tiny data and BERTs, programs run as a user runs them."""

import base64
import json
import logging
import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import evaluate_models
import train
from common import cli as options
from common import provenance
from common.files import write_json
from scripts import extract_regions, prepare_captions
from scripts.parts.golden import CASES, GOLDEN, Case

ROOT = Path(__file__).parent.parent
Run = Callable[..., int]  # runs a program in this process and returns its exit status
Error = Callable[..., str]  # runs one that must refuse its input and returns its error

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a model hub for anything
# Two tests run side by side on two cores; threads that wait for each other would take most of both.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of programs that tests start


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(GOLDEN / request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


WORDS = "a man woman dog cat boy girl two red blue black white shirt running on in the with ball"
IMG_DIM, REGIONS = 13, 7


def write_split(
    folder: Path,
    name: str,
    images: int,
    *,
    counts: Sequence[int] | None = None,
    repeat: bool = False,
    dtype: type = np.float32,
    longest: int = 9,
    width: int = IMG_DIM,
    seed: int = 0,
) -> None:
    """Random features and captions in SCAN's layout; every caption has 1 to `longest` words.

    With `counts` the images have so many captions, and an ids file says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((seed, len(name), images))
    features = rng.random((images, REGIONS, width)).astype(dtype)
    each = [5] * images if counts is None else list(counts)
    np.save(folder / f"{name}_ims.npy", np.repeat(features, each, axis=0) if repeat else features)
    captions = [
        " ".join(rng.choice(WORDS.split(), size=rng.integers(1, longest + 1)))
        for _ in range(sum(each))
    ]
    (folder / f"{name}_caps.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    if counts is not None:
        ids = [f"{name}{i}\n" for i, count in enumerate(counts) for _ in range(count)]
        (folder / f"{name}_ids.txt").write_text("".join(ids))


def image_of_caption(captions: int) -> np.ndarray:
    """Return the image of each caption in SCAN's layout, five an image."""
    return np.arange(captions) // 5


TSV_WIDTH = 6


def tsv_row(key: object, seed: int, width: int = TSV_WIDTH) -> bytes:
    """A row of bottom-up attention's TSV files, drawn by a seed."""
    rng = np.random.default_rng(seed)
    boxes, features = rng.random((36, 4), "float32"), rng.random((36, width), "float32")
    coded = [base64.b64encode(a.tobytes()).decode() for a in (boxes, features)]
    return "\t".join([str(key), "60", "48", "36", *coded]).encode() + b"\n"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with data/tiny (train, dev, test in both row ratios) and a BERT with dropout."""
    return write_tiny(tmp_path)


def write_tiny(folder: Path) -> Path:
    """What the fixture `tiny` holds."""
    write_split(folder / "data/tiny", "train", 11)
    write_split(folder / "data/tiny", "dev", 7, repeat=True)
    write_split(folder / "data/tiny", "test", 10, dtype=np.float16)
    shutil.copytree(GOLDEN / "i2t/bert", folder / "bert")
    path = folder / "bert/bert_config.json"
    config = json.loads(path.read_text())
    config |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def _two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny(tmp_path_factory.mktemp("trained"))
    train.main(tiny_train(folder, "--max_steps", "2"))
    return folder


@pytest.fixture
def trained(_two_steps: Path, tmp_path: Path) -> Path:
    """The folder of `tiny` with a complete run of two steps, in i2t."""
    return Path(shutil.copytree(_two_steps, tmp_path, dirs_exist_ok=True))


def tiny_train(folder: Path, *more: str, direction: str = "i2t") -> list[str]:
    """Options of a training on `tiny` that takes a second."""
    paths = {"data_path": "data", "bert_path": "bert", "logger_name": "runs"}
    sizes = {"embed_size": 8, "max_words": 12, "num_head_IMRC": 2}
    small = {"hid_IMRC": 6, "hid_router": 5, "batch_size": 6, "workers": 0, "log_step": 2}
    where = [x for name, v in paths.items() for x in (f"--{name}", str(folder / v))]
    rest = [x for name, v in (sizes | small).items() for x in (f"--{name}", str(v))]
    return [*where, "--data_name", "tiny", *rest, "--direction", direction, *more]


def run_here(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], argv: Sequence[str]) -> int:
    """Run a program in this process as its command line does; the exit status."""
    monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, argv)])
    monkeypatch.setattr(options, "tune_malloc", lambda: None)
    logging.getLogger().setLevel(logging.INFO)
    try:
        options.run(main)
    except SystemExit as stop:
        return int(stop.code)
    return 0


@pytest.fixture
def run_train(monkeypatch) -> Run:
    return lambda *argv: run_here(monkeypatch, train.main, argv)


@pytest.fixture
def run_evaluate(monkeypatch) -> Run:
    return lambda *argv: run_here(monkeypatch, evaluate_models.main, argv)


@pytest.fixture
def train_error(run_train: Run, capsys) -> Error:
    return lambda *argv: error_line(run_train(*argv), capsys)


@pytest.fixture
def evaluate_error(run_evaluate: Run, capsys) -> Error:
    return lambda *argv: error_line(run_evaluate(*argv), capsys)


def error_line(status: int, capsys) -> str:
    """Return the one line in which a program has refused its input."""
    text = capsys.readouterr().err
    assert status == 2 and "Traceback" not in text and "usage:" not in text
    return text.splitlines()[-1]


def state(path: Path) -> dict:
    """Return what a checkpoint of a training holds."""
    return torch.load(path, weights_only=True)


def events(folder: Path) -> list[dict]:
    """Return the lines of a run's log of metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_program(program: str, *argv: object) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, as a user does."""
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", ROOT / program, *argv]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


def same(a: object, b: object) -> bool:
    """Equal to the last bit, through dictionaries and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def limit_memory(pid: int, more: int) -> None:
    """Let a process take `more` bytes of memory and no more."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more
    resource.prlimit(pid, resource.RLIMIT_AS, (most, most))


def report(part: str, results: dict[str, object], path: Path) -> None:
    """Write the results of a program that is run by hand into its part of a JSON file."""
    module = sys.modules["__main__"].__spec__.name  # they are run as `python -m tests.NAME`
    about = provenance.of(shlex.join(["python", "-m", module, *sys.argv[1:]]))
    parts = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, parts | {part: about | results})


# Images and extractions of their regions


def draw(folder: Path, count: int = 10) -> Path:
    """Draw an image of a square each; return the path of their captions in Karpathy's form."""
    folder.mkdir()
    entries = []
    for i in range(count):
        image = Image.new("RGB", (60 + i, 48), "white")
        ImageDraw.Draw(image).rectangle((4 * i, 5, 4 * i + 20, 30), fill=(20 * i, 90, 40))
        image.save(folder / f"{i}.png")
        split = "val" if i % 5 == 3 else "test" if i % 5 == 4 else "train"
        texts = [{"raw": f"a man in {word} {i}"} for word in ("red", "blue", "black", "white", "a")]
        entries.append({"imgid": i, "filename": f"{i}.png", "split": split, "sentences": texts})
    path = folder / "dataset.json"
    path.write_text(json.dumps({"dataset": "own", "images": entries}))
    return path


@pytest.fixture
def extract(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the program on tmp_path/data/own; return standard output, or error after status 2."""

    def run(*more: object, status: int = 0) -> str:
        argv = ["--data", tmp_path / "data/own", "--workers", 0, "--batch_size", 2, *more]
        capsys.readouterr()
        assert run_here(monkeypatch, extract_regions.main, argv) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    argv = [draw(tmp_path / "images"), "--out", tmp_path / "data/own"]
    assert run_here(monkeypatch, prepare_captions.main, argv) == 0
    return tmp_path / "data/own"


def save_noise(path: Path, width: int, height: int) -> Image.Image:
    """Save an image that changes if it is turned, mirrored or has its colours swapped."""
    colours = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
    image.save(path, "PNG")
    return image


def write_rows(drawn: Path, *left_out: int) -> list[object]:
    """Write a TSV row for all but some images; return the options that read it."""
    rows = b"".join(tsv_row(key, key) for key in range(10) if key not in left_out)
    (drawn / "rows.tsv").write_bytes(rows)
    return ["--model", "tsv", "--tsv", drawn / "rows.tsv"]
