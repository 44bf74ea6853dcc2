"""extract_regions.py — pictures to region features and boxes, in the order of the ids.

    python -m scripts.extract_regions --images photos --data data/own --model efficientnet_lite2
    python -m scripts.extract_regions --images photos --data data/own --model fasterrcnn --weights W
    python -m scripts.extract_regions --tsv trainval.tsv --data data/coco --model tsv

Reads {split}_ids.txt and id_mapping.json of the folder that prepare_captions wrote. Writes
{split}_ims.npy (pictures, 36, width) and {split}_boxes.npy (pictures, 36, 4), x1 y1 x2 y2 in pixels
of the picture as it is seen. Work in progress has other names; the same command, without
--overwrite, goes on with it, and gives the bytes of a run that was not cut off. What was done is
noted in {split}_regions.json.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from torch.utils.data import Dataset

from common.cli import parse, pick_device, print_line, progress, run
from common.config import LARGEST
from common.errors import InputError, check_range, require, summarise
from common.layout import SplitName, ids_file, read_names
from common.lock import LOCK, only_writer
from common.signals import Signals
from common.workers import load
from scripts.parts.extraction import Extraction
from scripts.parts.regions import Detector, Grid, Source
from scripts.parts.tsv_regions import Tsv

log = logging.getLogger(__name__)

SPLITS = get_args(SplitName)
SAVED_ROWS = 256  # at most so many rows are done twice after a cut


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
        of_tsv, of_detector = self.model == "tsv", self.model == "fasterrcnn"
        needless = {
            "images": self.images and of_tsv,
            "tsv": self.tsv and not of_tsv,
            "tsv_key": self.tsv_key != "id" and not of_tsv,
            "weights": self.weights and not of_detector,
        }
        for name, there in needless.items():
            require(not there, f"--{name}: --model {self.model} has no use for it")


def source_of(options: Options) -> Source:
    """What makes the features. Raises InputError."""
    if options.model == "tsv":
        return Tsv([Path(path) for path in options.tsv], options.tsv_key == "name")
    folder, device = Path(options.images), pick_device(options.device)
    log.info("%s on %s", options.model, device)
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


def extract(
    extraction: Extraction,
    source: Source,
    wanted: Mapping[str, Any],
    options: Options,
    signals: Signals,
) -> None:
    """Extract what is not there yet. Raises InputError, and Stopped between two batches.

    `wanted` is what the source's reader takes for each id.
    """
    split, ids = extraction.split, extraction.ids
    # the last bits depend on how many pictures are encoded at a time
    about = {"dtype": options.dtype, "batch_size": options.batch_size}
    extraction.begin(source.about | about, source.width)
    if extraction.complete:
        print_line(f"{split}: complete\n")
        return
    rows = Blocks(source.reader, [wanted[key] for key in ids])
    try:
        _fill(extraction, source, rows, options, signals)
    finally:
        extraction.save()
    extraction.finish()
    out = [ids[row] for row in extraction.left_out]
    said = f"; left out: ids {summarise(out)}" if out else ""
    print_line(f"{split}: {len(ids) - len(out)} pictures, {source.width} wide{said}\n")


def _fill(
    extraction: Extraction, source: Source, rows: Blocks, options: Options, signals: Signals
) -> None:
    """Make the rows that are not there yet, and save them now and then."""
    size, total, saved = options.batch_size, len(extraction.ids), extraction.rows
    places = [(row, min(row + size, total)) for row in range(saved, total, size)]
    blocks = load(rows, places, options.workers)
    with progress(f"{extraction.split} regions", total, "picture") as bar:
        bar.update(saved)
        for (first, stop), items in zip(places, blocks, strict=True):
            signals.check()
            _put(extraction, source, dict(enumerate(items, first)), options.skip_broken)
            extraction.advance(stop)
            bar.update(stop - first)
            if stop - saved >= SAVED_ROWS:
                saved = stop
                extraction.save()


def _put(extraction: Extraction, source: Source, items: dict[int, Any], skip: bool) -> None:
    """Encode what the reader had for some rows, and store it."""
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
    options = parse(Options, None, __doc__)
    folder = Path(options.data)
    splits = options.splits or [s for s in SPLITS if os.path.exists(ids_file(folder, s))]
    require(bool(splits), f"{folder}: has no ids; expected what prepare_captions wrote")
    names = read_names(folder)
    with only_writer(folder / LOCK):
        extractions = [Extraction(folder, split, names, options.overwrite) for split in splits]
        source = source_of(options)
        wanted = source.find(names)
        with Signals() as signals:
            for extraction in extractions:
                extract(extraction, source, wanted, options, signals)


if __name__ == "__main__":
    run(main)
