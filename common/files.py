"""files.py — texts, JSON and arrays: checked when read, atomic when written (SPEC §10).

Every reader of a stranger's file and every writer goes through these functions. They know nothing
of the content. Files of torch and safetensors are in torch_files.py.
"""

import codecs
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from common.errors import InputError, require
from common.memory import is_oom

LONGEST_TEXT = 2**28  # bytes; the captions of MSCOCO are a tenth of it
CHUNK = 2**24  # bytes read at a time


@contextmanager
def explain_os_errors(path: Path, wanted: str) -> Iterator[None]:
    """Turn an OSError into an InputError that names the file and what was expected."""
    try:
        yield
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        reason = "not found" if is_missing else error.strerror or error
        raise InputError(f"{path}: {reason}; expected {wanted}") from error


def require_regular_file(path: Path, wanted: str) -> int:
    """Return the size of a file in bytes. Raises InputError for a folder, a pipe or a device."""
    with explain_os_errors(path, wanted):
        try:
            info = path.stat()
        except ValueError as error:  # a name with a NUL character or half a surrogate pair
            raise InputError(f"{path}: {error}; expected {wanted}") from error
    # opening a pipe would wait forever
    kind = "Is a directory" if stat.S_ISDIR(info.st_mode) else "is a pipe or a device"
    require(stat.S_ISREG(info.st_mode), f"{path}: {kind}; expected {wanted}")
    return info.st_size


# Reading


def read_text(path: Path, wanted: str) -> str:
    """Return the content of a UTF-8 file, without a byte order mark at its start.

    Raises InputError with the first line that is not UTF-8.
    """
    size = require_regular_file(path, wanted)
    require(size <= LONGEST_TEXT, f"{path}: {size} bytes; expected at most {LONGEST_TEXT}")
    with explain_os_errors(path, wanted):
        data = path.read_bytes()
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    require(not is_utf16, f"{path}: is UTF-16; expected UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)  # as editors of Windows write it
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line} is not UTF-8") from error


def read_json(path: Path, wanted: str) -> dict[str, Any]:
    """Return the JSON object of a file. Raises InputError that names the file."""
    text = read_text(path, wanted)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}; expected {wanted}") from error
    require(isinstance(content, dict), f"{path}: expected a JSON object, {wanted}")
    return content


def map_array(path: Path, wanted: str) -> np.memmap:
    """Open a .npy file as a memory map. Raises InputError if it is damaged, cut off or no array."""
    require_regular_file(path, wanted)
    try:
        with explain_os_errors(path, wanted):
            return npy.open_memmap(path, mode="r")
    except InputError:
        raise
    except Exception as error:  # numpy's parser of headers raises errors of many types
        if is_oom(error):
            raise
        raise InputError(f"{path}: not a complete .npy array of numbers: {error}") from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    require_regular_file(path, "a file")
    digest = hashlib.sha256()
    with explain_os_errors(path, "a file"), path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


# Writing. All functions raise InputError if the disk or the folder does not take the file.


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that replaces `path` only once it is complete and on the disk.

    If writing fails or the program is killed, the old file stays.
    """
    partial = partial_path(path)
    with explain_os_errors(path, "a file to write"):
        try:
            _clear_way(path)
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            _sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Return the name of a file while it is being written."""
    return path.with_name(path.name + ".partial")


def _clear_way(path: Path) -> None:
    """Remove an incomplete earlier file. Raises InputError if `path` is a pipe, a folder, ..."""
    if os.path.exists(path):
        require_regular_file(path, "a file to write")
    partial_path(path).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have a renaming survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: Path, taken: Iterable[str | Path] = ()) -> None:
    """Raise InputError if `path` cannot be written or is one of `taken` (inputs, other outputs).

    Programs call it for each output before they start long work.
    """
    names = {os.path.realpath(name) for name in (path, partial_path(path))}
    is_free = names.isdisjoint(os.path.realpath(other) for other in taken)
    require(is_free, f"{path}: is an input or another output; expected a file of its own")
    with explain_os_errors(path, "a file to write"):
        _clear_way(path)
        require(not path.is_symlink(), f"{path}: is a link; expected a file to write")
        partial_path(path).open("xb").close()
        partial_path(path).unlink()


def check_new_folder(option: str, folder: Path) -> None:
    """Raise InputError if `folder` exists and is not an empty folder."""
    with explain_os_errors(folder, "a new or empty folder"):
        is_free = not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))
    require(is_free, f"{option} {folder}: is not a new or empty folder")


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file."""
    with atomic_write(path) as file:
        file.write(data)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file."""
    write_bytes(path, f"{json.dumps(content, indent=1)}\n".encode())


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file."""
    write_bytes(path, text.encode())


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a UTF-8 file, each of `lines` on its line."""
    write_text(path, "\n".join(lines) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file."""
    write_blocks(path, array.shape, array.dtype, [array])


def write_blocks(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterable[np.ndarray]
) -> None:
    """Write a .npy file of `shape` from consecutive blocks of its rows."""
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with atomic_write(path) as file:
        npy.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)
