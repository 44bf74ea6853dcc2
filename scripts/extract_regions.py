"""extract_regions.py — pictures to region features and boxes, in the order of the ids.

    python -m scripts.extract_regions --images photos --data data/own --model efficientnet_lite2
    python -m scripts.extract_regions --images photos --data data/own --model fasterrcnn --weights W
    python -m scripts.extract_regions --tsv trainval.tsv --data data/coco --model tsv

Reads {split}_ids.txt and id_mapping.json of the folder that prepare_captions wrote. Writes
{split}_ims.npy (pictures, 36, width) and {split}_boxes.npy (pictures, 36, 4), x1 y1 x2 y2 in pixels
of the picture as it is seen. Work in progress has other names; the same command goes on with it,
and gives the bytes of a run that was not cut off. What was done is noted in {split}_regions.json.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from numpy.lib.format import open_memmap
from torch.utils.data import Dataset

from files import map_array, naming, read_json, write_blocks, write_json, write_lines
from layout import (
    CAPTIONS_PER_IMAGE,
    SplitName,
    boxes_file,
    count_images,
    extraction_file,
    ids_file,
    nameless_faults,
    pictures_digest,
    read_captions,
    read_ids,
    read_names,
    split_files,
)
from loader import load
from locking import LOCK, only_writer
from options import (
    LARGEST,
    InputError,
    check_range,
    parse,
    pick_device,
    progress,
    refuse,
    require,
    run,
    say,
    some,
)
from regions import REGIONS, Detector, Grid, Source
from scripts.tsv_regions import Tsv
from signals import Signals

log = logging.getLogger(__name__)

SPLITS = get_args(SplitName)
SAVED_ROWS = 256  # at most so many rows are done twice after a cut
COPIED_ROWS = 500  # at a time


@dataclass(frozen=True)
class Options:
    data: Annotated[str, "folder that prepare_captions wrote, DATA_PATH/DATA_NAME"]
    model: Annotated[Literal["fasterrcnn", "efficientnet_lite2", "tsv"], "what makes the features"]
    images: Annotated[str, "folder of the pictures"] = ""
    weights: Annotated[str, "fasterrcnn: weights, a local .pth or .safetensors"] = ""
    tsv: Annotated[list[str] | None, "tsv: bottom-up attention's TSV files"] = None
    tsv_key: Annotated[
        Literal["id", "name"], "image_id of the TSV is the id, or the file's name without ending"
    ] = "id"
    splits: Annotated[list[str] | None, "only these (all that have ids)"] = None
    dtype: Annotated[Literal["float16", "float32"], "of the features"] = "float32"
    batch_size: Annotated[int, "pictures at a time"] = 16
    workers: Annotated[int, "processes that read pictures; 0 reads in the program itself"] = 2
    device: Annotated[str, "auto, cpu, cuda, cuda:1, ..."] = "auto"
    skip_broken: Annotated[bool, "leave pictures that cannot be read out, captions too"] = False
    overwrite: Annotated[bool, "begin afresh where features are"] = False

    def __post_init__(self) -> None:
        check_range(self, ("batch_size",), 1, LARGEST)
        check_range(self, ("workers",), 0, LARGEST)
        for name in self.splits or ():
            require(name in SPLITS, f"--splits {name}: expected some of {', '.join(SPLITS)}")
        if self.model == "tsv":
            require(bool(self.tsv), "--model tsv: expected --tsv FILE")
        else:
            require(bool(self.images), f"--model {self.model}: expected --images FOLDER")
        if self.model == "fasterrcnn":
            require(bool(self.weights), "--model fasterrcnn: expected --weights FILE")
        needless = (self.tsv and self.model != "tsv", self.weights and self.model != "fasterrcnn")
        for name, there in zip(("tsv", "weights"), needless, strict=True):
            require(not there, f"--{name}: --model {self.model} has no use for it")


def source_of(options: Options) -> Source:
    """What makes the features. Raises InputError."""
    if options.model == "tsv":
        return Tsv([Path(path) for path in options.tsv], options.tsv_key == "name")
    folder, device = Path(options.images), pick_device(options.device)
    if options.model == "fasterrcnn":
        return Detector(folder, Path(options.weights), device)
    return Grid(folder, device)


@dataclass(frozen=True)
class Blocks(Dataset):
    """What a source's reader has for rows `first` to `stop`; an InputError for a broken one."""

    reader: Any
    wanted: Sequence[Any]  # what it takes for each row

    def __getitem__(self, place: tuple[int, int]) -> list[Any]:
        return [self._one(wanted) for wanted in self.wanted[slice(*place)]]

    def _one(self, wanted: Any) -> Any:
        try:
            return self.reader(wanted)
        except InputError as error:
            return error


class Extraction:
    """One split's features on their way: which rows are done, and where they are."""

    def __init__(
        self, folder: Path, split: SplitName, names: dict[str, str], options: Options
    ) -> None:
        self.folder, self.split, self.names, self.options = folder, split, names, options
        self.record = extraction_file(folder, split)
        features, captions = split_files(folder, split)
        boxes, ids = boxes_file(folder, split), ids_file(folder, split)
        self.results = (features, boxes, captions, ids)
        self._end_renaming()
        self.captions = read_captions(captions)
        self.ids = read_ids(ids, count_images(captions, self.captions))
        refuse(nameless_faults(ids, names, self.ids))

    def partial(self, name: str) -> Path:
        return self.folder / f"{self.split}_{name}.npy.extracting"

    def fresh(self, path: Path) -> Path:
        """Name of a result that is whole, while the others may not be."""
        return path.with_name(path.name + ".new")

    def _end_renaming(self) -> None:
        try:
            state = read_json(self.record, "a record") if self.record.exists() else {}
        except InputError:
            if not self.options.overwrite:
                raise
            state = {}
        if state.get("renaming"):
            self._rename(state)

    def _rename(self, state: dict[str, Any]) -> None:
        write_json(self.record, state | {"renaming": True})
        working = (self.partial("ims"), self.partial("boxes"), None, None)
        for path, rows in zip(self.results, working, strict=True):
            if self.fresh(path).exists():
                self.fresh(path).replace(path)
            elif rows is not None and rows.exists() and not state.get("left_out"):
                rows.replace(path)
            if rows is not None:
                rows.unlink(missing_ok=True)
        write_json(self.record, state | {"renaming": False, "complete": True})

    def state(self, source: Source) -> dict[str, Any]:
        """How far an earlier run came. Raises InputError where it is not this one's."""
        about = source.about | {
            "dtype": self.options.dtype,
            "batch_size": self.options.batch_size,  # on which the last bits depend
            "ids": pictures_digest(self.ids, self.names),
        }
        new = {"about": about, "rows": 0, "left_out": [], "complete": False}
        if self.options.overwrite:
            return new
        if not self.record.exists():
            there = [path for path in self.results[:2] if path.exists()]
            require(not there, f"{some([*map(str, there)])}: is there; --overwrite replaces it")
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

    def run(self, source: Source, wanted: Mapping[str, Any], signals: Signals) -> None:
        """Extract what is not there yet. Raises InputError, and Stopped between two batches.

        `wanted` is what the source's reader takes for each id.
        """
        state = self.state(source)
        if state.get("complete"):
            self._check_complete()
            say(f"{self.split}: complete\n")
            return
        if not state["rows"]:
            for path in self.results:  # of a run before that was cut off at its end
                self.fresh(path).unlink(missing_ok=True)
        arrays = self._arrays(state, source.width)
        self._save(arrays, state)
        size, total = self.options.batch_size, len(self.ids)
        places = [(row, min(row + size, total)) for row in range(state["rows"], total, size)]
        of_rows = Blocks(source.reader, [wanted[key] for key in self.ids])
        blocks = load(of_rows, places, self.options.workers)
        saved = state["rows"]
        try:
            with progress(f"{self.split} regions", total, "picture") as bar:
                bar.update(saved)
                for (first, stop), items in zip(places, blocks, strict=True):
                    signals.obey()
                    self._put(arrays, source, first, items, state["left_out"])
                    state["rows"] = stop
                    bar.update(stop - first)
                    if stop - saved >= SAVED_ROWS:
                        saved = stop
                        self._save(arrays, state)
        finally:
            self._save(arrays, state)
        self._finish(arrays, state)

    def _check_complete(self) -> None:
        """Raise InputError where what the record says is there is not."""
        expected = f"{len(self.ids)} rows, by {self.record.name}; --overwrite makes them anew"
        for path in self.results[:2]:
            found = len(map_array(path, expected))
            require(found == len(self.ids), f"{path}: {found} rows; expected {expected}")

    def _arrays(self, state: dict[str, Any], width: int) -> list[np.memmap]:
        """Features and boxes by memory map, their disk taken beforehand: a full one is an error."""
        arrays = []
        for name, last, kind in (
            ("ims", width, self.options.dtype),
            ("boxes", 4, "float32"),
        ):
            path, shape = self.partial(name), (len(self.ids), REGIONS, last)
            with naming(path, "a file to write"):
                if state["rows"]:
                    expected = f"the first {state['rows']} rows; --overwrite begins afresh"
                    require(not path.is_symlink(), f"{path}: is a link; expected {expected}")
                    found = map_array(path, expected)  # whole: writing would fill up a short one
                    fits = found.shape == shape and found.dtype == kind
                    message = f"{path}: shape {found.shape}, {found.dtype}; expected {expected}"
                    require(fits, message)
                    array = open_memmap(path, mode="r+")
                else:
                    path.unlink(missing_ok=True)
                    array = open_memmap(path, mode="w+", dtype=kind, shape=shape)
                    with path.open("r+b") as file, suppress(AttributeError):  # macOS lacks it
                        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            arrays.append(array)
        return arrays

    def _put(
        self, arrays: list[np.memmap], source: Source, first: int, items: list, left_out: list
    ) -> None:
        whole = []
        for row, item in enumerate(items, first):
            if not isinstance(item, InputError):
                whole.append(row)
                continue
            if not self.options.skip_broken:
                raise InputError(f"{item} (--skip_broken leaves it and its captions out)")
            log.warning("left out: id %s: %s", self.ids[row], item)
            left_out.append(row)
        if whole:
            with np.errstate(over="ignore"):
                parts = source.encode([items[row - first] for row in whole])
                for array, part in zip(arrays, parts, strict=True):
                    array[whole] = part
            finite = np.isfinite(arrays[0][whole]).all()
            message = f"features of ids {self.ids[whole[0]]} to {self.ids[whole[-1]]}"
            require(bool(finite), f"{message} are no numbers of {self.options.dtype}")

    def _save(self, arrays: list[np.memmap], state: dict[str, Any]) -> None:
        for array in arrays:
            array.flush()
        left_out = [row for row in state["left_out"] if row < state["rows"]]
        write_json(self.record, state | {"left_out": left_out})

    def _finish(self, arrays: list[np.memmap], state: dict[str, Any]) -> None:
        """Give the results their names; those of captions and ids too, where rows are left out."""
        left_out = set(state["left_out"])
        kept = [row for row in range(len(self.ids)) if row not in left_out]
        require(bool(kept), f"{self.split}: no picture can be read")
        for array, path in zip(arrays, self.results[:2], strict=True):
            if left_out:
                shape = (len(kept), *array.shape[1:])
                write_blocks(self.fresh(path), shape, array.dtype, _rows(array, kept))
        if left_out:
            n = CAPTIONS_PER_IMAGE
            texts = (
                [caption for row in kept for caption in self.captions[n * row : n * (row + 1)]],
                [self.ids[row] for row in kept],
            )
            for path, lines in zip(self.results[2:], texts, strict=True):
                write_lines(self.fresh(path), lines)
            digest = pictures_digest(texts[1], self.names)
            state = state | {"about": state["about"] | {"ids": digest}}
        self._rename(state)
        out = [self.ids[row] for row in sorted(left_out)]
        said = f"; left out: ids {some(out)}" if out else ""
        say(f"{self.split}: {len(kept)} pictures, {arrays[0].shape[2]} wide{said}\n")


def _rows(array: np.ndarray, kept: Sequence[int]) -> Iterator[np.ndarray]:
    for first in range(0, len(kept), COPIED_ROWS):
        yield array[kept[first : first + COPIED_ROWS]]


def main() -> None:
    options = parse(Options, None, __doc__)
    folder = Path(options.data)
    splits = options.splits or [s for s in SPLITS if os.path.exists(ids_file(folder, s))]
    require(bool(splits), f"{folder}: has no ids; expected what prepare_captions wrote")
    names = read_names(folder)
    with only_writer(folder / LOCK):
        extractions = [Extraction(folder, split, names, options) for split in splits]
        source = source_of(options)
        wanted = source.find(names)
        with Signals() as signals:
            for extraction in extractions:
                extraction.run(source, wanted, signals)


if __name__ == "__main__":
    run(main)
