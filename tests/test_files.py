"""files.py: files appear whole or not at all; what is no text, JSON or array is refused."""

import os
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from common.files import atomic_write, check_writable, read_json, read_text, write_array, write_json


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError), atomic_write(path, 4) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"before"
    with atomic_write(path, 5) as file:
        file.write(b"after")
        file.flush()
        assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"after"


def test_what_had_the_name_before_is_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    path, kept = tmp_path / "file", tmp_path / "kept"
    for number in range(3):
        with atomic_write(path, 1, kept) as file:
            file.write(b"%d" % number)
    assert (kept.read_bytes(), path.read_bytes()) == (b"1", b"2")
    with pytest.raises(RuntimeError), atomic_write(path, 1, kept):
        raise RuntimeError
    assert (kept.read_bytes(), path.read_bytes()) == (b"1", b"2")


def test_nothing_is_written_through_a_link_that_lies_in_wait(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    (tmp_path / "run/file.partial").symlink_to(outside)
    write_json(tmp_path / "run/file", {"a": 1})
    assert outside.read_bytes() == b"mine"
    assert read_json(tmp_path / "run/file", "it") == {"a": 1}


def test_a_folder_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="file: not found; expected a file to write"),
        atomic_write(tmp_path / "no/file", 0),
    ):
        pass


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system itself refuses to write more bytes to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("write", [write_json, check_writable])
def test_pipes_and_devices_are_not_replaced_by_files(tmp_path: Path, write) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(InputError, match=f"{name}: is a pipe or a device"):
            write(tmp_path / name, *([{}] if write is write_json else []))
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_an_output_costs_no_other_file(tmp_path: Path) -> None:
    """Neither an input, by whatever way it is named, nor what a link leads to."""
    (tmp_path / "input").write_text("precious")
    (tmp_path / "way").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to("input")
    (tmp_path / "nowhere").symlink_to("new")
    for path, taken in ((tmp_path / "way/input", "input"), (tmp_path / "in", "in.partial")):
        with pytest.raises(InputError, match="is an input or another output"):
            check_writable(path, [tmp_path / taken])
    for name in ("link", "nowhere"):
        with pytest.raises(InputError, match=f"{name}: is a link; expected a file to write"):
            check_writable(tmp_path / name)
    check_writable(tmp_path / "way/new", [tmp_path / "input"])
    assert (tmp_path / "input").read_text() == "precious" and not (tmp_path / "new").exists()


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("a\0b", "a\ud800b"):
        with pytest.raises(InputError, match=r"expected a text"):
            read_text(tmp_path / name, "a text")


def test_a_text_beyond_all_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.files.LONGEST_TEXT", 9)
    (tmp_path / "x").write_text("0123456789")
    with pytest.raises(InputError, match="x: 10 bytes; expected words, 9 at most"):
        read_text(tmp_path / "x", "words")


def test_arrays_are_written_as_numpy_writes_them(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((5, 7), dtype=np.float32)
    for given in (array, array.T):
        write_array(tmp_path / "x.npy", given)
        np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), given)
    with largest_file(100), pytest.raises(InputError, match="268 bytes are needed"):
        write_array(tmp_path / "x.npy", array)


# JSON and safetensors


@pytest.mark.parametrize("text", ["{", "[" * 10**5, "[]", "3", '{"a": 1e', "", "\ufeff{}"])
def test_json_that_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"x\.json: (not JSON|expected a JSON object)"):
        read_json(tmp_path / "x.json", "sizes")
