"""extract_regions.py: interrupted and resumed, images left out, options."""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import run_program, write_rows

from common.lock import LOCK, only_writer
from scripts.parts.tsv import Tsv


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_interrupted_and_resumed(
    drawn: Path, extract: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in every batch and at every renaming, a run writes the same files."""
    how, before = [*write_rows(drawn, 5), "--skip_broken"], drawn.with_name("before")
    shutil.copytree(drawn, before)
    extract(*how)
    whole = contents(drawn)

    class Killed(BaseException):
        pass

    def stop_at(call: int, patch: pytest.MonkeyPatch) -> None:
        """Kill the run at this call of one of the two functions."""
        calls = itertools.count()

        def counted(real: Callable) -> Callable:
            def run(*args: object) -> object:
                if next(calls) == call:
                    raise Killed
                return real(*args)

            return run

        for owner, name in ((Tsv, "encode"), (Path, "replace")):
            patch.setattr(owner, name, counted(getattr(owner, name)))

    for call in range(60):
        shutil.rmtree(drawn)
        shutil.copytree(before, drawn)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            stop_at(call, patch)
            extract(*how)
            break
        extract(*how)
        assert contents(drawn) == whole, call
    assert 20 < call < 59 and contents(drawn) == whole  # the last run was not interrupted


def test_ctrl_c_keeps_whole_batches_and_other_options_are_refused(
    drawn: Path, extract: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    how, read = write_rows(drawn), Tsv.read

    def interrupt(source: Tsv, key: str) -> object:
        if key == "2":
            raise KeyboardInterrupt  # as of Ctrl-C
        return read(source, key)

    with monkeypatch.context() as patch:
        patch.setattr(Tsv, "read", interrupt)
        extract(*how, status=130)
    record = json.loads((drawn / "train_regions.json").read_text())
    assert record["rows"] == 2 and not record["complete"]
    assert "batch_size" in extract(*how, "--batch_size", 3, status=2)  # the last bits depend on it
    extract(*how)


def test_other_or_damaged_rows_are_not_resumed(drawn: Path, extract: Callable[..., str]) -> None:
    how, ids = write_rows(drawn, 6), drawn / "train_ids.txt"
    extract(*how, status=2)  # ids 0 1 2 5 are done, 6 has no row
    before = ids.read_text()
    ids.write_text("".join(reversed(before.splitlines(keepends=True))))
    assert "another ids" in extract(*how, status=2)
    ids.write_text(before)
    write_rows(drawn)
    assert "another weights" in extract(*how, status=2)
    write_rows(drawn, 6)
    path = drawn / "train_ims.npy.new"
    os.truncate(path, path.stat().st_size - 1)
    assert str(path) in extract(*how, status=2)
    path.unlink()
    assert str(path) in extract(*how, status=2)
    (drawn / "train_regions.json").write_text("{}")
    extract(*write_rows(drawn), "--overwrite")


def test_complete_features_are_checked(drawn: Path, extract: Callable[..., str]) -> None:
    how = write_rows(drawn)
    extract(*how)
    extract(*how)
    (drawn / "dev_boxes.npy").unlink()
    assert "dev_boxes.npy" in extract(*how, status=2)
    np.save(drawn / "dev_boxes.npy", np.zeros((1, 36, 4), "f4"))
    assert "dev_boxes.npy: 1 rows" in extract(*how, status=2)
    extract(*how, "--overwrite")
    (drawn / "dev_regions.json").write_text("{")
    assert "dev_regions.json" in extract(*how, status=2)


def test_only_one_run_writes(drawn: Path) -> None:
    with only_writer(drawn / LOCK):
        other = run_program("scripts/extract_regions.py", "--data", drawn, *write_rows(drawn))
    assert other.returncode == 2 and f"process {os.getpid()}" in other.stderr


def test_features_of_others_are_not_overwritten(drawn: Path, extract: Callable[..., str]) -> None:
    (drawn / "train_ims.npy").write_bytes(b"theirs")
    error = extract(*write_rows(drawn), status=2)
    assert "train_ims.npy" in error and "--overwrite" in error
    assert (drawn / "train_ims.npy").read_bytes() == b"theirs"


def test_options_that_do_not_fit_the_model(extract: Callable[..., str]) -> None:
    images = ["--images", "y"]
    for argv in (["efficientnet_lite2", *images, "--weights", "w"], ["fasterrcnn", *images]):
        assert "--weights" in extract("--model", *argv, status=2)
