"""extract_regions.py — 36 region features and boxes an image, in the order of the ids.

    python -m scripts.extract_regions --images photos --data data/own --model efficientnet_lite2
    python -m scripts.extract_regions --images photos --data data/own --model fasterrcnn --weights W
    python -m scripts.extract_regions --tsv trainval.tsv --data data/coco --model tsv

Reads {split}_ids.txt and id_mapping.json of the folder that prepare_captions wrote. Writes
{split}_ims.npy (images, 36, width) and {split}_boxes.npy (images, 36, 4), x1 y1 x2 y2 in pixels of
the upright image, and a record, {split}_regions.json. If a run is interrupted, the same command
without --overwrite resumes it and writes the same bytes as an uninterrupted run.
"""

import io
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
from numpy.lib import format as npy

from common.cli import parse, pick_device, print_line, progress, run
from common.config import LARGEST
from common.errors import InputError, check_range, require, summarise
from common.files import (
    explain_os_errors,
    map_array,
    read_json,
    require_regular_file,
    write_bytes,
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
    read_names,
    split_files,
)
from common.lock import LOCK, only_writer
from scripts.parts.images import REGIONS, find_images

if TYPE_CHECKING:
    from scripts.parts.regions import Source

log = logging.getLogger(__name__)

DTYPE = np.dtype("float32")  # of features and boxes
OPTIONS_OF = {
    "fasterrcnn": ("images", "weights"),
    "efficientnet_lite2": ("images",),
    "tsv": ("tsv",),
}


@dataclass(frozen=True)
class Options:
    data: Annotated[str, "folder that prepare_captions wrote, DATA_PATH/DATA_NAME"]
    model: Annotated[Literal["fasterrcnn", "efficientnet_lite2", "tsv"], "source of the features"]
    images: Annotated[str, "folder of the images"] = ""
    weights: Annotated[str, "fasterrcnn: weights, a local .pth or .safetensors"] = ""
    tsv: Annotated[list[str] | None, "tsv: TSV files of bottom-up attention"] = None
    tsv_key: Annotated[
        Literal["id", "name"], "tsv: image_id is the id, or the file's name without its ending"
    ] = "id"
    batch_size: Annotated[int, "images at a time"] = 16
    workers: Annotated[int, "processes that read images; 0 reads in the program itself"] = 2
    device: Annotated[str, "auto, cpu, cuda, cuda:1, ..."] = "auto"
    skip_broken: Annotated[bool, "leave out images that cannot be read, with their captions"] = (
        False
    )
    overwrite: Annotated[bool, "replace features that are there"] = False

    def __post_init__(self) -> None:
        check_range(self, ("batch_size",), 1, LARGEST)
        check_range(self, ("workers",), 0, LARGEST)
        for name in ("images", "weights", "tsv"):
            is_used, is_given = name in OPTIONS_OF[self.model], bool(getattr(self, name))
            require(is_given or not is_used, f"--model {self.model}: expected --{name}")
            require(is_used or not is_given, f"--{name}: --model {self.model} does not use it")


class Extraction:
    """The growing files of a split's features, and the record of how many images are done.

    Rows are appended to {split}_ims.npy.new and {split}_boxes.npy.new. When all are done, the files
    get their names; if images are left out, so do new files of the others' captions and ids.
    """

    def __init__(self, folder: Path, split: SplitName, names: dict[str, str]) -> None:
        self.split, self.names = split, names
        self.record = extraction_file(folder, split)
        features, captions = split_files(folder, split)
        ids = ids_file(folder, split)
        self.arrays, self.texts = (features, boxes_file(folder, split)), (captions, ids)
        self.files: dict[Path, tuple[int, int]] = {}  # shape of a row
        self.state: dict[str, Any] = {}
        if self.record.exists():
            self.state = read_json(self.record, "a record of what was extracted")
        if self.state.get("renaming"):
            self._rename()  # before captions and ids are read: they may be of two extractions
        self.captions = read_captions(captions)
        self.ids = read_ids(ids, count_images(captions, self.captions))
        check_named(ids, self.ids, names)

    @property
    def complete(self) -> bool:
        return self.state.get("complete", False)

    @property
    def done(self) -> int:
        """Number of images that are done, left out ones included."""
        return self.state["rows"]

    def begin(self, about: dict[str, Any], width: int, overwrite: bool) -> None:
        """Begin new files, or check and resume those of an earlier run.

        `about` is all that the rows depend on. Raises InputError if the files are of another run,
        or damaged.
        """
        about = about | {"ids": images_digest(self.ids, self.names)}
        features, boxes = self.arrays
        self.files = {_new(features): (REGIONS, width), _new(boxes): (REGIONS, 4)}
        if overwrite or not self.state:
            there = [str(path) for path in self.arrays if path.exists()]
            problem = f"{', '.join(there)}: is there already; --overwrite replaces it"
            require(overwrite or not there, problem)
            for path in self.texts:
                _new(path).unlink(missing_ok=True)
            for path, shape in self.files.items():
                write_bytes(path, _header(0, shape))
            self.state = {"about": about, "rows": 0, "left_out": [], "complete": False}
            write_json(self.record, self.state)
        self._check_record(about)
        if self.complete:
            return
        rows = self.done - len(self.state["left_out"])
        for path, shape in self.files.items():
            size = len(_header(0, shape)) + rows * np.empty(shape, DTYPE).nbytes
            expected = f"{rows} rows, as {self.record.name} says; --overwrite begins again"
            is_whole = require_regular_file(path, expected) >= size
            require(is_whole, f"{path}: is cut off; expected {expected}")
            with explain_os_errors(path, "a file to write"):
                os.truncate(path, size)  # drops a batch that was interrupted

    def _check_record(self, about: dict[str, Any]) -> None:
        """Raise InputError if the record or complete features are of another run, or damaged."""
        old = self.state.get("about")
        changed = [k for k in about if not isinstance(old, dict) or old.get(k) != about[k]]
        problem = f"{self.record}: was begun with another {', '.join(changed)}"
        require(not changed, f"{problem}; --overwrite begins again")
        if self.complete:
            expected = f"{len(self.ids)} rows, as {self.record.name} says; --overwrite makes them"
            for path in self.arrays:
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

        `arrays` are features `[n, 36, width]` and boxes `[n, 36, 4]` of those that are not
        `left_out`, or nothing if all are. Raises InputError if they hold NaN, or the disk is full.
        """
        for path, values in zip(self.files, arrays, strict=bool(arrays)):
            problem = f"{path}: behind image {self.done}: NaN or infinite numbers"
            require(bool(np.isfinite(values).all()), problem)
            _write(path, os.SEEK_END, np.ascontiguousarray(values, DTYPE).data)
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
        for path, shape in self.files.items():
            _write(path, os.SEEK_SET, _header(len(kept), shape))
        if left_out:
            n, ids = CAPTIONS_PER_IMAGE, [self.ids[row] for row in kept]
            captions = [c for row in kept for c in self.captions[n * row : n * (row + 1)]]
            for path, lines in zip(self.texts, (captions, ids), strict=True):
                write_lines(_new(path), lines)
            self.state["about"]["ids"] = images_digest(ids, self.names)
        self._rename()
        return [self.ids[row] for row in sorted(left_out)]

    def _rename(self) -> None:
        """Give the files their names. If the run is killed here, the next one does it."""
        write_json(self.record, self.state | {"renaming": True})
        for path in (*self.arrays, *self.texts):
            if _new(path).exists():
                _new(path).replace(path)
        self.state |= {"renaming": False, "complete": True}
        write_json(self.record, self.state)


def _new(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _header(rows: int, shape: tuple[int, int]) -> bytes:
    """Header of a .npy file. numpy leaves space, so that it is as long for any number of rows."""
    file = io.BytesIO()
    header = {"descr": DTYPE.str, "fortran_order": False, "shape": (rows, *shape)}
    npy.write_array_header_1_0(file, header)
    return file.getvalue()


def _write(path: Path, whence: int, data: bytes | memoryview) -> None:
    """Write `data` to the disk, at the start or the end of a file."""
    with explain_os_errors(path, "a file to write"), path.open("r+b") as file:
        file.seek(0, whence)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def open_source(options: Options, names: Mapping[str, str]) -> "Source":
    """Open the source of the features. Raises InputError."""
    from scripts.parts.regions import Detector, Grid, Tsv

    if options.model == "tsv":
        paths = [Path(path) for path in options.tsv or ()]
        return Tsv(paths, names, options.tsv_key == "name")
    files, device = find_images(Path(options.images), names), pick_device(options.device)
    log.info("%s on %s", options.model, device)
    if options.model == "fasterrcnn":
        return Detector(files, Path(options.weights), device)
    return Grid(files, device)


def extract(extraction: Extraction, source: "Source", options: Options) -> None:
    """Extract a split's missing rows batch by batch. Raises InputError."""
    from common.workers import load
    from scripts.parts.regions import Batches

    # The last bits of features depend on how many images are encoded at a time.
    about = source.about | {"dtype": str(DTYPE), "batch_size": options.batch_size}
    extraction.begin(about, source.width, options.overwrite)
    split, ids, size = extraction.split, extraction.ids, options.batch_size
    if extraction.complete:
        print_line(f"{split}: complete\n")
        return
    batches = [ids[row : row + size] for row in range(extraction.done, len(ids), size)]
    loaded = load(Batches(source.read), batches, options.workers)
    with progress(f"{split} regions", len(ids), "image") as bar:
        bar.update(extraction.done)
        for keys, items in zip(batches, loaded, strict=True):
            left_out = []
            for row, item in enumerate(items, extraction.done):
                if isinstance(item, InputError):
                    advice = "--skip_broken leaves it and its captions out"
                    require(options.skip_broken, f"{item} ({advice})")
                    log.warning("left out: id %s: %s", ids[row], item)
                    left_out.append(row)
            whole = [item for item in items if not isinstance(item, InputError)]
            extraction.put(len(keys), source.encode(whole) if whole else (), left_out)
            bar.update(len(keys))
    missing = extraction.finish()
    note = f"; left out: ids {summarise(missing)}" if missing else ""
    print_line(f"{split}: {len(ids) - len(missing)} images, {source.width} wide{note}\n")


def main() -> None:
    options = parse(Options, None, __doc__ or "")
    folder = Path(options.data)
    splits = [split for split in get_args(SplitName) if ids_file(folder, split).exists()]
    require(bool(splits), f"{folder}: no ids; expected a folder that prepare_captions wrote")
    names = read_names(folder)
    with only_writer(folder / LOCK):
        extractions = [Extraction(folder, split, names) for split in splits]
        source = open_source(options, names)
        for extraction in extractions:
            extract(extraction, source, options)


if __name__ == "__main__":
    run(main)
