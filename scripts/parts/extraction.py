"""extraction.py — one split's features on their way: which rows are done, and where they are.

Kept apart from extract_regions.py, which makes them. They have other names until all are whole, and
a record says how far they came.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from common.errors import InputError, require
from common.files import (
    explain_os_errors,
    map_array,
    read_json,
    write_blocks,
    write_json,
    write_lines,
)
from common.layout import (
    CAPTIONS_PER_IMAGE,
    SplitName,
    boxes_file,
    check_named,
    count_images,
    extraction_file,
    ids_file,
    images_digest,
    read_captions,
    read_ids,
    split_files,
)
from scripts.parts.regions import REGIONS

COPIED_ROWS = 500  # at a time


class Extraction:
    """The files of a split's features, and the record of what is in them."""

    def __init__(
        self, folder: Path, split: SplitName, names: dict[str, str], overwrite: bool
    ) -> None:
        self.folder, self.split, self.names, self.overwrite = folder, split, names, overwrite
        self.record = extraction_file(folder, split)
        features, captions = split_files(folder, split)
        boxes, ids = boxes_file(folder, split), ids_file(folder, split)
        self.results = (features, boxes, captions, ids)
        self._end_renaming()
        self.captions = read_captions(captions)
        self.ids = read_ids(ids, count_images(captions, self.captions))
        check_named(ids, self.ids, names)
        self.arrays: list[np.memmap] = []
        self.state: dict[str, Any] = {}  # what the record holds

    def _partial(self, name: str) -> Path:
        return self.folder / f"{self.split}_{name}.npy.extracting"

    def _fresh(self, path: Path) -> Path:
        """Name of a result that is whole, while the others may not be."""
        return path.with_name(path.name + ".new")

    def _end_renaming(self) -> None:
        try:
            state = read_json(self.record, "a record") if self.record.exists() else {}
        except InputError:
            if not self.overwrite:
                raise
            state = {}
        if state.get("renaming"):
            self._rename(state)

    def _rename(self, state: dict[str, Any]) -> None:
        write_json(self.record, state | {"renaming": True})
        working = (self._partial("ims"), self._partial("boxes"), None, None)
        for path, rows in zip(self.results, working, strict=True):
            if self._fresh(path).exists():
                self._fresh(path).replace(path)
            elif rows is not None and rows.exists() and not state.get("left_out"):
                rows.replace(path)
            if rows is not None:
                rows.unlink(missing_ok=True)
        write_json(self.record, state | {"renaming": False, "complete": True})

    def begin(self, about: dict[str, Any], width: int) -> None:
        """Open the files where an earlier run left them, or new ones.

        `about` is what the rows depend on, `dtype` among it. Raises InputError where what is there
        is of another run, or damaged.
        """
        self.state = self._recorded(about | {"ids": images_digest(self.ids, self.names)})
        if self.complete:
            self._check_complete()
            return
        if not self.rows:
            for path in self.results:  # of a run before that was cut off at its end
                self._fresh(path).unlink(missing_ok=True)
        self.arrays = [
            self._array(self._partial("ims"), width, about["dtype"]),
            self._array(self._partial("boxes"), 4, "float32"),
        ]
        self.save()

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.state.get("complete", False)

    @property
    def rows(self) -> int:
        """How many rows are done, those that are left out included."""
        return self.state["rows"]

    @property
    def left_out(self) -> list[int]:
        """Rows that are none of the results'."""
        return sorted(set(self.state["left_out"]))

    def _recorded(self, about: dict[str, Any]) -> dict[str, Any]:
        """How far an earlier run came. Raises InputError where it is not this one's."""
        new = {"about": about, "rows": 0, "left_out": [], "complete": False}
        if self.overwrite:
            return new
        if not self.record.exists():
            there = [str(path) for path in self.results[:2] if path.exists()]
            require(not there, f"{', '.join(there)}: is there; --overwrite replaces it")
            return new
        old = read_json(self.record, "a record of what was extracted")
        known = old.get("about") if isinstance(old.get("about"), dict) else {}
        other = [key for key in about if known.get(key) != about[key]]
        message = f"{self.record}: begun with another {', '.join(other)}; --overwrite begins afresh"
        require(not other, message)
        left_out = old.get("left_out")
        rows = [old.get("rows"), *(left_out if isinstance(left_out, list) else [None])]
        fits = all(type(row) is int and 0 <= row <= len(self.ids) for row in rows)
        require(fits or old.get("complete") is True, f"{self.record}: is no record of rows done")
        return old

    def _check_complete(self) -> None:
        """Raise InputError where what the record says is there is not."""
        expected = f"{len(self.ids)} rows, by {self.record.name}; --overwrite makes them anew"
        for path in self.results[:2]:
            found = len(map_array(path, expected))
            require(found == len(self.ids), f"{path}: {found} rows; expected {expected}")

    def _array(self, path: Path, width: int, dtype: str) -> np.memmap:
        """A file of rows by memory map, its disk taken beforehand: a full one is an error."""
        shape = (len(self.ids), REGIONS, width)
        with explain_os_errors(path, "a file to write"):
            if self.rows:
                expected = f"the first {self.rows} rows; --overwrite begins afresh"
                require(not path.is_symlink(), f"{path}: is a link; expected {expected}")
                found = map_array(path, expected)  # whole: writing would fill up a short one
                fits = found.shape == shape and found.dtype == dtype
                message = f"{path}: shape {found.shape}, {found.dtype}; expected {expected}"
                require(fits, message)
                return open_memmap(path, mode="r+")
            path.unlink(missing_ok=True)
            array = open_memmap(path, mode="w+", dtype=dtype, shape=shape)
            with path.open("r+b") as file, suppress(AttributeError):  # macOS lacks it
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            return array

    def put(self, rows: Sequence[int], features: np.ndarray, boxes: np.ndarray) -> None:
        """Store features `[n, 36, width]` and boxes `[n, 36, 4]` of some rows.

        Raises InputError where the features are no numbers of their type.
        """
        with np.errstate(over="ignore"):
            for array, part in zip(self.arrays, (features, boxes), strict=True):
                array[rows] = part
        finite = np.isfinite(self.arrays[0][rows]).all()
        message = f"features of ids {self.ids[rows[0]]} to {self.ids[rows[-1]]}"
        require(bool(finite), f"{message} are no numbers of {self.arrays[0].dtype}")

    def leave_out(self, row: int) -> None:
        """Have a row, and its captions, be none of the results'."""
        self.state["left_out"].append(row)

    def advance(self, rows: int) -> None:
        """Note, not yet on disk, that the first `rows` are done."""
        self.state["rows"] = rows

    def save(self) -> None:
        """Write what was done to disk: a later run goes on from here."""
        for array in self.arrays:
            array.flush()
        left_out = [row for row in self.state["left_out"] if row < self.rows]
        write_json(self.record, self.state | {"left_out": left_out})

    def finish(self) -> None:
        """Give the results their names; those of captions and ids too, where rows are left out.

        Raises InputError where no row is left.
        """
        left_out = set(self.left_out)
        kept = [row for row in range(len(self.ids)) if row not in left_out]
        require(bool(kept), f"{self.results[3]}: none of its {len(self.ids)} pictures can be read")
        if left_out:
            self._write_kept(kept)
        self.arrays = []  # a file that is mapped keeps its disk, also where it has no name
        self._rename(self.state)
        self.state["complete"] = True

    def _write_kept(self, kept: Sequence[int]) -> None:
        """Write results of some rows alone."""
        for array, path in zip(self.arrays, self.results[:2], strict=True):
            shape = (len(kept), *array.shape[1:])
            write_blocks(self._fresh(path), shape, array.dtype, _blocks(array, kept))
        n = CAPTIONS_PER_IMAGE
        captions = [caption for row in kept for caption in self.captions[n * row : n * (row + 1)]]
        ids = [self.ids[row] for row in kept]
        for path, lines in zip(self.results[2:], (captions, ids), strict=True):
            write_lines(self._fresh(path), lines)
        self.state["about"]["ids"] = images_digest(ids, self.names)


def _blocks(array: np.ndarray, kept: Sequence[int]) -> Iterator[np.ndarray]:
    for first in range(0, len(kept), COPIED_ROWS):
        yield array[kept[first : first + COPIED_ROWS]]
