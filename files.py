"""files.py — files in and out (SPEC §10): what comes in is never executed and checked before it is
believed, what goes out appears whole or not at all.

Kept apart from checkpoint.py and data.py, which say what their files mean, because every reader of
strangers' files and every writer goes through these few functions.
"""

import argparse
import errno
import hashlib
import io
import json
import math
import mmap
import os
import re
import shutil
import stat
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from memory import out_of_memory
from options import InputError, require
from pickles import CodeAsked, check_pickle

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a system says where no more bytes fit
LONGEST_TEXT = 2**28  # bytes; the captions of MSCOCO are a tenth of it
CHUNK = 2**24  # bytes hashed at a time
ZIP_START, ZIP_END, ZIP_END_BYTES = b"PK\x03\x04", b"PK\x05\x06", 22
LOCATOR, LOCATOR_BYTES, END_64_BYTES = b"PK\x06\x07", 20, 56
SEAL = re.compile(rb"sha256=([0-9a-f]{64})")  # the comment at the end of a sealed zip file
SEAL_BYTES = len("sha256=") + 64
OLD_PICKLES = 5  # of torch's format before it was a zip file
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8),
}


class Damaged(InputError):
    """A file that is not what was written."""


@contextmanager
def naming(path: Path, wanted: str) -> Iterator[None]:
    """Turn what the system says of a file into an InputError that names it and what was wanted."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; expected {wanted}") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; expected {wanted}") from error


def size_of(path: Path, wanted: str) -> int:
    """Bytes of a file. Raises InputError where it is none: a folder, a pipe, a device."""
    with naming(path, wanted):
        try:
            found = path.stat()
        except ValueError as error:  # a name that no file can have
            raise InputError(f"{path}: {error}; expected {wanted}") from error
    require(not stat.S_ISDIR(found.st_mode), f"{path}: Is a directory; expected {wanted}")
    require(stat.S_ISREG(found.st_mode), f"{path}: is a pipe or a device; expected {wanted}")
    return found.st_size


def read_text(path: Path, wanted: str) -> str:
    """A UTF-8 file. Raises InputError that names the file, and the line that is not UTF-8."""
    size = size_of(path, wanted)
    require(
        size <= LONGEST_TEXT, f"{path}: {size} bytes; expected {wanted}, {LONGEST_TEXT} at most"
    )
    with naming(path, wanted):
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
    size = size_of(path, wanted)
    try:
        with naming(path, wanted):
            _check_array(path, size)
            return npy.open_memmap(path, mode="r")
    except InputError:
        raise
    except Exception as error:  # numpy's reader of headers can fail in any way
        if out_of_memory(error):
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


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The arrays of a safetensors file by name. Raises InputError where it is not whole."""
    size_of(path, "a safetensors file")
    try:
        arrays = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: no whole safetensors file: {error}") from error
    for name, value in arrays.items():
        require(value.dtype in DTYPES, f"{path}: {name} is {value.dtype}; expected plain numbers")
    return arrays


def read_torch(path: Path) -> Any:
    """A torch file's content on the CPU: numbers, texts and arrays in lists and dictionaries.

    Nothing is executed; Python 2's strings are read too. Raises InputError where the file asks for
    code, and Damaged where it is not whole or claims more than it holds; one that `write_torch`
    wrote is held to its checksum first.
    """
    size = size_of(path, "a file that torch wrote")
    with naming(path, "a file that torch wrote"):
        file = path.open("rb")
    # DEVIATION: nothing that a file holds is executed (the published code unpickled anything).
    with file, torch.serialization.safe_globals([argparse.Namespace]):
        try:
            _check_container(file, size)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
            return _Plain(size).of(content)
        except CodeAsked as error:
            reason = f"asks for code, {error}, which is not executed; expected plain data"
            raise InputError(f"{path}: {reason}") from error
        except Exception as error:  # a damaged file can fail in any way; none of them is ours
            if out_of_memory(error):
                raise
            if isinstance(error, OSError) and error.errno:  # the disk, not what is on it
                raise InputError(f"{path}: cannot be read: {error.strerror}") from error
            raise Damaged(f"{path}: truncated or no checkpoint: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why, in a line: torch's words without its advice, which is to execute the file."""
    text = str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__
    line = text.splitlines()[0]
    return type(error).__name__ if "weights_only" in line else line


def _check_container(file: IO[bytes], size: int) -> None:
    """Raise ValueError where a file claims more than it has, or breaks its seal."""
    start = file.read(len(ZIP_START))
    file.seek(0)
    if start != ZIP_START:
        # by memory map: a file's own read would take the memory that a text claims
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for _ in range(OLD_PICKLES):
                check_pickle(data, size)
        return
    sealed = not _ends_plainly(file)
    if sealed:
        _check_seal(file, size)
    _check_end(file, size - ZIP_END_BYTES - SEAL_BYTES * sealed)
    with zipfile.ZipFile(file) as records:
        listed = records.infolist()
        names = {record.filename for record in listed}
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(names) < len(listed) or len({name.split("/")[0] for name in names}) != 1:
            raise ValueError("its records have no names of their own")
        if any(record.compress_type != zipfile.ZIP_STORED for record in listed):
            raise ValueError("its records are compressed; torch writes them plain")
        if sum(record.file_size for record in listed) > size or len(pickles) != 1:
            raise ValueError(f"its records are more than a file of {size} bytes holds")
        claimed = check_pickle(io.BytesIO(records.read(pickles[0])), size)
        sizes = {record.filename: record.file_size for record in listed}
        root = pickles[0].removesuffix("data.pkl")
        if any(sizes.get(f"{root}data/{key}") != held for key, held in claimed.items()):
            raise ValueError("claims numbers that its records do not hold")


def _check_end(file: IO[bytes], end: int) -> None:
    """Raise ValueError unless a zip file's list of records stands right before its end record.

    Python would look for it there, torch where the end record says.
    """
    file.seek(end)
    *_, length, offset, _ = struct.unpack("<4s4H2LH", file.read(ZIP_END_BYTES))
    file.seek(max(0, end - LOCATOR_BYTES))
    mark, _, at, _ = struct.unpack("<4sLQL", file.read(LOCATOR_BYTES))
    if mark == LOCATOR:  # a second end record for files beyond 4 GB
        end -= LOCATOR_BYTES + END_64_BYTES
        file.seek(max(0, end))
        *_, length, offset = struct.unpack("<4sQ2H2L4Q", file.read(END_64_BYTES))
        if at != end:
            raise ValueError("its end records are not where they should be")
    if offset + length != end:
        raise ValueError("its list of records is not where it should be")


def _ends_plainly(file: IO[bytes]) -> bool:
    """Whether a zip file ends as torch leaves it, without the comment that a seal is."""
    file.seek(-min(ZIP_END_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
    return file.read().startswith(ZIP_END)


def has_checksum(path: Path) -> bool:
    """Whether `write_torch` wrote a file."""
    with naming(path, "a file that torch wrote"), path.open("rb") as file:
        return not _ends_plainly(file)


def _check_seal(file: IO[bytes], size: int) -> None:
    """Raise ValueError where what precedes a zip file's comment is not what the comment says."""
    before = size - SEAL_BYTES - 2  # two bytes give the length of the comment
    file.seek(max(0, before))
    length, seal = file.read(2), SEAL.fullmatch(file.read())
    digest = hashlib.sha256()
    file.seek(0)
    for start in range(0, before, CHUNK):
        digest.update(file.read(min(CHUNK, before - start)))
    digest.update(b"\0\0")  # the length of no comment, as torch wrote it
    fits = seal is not None and seal[1].decode() == digest.hexdigest()
    if not (fits and length == SEAL_BYTES.to_bytes(2, "little")):
        raise ValueError("content and checksum do not fit")


class _Plain:
    """Turns what torch made into plain data, for a file of `size` bytes.

    Dictionaries lose their attributes and parameters their gradients; what is shared stays shared.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.done: dict[int, Any] = {}
        self.storages: set[int] = set()
        self.held = 0  # bytes of all of them

    def of(self, value: Any) -> Any:
        """Raises ValueError where an array is not plain, or larger than what the file holds."""
        if id(value) in self.done:
            return self.done[id(value)]
        if isinstance(value, dict):
            new = self.done[id(value)] = {}
            new.update((key, self.of(v)) for key, v in dict.items(value))
        elif isinstance(value, list):
            new = self.done[id(value)] = []
            new.extend(map(self.of, value))
        elif isinstance(value, tuple):
            new = tuple(map(self.of, value))
        elif isinstance(value, argparse.Namespace):
            new = self.done[id(value)] = argparse.Namespace()
            vars(new).update(self.of(vars(value)))
        else:
            new = self.array(value) if isinstance(value, Tensor) else value
        self.done[id(value)] = new
        return new

    def array(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.storages:
            self.storages.add(storage.data_ptr())
            self.held += storage.nbytes()
        fits = tensor.numel() * tensor.element_size() <= storage.nbytes()
        if not fits or self.held > self.size or tensor.dtype not in DTYPES:
            shape = list(tensor.shape)
            raise ValueError(f"claims an array of shape {shape} in a file of {self.size} bytes")
        return tensor.detach()


@contextmanager
def whole_file(path: Path, size: int, keep: Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write `size` bytes to that takes its name only once it is whole and on the disk.

    What had the name before is then found at `keep`, if one is given. Raises InputError where the
    folder cannot be written to, or is full; what had the name before stays.
    """
    partial = beside(path)
    with naming(path, "a file to write"):
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


def beside(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(path.name + ".partial")


def check_writable(path: Path) -> None:
    """Raise InputError where `whole_file` could not write a file of that name."""
    with naming(path, "a file to write"):
        _begin(path, beside(path))
        beside(path).open("xb").close()
        beside(path).unlink()


def check_new_folder(option: str, folder: Path) -> None:
    """Raise InputError unless a folder is empty, or not there yet."""
    with naming(folder, "a new or empty folder"):
        free = not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))
    require(free, f"{option} {folder}: is no new or empty folder")


def _begin(path: Path, partial: Path) -> None:
    """Make room for a file; what is none, a pipe or a device, is left alone."""
    if os.path.exists(path):
        size_of(path, "a file to write")
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
    with whole_file(path, len(data)) as file:
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
    with whole_file(path, header.tell() + math.prod(shape) * dtype.itemsize) as file:
        file.write(header.getvalue())
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)


def write_torch(path: Path, content: Any, keep: Path | None = None) -> None:
    """Write plain data with a checksum; it loads with `torch.load(..., weights_only=True)`.

    The checksum is the zip file's comment: SHA-256 of the file without it. What had the name
    before is then found at `keep`, if one is given. Raises InputError where that cannot be done.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with buffer.getbuffer() as data:
        seal = b"sha256=" + hashlib.sha256(data).hexdigest().encode()
        with whole_file(path, len(data) + len(seal), keep) as file:
            file.write(data[:-2])
            file.write(len(seal).to_bytes(2, "little") + seal)


def write_old_torch(path: Path, content: Any) -> None:
    """Write plain data in torch's format before 1.6, which the published code reads.

    It has no room for a checksum. Raises InputError where that cannot be done.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    write_bytes(path, buffer.getbuffer())


def write_safetensors(path: Path, arrays: dict[str, Tensor]) -> str:
    """Write arrays by name; the SHA-256 of the file. Raises InputError where it cannot be done."""
    data = safetensors_bytes({k: v.contiguous() for k, v in arrays.items()}, {"format": "pt"})
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file. Raises InputError where it cannot be read."""
    size_of(path, "a file")
    digest = hashlib.sha256()
    with naming(path, "a file"), path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
