"""scripts/demo.sh and what it runs: drawn scenes, curves, example retrievals, the final table."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_here
from PIL import Image

from common.cli import parse
from common.layout import read_captions
from scripts import demo_table, draw_scenes, show_retrievals
from scripts.parts.experiments import REGISTRY, read_registry
from training.config import TrainConfig

SCENES = {"train": 12, "dev": 3, "test": 8}


def draw(monkeypatch: pytest.MonkeyPatch, out: Path) -> dict:
    """Draw a few scenes and return their JSON."""
    counts = [x for name, count in SCENES.items() for x in (f"--{name}", count)]
    assert run_here(monkeypatch, draw_scenes.main, ["--out", out, *counts]) == 0
    return json.loads((out / "dataset_scenes.json").read_text())


def test_scenes_are_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = (draw(monkeypatch, tmp_path / name) for name in "ab")
    assert first == again
    for entry in first["images"]:
        a, b = (tmp_path / name / "images" / entry["filename"] for name in "ab")
        assert a.read_bytes() == b.read_bytes()
        with Image.open(a) as image:
            assert image.size == (260, 260) and image.mode == "RGB"
    splits = [entry["split"] for entry in first["images"]]
    assert splits == ["train"] * 12 + ["val"] * 3 + ["test"] * 8


def test_five_captions_each_shared_by_no_two_images() -> None:
    scenes = list(draw_scenes.scenes(200, np.random.default_rng(0)))
    for _, shapes, captions in scenes:
        assert len(set(captions)) == 5
        for caption in captions:
            assert all(shape.colour in caption for shape in shapes)
            assert len(caption.split()) <= 28  # with marks and [CLS], [SEP] 32 WordPieces
    assert len({caption for *_, captions in scenes for caption in captions}) == 1000


def test_caption_states_the_relation_of_shapes() -> None:
    a = draw_scenes.Shape("star", "red", "big", 0, 0)
    b = draw_scenes.Shape("cross", "blue", "small", 0, 2)
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = draw_scenes.caption("white", (a, b), rng)
        first = "red" if text.index("red") < text.index("blue") else "blue"
        if text.endswith(" it") or " it " in text.replace(",", " "):
            first = "blue" if first == "red" else "red"  # `it` is named first
        assert ("left of" if first == "red" else "right of") in text
    assert draw_scenes.relation(b, a, rng) in draw_scenes.SYNONYMS["right"]


def test_colours_of_a_scene() -> None:
    shape = draw_scenes.Shape("circle", "red", "big", 1, 2)
    image = draw_scenes.draw("grey", [shape], np.random.default_rng(0))
    assert image.getpixel((217, 130)) == draw_scenes.COLOURS["red"]
    assert image.getpixel((43, 130)) == draw_scenes.GROUNDS["grey"]


@pytest.fixture
def retrieved(tmp_path: Path) -> list[object]:
    """Options of show_retrievals for three images, the last two of them mixed up."""
    (tmp_path / "images").mkdir()
    for k in range(3):
        Image.new("RGB", (30, 20), (80 * k, 0, 0)).save(tmp_path / f"images/{k}.png")
    captions = "".join(f"caption {k} costs 5$ or 6$\n" for k in range(15))
    (tmp_path / "test_caps.txt").write_text(captions)
    (tmp_path / "test_ids.txt").write_text("7\n8\n9\n")
    (tmp_path / "id_mapping.json").write_text('{"7": "0.png", "8": "1.png", "9": "2.png"}')
    scores = np.repeat(np.eye(3, dtype=np.float32)[[0, 2, 1]], 5, axis=1)
    np.save(tmp_path / "s.npy", scores)
    where = ["--scores", tmp_path / "s.npy", "--data", tmp_path, "--images", tmp_path / "images"]
    return [*where, "--out", tmp_path / "p.png"]


def test_retrievals_are_marked_right_or_wrong(
    retrieved: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_here(monkeypatch, show_retrievals.main, retrieved) == 0
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size[0] > 1000
    captions, files = read_captions(tmp_path / "test_caps.txt"), sorted(tmp_path.glob("images/*"))
    scores, owner = np.load(tmp_path / "s.npy"), np.arange(15) // 5
    above, below = show_retrievals.draw(scores, owner, captions, files).subfigs
    marks = [axes.get_xlabel() for axes in above.axes if axes.get_xlabel()]
    assert marks == ["right", "wrong", "wrong"] + 2 * ["wrong", "wrong", "right"]
    answers = below.axes[1::2]  # of each image
    texts = [[(text.get_text()[:16], text.get_color()) for text in axes.texts] for axes in answers]
    right, wrong = (show_retrievals.COLOUR[is_right] for is_right in (True, False))
    assert texts[0] == [(f"right: caption {k}", right) for k in range(5)]
    for number, first in ((1, 10), (2, 5)):  # the captions of the other one
        assert texts[number] == [(f"wrong: caption {first + k}"[:16], wrong) for k in range(5)]


def test_retrievals_refuse_other_scores_and_to_replace_an_image(
    retrieved: list[object], tmp_path: Path, monkeypatch, capsys
) -> None:
    image = tmp_path / "images/1.png"
    before = image.read_bytes()
    assert run_here(monkeypatch, show_retrievals.main, [*retrieved, "--out", image]) == 2
    assert "1.png" in capsys.readouterr().err and image.read_bytes() == before
    np.save(tmp_path / "s.npy", np.zeros((2, 10), np.float32))
    assert run_here(monkeypatch, show_retrievals.main, retrieved) == 2
    assert "s.npy: shape (2, 10)" in capsys.readouterr().err


def test_a_damaged_result_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "i2t.json").write_text("{}")
    assert run_here(monkeypatch, demo_table.main, [tmp_path]) == 2
    assert "i2t.json" in capsys.readouterr().err


def test_chance() -> None:
    """Against orders that were drawn at random."""
    rng = np.random.default_rng(0)
    best = np.array([min(rng.permutation(500)[:5]) for _ in range(4000)])
    found = demo_table.chance(100)
    for value, k in zip(found[:3], (1, 5, 10), strict=True):
        assert value == pytest.approx(100 * (best < k).mean(), abs=1.5)
    assert found[3:] == [1, 5, 10] and round(sum(found)) == 32


def demo(out: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run demo.sh on a few scenes, without installing anything."""
    sizes = {name.upper(): count for name, count in SCENES.items()} | {"STEPS": 2, "BATCH": 4}
    given = sizes | {"OUT": out, "LEAST": 0, "DIME_PYTHON": sys.executable} | settings
    environment = os.environ | {name: str(value) for name, value in given.items()}
    command = ["bash", ROOT / "scripts/demo.sh"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_demo_trains_with_the_options_of_the_registry(tmp_path: Path) -> None:
    """All options but the folders; a recorder stands in for Python."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/record"\n')
    python.chmod(0o755)
    defaults = dict.fromkeys(("TRAIN", "DEV", "TEST", "STEPS", "BATCH", "LEAST"), "")
    done = demo(tmp_path / "demo", DIME_PYTHON=python, **defaults)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "record").read_text().splitlines()
    recorded = [line.split()[1:] for line in lines if line.startswith("train.py ")]
    folders = dict.fromkeys(("data_path", "bert_path", "logger_name"), "elsewhere")
    runs, _ = read_registry(REGISTRY)
    for argv, direction in zip(recorded, ("i2t", "t2i"), strict=True):
        command = runs[f"demo_{direction}"].train_command(0)[1:]
        ours, wanted = (replace(parse(TrainConfig, a, ""), **folders) for a in (argv, command))
        assert ours == wanted


@pytest.mark.slow  # a dozen programs, each of which imports torch
def test_a_short_demonstration(tmp_path: Path) -> None:
    """All of demo.sh but its installation: run, run again, and refused with other settings."""
    out = tmp_path / "demo"
    first = demo(out)
    assert first.returncode == 0, first.stderr
    assert "| ensemble |" in first.stdout
    assert first.stdout.count("scene_000") == 5 and "serve --index" in first.stdout
    for name in ("curves.png", "retrievals.png", "i2t/model_best.pth.tar"):
        assert (out / name).stat().st_size > 0
    results = json.loads((out / "demo.json").read_text())
    assert results["images"] == 8 and results["rows"].keys() == {"chance", "i2t", "t2i", "ensemble"}
    weights = (out / "i2t/checkpoint.pth.tar").read_bytes()
    second = demo(out, LEAST=601)
    assert second.returncode == 2 and "601" in second.stderr
    assert (out / "i2t/checkpoint.pth.tar").read_bytes() == weights
    third = demo(out, STEPS=3)
    assert third.returncode == 2 and "delete it" in third.stderr
