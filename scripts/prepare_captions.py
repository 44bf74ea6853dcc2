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
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from common.cli import parse, print_line, run
from common.errors import InputError, brief_repr, check_range, require, summarise
from common.files import explain_os_errors, read_json, write_json, write_lines
from common.layout import (
    CAPTIONS_PER_IMAGE,
    LONGEST_CAPTION,
    SplitName,
    files_of,
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
    return list(reader(path, content))


@contextmanager
def explain_errors(what: str) -> Iterator[None]:
    """Turn the exceptions of a value that is missing or of another type into an InputError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{what}: {reason[:200]}; expected {EXPECTED}") from error


def read_karpathy(path: Path, content: dict[str, Any]) -> Iterator[CaptionedImage]:
    """Yield the images of Karpathy's JSON, in its order. Raises InputError."""
    for number, image in enumerate(content["images"]):
        with explain_errors(f"{path}: image {number}"):
            name = file_name([image.get("filepath", ""), image["filename"]], str(path))
            what = f"{path}: {name}"
            if image["split"] not in SPLITS:
                expected = f"expected one of {', '.join(SPLITS)}"
                raise InputError(f"{what}: split {brief_repr(image['split'])}; {expected}")
            of_coco = "cocoid" in image
            key = image_id(image["cocoid" if of_coco else "imgid"], what)
            captions = first_five([sentence["raw"] for sentence in image["sentences"]], what)
            yield CaptionedImage(key, name, SPLITS[image["split"]], captions, of_coco)


def read_annotations(path: Path, content: dict[str, Any]) -> Iterator[CaptionedImage]:
    """Yield the images of MSCOCO's annotations, by id. Raises InputError."""
    from pycocotools.coco import COCO

    is_val = path.name.startswith("captions_val")
    expected = "expected a name that begins with captions_train or captions_val"
    require(is_val or path.name.startswith("captions_train"), f"{path}: {expected}")
    subfolder = path.stem.removeprefix("captions_")  # train2014, for example
    coco = COCO()
    coco.dataset = content
    with explain_errors(str(path)), redirect_stdout(io.StringIO()):  # it prints what it does
        coco.createIndex()
        images = sorted(content["images"], key=lambda image: image["id"])
    held_out = min(HELD_OUT, len(images) // 2) if is_val else 0
    for number, image in enumerate(images):
        split: SplitName = "train"
        if number < 2 * held_out:
            split = "dev" if number < held_out else "test"
        with explain_errors(f"{path}: image {brief_repr(image['id'])}"):
            name = file_name([subfolder, image["file_name"]], str(path))
            what = f"{path}: {name}"
            annotations = sorted(coco.imgToAnns[image["id"]], key=lambda a: a["id"])
            captions = first_five([a["caption"] for a in annotations], what)
            yield CaptionedImage(image_id(image["id"], what), name, split, captions, True)


def image_id(value: Any, what: str) -> str:
    """Return an id as a line of {split}_ids.txt. Raises InputError if it is not one."""
    text = str(value)
    is_line = isinstance(value, int | str) and text.isprintable() and text == text.strip() != ""
    require(is_line, f"{what}: id {brief_repr(value)}; expected a number or a line of text")
    return text


def file_name(parts: Sequence[str], what: str) -> str:
    """Return a relative file name. Raises InputError if it leaves the folder of the images."""
    name = "/".join(part for part in parts if part)
    problem = f"{what}: file name {name!r}; expected one inside the folder of the images"
    require(stays_inside(name), problem)
    return name


def first_five(sentences: Sequence[str], what: str) -> tuple[str, ...]:
    """Return the first five sentences, each on one line. Raises InputError if one is unusable."""
    n = CAPTIONS_PER_IMAGE
    require(len(sentences) >= n, f"{what}: {len(sentences)} sentences; expected {n}")
    lines = tuple(" ".join(sentence.split()) for sentence in sentences[:n])
    for number, line in enumerate(lines, 1):
        problem = f"{what}, sentence {number}: {line[:40]!r}, {len(line)} characters"
        expected = f"expected text of 1 to {LONGEST_CAPTION} characters"
        require(0 < len(line) <= LONGEST_CAPTION, f"{problem}; {expected}")
        line.encode()  # raises ValueError for half a surrogate pair, which UTF-8 cannot hold
    return lines


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


def write(folder: Path, splits: Mapping[SplitName, Sequence[CaptionedImage]]) -> None:
    """Write captions, ids and file names."""
    every = [image for images in splits.values() for image in images]
    write_json(names_file(folder), {image.key: image.name for image in every})
    for name, images in splits.items():
        captions = [caption for image in images for caption in image.captions]
        write_lines(split_files(folder, name)[1], captions)
        write_lines(ids_file(folder, name), [image.key for image in images])
        print_line(f"{name}: {len(images)} images, {len(captions)} captions")


def main() -> None:
    options = parse(Options, None, __doc__ or "")
    images = [image for path in options.json for image in read(Path(path))]
    require(bool(images), f"{options.json[0]}: holds no image")
    key, count = Counter(image.key for image in images).most_common(1)[0]
    problem = f"{summarise(options.json)}: id {key} belongs to {count} images; expected one"
    require(count == 1, problem)
    folder, splits = Path(options.out), group_by_split(images, options.train)
    outputs = {os.path.realpath(path) for name in splits for path in files_of(folder, name)}
    for path in options.json:
        problem = f"--out {folder}: would overwrite {path}; expected another folder"
        require(os.path.realpath(path) not in outputs, problem)
    with explain_os_errors(folder, "a folder to write to"):
        folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder / LOCK):
        check_existing(folder, splits)
        write(folder, splits)


if __name__ == "__main__":
    run(main)
