"""extract_regions.py: interrupted and resumed, images left out, options."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, tsv_row, write_rows

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


def test_killed_and_resumed(tmp_path: Path) -> None:
    """The program, killed whenever its record has grown, writes the same files."""
    count = 60
    rows = tmp_path / "rows.tsv"
    rows.write_bytes(b"".join(tsv_row(key, key) for key in range(count) if key % 7))
    for folder in (tmp_path / "killed", tmp_path / "whole"):
        folder.mkdir()
        (folder / "train_caps.txt").write_text("a man\n" * 5 * count)
        (folder / "train_ids.txt").write_text("".join(f"{key}\n" for key in range(count)))
        names = {str(key): f"{key}.png" for key in range(count)}
        (folder / "id_mapping.json").write_text(json.dumps(names))

    def start(folder: Path) -> subprocess.Popen:
        argv = ["--data", folder, "--model", "tsv", "--tsv", rows, "--skip_broken", "--workers", 0]
        argv += ["--batch_size", 20]
        program = [sys.executable, "-m", "scripts.extract_regions", *map(str, argv)]
        return subprocess.Popen(program, cwd=ROOT, stderr=subprocess.DEVNULL)

    def rows_done(record: Path) -> int:
        return json.loads(record.read_text())["rows"] if record.exists() else 0

    assert start(tmp_path / "whole").wait() == 0
    record, kills = tmp_path / "killed/train_regions.json", []
    while True:
        done, program = rows_done(record), start(tmp_path / "killed")
        while program.poll() is None and rows_done(record) == done:
            time.sleep(0.001)
        program.kill()
        if program.wait() == 0:
            break
        kills.append(rows_done(record))
    assert len(kills) > 1 and 0 < kills[0] < kills[-1]
    for name in ("killed", "whole"):
        (tmp_path / name / LOCK).unlink()  # names the process
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


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
