"""torch_files.py — files of tensors: torch's own, old and new, and safetensors (SPEC §10)."""

import argparse
import errno
import hashlib
import io
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from common.errors import InputError
from common.files import require_regular_file, write_bytes
from common.memory import is_oom

ZIP_START = b"PK\x03\x04"  # torch's format since 1.6; before, a file was a sequence of pickles
FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")  # how torch names what it refuses to import


class Damaged(InputError):
    """The file is truncated or changed, or was never of this kind."""


def read_torch(path: Path) -> Any:
    """Return the content of a torch file, on the CPU: plain data and tensors.

    No code in the file runs; a file that asks for code raises InputError, a damaged one Damaged.
    Files of torch before 1.6, which carry no checksums, and Python 2's strings are read, too.
    """
    # DEVIATION: nothing that a file holds is executed (the published code unpickled anything).
    with _explain_damage(path), torch.serialization.safe_globals([argparse.Namespace]):
        with path.open("rb") as file:
            zipped = file.read(len(ZIP_START)) == ZIP_START
        if zipped:  # torch does not compare the checksums
            with zipfile.ZipFile(path) as records:
                if broken := records.testzip():
                    raise ValueError(f"the checksum of its record {broken} differs")
        return torch.load(path, map_location="cpu", weights_only=True)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name. Raises Damaged."""
    with _explain_damage(path):
        return load_file(path)


@contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    """Turn every exception of a reader into an InputError that names the file."""
    require_regular_file(path, "a file of weights")
    try:
        yield
    except Exception as error:  # readers of damaged files fail in every way
        if is_oom(error):
            raise
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        # torch's further lines advise to run the file's code
        text = str(error).split("WeightsUnpickler error:")[-1].strip()
        if forbidden := FORBIDDEN.search(text):
            raise InputError(f"{path}: asks for code, {forbidden[1]}, which never runs") from error
        line = text.partition("\n")[0]
        reason = line if line and "weights_only" not in line else type(error).__name__
        raise Damaged(f"{path}: damaged, truncated or no checkpoint: {reason}") from error


def write_torch(path: Path, content: Any) -> None:
    """Write plain data and tensors, whole or not at all; `read_torch` reads them."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with buffer.getbuffer() as data:  # released, since a failure keeps it with its traceback
        write_bytes(path, data)


def write_safetensors(path: Path, arrays: dict[str, Tensor]) -> str:
    """Write tensors by name and return the file's SHA-256. Raises InputError."""
    data = safetensors_bytes({k: v.contiguous() for k, v in arrays.items()}, {"format": "pt"})
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()
