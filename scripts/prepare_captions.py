"""prepare_captions.py — captions, ids and file names of a data set in SCAN's layout (SPEC §10).

    python -m scripts.prepare_captions dataset_flickr30k.json --out data/f30k_precomp
    python -m scripts.prepare_captions captions_train2014.json captions_val2014.json --out data/coco
    python -m scripts.prepare_captions results_20130124.token --out data/f30k --split 0.9 0.05 0.05
    python -m scripts.prepare_captions captions.txt --out data/f8k --split 0.8 0.1 0.1
    python -m scripts.prepare_captions train/metadata.jsonl test/metadata.jsonl --out data/own

Formats, recognised by the content:
  Karpathy's JSON       dataset_coco.json, or your own images in that form
  MSCOCO's annotations  captions_train2014.json, or your own images in that form
  token file            NAME#0, a tab and a caption (Flickr30K), or NAME| 0| caption (Kaggle)
  CSV table             columns image,caption (Kaggle) or file_name,text (image folders)
  JSON lines            {"file_name": "a.jpg", "text": "A dog."}, as in metadata.jsonl
In the last three, each line is a caption, and lines of one file name are captions of one image.

Splits:
  Karpathy's JSON       train and restval become train, val becomes dev, test becomes test
  MSCOCO's annotations  captions_train* becomes train; of captions_val*, ordered by image id, the
                        first 5,000 become dev, the next 5,000 test, the rest train (of fewer than
                        10,000, one half each becomes dev and test)
  CSV, JSON lines       a field `split`, or a folder train, validation or test: in the file name, or
                        as the folder of metadata.csv or metadata.jsonl
  any file without      --split divides the images. What it draws depends on --seed and the ids.
Of MSCOCO, testall is the whole test split and test its first 1,000 images.

Output: {split}_caps.txt, a caption a line; {split}_ids.txt; id_mapping.json, the file name of each
id. An id is MSCOCO's id of the image, Karpathy's imgid, else the file name. Of an image with more
than five captions the first five are kept, unless you pass --captions_per_image all. If all images
then have five, an image has one line in {split}_ids.txt, otherwise one for each caption.
"""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

from common.cli import parse, print_line, run
from common.errors import check_range, require, summarise
from common.files import check_writable, explain_os_errors, write_json, write_lines
from common.layout import (
    CAPTIONS_PER_IMAGE,
    CaptionGroups,
    SplitName,
    ids_file,
    names_file,
    read_lines,
    read_names,
    split_files,
)
from common.lock import LOCK, only_writer
from scripts.parts.caption_files import CaptionedImage, read

SHARED: tuple[SplitName, ...] = ("train", "dev", "test")  # order of --split
TEST_1K = 1000  # images of MSCOCO's test split in `test`, the first fold of the 1K protocol

Splits = dict[SplitName, list[CaptionedImage]]


@dataclass(frozen=True)
class Options:
    files: Annotated[list[str], "captions in one of the formats above", "FILE"]
    out: Annotated[str, "folder to write, DATA_PATH/DATA_NAME"]
    split: Annotated[
        list[float] | None,
        "shares of train, dev and test, if the files have no splits: 0.8 0.1 0.1",
    ] = None
    seed: Annotated[int, "of --split"] = 0
    captions_per_image: Annotated[Literal["5", "all"], "captions to keep of an image"] = "5"
    train: Annotated[int | None, "only the first N images of train (default: all)"] = None

    def __post_init__(self) -> None:
        check_range(self, ("train",), 1)
        shares = self.split
        if shares is not None:
            are_shares = len(shares) == len(SHARED) and min(shares) >= 0
            problem = f"--split {' '.join(map(str, shares))}: expected three shares that sum to 1"
            require(are_shares and abs(sum(shares) - 1) < 1e-6, problem)


def read_all(options: Options) -> list[CaptionedImage]:
    """Return the images of all files, each with a split; print what each file is.

    Raises InputError if an id occurs twice, or --split does not fit the files.
    """
    images: list[CaptionedImage] = []
    for path in options.files:
        form, added = read(Path(path))
        has_splits = added[0].split is not None
        captions = sum(len(image.captions) for image in added)
        splits = "splits of its own" if has_splits else "no splits"
        print_line(f"{path}: {form}, {len(added)} images, {captions} captions, {splits}")
        expected = "expected --split, for example --split 0.8 0.1 0.1"
        require(has_splits or options.split is not None, f"{path}: has no splits; {expected}")
        problem = f"--split: {path} has splits of its own; expected no --split"
        require(not has_splits or options.split is None, problem)
        images += added
    key, count = Counter(image.key for image in images).most_common(1)[0]
    problem = f"{summarise(options.files)}: id {key} belongs to {count} images; expected one"
    require(count == 1, problem)
    return images if options.split is None else divide(images, options.split, options.seed)


def divide(
    images: Sequence[CaptionedImage], shares: Sequence[float], seed: int
) -> list[CaptionedImage]:
    """Return the images in their order, each with a split. Raises InputError if one gets none."""
    drawn = sorted(range(len(images)), key=lambda i: draw(seed, images[i].key))
    ends = [round(end * len(images)) for end in accumulate(shares, initial=0.0)]
    divided = list(images)
    for name, share, (begin, end) in zip(SHARED, shares, pairwise(ends), strict=True):
        problem = f"--split {share} for {name}: no image of {len(images)}; expected a larger share"
        require(begin < end, problem)
        for i in drawn[begin:end]:
            divided[i] = replace(images[i], split=name)
    return divided


def draw(seed: int, key: str) -> bytes:
    """Return a random number for an image: the same in every version of every library."""
    return hashlib.sha256(f"{seed} {key}".encode()).digest()


def group_by_split(images: Sequence[CaptionedImage], train: int | None) -> Splits:
    """Return the images of each split that has any, at most `train` of train; testall of MSCOCO."""
    splits: Splits = {name: [image for image in images if image.split == name] for name in SHARED}
    splits["train"] = splits["train"][:train]
    if any(image.of_coco for image in images):
        splits["testall"] = splits["test"]
        splits["test"] = splits["testall"][:TEST_1K]
    return {name: chosen for name, chosen in splits.items() if chosen}


def keep_five(splits: Splits) -> Splits:
    """Return the splits with the first five captions of each image; print how many are left out."""
    most = CAPTIONS_PER_IMAGE
    counts = [len(image.captions) for image in each_image(splits)]
    if surplus := [count - most for count in counts if count > most]:
        left_out = f"{sum(surplus)} captions of {len(surplus)} images are left out"
        print_line(f"{left_out}; --captions_per_image all keeps them")
    return {
        name: [replace(image, captions=image.captions[:most]) for image in images]
        for name, images in splits.items()
    }


def each_image(splits: Splits) -> list[CaptionedImage]:
    """Return the images of all splits, those of `test` and `testall` once."""
    return list({image.key: image for images in splits.values() for image in images}.values())


def check_existing(folder: Path, splits: Splits) -> None:
    """Raise InputError if the folder has features, or a whole split, of other images."""
    for name in get_args(SplitName):
        features, captions = split_files(folder, name)
        if name not in splits:
            for path in (features, captions, ids_file(folder, name)):
                problem = f"{path}: is of a split that the files do not have; move it away"
                require(not os.path.lexists(path), problem)
        elif os.path.lexists(features):
            names = read_names(folder)
            ids = [key for key, _ in groupby(read_lines(ids_file(folder, name), "ids, one a line"))]
            images = [(image.key, image.name) for image in splits[name]]
            problem = f"{features}: is of other images or in another order; move it away"
            require([(key, names.get(key)) for key in ids] == images, problem)


def write(folder: Path, splits: Splits, inputs: Sequence[str]) -> None:
    """Write captions, ids and file names. Raises InputError if that would overwrite an input."""
    every = each_image(splits)
    groups = CaptionGroups(np.array([len(image.captions) for image in every]))
    lines_of_ids = 1 if groups.is_five else None  # of an image; None: as many as it has captions
    texts: dict[Path, list[str]] = {}
    for name, images in splits.items():
        texts[split_files(folder, name)[1]] = [text for image in images for text in image.captions]
        texts[ids_file(folder, name)] = [
            image.key for image in images for _ in image.captions[:lines_of_ids]
        ]
    for path in (names_file(folder), *texts):
        check_writable(path, inputs)
    if not groups.is_five:
        print_line(f"captions an image: {groups}; ids have a line a caption")
    write_json(names_file(folder), {image.key: image.name for image in every})
    for path, lines in texts.items():
        write_lines(path, lines)
        print_line(f"{path}: {len(lines)} lines")


def main() -> None:
    options = parse(Options, None, __doc__)
    splits = group_by_split(read_all(options), options.train)
    if options.captions_per_image != "all":
        splits = keep_five(splits)
    folder = Path(options.out)
    with explain_os_errors(folder, "a folder to write to"):
        folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder / LOCK):
        check_existing(folder, splits)
        write(folder, splits, options.files)


if __name__ == "__main__":
    run(main)
