"""files.py: files appear complete or not at all; bad texts, JSON and arrays are refused."""

import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from common.files import atomic_write, check_writable, read_json, read_text, write_array, write_json
from common.layout import read_lines


def test_file_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"before"
    with atomic_write(path) as file:
        file.write(b"after")
        file.flush()
        assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"after"


def test_waiting_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    (tmp_path / "run/file.partial").symlink_to(outside)
    write_json(tmp_path / "run/file", {"a": 1})
    assert outside.read_bytes() == b"mine"
    assert read_json(tmp_path / "run/file", "it") == {"a": 1}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Have the system refuse to write more than `size` bytes to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("write", [lambda path: write_json(path, {}), check_writable])
def test_pipes_are_not_replaced(tmp_path: Path, write: Callable[[Path], None]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(InputError, match=f"{name}: is a pipe"):
            write(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_output_does_not_replace_an_input_or_the_target_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "input").write_text("precious")
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to("input")
    (tmp_path / "nowhere").symlink_to("new")
    for path, taken in ((tmp_path / "folder/input", "input"), (tmp_path / "in", "in.partial")):
        with pytest.raises(InputError, match="input or another output"):
            check_writable(path, [tmp_path / taken])
    for name in ("link", "nowhere"):
        with pytest.raises(InputError, match=f"{name}: is a link"):
            check_writable(tmp_path / name)
    check_writable(tmp_path / "folder/new", [tmp_path / "input"])
    assert (tmp_path / "input").read_text() == "precious" and not (tmp_path / "new").exists()


def test_text_that_is_too_long_or_has_an_impossible_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("common.files.LONGEST_TEXT", 9)
    (tmp_path / "x").write_text("0123456789")
    for name in ("x", "a\0b", "a\ud800b", "no/x"):
        with pytest.raises(InputError):
            read_text(tmp_path / name, "words")


def test_a_byte_order_mark_is_taken_off(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes('{"\ufeffä": 1}\n'.encode("utf-8-sig"))
    assert read_json(path, "it") == {"\ufeffä": 1}  # a later one is a character
    assert read_text(path, "it")[0] == "{" and read_lines(path, "it")[0][0] == "{"
    path.write_bytes(b"\xef\xbb\xbfa\n\xff")
    with pytest.raises(InputError, match="x: line 2 is not UTF-8"):
        read_text(path, "it")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_refused_by_name(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes("\ufeffa dog\n".encode(encoding))
    with pytest.raises(InputError, match="x: is UTF-16; expected UTF-8"):
        read_text(tmp_path / "x", "captions")


def test_arrays_are_written_as_numpy_writes_them(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((5, 7), dtype=np.float32)
    for given in (array, array.T):
        write_array(tmp_path / "x.npy", given)
        np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), given)
    with largest_file(100), pytest.raises(InputError, match=r"x\.npy: File too large"):
        write_array(tmp_path / "x.npy", array)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), array.T)


@pytest.mark.parametrize("text", ["{", "[" * 10**5, "[]", "3", '{"a": 1e', ""])
def test_invalid_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"x\.json: "):
        read_json(tmp_path / "x.json", "sizes")
