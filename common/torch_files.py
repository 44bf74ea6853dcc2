"""torchfiles.py — files of tensors: torch's own, old and new, and safetensors (SPEC §10).

Kept apart from files.py because a torch file is a pickle, which could ask for anything: what comes
in is checked before torch is let at it, what goes out carries its checksum. What the files mean is
checkpoint.py's and bert.py's.
"""

import argparse
import hashlib
import io
import mmap
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from common.errors import InputError, require
from common.files import CHUNK, atomic_write, explain_os_errors, require_regular_file, write_bytes
from common.memory import is_oom
from common.pickles import CodeAsked, check_pickle

ZIP_START, ZIP_END, ZIP_END_BYTES = b"PK\x03\x04", b"PK\x05\x06", 22
LOCATOR, LOCATOR_BYTES, END_64_BYTES = b"PK\x06\x07", 20, 56
SEAL = re.compile(rb"sha256=([0-9a-f]{64})")  # the comment at the end of a sealed zip file
SEAL_BYTES = len("sha256=") + 64
OLD_PICKLES = 5  # of torch's format before it was a zip file
DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8),
}


class Damaged(InputError):
    """A file that is not what was written."""


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The arrays of a safetensors file by name. Raises InputError where it is not whole."""
    require_regular_file(path, "a safetensors file")
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
    size = require_regular_file(path, "a file that torch wrote")
    with explain_os_errors(path, "a file that torch wrote"):
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
            if is_oom(error):
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
    with explain_os_errors(path, "a file that torch wrote"), path.open("rb") as file:
        return file.read(len(ZIP_START)) == ZIP_START and not _ends_plainly(file)


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


def write_torch(path: Path, content: Any, keep: Path | None = None) -> None:
    """Write plain data with a checksum; it loads with `torch.load(..., weights_only=True)`.

    The checksum is the zip file's comment: SHA-256 of the file without it. What had the name
    before is then found at `keep`, if one is given. Raises InputError where that cannot be done.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with buffer.getbuffer() as data:
        seal = b"sha256=" + hashlib.sha256(data).hexdigest().encode()
        with atomic_write(path, keep) as file:
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
