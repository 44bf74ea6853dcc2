"""extract_regions.py — region features and boxes of images, in the order of the ids.

    D=data/own    # the folder that prepare_captions wrote
    python -m scripts.extract_regions --data $D --model efficientnet_lite2 --images photos
    python -m scripts.extract_regions --data $D --model fasterrcnn --images photos --weights W.pth
    python -m scripts.extract_regions --data $D --model hf --images photos --weights dinov2-base
    python -m scripts.extract_regions --data $D --model tsv --tsv trainval.tsv
    python -m scripts.extract_regions --data $D --model tsv --tsv val2014_obj36.tsv --key name
    python -m scripts.extract_regions --data $D --model npz --features butd36 --key name

Backbones make 36 regions an image; files have any one number of them. Reads {split}_ids.txt and
id_mapping.json. Writes {split}_ims.npy (images, regions, width), {split}_boxes.npy (images,
regions, 4), x1 y1 x2 y2 in pixels of the upright image, and a record of what made them,
{split}_regions.json. If a run is interrupted, the same command without --overwrite resumes it and
writes the same bytes as an uninterrupted run.
"""

import logging
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

from common.cli import parse, pick_device, print_line, progress, run
from common.config import LARGEST
from common.errors import check_range, require, summarise
from common.layout import SplitName, ids_file, read_names
from common.lock import LOCK, only_writer
from scripts.parts.extraction import DTYPE, Extraction
from scripts.parts.images import find_images

if TYPE_CHECKING:
    from scripts.parts.regions import Source

log = logging.getLogger(__name__)

OPTIONS_OF = {
    "efficientnet_lite2": ("images",),
    "fasterrcnn": ("images", "weights"),
    "hf": ("images", "weights"),
    "tsv": ("tsv",),
    "npz": ("features",),
}


@dataclass(frozen=True)
class Options:
    data: Annotated[str, "folder that prepare_captions wrote, DATA_PATH/DATA_NAME"]
    model: Annotated[
        Literal["efficientnet_lite2", "fasterrcnn", "hf", "tsv", "npz"],
        "source of the features: torchvision's detector, a model of transformers, files, ...",
    ]
    images: Annotated[str, "folder of the images"] = ""
    weights: Annotated[
        str, "fasterrcnn: a local .pth or .safetensors; hf: a local transformers folder"
    ] = ""
    tsv: Annotated[list[str] | None, "TSV files of bottom-up attention, its ports or LXMERT"] = None
    tsv_dtype: Annotated[
        Literal["float16", "float32", "float64"], "tsv: type of the features; others are refused"
    ] = "float32"
    features: Annotated[
        str, "npz: folder of one .npz (x, bbox) or .npy (features alone) an image"
    ] = ""
    key: Annotated[
        Literal["id", "name"],
        "tsv, npz: files call an image by its id, or by its file's name without the ending",
        "--tsv_key",
    ] = "id"
    batch_size: Annotated[int, "images at a time"] = 16
    workers: Annotated[int, "processes that read images; 0 reads in the program itself"] = 2
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps, ..."] = "auto"
    skip_broken: Annotated[bool, "leave out images that cannot be read, with their captions"] = (
        False
    )
    overwrite: Annotated[bool, "replace features that are there"] = False

    def __post_init__(self) -> None:
        check_range(self, ("batch_size",), 1, LARGEST)
        check_range(self, ("workers",), 0, LARGEST)
        for name in ("images", "weights", "tsv", "features"):
            is_used, is_given = name in OPTIONS_OF[self.model], bool(getattr(self, name))
            require(is_given or not is_used, f"--model {self.model}: expected --{name}")
            require(is_used or not is_given, f"--{name}: --model {self.model} does not use it")


def open_source(options: Options, names: Mapping[str, str]) -> "Source":
    """Open the source of the features. Raises InputError."""
    from scripts.parts.array_files import ArrayFiles
    from scripts.parts.regions import ImageFiles, open_backbone
    from scripts.parts.tsv import Tsv

    by_name = options.key == "name"
    if options.model == "tsv":
        image_ids = {key: PurePosixPath(names[key]).stem if by_name else key for key in names}
        image_id, count = Counter(image_ids.values()).most_common(1)[0]
        problem = f"--key name: {image_id} is the name of {count} images; expected --key id"
        require(count == 1, problem)
        return Tsv([Path(path) for path in options.tsv or ()], image_ids, options.tsv_dtype)
    if options.model == "npz":
        stems = {key: str(PurePosixPath(name).with_suffix("")) for key, name in names.items()}
        return ArrayFiles(Path(options.features), stems if by_name else {key: key for key in names})
    files, device = find_images(Path(options.images), names), pick_device(options.device)
    log.info("%s on %s", options.model, device)
    return ImageFiles(files, open_backbone(options.model, Path(options.weights), device))


def extract(extraction: Extraction, source: "Source", options: Options) -> None:
    """Extract a split's missing rows batch by batch. Raises InputError."""
    from scripts.parts.regions import read_batches

    # The last bits of features depend on how many images are encoded at a time.
    about = source.about | {"dtype": str(DTYPE), "batch_size": options.batch_size}
    extraction.begin(about, source.shapes, options.overwrite)
    split, ids = extraction.split, extraction.ids
    if extraction.complete:
        print_line(f"{split}: complete\n")
        return
    size, workers, skip_broken = options.batch_size, options.workers, options.skip_broken
    batches = read_batches(source, ids, extraction.done, size, workers, skip_broken)
    with progress(f"{split} regions", len(ids), "image") as bar:
        bar.update(extraction.done)
        for count, items, left_out in batches:
            extraction.put(count, source.encode(items) if items else (), left_out)
            bar.update(count)
    missing = extraction.finish()
    regions, width = source.shapes[0]
    note = f"; left out: ids {summarise(missing)}" if missing else ""
    print_line(f"{split}: {len(ids) - len(missing)} images, {regions} x {width}{note}\n")


def main() -> None:
    options = parse(Options, None, __doc__)
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
