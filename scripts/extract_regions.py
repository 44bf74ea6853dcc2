"""extract_regions.py — 36 region features and boxes an image, in the order of the ids.

    python -m scripts.extract_regions --images photos --data data/own --model efficientnet_lite2
    python -m scripts.extract_regions --images photos --data data/own --model fasterrcnn --weights W
    python -m scripts.extract_regions --tsv trainval.tsv --data data/coco --model tsv

Reads {split}_ids.txt and id_mapping.json of the folder that prepare_captions wrote. Writes
{split}_ims.npy (images, 36, width) and {split}_boxes.npy (images, 36, 4), x1 y1 x2 y2 in pixels of
the upright image, and a record, {split}_regions.json. If a run is interrupted, the same command
without --overwrite resumes it and writes the same bytes as an uninterrupted run.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
from numpy.lib.format import open_memmap

from common.cli import parse, pick_device, print_line, progress, run
from common.config import LARGEST
from common.errors import InputError, check_range, require, summarise
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
    read_names,
    split_files,
)
from common.lock import LOCK, only_writer
from common.signals import Signals
from scripts.parts.images import REGIONS

if TYPE_CHECKING:
    from scripts.parts.regions import Blocks, Source

log = logging.getLogger(__name__)

SAVED_ROWS = 256  # at most so many rows are computed again after an interruption
COPIED_ROWS = 500  # at a time
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
    splits: Annotated[list[SplitName] | None, "only these (default: all that have ids)"] = None
    dtype: Annotated[Literal["float16", "float32"], "type of the features"] = "float32"
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
    """The files of a split's features, and the record of how many rows are done.

    Rows are written to {split}_ims.npy.extracting and {split}_boxes.npy.extracting. When all are
    done, the files get their names. If images are left out, {name}.new holds the kept rows,
    captions and ids until then.
    """

    def __init__(
        self, folder: Path, split: SplitName, names: dict[str, str], overwrite: bool
    ) -> None:
        self.split, self.names, self.overwrite = split, names, overwrite
        self.record = extraction_file(folder, split)
        features, captions = split_files(folder, split)
        ids = ids_file(folder, split)
        self.arrays_paths = (features, boxes_file(folder, split))
        self.text_paths = (captions, ids)
        self.arrays: list[np.memmap] = []
        self.state = self._read_record()
        if self.state.get("renaming"):
            self._rename()  # before captions and ids are read: they may be of two extractions
        self.captions = read_captions(captions)
        self.ids = read_ids(ids, count_images(captions, self.captions))
        check_named(ids, self.ids, names)

    def _read_record(self) -> dict[str, Any]:
        if not self.record.exists():
            return {}
        try:
            return read_json(self.record, "a record of what was extracted")
        except InputError:
            if not self.overwrite:
                raise
            return {}

    @property
    def complete(self) -> bool:
        return self.state.get("complete", False)

    @property
    def rows(self) -> int:
        """Number of rows that are done, left out ones included."""
        return self.state["rows"]

    @property
    def left_out(self) -> list[int]:
        """Rows of images that cannot be read."""
        return sorted(set(self.state["left_out"]))

    def begin(self, about: dict[str, Any], width: int) -> None:
        """Open the files as an earlier run left them, or new ones.

        `about` is all that the rows depend on, `dtype` among it. Raises InputError if the files are
        of another run, or damaged.
        """
        about = about | {"ids": images_digest(self.ids, self.names)}
        if self.overwrite or not self.record.exists():
            there = [str(path) for path in self.arrays_paths if path.exists()]
            problem = f"{', '.join(there)}: is there already; --overwrite replaces it"
            require(self.overwrite or not there, problem)
            self.state = {"about": about, "rows": 0, "left_out": [], "complete": False}
        else:
            self._check_record(about)
        if self.complete:
            self._check_complete()
            return
        if not self.rows:
            for path in (*self.arrays_paths, *self.text_paths):
                _new(path).unlink(missing_ok=True)
        widths_and_types = ((width, about["dtype"]), (4, "float32"))
        self.arrays = [
            self._open_array(_partial(path), *kind)
            for path, kind in zip(self.arrays_paths, widths_and_types, strict=True)
        ]
        self.save()

    def _check_record(self, about: dict[str, Any]) -> None:
        """Raise InputError if the record is of another run, or damaged."""
        old = self.state.get("about")
        changed = [k for k in about if not isinstance(old, dict) or old.get(k) != about[k]]
        problem = f"{self.record}: was begun with another {', '.join(changed)}"
        require(not changed, f"{problem}; --overwrite begins again")
        left_out = self.state.get("left_out")
        rows = [self.state.get("rows"), *(left_out if isinstance(left_out, list) else [None])]
        are_rows = all(type(row) is int and 0 <= row <= len(self.ids) for row in rows)
        require(are_rows or self.complete is True, f"{self.record}: is damaged: rows {rows[0]}")

    def _check_complete(self) -> None:
        """Raise InputError if the features of a complete extraction are missing or too short."""
        expected = f"{len(self.ids)} rows, as {self.record.name} says; --overwrite makes them again"
        for path in self.arrays_paths:
            rows = len(map_array(path, expected))
            require(rows == len(self.ids), f"{path}: {rows} rows; expected {expected}")

    def _open_array(self, path: Path, width: int, dtype: str) -> np.memmap:
        """Open a file of rows as a memory map, with its disk space allocated."""
        shape = (len(self.ids), REGIONS, width)
        with explain_os_errors(path, "a file to write"):
            if self.rows:
                expected = f"the first {self.rows} rows; --overwrite begins again"
                require(not path.is_symlink(), f"{path}: is a link; expected {expected}")
                old = map_array(path, expected)  # mode r+ would extend a file that is too short
                if old.shape != shape or old.dtype != dtype:
                    raise InputError(f"{path}: shape {old.shape}, {old.dtype}; expected {expected}")
                return open_memmap(path, mode="r+")
            path.unlink(missing_ok=True)
            array = open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
            # On a full disk a write to a map would kill the process; macOS lacks the call.
            with path.open("r+b") as file, suppress(AttributeError):
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            return array

    def put(self, rows: Sequence[int], features: np.ndarray, boxes: np.ndarray) -> None:
        """Store features `[n, 36, width]` and boxes `[n, 36, 4]` of some rows.

        Raises InputError if float16 cannot hold the features.
        """
        with np.errstate(over="ignore"):
            for array, values in zip(self.arrays, (features, boxes), strict=True):
                array[rows] = values
        if not np.isfinite(self.arrays[0][rows]).all():
            of = f"features of ids {self.ids[rows[0]]} to {self.ids[rows[-1]]}"
            raise InputError(f"{of}: not finite as {self.arrays[0].dtype}")

    def leave_out(self, row: int) -> None:
        """Leave a row and its captions out of the results."""
        self.state["left_out"].append(row)

    def advance(self, rows: int) -> None:
        """Note, in memory, that the first `rows` are done."""
        self.state["rows"] = rows

    def save(self) -> None:
        """Write rows and record to the disk: a later run resumes here."""
        for array in self.arrays:
            array.flush()
        left_out = [row for row in self.state["left_out"] if row < self.rows]
        write_json(self.record, self.state | {"left_out": left_out})

    def finish(self) -> None:
        """Give the files their names. Raises InputError if all rows are left out."""
        left_out = set(self.left_out)
        kept = [row for row in range(len(self.ids)) if row not in left_out]
        require(bool(kept), f"{self.text_paths[1]}: none of its {len(self.ids)} images can be read")
        if left_out:
            self._write_kept(kept)
        self.arrays = []  # a mapped file keeps its disk space even after it is deleted
        self._rename()

    def _write_kept(self, kept: Sequence[int]) -> None:
        """Write the rows, captions and ids of the images that are kept."""
        for array, path in zip(self.arrays, self.arrays_paths, strict=True):
            write_blocks(
                _new(path), (len(kept), *array.shape[1:]), array.dtype, _blocks(array, kept)
            )
        n = CAPTIONS_PER_IMAGE
        captions = [caption for row in kept for caption in self.captions[n * row : n * (row + 1)]]
        ids = [self.ids[row] for row in kept]
        for path, lines in zip(self.text_paths, (captions, ids), strict=True):
            write_lines(_new(path), lines)
        self.state["about"]["ids"] = images_digest(ids, self.names)

    def _rename(self) -> None:
        """Give the files their names. If the run is killed here, the next one does it."""
        write_json(self.record, self.state | {"renaming": True})
        for path in (*self.arrays_paths, *self.text_paths):
            if _new(path).exists():
                _new(path).replace(path)
            elif _partial(path).exists() and not self.state.get("left_out"):
                _partial(path).replace(path)
            _partial(path).unlink(missing_ok=True)
        self.state |= {"renaming": False, "complete": True}
        write_json(self.record, self.state)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".extracting")


def _new(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _blocks(array: np.ndarray, kept: Sequence[int]) -> Iterator[np.ndarray]:
    for first in range(0, len(kept), COPIED_ROWS):
        yield array[kept[first : first + COPIED_ROWS]]


def make_source(options: Options) -> "Source":
    """Open what makes the features. Raises InputError."""
    from scripts.parts.regions import Detector, Grid, Tsv

    if options.model == "tsv":
        return Tsv([Path(path) for path in options.tsv or ()], options.tsv_key == "name")
    folder, device = Path(options.images), pick_device(options.device)
    log.info("%s on %s", options.model, device)
    if options.model == "fasterrcnn":
        return Detector(folder, Path(options.weights), device)
    return Grid(folder, device)


def extract(
    extraction: Extraction,
    source: "Source",
    arguments: Mapping[str, Any],
    options: Options,
    signals: Signals,
) -> None:
    """Extract the missing rows, with the reader's argument for each id in `arguments`.

    Raises InputError, and Stopped between two batches.
    """
    from scripts.parts.regions import Blocks

    split, ids = extraction.split, extraction.ids
    # The last bits of features depend on how many images are encoded at a time.
    about = {"dtype": options.dtype, "batch_size": options.batch_size}
    extraction.begin(source.about | about, source.width)
    if extraction.complete:
        print_line(f"{split}: complete\n")
        return
    images = Blocks(source.reader, [arguments[key] for key in ids])
    try:
        _extract_rows(extraction, source, images, options, signals)
    finally:
        extraction.save()
    extraction.finish()
    left_out = [ids[row] for row in extraction.left_out]
    note = f"; left out: ids {summarise(left_out)}" if left_out else ""
    print_line(f"{split}: {len(ids) - len(left_out)} images, {source.width} wide{note}\n")


def _extract_rows(
    extraction: Extraction, source: "Source", images: "Blocks", options: Options, signals: Signals
) -> None:
    """Extract the missing rows batch by batch, and save every SAVED_ROWS."""
    from common.workers import load

    size, total, saved = options.batch_size, len(extraction.ids), extraction.rows
    blocks = [(row, min(row + size, total)) for row in range(saved, total, size)]
    batches = load(images, blocks, options.workers)
    with progress(f"{extraction.split} regions", total, "image") as bar:
        bar.update(saved)
        for (first, stop), items in zip(blocks, batches, strict=True):
            signals.check()
            _encode(extraction, source, dict(enumerate(items, first)), options.skip_broken)
            extraction.advance(stop)
            bar.update(stop - first)
            if stop - saved >= SAVED_ROWS:
                saved = stop
                extraction.save()


def _encode(extraction: Extraction, source: "Source", items: dict[int, Any], skip: bool) -> None:
    """Encode and store what the reader returned for some rows."""
    whole = {row: item for row, item in items.items() if not isinstance(item, InputError)}
    for row, item in items.items():
        if row in whole:
            continue
        if not skip:
            raise InputError(f"{item} (--skip_broken leaves it and its captions out)")
        log.warning("left out: id %s: %s", extraction.ids[row], item)
        extraction.leave_out(row)
    if whole:
        extraction.put(list(whole), *source.encode(list(whole.values())))


def main() -> None:
    options = parse(Options, None, __doc__ or "")
    folder = Path(options.data)
    splits = options.splits or [s for s in get_args(SplitName) if ids_file(folder, s).exists()]
    require(bool(splits), f"{folder}: no ids; expected a folder that prepare_captions wrote")
    names = read_names(folder)
    with only_writer(folder / LOCK):
        extractions = [Extraction(folder, split, names, options.overwrite) for split in splits]
        source = make_source(options)
        arguments = source.find(names)
        with Signals() as signals:
            for extraction in extractions:
                extract(extraction, source, arguments, options, signals)


if __name__ == "__main__":
    run(main)
