"""extract_regions.py: interrupted and resumed, images left out, options."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_rows

from common.lock import LOCK
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

    real_encode, real_replace = Tsv.encode, Path.replace
    for calls in range(60):
        shutil.rmtree(drawn)
        shutil.copytree(before, drawn)
        left = [calls]

        def counted(real: Callable, left: list[int] = left) -> Callable:
            def run(*args: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return real(*args)

            return run

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Tsv, "encode", counted(real_encode))
            patch.setattr(Path, "replace", counted(real_replace))
            extract(*how)
            raise Killed
        extract(*how)
        assert contents(drawn) == whole, calls
    assert left[0] >= 0  # the last one was not interrupted


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


def test_only_one_run_writes(drawn: Path, extract: Callable[..., str]) -> None:
    how = write_rows(drawn)
    hold = "import sys; from pathlib import Path; from common.lock import only_writer\n"
    hold += "with only_writer(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, drawn / LOCK]
    with subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert f"process {other.pid}" in extract(*how, status=2)
        other.stdin.close()
    extract(*how)


def test_features_of_others_are_not_overwritten(drawn: Path, extract: Callable[..., str]) -> None:
    (drawn / "train_ims.npy").write_bytes(b"theirs")
    error = extract(*write_rows(drawn), status=2)
    assert "train_ims.npy" in error and "--overwrite" in error
    assert (drawn / "train_ims.npy").read_bytes() == b"theirs"


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (["efficientnet_lite2", "--images", "y", "--weights", "w"], "--weights"),
        (["fasterrcnn", "--images", "y"], "--weights"),
    ],
)
def test_options_that_do_not_fit_the_model(
    extract: Callable[..., str], argv: list[str], option: str
) -> None:
    assert option in extract("--model", *argv, status=2)
