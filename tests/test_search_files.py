"""scripts.search: interrupted and resumed, FAISS, bad input."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, save_noise
from PIL import Image
from searching import (
    SENTENCES,
    Searching,
    model_of,
    options_of,
    save_backbone,
    searching,
    write_world,
)

from common.errors import InputError
from scripts.parts import search_build
from scripts.parts.growing import GrowingArray
from scripts.parts.search_files import Part, Record, digest_of
from scripts.parts.search_models import SearchModels
from scripts.search import Index

QUERY = "a man in red"


@pytest.fixture(scope="module")
def _world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Searching:
    return searching(monkeypatch, capsys)


@pytest.fixture
def world(_world: Path, tmp_path: Path) -> Path:
    """A copy of the models, images and sentences."""
    return Path(shutil.copytree(_world, tmp_path / "world"))


@pytest.fixture
def built(_world: Path, world: Path, run: Searching) -> Path:
    """An index of the images and of sentences, with a first stage."""
    once = _world.with_name("index")
    if not once.exists():
        run(*options_of(_world), *full(_world), "--out", once)
    return Path(shutil.copytree(once, world / "index"))


def full(world: Path) -> list[object]:
    first = model_of(world, "encoders")
    return ["--first_stage", first, "--captions", world / "sentences.txt"]


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def open_once(patch: pytest.MonkeyPatch) -> None:
    """Open the models of all runs that follow only once."""
    known: dict[str, object] = {}

    def remember(name: str, real: Callable) -> Callable:
        return lambda *args: known.setdefault(name, real(*args) if name not in known else None)

    for owner, name in ((SearchModels, "open"), (search_build, "choose_backbone")):
        patch.setattr(owner, name, remember(name, getattr(owner, name)))


# Interrupted and resumed


def test_interrupted_and_resumed(
    world: Path, run: Searching, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at every write, an index has the same files in the end."""
    open_once(monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(search_build, "SENTENCES", 5)
    out = world / "index"
    how = [*options_of(world), *full(world), "--batch_size", 6, "--out", out]
    run(*how)
    whole = contents(out)

    class Killed(BaseException):
        pass

    def stop_at(call: int, patch: pytest.MonkeyPatch) -> None:
        calls = itertools.count()

        def counted(real: Callable) -> Callable:
            def called(*args: object) -> object:
                if next(calls) == call:
                    raise Killed
                return real(*args)

            return called

        for owner, name in ((GrowingArray, "_write"), (Path, "replace")):
            patch.setattr(owner, name, counted(getattr(owner, name)))

    for call in range(200):
        shutil.rmtree(out)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            stop_at(call, patch)
            run(*how)
            break
        run(*how)
        assert contents(out) == whole, call
    assert 40 < call < 199 and contents(out) == whole


def test_killed_and_resumed(world: Path, run: Searching, tmp_path: Path) -> None:
    """SIGKILL in the middle; what a query says then finishes the index."""
    for i in range(100, 150):
        save_noise(world / f"images/{i}.png", 300, 200)
    out = world / "index"
    argv = list(map(str, [*options_of(world), "--out", out]))
    program = subprocess.Popen([sys.executable, "-m", "scripts.search", *argv], cwd=ROOT)
    while program.poll() is None:
        with contextlib.suppress(OSError, InputError):
            images = Record.read(out).images
            if images and images["done"] >= 6:
                program.kill()
                break
        time.sleep(0.001)
    assert program.wait() == -signal.SIGKILL
    done = Record.read(out).rows("images")
    assert 0 < done < 60
    error = run("query", "--index", out, QUERY, status=2)
    assert f"{done} images" in error
    run(*error.split("scripts.search ")[1].split())
    run(*options_of(world), "--out", world / "whole")
    killed, whole = contents(out), contents(world / "whole")
    for files in (killed, whole):
        files.pop("index.json")  # its command names the folder
    assert killed == whole


def test_a_complete_index_is_checked_and_left(built: Path, run: Searching, world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*.npy")}
    how = [*options_of(world), *full(world), "--out", built]
    assert "10 images" in run(*how) and "9 sentences" in run(*how)
    assert before == {path: path.stat().st_mtime_ns for path in built.rglob("*.npy")}
    os.truncate(built / "images/boxes.npy", 500)
    assert "boxes.npy" in run(*how, status=2)
    run(*how, "--overwrite")
    assert len(Index.open(built).images(QUERY)) == 10


def test_other_options_or_files_are_refused(built: Path, run: Searching, world: Path) -> None:
    how = [*options_of(world), *full(world), "--out", built]
    for option, value in {"--dtype": "float32", "--batch_size": 4}.items():
        assert option in run(*how, option, value, status=2)
    assert "--first_stage" in run(*how[: how.index("--first_stage")], "--out", built, status=2)
    path = world / "sentences.txt"
    path.write_text("\n".join(SENTENCES[1:]))
    assert "--captions" in run(*how, status=2)
    path.write_text("\n".join(SENTENCES))
    (world / "images/3.png").unlink()
    error = run(*how, status=2)
    assert "--images" in error and "--overwrite" in error
    assert len(Index.open(built).names) == 10
    assert "9 images" in run(*how, "--overwrite")


def test_a_folder_of_others_is_not_written_to(world: Path, run: Searching) -> None:
    before = contents(world)
    for more in ([], ["--overwrite"]):
        error = run(*options_of(world), "--out", world, *more, status=2)
        assert "--out" in error and "encoders" in error
    assert contents(world) == before


def test_an_index_that_is_replaced_leaves_other_files(
    built: Path, run: Searching, world: Path
) -> None:
    mine = built / "images/mine.png"
    save_noise(mine, 20, 20)
    run(*options_of(world), "--out", built, "--overwrite")
    left = {path.name for path in (built / "images").iterdir()}
    arrays = {f"{name}_{i}.npy" for name in ("tokens", "pooled") for i in (0, 1)}
    assert left == {"mine.png", "names.json", "boxes.npy", *arrays}
    assert "--overwrite" not in Record.read(built).command


# Images


def test_a_broken_image_is_named_and_left_out(world: Path, run: Searching) -> None:
    (world / "images/2.png").write_bytes(b"no image")
    save_noise(world / "images/1.png", 1, 1)
    save_noise(world / "images/sub.png", 20, 20)
    how = [*options_of(world), "--out", world / "index"]
    error = run(*how, status=2)
    assert "1.png" in error and "--skip_broken" in error
    printed = run(*how, "--skip_broken")
    assert "9 images" in printed and "2 left out" in printed
    index = Index.open(world / "index")
    assert set(index.names) == {f"{i}.png" for i in range(10) if i not in (1, 2)} | {"sub.png"}
    assert len(np.load(world / "index/images/boxes.npy")) == 9
    assert {hit.name for hit in index.images(QUERY)} == set(index.names)
    for path in (world / "images").iterdir():
        path.write_bytes(b"no image")
    error = run(*how, "--skip_broken", "--overwrite", status=2)
    assert "images" in error and "11" in error


# Backbones


def test_the_backbone_is_that_of_the_training_data(world: Path, run: Searching) -> None:
    how = [*options_of(world), "--out", world / "index"]
    assert "--backbone" in run(*how, "--backbone", "efficientnet_lite2", status=2)
    plain = [option for option in how if option not in ("--weights", world / "vit")]
    assert "--weights" in run(*plain, status=2)
    save_backbone(world / "vit")  # with other weights
    error = run(*how, status=2)
    assert "weights" in error and "model_best.pth.tar" in error


def test_a_query_by_image_needs_the_backbone(built: Path, run: Searching, world: Path) -> None:
    """Queries by text do not."""
    image = ["--image", world / "images/1.png"]
    record = json.loads((built / "index.json").read_text())
    assert run("query", "--index", built, *image)
    vit = Path(record["places"]["weights"])
    vit.rename(vit.with_name("away"))
    try:
        assert str(vit) in run("query", "--index", built, *image, status=2)
        assert run("query", "--index", built, QUERY)
        save_backbone(vit)  # with other weights
        assert "another weights" in run("query", "--index", built, *image, status=2)
        shutil.rmtree(vit)
    finally:
        vit.with_name("away").rename(vit)


# FAISS


def test_an_index_with_faiss(built: Path, run: Searching, world: Path) -> None:
    """Another factory string makes the FAISS index anew, and nothing else."""
    pytest.importorskip("faiss")
    how = [*options_of(world), *full(world), "--out", built]
    before = (built / "images/tokens_0.npy").stat().st_mtime_ns
    plain = Index.open(built).images(QUERY, rerank=3)
    for factory in ("Flat", "IVF2,Flat", "PCA4,Flat"):
        run(*how, "--faiss", factory)
        answer = Index.open(built).images(QUERY, rerank=3)
        assert answer.candidates == 3 and len(answer) == 10
        if factory == "Flat":
            assert [hit.row for hit in answer] == [hit.row for hit in plain]
    assert (built / "images/tokens_0.npy").stat().st_mtime_ns == before
    for factory in ("Flt", "IVF4096,PQ2", "PQ3"):
        error = run(*how, "--faiss", factory, status=2)
        assert f"--faiss {factory}" in error and len(error.splitlines()) == 1
    path = built / "images/vectors.faiss"
    run(*how, "--faiss", "Flat")
    path.write_bytes(path.read_bytes()[:-1])
    assert "vectors.faiss" in run("query", "--index", built, QUERY, status=2)
    run(*how, "--faiss", "Flat")
    assert run("query", "--index", built, QUERY)
    run(*how)
    assert run("query", "--index", built, QUERY)


def test_faiss_is_asked_for_by_name(
    built: Path, run: Searching, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    how = [*options_of(world), *full(world), "--out", built, "--faiss", "Flat"]
    assert "pip install -r requirements-search.txt" in run(*how, status=2)
    assert "--first_stage" in run(*options_of(world), "--out", built, "--faiss", "Flat", status=2)


# Bad input


def test_a_damaged_index_is_refused(
    built: Path, run: Searching, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of it, cut off, changed or missing."""
    open_once(monkeypatch)
    for path in sorted(built.rglob("*.*")):
        data = path.read_bytes()
        cut, other = data[:-2], data.replace(b"1", b"2", 1)
        damaged = [cut, b"", None] + [other] * (path.suffix == ".json")
        for content in damaged:
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            error = run("query", "--index", built, QUERY, status=2)
            assert path.name in error
            path.write_bytes(data)
    assert run("query", "--index", built, QUERY)


def test_numbers_that_are_none_are_named(built: Path) -> None:
    for name in ("vectors", "tokens_1", "pooled_0"):
        path = built / f"images/{name}.npy"
        data = path.read_bytes()
        path.write_bytes(data[:-4] + np.float32([np.nan]).tobytes())
        with pytest.raises(InputError, match=path.name):
            Index.open(built).images(QUERY)
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "value"),
    {"images": {"done": 3}, "about": {}, "faiss": "Flat", "complete": 1, "more": 1}.items(),
)
def test_a_record_of_another_shape_is_refused(built: Path, name: str, value: object) -> None:
    """Whose SHA-256 fits."""
    path = built / "index.json"
    content = json.loads(path.read_text())
    rest = {key: content[key] for key in content if key not in ("format", "sha256")}
    rest[name] = value
    path.write_text(json.dumps(rest | {"format": content["format"], "sha256": digest_of(rest)}))
    with pytest.raises(InputError, match=r"index\.json"):
        Record.read(built)


def test_names_are_as_many_as_the_record_says(built: Path) -> None:
    digest = Record.read(built).about["images"]
    for done in (9, 11):
        with pytest.raises(InputError, match=r"names\.json"):
            Part(built / "images", {}).names(digest, {"done": done, "left_out": []})


def test_models_that_were_changed_or_moved(built: Path, run: Searching, tmp_path: Path) -> None:
    path = built / "index.json"
    record = Record.read(built)
    places = record.places | {"model_path": [str(tmp_path / "a"), str(tmp_path / "b")]}
    moved = Record(**{**vars(record), "places": places})
    moved.write(built)
    i2t, t2i = map(Path, record.places["model_path"])
    assert str(tmp_path / "a") in run("query", "--index", built, QUERY, status=2)
    where = ["query", "--index", built, QUERY, "--model_path"]
    assert run(*where, t2i, i2t)  # in any order
    first = Path(record.places["first_stage"])
    assert run(*where, t2i, first, i2t)
    other = shutil.copy(i2t, tmp_path / "other.pth.tar")
    with other.open("ab") as file:
        file.write(b"0")
    error = run(*where, other, status=2)
    assert str(other) in error and "--model_path" in error
    for name in ("a", "b"):
        shutil.copy(t2i, tmp_path / name)
    assert str(tmp_path / "a") in run("query", "--index", built, QUERY, status=2)
    assert path.exists()


def test_another_bert_is_refused(built: Path, run: Searching, tmp_path: Path) -> None:
    where = ["query", "--index", built, QUERY, "--bert_path"]
    assert run(*where, GOLDEN / "i2t/bert")
    assert "none" in run(*where, tmp_path / "none", status=2)
    assert "BERT" in run(*where, GOLDEN / "t2i/bert", status=2)


def test_queries_that_are_refused(built: Path, run: Searching, tmp_path: Path) -> None:
    where = ["query", "--index", built]
    assert "♞♞" in run(*where, "♞♞", status=2)
    for option, value in {"--top": 0, "--rerank": -1, "--json": tmp_path / "no/a.json"}.items():
        assert option.strip("-") in run(*where, QUERY, option, value, status=2)
    save_noise(tmp_path / "dot.png", 1, 1)
    (tmp_path / "text.png").write_text("text")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "wide.png")
    for name in ("dot.png", "wide.png", "text.png", "none.png"):
        assert name in run(*where, "--image", tmp_path / name, status=2)


def test_an_index_without_sentences_answers_no_image(world: Path, run: Searching) -> None:
    run(*options_of(world), "--out", world / "index")
    image = world / "images/1.png"
    assert "--captions" in run("query", "--index", world / "index", "--image", image, status=2)
