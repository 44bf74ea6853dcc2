"""prepare_captions.py — captions, ids and file names of a data set in SCAN's layout (SPEC §10).

    python -m scripts.prepare_captions dataset_flickr30k.json --out data/f30k_precomp
    python -m scripts.prepare_captions dataset_coco.json --out data/coco_precomp
    python -m scripts.prepare_captions captions_train2014.json captions_val2014.json --out data/coco

JSON is Karpathy's (dataset_flickr8k.json, dataset_flickr30k.json, dataset_coco.json, or your own
images in that form) or MSCOCO's annotations (captions_*.json, through pycocotools).

Splits. Karpathy's: train and restval become train, val becomes dev, test becomes test. MSCOCO's
annotations: captions_train* becomes train; of captions_val*, ordered by image id, the first 5,000
become dev, the next 5,000 test and the rest train (of fewer than 10,000, one half each becomes dev
and test). Of MSCOCO, in either form, testall is the whole test split and test its first 1,000.

Output: {split}_caps.txt, five lines an image (its first five sentences, each on one line);
{split}_ids.txt, one id an image (MSCOCO's id of the image, else Karpathy's imgid);
id_mapping.json, id to file name. An image with fewer than five sentences is an error.
"""

import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from common.cli import parse, print_line, run
from common.errors import InputError, brief_repr, check_range, require, summarise
from common.files import check_writable, explain_os_errors, read_json, write_json, write_lines
from common.layout import (
    CAPTIONS_PER_IMAGE,
    LONGEST_CAPTION,
    SplitName,
    ids_file,
    names_file,
    read_lines,
    read_names,
    split_files,
    stays_inside,
)
from common.lock import LOCK, only_writer

SPLITS: dict[str, SplitName] = {"train": "train", "restval": "train", "val": "dev", "test": "test"}
TEST_1K = 1000  # images of MSCOCO's test split in `test`, the first fold of the 1K protocol
HELD_OUT = 5000  # images of MSCOCO's dev and test splits
EXPECTED = "Karpathy's JSON or MSCOCO's annotations"


@dataclass(frozen=True)
class Options:
    json: Annotated[list[str], "Karpathy's JSON or MSCOCO's captions_*.json", "JSON"]
    out: Annotated[str, "folder to write, DATA_PATH/DATA_NAME"]
    train: Annotated[int | None, "only the first N images of train (default: all)"] = None

    def __post_init__(self) -> None:
        check_range(self, ("train",), 1)


@dataclass(frozen=True)
class CaptionedImage:
    """An image and its captions."""

    key: str  # its id
    name: str  # of its file, with the subfolder that the JSON gives
    split: SplitName
    captions: tuple[str, ...]
    of_coco: bool


def read(path: Path) -> list[CaptionedImage]:
    """Return the images of one JSON file. Raises InputError."""
    content = read_json(path, EXPECTED)
    require(isinstance(content.get("images"), list), f"{path}: no images; expected {EXPECTED}")
    reader = read_annotations if "annotations" in content else read_karpathy
    images: list[CaptionedImage] = []
    try:
        for image in reader(path, content):
            images.append(image)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        # A value is missing or of another type; annotations are counted in the order of ids.
        reason = f"{type(error).__name__}: {error}"[:200]
        raise InputError(f"{path}: image {len(images)}: {reason}; expected {EXPECTED}") from error
    return images


def read_karpathy(path: Path, content: dict[str, Any]) -> Iterator[CaptionedImage]:
    """Yield the images of Karpathy's JSON, in its order."""
    for image in content["images"]:
        name = "/".join(part for part in (image.get("filepath"), image["filename"]) if part)
        problem = f"{path}: {name}: split {brief_repr(image['split'])}"
        require(image["split"] in SPLITS, f"{problem}; expected one of {', '.join(SPLITS)}")
        of_coco = "cocoid" in image
        key, sentences = image["cocoid" if of_coco else "imgid"], image["sentences"]
        texts = [sentence["raw"] for sentence in sentences]
        yield captioned_image(path, key, name, SPLITS[image["split"]], texts, of_coco)


def read_annotations(path: Path, content: dict[str, Any]) -> Iterator[CaptionedImage]:
    """Yield the images of MSCOCO's annotations, by id."""
    from pycocotools.coco import COCO

    is_val = path.name.startswith("captions_val")
    expected = "expected a name that begins with captions_train or captions_val"
    require(is_val or path.name.startswith("captions_train"), f"{path}: {expected}")
    subfolder = path.stem.removeprefix("captions_")  # train2014, for example
    coco = COCO()
    coco.dataset = content
    with redirect_stdout(io.StringIO()):  # it prints what it does
        coco.createIndex()
    images = sorted(content["images"], key=lambda image: image["id"])
    held_out = min(HELD_OUT, len(images) // 2) if is_val else 0
    for number, image in enumerate(images):
        split: SplitName = "train"
        if number < 2 * held_out:
            split = "dev" if number < held_out else "test"
        annotations = sorted(coco.imgToAnns[image["id"]], key=lambda a: a["id"])
        texts = [a["caption"] for a in annotations]
        name = f"{subfolder}/{image['file_name']}"
        yield captioned_image(path, image["id"], name, split, texts, True)


def captioned_image(
    path: Path, key: Any, name: str, split: SplitName, sentences: Sequence[str], of_coco: bool
) -> CaptionedImage:
    """Return an image with its first five sentences, each on one line.

    Raises InputError if the id is no line of text, the name leaves the folder of the images, or a
    sentence is unusable.
    """
    expected = "expected a name inside the folder of the images"
    require(stays_inside(name), f"{path}: file name {name!r}; {expected}")
    what, n = f"{path}: {name}", CAPTIONS_PER_IMAGE
    is_line = isinstance(key, int | str) and str(key).isprintable() and str(key).strip() == str(key)
    require(is_line and key != "", f"{what}: id {brief_repr(key)}; expected a line of text")
    require(len(sentences) >= n, f"{what}: {len(sentences)} sentences; expected {n}")
    captions = tuple(" ".join(sentence.split()) for sentence in sentences[:n])
    for number, line in enumerate(captions, 1):
        problem = f"{what}, sentence {number}: {line[:40]!r}, {len(line)} characters"
        expected = f"expected text of 1 to {LONGEST_CAPTION} characters"
        require(0 < len(line) <= LONGEST_CAPTION, f"{problem}; {expected}")
        line.encode()  # raises ValueError for half a surrogate pair, which UTF-8 cannot hold
    return CaptionedImage(str(key), name, split, captions, of_coco)


def group_by_split(
    images: Sequence[CaptionedImage], train: int | None
) -> dict[SplitName, list[CaptionedImage]]:
    """Return the images of each split that has any, at most `train` of train; testall of MSCOCO."""
    names: tuple[SplitName, ...] = ("train", "dev", "test")
    splits = {name: [image for image in images if image.split == name] for name in names}
    splits["train"] = splits["train"][:train]
    if any(image.of_coco for image in images):
        splits["testall"] = splits["test"]
        splits["test"] = splits["testall"][:TEST_1K]
    return {name: chosen for name, chosen in splits.items() if chosen}


def check_existing(folder: Path, splits: Mapping[SplitName, Sequence[CaptionedImage]]) -> None:
    """Raise InputError if the folder has features, or a whole split, of other images."""
    for name in get_args(SplitName):
        features, captions = split_files(folder, name)
        if name not in splits:
            for path in (features, captions, ids_file(folder, name)):
                problem = f"{path}: is of a split that the JSON does not have; move it away"
                require(not os.path.lexists(path), problem)
        elif os.path.lexists(features):
            ids, names = read_lines(ids_file(folder, name), "ids, one a line"), read_names(folder)
            images = [(image.key, image.name) for image in splits[name]]
            problem = f"{features}: is of other images or in another order; move it away"
            require([(key, names.get(key)) for key in ids] == images, problem)


def write(
    folder: Path, splits: Mapping[SplitName, Sequence[CaptionedImage]], inputs: Sequence[str]
) -> None:
    """Write captions, ids and file names. Raises InputError if that would overwrite an input."""
    texts = {}
    for name, images in splits.items():
        texts[split_files(folder, name)[1]] = [text for image in images for text in image.captions]
        texts[ids_file(folder, name)] = [image.key for image in images]
    for path in (names_file(folder), *texts):
        check_writable(path, inputs)
    every = [image for images in splits.values() for image in images]
    write_json(names_file(folder), {image.key: image.name for image in every})
    for path, lines in texts.items():
        write_lines(path, lines)
        print_line(f"{path}: {len(lines)} lines")


def main() -> None:
    options = parse(Options, None, __doc__ or "")
    images = [image for path in options.json for image in read(Path(path))]
    require(bool(images), f"{options.json[0]}: holds no image")
    key, count = Counter(image.key for image in images).most_common(1)[0]
    problem = f"{summarise(options.json)}: id {key} belongs to {count} images; expected one"
    require(count == 1, problem)
    folder, splits = Path(options.out), group_by_split(images, options.train)
    with explain_os_errors(folder, "a folder to write to"):
        folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder / LOCK):
        check_existing(folder, splits)
        write(folder, splits, options.json)


if __name__ == "__main__":
    run(main)
