"""growing.py — a .npy file to which rows are appended, so that an interrupted run can resume it."""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from common.errors import InputError, require
from common.files import explain_os_errors, require_regular_file, write_bytes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class GrowingArray:
    """A .npy file that grows. Until `finish` its header says 0 rows."""

    path: Path
    shape: Shape  # of a row
    dtype: np.dtype

    def begin(self) -> None:
        """Write an empty file. Whoever reads an old one by memory map keeps it."""
        write_bytes(self.path, self._header(0))

    def resume(self, rows: int, record: Path) -> None:
        """Cut the file to `rows` rows, which drops a batch that was interrupted.

        `record` is the file that knows the number of rows. Raises InputError if there are fewer.
        """
        expected = f"{rows} rows, as {record.name} says; --overwrite begins again"
        size = len(self._header(0)) + rows * self._row_size
        is_whole = require_regular_file(self.path, expected) >= size
        require(is_whole, f"{self.path}: is cut off; expected {expected}")
        with explain_os_errors(self.path, "a file to write"):
            os.truncate(self.path, size)

    def append(self, rows: np.ndarray) -> None:
        """Append `[rows, *shape]`, and return once they are on the disk.

        Raises InputError if they hold NaN, or the disk is full.
        """
        if not np.isfinite(rows).all():
            with explain_os_errors(self.path, "a file to write"):
                done = (self.path.stat().st_size - len(self._header(0))) // self._row_size
            raise InputError(f"{self.path}: behind row {done}: NaN or infinite numbers")
        self._write(os.SEEK_END, np.ascontiguousarray(rows, self.dtype).data)

    def finish(self, rows: int) -> None:
        """Write the header, after which the file is an array of `rows` rows."""
        self._write(os.SEEK_SET, self._header(rows))

    @property
    def _row_size(self) -> int:
        return np.empty(self.shape, self.dtype).nbytes

    def _header(self, rows: int) -> bytes:
        """Return the header. numpy leaves space, so that it is as long for any number of rows."""
        file = io.BytesIO()
        descr = npy.dtype_to_descr(self.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (rows, *self.shape)}
        npy.write_array_header_1_0(file, header)
        return file.getvalue()

    def _write(self, whence: int, data: bytes | memoryview) -> None:
        with explain_os_errors(self.path, "a file to write"), self.path.open("r+b") as file:
            file.seek(0, whence)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
