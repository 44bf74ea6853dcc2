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
from collections.abc import Iterable, Mapping, Sequence
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
    write_array,
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
    from scripts.parts.regions import Source

log = logging.getLogger(__name__)

SAVED_ROWS = 256  # at most so many rows are computed again after an interruption
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
    """The growing files of a split's features, and the record of how many rows are done.

    Rows are appended to {split}_ims.npy.new and {split}_boxes.npy.new. When all are done, the files
    get their names; if images are left out, so do new files of the others' captions and ids.
    """

    def __init__(
        self, folder: Path, split: SplitName, names: dict[str, str], overwrite: bool
    ) -> None:
        self.split, self.names, self.overwrite = split, names, overwrite
        self.record = extraction_file(folder, split)
        features, captions = split_files(folder, split)
        ids = ids_file(folder, split)
        self.arrays, self.texts = (features, boxes_file(folder, split)), (captions, ids)
        self.files: list[tuple[Path, tuple[int, int], np.dtype]] = []  # shape and type of a row
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
    def rows(self) -> int:
        """Number of rows that are done, left out ones included."""
        return self.state["rows"]

    def begin(self, about: dict[str, Any], width: int) -> None:
        """Begin new files, or check and resume those of an earlier run.

        `about` is all that the rows depend on, `dtype` among it. Raises InputError if the files are
        of another run, or damaged.
        """
        about = about | {"ids": images_digest(self.ids, self.names)}
        if self.overwrite or not self.state:
            there = [str(path) for path in self.arrays if path.exists()]
            problem = f"{', '.join(there)}: is there already; --overwrite replaces it"
            require(self.overwrite or not there, problem)
            for path in (*self.arrays, *self.texts):
                _new(path).unlink(missing_ok=True)
            self.state = {"about": about, "rows": 0, "left_out": [], "complete": False}
        else:
            self._check_record(about)
        if not self.complete:
            features, boxes = self.arrays
            self._begin_file(_new(features), (REGIONS, width), np.dtype(about["dtype"]))
            self._begin_file(_new(boxes), (REGIONS, 4), np.dtype("float32"))
            self.save()

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
        is_count = type(rows) is int and 0 <= rows <= len(self.ids)
        are_ints = isinstance(left_out, list) and all(type(row) is int for row in left_out)
        is_whole = is_count and are_ints and left_out == sorted(set(left_out) & set(range(rows)))
        require(is_whole, f"{self.record}: is damaged; --overwrite begins again")

    def _begin_file(self, path: Path, shape: tuple[int, int], dtype: np.dtype) -> None:
        """Write an empty file of rows, or cut an earlier run's behind the rows that are done."""
        rows = self.rows - len(self.state["left_out"])
        if rows:
            expected = f"{rows} rows of shape {shape}, {dtype}; --overwrite begins again"
            require(not path.is_symlink(), f"{path}: is a link; expected {expected}")
            old = map_array(path, expected)
            if len(old) < rows or old.shape[1:] != shape or old.dtype != dtype:
                raise InputError(f"{path}: shape {old.shape}, {old.dtype}; expected {expected}")
            with explain_os_errors(path, "a file to write"):
                os.truncate(path, old.offset + rows * old[0].nbytes)
        else:
            write_array(path, np.empty((0, *shape), dtype))
        self.files.append((path, shape, dtype))

    def put(self, features: np.ndarray, boxes: np.ndarray) -> None:
        """Append features `[n, 36, width]` and boxes `[n, 36, 4]`.

        Raises InputError if float16 cannot hold them, or the disk is full.
        """
        for (path, _, dtype), values in zip(self.files, (features, boxes), strict=True):
            with np.errstate(over="ignore"):
                values = np.ascontiguousarray(values, dtype)
            end = f"behind row {self.rows}"
            require(bool(np.isfinite(values).all()), f"{path}: {end}: not finite as {dtype}")
            with explain_os_errors(path, "a file to write"), path.open("ab") as file:
                file.write(values.data)

    def advance(self, rows: int, left_out: Iterable[int]) -> None:
        """Note, in memory, that the first `rows` are done, and which new ones are left out."""
        self.state |= {"rows": rows, "left_out": [*self.state["left_out"], *left_out]}

    def save(self) -> None:
        """Write rows, their number in the headers, and the record to the disk."""
        rows = self.rows - len(self.state["left_out"])
        for path, shape, dtype in self.files:
            header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False}
            with explain_os_errors(path, "a file to write"), path.open("r+b") as file:
                # As long as before: numpy leaves space for a larger number of rows.
                npy.write_array_header_1_0(file, header | {"shape": (rows, *shape)})
                file.flush()
                os.fsync(file.fileno())
        write_json(self.record, self.state)

    def finish(self) -> list[str]:
        """Give the files their names, and return the ids that are left out.

        Raises InputError if all are.
        """
        left_out = set(self.state["left_out"])
        kept = [row for row in range(len(self.ids)) if row not in left_out]
        require(bool(kept), f"{self.texts[1]}: none of its {len(self.ids)} images can be read")
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
    split, ids = extraction.split, extraction.ids
    # The last bits of features depend on how many images are encoded at a time.
    about = {"dtype": options.dtype, "batch_size": options.batch_size}
    extraction.begin(source.about | about, source.width)
    if extraction.complete:
        print_line(f"{split}: complete\n")
        return
    try:
        _extract_rows(extraction, source, [arguments[key] for key in ids], options, signals)
    finally:
        extraction.save()
    left_out = extraction.finish()
    note = f"; left out: ids {summarise(left_out)}" if left_out else ""
    print_line(f"{split}: {len(ids) - len(left_out)} images, {source.width} wide{note}\n")


def _extract_rows(
    extraction: Extraction,
    source: "Source",
    arguments: Sequence[Any],
    options: Options,
    signals: Signals,
) -> None:
    """Extract the missing rows batch by batch, and save every SAVED_ROWS."""
    from common.workers import load
    from scripts.parts.regions import Blocks

    size, total, saved = options.batch_size, len(arguments), extraction.rows
    blocks = [(row, min(row + size, total)) for row in range(saved, total, size)]
    batches = load(Blocks(source.reader, arguments), blocks, options.workers)
    with progress(f"{extraction.split} regions", total, "image") as bar:
        bar.update(saved)
        for (first, stop), items in zip(blocks, batches, strict=True):
            signals.check()
            errors = {
                r: item for r, item in enumerate(items, first) if isinstance(item, InputError)
            }
            for row, error in errors.items():
                advice = "--skip_broken leaves it and its captions out"
                require(options.skip_broken, f"{error} ({advice})")
                log.warning("left out: id %s: %s", extraction.ids[row], error)
            whole = [item for item in items if not isinstance(item, InputError)]
            if whole:
                extraction.put(*source.encode(whole))
            extraction.advance(stop, errors)
            bar.update(stop - first)
            if stop - saved >= SAVED_ROWS:
                saved = stop
                extraction.save()


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
