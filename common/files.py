"""files.py — files in and out (SPEC §10): what comes in is never executed and checked before it is
believed, what goes out appears whole or not at all.

Texts, JSON and arrays of numbers; torch's own files are in torchfiles.py. Kept apart from the rooms
that say what their files mean, because every reader of strangers' files and every writer goes
through these few functions.
"""

import errno
import hashlib
import io
import json
import math
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from common.errors import InputError, require
from common.memory import is_oom

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a system says where no more bytes fit
LONGEST_TEXT = 2**28  # bytes; the captions of MSCOCO are a tenth of it
CHUNK = 2**24  # bytes hashed at a time
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


@contextmanager
def explain_os_errors(path: Path, wanted: str) -> Iterator[None]:
    """Turn what the system says of a file into an InputError that names it and what was wanted."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; expected {wanted}") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; expected {wanted}") from error


def require_regular_file(path: Path, wanted: str) -> int:
    """Bytes of a file. Raises InputError where it is none: a folder, a pipe, a device."""
    with explain_os_errors(path, wanted):
        try:
            found = path.stat()
        except ValueError as error:  # a name that no file can have
            raise InputError(f"{path}: {error}; expected {wanted}") from error
    require(not stat.S_ISDIR(found.st_mode), f"{path}: Is a directory; expected {wanted}")
    require(stat.S_ISREG(found.st_mode), f"{path}: is a pipe or a device; expected {wanted}")
    return found.st_size


def read_text(path: Path, wanted: str) -> str:
    """A UTF-8 file. Raises InputError that names the file, and the line that is not UTF-8."""
    size = require_regular_file(path, wanted)
    require(
        size <= LONGEST_TEXT, f"{path}: {size} bytes; expected {wanted}, {LONGEST_TEXT} at most"
    )
    with explain_os_errors(path, wanted):
        data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line} is not UTF-8") from error


def read_json(path: Path, wanted: str) -> dict[str, Any]:
    """A JSON object. Raises InputError that names the file."""
    text = read_text(path, wanted)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}; expected {wanted}") from error
    require(isinstance(content, dict), f"{path}: expected a JSON object, {wanted}")
    return content


def map_array(path: Path, wanted: str) -> np.memmap:
    """A .npy file by memory map. Raises InputError where it is none, or not whole."""
    size = require_regular_file(path, wanted)
    try:
        with explain_os_errors(path, wanted):
            _check_array(path, size)
            return npy.open_memmap(path, mode="r")
    except InputError:
        raise
    except Exception as error:  # numpy's reader of headers can fail in any way
        if is_oom(error):
            raise
        raise InputError(f"{path}: no whole .npy array of numbers: {error}") from error


def _check_array(path: Path, size: int) -> None:
    """Raise ValueError where a .npy file's header says that it is longer than the file."""
    with path.open("rb") as file:
        version = npy.read_magic(file)
        length = int.from_bytes(file.read(2 if version == (1, 0) else 4), "little")
        if length > size:
            raise ValueError(f"its header claims {length} bytes")
        if version in HEADERS:  # later ones name fields, which no plain array has
            file.seek(npy.MAGIC_LEN)
            shape, _, dtype = HEADERS[version](file)
            wanted = file.tell() + math.prod(shape) * dtype.itemsize
            if wanted > size and not dtype.hasobject:
                raise ValueError(f"its header asks for {wanted} bytes, the file has {size}")


@contextmanager
def atomic_write(path: Path, size: int, keep: Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write `size` bytes to that takes its name only once it is whole and on the disk.

    What had the name before is then found at `keep`, if one is given. Raises InputError where the
    folder cannot be written to, or is full; what had the name before stays.
    """
    partial = partial_path(path)
    with explain_os_errors(path, "a file to write"):
        try:
            _begin(path, partial)
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and os.path.lexists(path):
                path.replace(keep)
            partial.replace(path)
            _sync(path.parent)
        except OSError as error:
            if error.errno in FULL:
                partial.unlink(missing_ok=True)  # before the free bytes are counted
                free = shutil.disk_usage(path.parent).free
                message = f"{path}: {error.strerror}: {size} bytes are needed, {free} are free"
                raise InputError(message) from error
            raise
        finally:
            partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(path.name + ".partial")


def check_writable(path: Path, taken: Iterable[str | Path] = ()) -> None:
    """Raise InputError where a user's output could not be written, or would cost another file.

    Those are the `taken` ones, inputs and other outputs, and what a link of that name leads to.
    """
    places = {os.path.realpath(place) for place in (path, partial_path(path))}
    free = places.isdisjoint(os.path.realpath(other) for other in taken)
    require(free, f"{path}: is an input or another output; expected a file of its own")
    with explain_os_errors(path, "a file to write"):
        _begin(path, partial_path(path))
        require(not path.is_symlink(), f"{path}: is a link; expected a file to write")
        partial_path(path).open("xb").close()
        partial_path(path).unlink()


def check_new_folder(option: str, folder: Path) -> None:
    """Raise InputError unless a folder is empty, or not there yet."""
    with explain_os_errors(folder, "a new or empty folder"):
        free = not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))
    require(free, f"{option} {folder}: is no new or empty folder")


def _begin(path: Path, partial: Path) -> None:
    """Make room for a file; what is none, a pipe or a device, is left alone."""
    if os.path.exists(path):
        require_regular_file(path, "a file to write")
    partial.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Have the folder's names on the disk, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Write plain data as JSON. Raises InputError where that cannot be done."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file. Raises InputError where that cannot be done."""
    write_bytes(path, text.encode())


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a UTF-8 file, one line each. Raises InputError where that cannot be done."""
    write_text(path, "\n".join(lines) + "\n")


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file, whole or not at all. Raises InputError where that cannot be done."""
    with atomic_write(path, len(data)) as file:
        file.write(data)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file. Raises InputError where that cannot be done."""
    write_blocks(path, array.shape, array.dtype, [array])


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a .npz file of arrays by name. Raises InputError where that cannot be done."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getbuffer())


def write_blocks(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterable[np.ndarray]
) -> None:
    """Write a .npy file from consecutive blocks of its rows. Raises InputError like write_array."""
    header = io.BytesIO()
    about = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(header, about)
    with atomic_write(path, header.tell() + math.prod(shape) * dtype.itemsize) as file:
        file.write(header.getvalue())
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file. Raises InputError where it cannot be read."""
    require_regular_file(path, "a file")
    digest = hashlib.sha256()
    with explain_os_errors(path, "a file"), path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
