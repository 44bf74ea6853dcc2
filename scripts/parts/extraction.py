"""extraction.py — the growing files of a split's features, which an interrupted run can resume."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import require
from common.files import map_array, read_json, write_json, write_lines
from common.layout import (
    SplitName,
    boxes_file,
    check_named,
    extraction_file,
    ids_file,
    images_digest,
    read_captions,
    read_groups,
    read_ids,
    split_files,
)
from scripts.parts.growing import GrowingArray

DTYPE = np.dtype("float32")  # of features and boxes


class Extraction:
    """The growing files of a split's features, and the record of how many images are done.

    Rows are appended to {split}_ims.npy.new and, if there are boxes, {split}_boxes.npy.new. When
    all are done, the files get their names; if images are left out, so do new files of the others'
    captions and ids.
    """

    def __init__(self, folder: Path, split: SplitName, names: dict[str, str]) -> None:
        self.split, self.names = split, names
        self.record = extraction_file(folder, split)
        features, captions = split_files(folder, split)
        ids = ids_file(folder, split)
        self.arrays, self.texts = (features, boxes_file(folder, split)), (captions, ids)
        self.files: list[GrowingArray] = []
        self.state: dict[str, Any] = {}
        if self.record.exists():
            self.state = read_json(self.record, "a record of what was extracted")
        if self.state.get("renaming"):
            self._rename()  # before captions and ids are read: they may be of two extractions
        self.captions = read_captions(captions)
        self.groups = read_groups(folder, split, len(self.captions))
        self.ids = read_ids(ids, self.groups.images)
        check_named(ids, self.ids, names)

    @property
    def complete(self) -> bool:
        return self.state.get("complete", False)

    @property
    def done(self) -> int:
        """Number of images that are done, left out ones included."""
        return self.state["rows"]

    def begin(
        self, about: dict[str, Any], shapes: Sequence[tuple[int, int]], overwrite: bool
    ) -> None:
        """Begin new files, or check and resume those of an earlier run.

        `about` is all that the rows depend on. `shapes` are those of an image's features and, if
        there are any, boxes. Raises InputError if the files are of another run, or damaged.
        """
        pairs = zip(map(_new, self.arrays), shapes, strict=False)
        self.files = [GrowingArray(path, shape, DTYPE) for path, shape in pairs]
        about = about | {"ids": images_digest(self.ids, self.names), "files": len(self.files)}
        if overwrite or not self.state:
            there = [str(path) for path in self.arrays if path.exists()]
            problem = f"{', '.join(there)}: is there already; --overwrite replaces it"
            require(overwrite or not there, problem)
            for path in self.texts:
                _new(path).unlink(missing_ok=True)
            for file in self.files:
                file.begin()
            self.state = {"about": about, "rows": 0, "left_out": [], "complete": False}
            write_json(self.record, self.state)
        self._check_record(about)
        if self.complete:
            return
        rows = self.done - len(self.state["left_out"])
        for file in self.files:
            file.resume(rows, self.record)

    def _check_record(self, about: dict[str, Any]) -> None:
        """Raise InputError if the record or complete features are of another run, or damaged."""
        old = self.state.get("about")
        changed = [k for k in about if not isinstance(old, dict) or old.get(k) != about[k]]
        problem = f"{self.record}: was begun with another {', '.join(changed)}"
        require(not changed, f"{problem}; --overwrite begins again")
        if self.complete:
            expected = f"{len(self.ids)} rows, as {self.record.name} says; --overwrite makes them"
            for path in self.arrays[: len(self.files)]:
                count = len(map_array(path, expected))
                require(count == len(self.ids), f"{path}: {count} rows; expected {expected}")
            return
        rows: Any = self.state.get("rows")
        left_out: Any = self.state.get("left_out")
        is_whole = type(rows) is int and 0 <= rows <= len(self.ids) and isinstance(left_out, list)
        is_whole = is_whole and left_out == [row for row in range(rows) if row in left_out]
        require(is_whole, f"{self.record}: is damaged; --overwrite begins again")

    def put(self, count: int, arrays: Sequence[np.ndarray], left_out: Sequence[int]) -> None:
        """Append the next `count` images, and save how many are done.

        `arrays` are features `[n, regions, width]`, and boxes `[n, regions, 4]` if there are any,
        of those that are not `left_out`, or nothing if all are. Raises InputError if they hold NaN,
        or the disk is full.
        """
        for file, values in zip(self.files, arrays, strict=bool(arrays)):
            file.append(values)
        self.state["rows"] += count
        self.state["left_out"] += left_out
        write_json(self.record, self.state)

    def finish(self) -> list[str]:
        """Give the files their names, and return the ids that are left out.

        Raises InputError if all are.
        """
        left_out = set(self.state["left_out"])
        kept = [row for row in range(len(self.ids)) if row not in left_out]
        require(bool(kept), f"{self.texts[1]}: none of its {len(self.ids)} images can be read")
        for file in self.files:
            file.finish(len(kept))
        if left_out:
            of_kept = self.groups.captions_of(np.array(kept))
            rows = kept if self.groups.is_five else self.groups.image_of_caption[of_kept]
            captions, ids = self.texts
            write_lines(_new(captions), [self.captions[caption] for caption in of_kept])
            write_lines(_new(ids), [self.ids[row] for row in rows])
            self.state["about"]["ids"] = images_digest([self.ids[row] for row in kept], self.names)
        self._rename()
        return [self.ids[row] for row in sorted(left_out)]

    def _rename(self) -> None:
        """Give the files their names. If the run is killed here, the next one does it."""
        write_json(self.record, self.state | {"renaming": True})
        for path in (*self.arrays, *self.texts):
            if _new(path).exists():
                _new(path).replace(path)
        about = self.state.get("about")
        if isinstance(about, dict) and about.get("files") == 1:
            self.arrays[1].unlink(missing_ok=True)  # boxes of the features that were replaced
        self.state |= {"renaming": False, "complete": True}
        write_json(self.record, self.state)


def _new(path: Path) -> Path:
    return path.with_name(path.name + ".new")
