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
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from options import InputError, require

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a system says where no more bytes fit
CHUNK = 2**24  # bytes hashed at a time
ZIP_START, ZIP_END = b"PK\x03\x04", b"PK\x05\x06"
ZIP_END_BYTES = 22
SEAL = re.compile(rb"sha256=([0-9a-f]{64})")  # the comment at the end of a sealed zip file
SEAL_BYTES = len("sha256=") + 64


@contextmanager
def naming(path: Path, wanted: str) -> Iterator[None]:
    """Turn what the system says of a file into an InputError that names it and what was wanted."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; expected {wanted}") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; expected {wanted}") from error


def read_text(path: Path, wanted: str) -> str:
    """A UTF-8 file. Raises InputError that names the file, and the line that is not UTF-8."""
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


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The arrays of a safetensors file by name. Raises InputError where it is not whole."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: no whole safetensors file: {error}") from error


def read_torch(path: Path) -> Any:
    """A torch file's plain data on the CPU; Python 2's strings are read too.

    Nothing is executed. Raises InputError where the file is damaged, asks for code, or claims more
    than it holds; a file that `write_torch` wrote is held to its checksum first.
    """
    with naming(path, "a file that torch wrote"):
        file = path.open("rb")
    # DEVIATION: nothing that a file holds is executed (the published code unpickled anything).
    with file, torch.serialization.safe_globals([argparse.Namespace]):
        try:
            _check_container(path, file)
            content = torch.load(file, map_location="cpu", weights_only=True)
            _check_tensors(path, content, path.stat().st_size)
        except InputError:
            raise
        except Exception as error:  # a damaged file can fail in any way; none of them is ours
            raise InputError(f"{path}: {_refusal(str(error) or type(error).__name__)}") from error
    return content


def _check_container(path: Path, file: IO[bytes]) -> None:
    """Raise an error where a zip file breaks its seal, or claims more bytes than it has."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(len(ZIP_START)) == ZIP_START:
        if has_checksum(path):
            _check_seal(path, file, size)
        with zipfile.ZipFile(file) as records:
            claimed = 0
            for record in records.infolist():
                plain = record.compress_type == zipfile.ZIP_STORED
                require(plain, f"{path}: {record.filename} is compressed; torch writes it plain")
                claimed += record.file_size
            require(claimed <= size, f"{path}: claims {claimed} bytes in a file of {size}")
    file.seek(0)


def has_checksum(path: Path) -> bool:
    """Whether a zip file carries a comment, which is the checksum that `write_torch` gave it."""
    with naming(path, "a file that torch wrote"), path.open("rb") as file:
        file.seek(-min(ZIP_END_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
        return not file.read().startswith(ZIP_END)


def _check_seal(path: Path, file: IO[bytes], size: int) -> None:
    """Raise InputError where what precedes a zip file's comment is not what the comment says."""
    before = size - SEAL_BYTES - 2  # two bytes give the length of the comment
    file.seek(max(0, before))
    length, seal = file.read(2), SEAL.fullmatch(file.read())
    digest = hashlib.sha256()
    file.seek(0)
    for start in range(0, before, CHUNK):
        digest.update(file.read(min(CHUNK, before - start)))
    digest.update(b"\0\0")  # the length of no comment, as torch wrote it
    fits = seal is not None and seal[1].decode() == digest.hexdigest()
    fits = fits and length == SEAL_BYTES.to_bytes(2, "little")
    require(fits, f"{path}: truncated or damaged: content and checksum do not fit")


def _check_tensors(path: Path, content: Any, size: int) -> None:
    """Raise InputError where an array is not plain, or larger than what the file holds of it."""
    held = {}
    for tensor in _tensors(content):
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
        require(dense and not tensor.is_quantized, f"{path}: holds no plain array of numbers")
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        claimed = tensor.numel() * tensor.element_size()
        require(
            claimed <= storage.nbytes() and sum(held.values()) <= size,
            f"{path}: claims an array of shape {list(tensor.shape)} in a file of {size} bytes",
        )


def _tensors(content: Any) -> Iterator[Tensor]:
    """Every tensor in plain data, each container opened once however it is nested."""
    seen: set[int] = set()
    todo = [content]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            todo += value
        elif isinstance(value, argparse.Namespace):
            todo.append(vars(value))


def _refusal(reason: str) -> str:
    """Torch's reason without its advice, which is to execute the file."""
    code = re.search(r"GLOBAL (\S+)", reason)
    if code:
        return f"asks for code, {code[1]}, which is not executed; expected plain data"
    detail = reason.split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
    advice = "weights_only" in detail
    return "truncated or no checkpoint" + ("" if advice else f": {detail}")


@contextmanager
def whole_file(path: Path, size: int, keep: Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write `size` bytes to that takes its name only once it is whole and on the disk.

    What had the name before is then found at `keep`, if one is given. Raises InputError where the
    folder cannot be written to, or is full; what had the name before stays.
    """
    partial = path.with_name(path.name + ".partial")
    with naming(path, "a file to write"):
        try:
            partial.unlink(missing_ok=True)
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                path.replace(keep)
            partial.replace(path)
            _sync(path.parent)
        except OSError as error:
            if error.errno in FULL:
                partial.unlink(missing_ok=True)
                free = shutil.disk_usage(path.parent).free
                message = f"{path}: {error.strerror}: {size} bytes are needed, {free} are free"
                raise InputError(message) from error
            raise
        finally:
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
    data = json.dumps(content, indent=1).encode() + b"\n"
    with whole_file(path, len(data)) as file:
        file.write(data)


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
