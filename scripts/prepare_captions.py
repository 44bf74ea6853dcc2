"""prepare_captions.py — captions, ids and file names of a data set in SCAN's layout.

    python -m scripts.prepare_captions dataset_flickr30k.json --out data/f30k_precomp
    python -m scripts.prepare_captions dataset_coco.json --out data/coco_precomp
    python -m scripts.prepare_captions captions_train2014.json captions_val2014.json --out data/coco

JSON is Karpathy's (dataset_flickr8k.json, dataset_flickr30k.json, dataset_coco.json, or your own
pictures in that form) or MSCOCO's annotations (captions_*.json, through pycocotools).

Splits. Karpathy's: train and restval become train, val becomes dev, test becomes test. MSCOCO's
annotations: captions_train* becomes train; of captions_val*, by id of the picture, the first 5,000
become dev, the next 5,000 test and the rest train (of fewer than 10,000, halves become dev and
test). Of MSCOCO, in either form, testall holds the whole test split and test its first 1,000.

Written: {split}_caps.txt, five lines a picture (its first five sentences, each on one line);
{split}_ids.txt, one id a picture (MSCOCO's id of the picture, else Karpathy's imgid);
id_mapping.json, id to file name. A picture with fewer than five sentences is an error.
"""

import contextlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pycocotools.coco import COCO

from common.cli import parse, print_line, progress, run
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

SPLITS = {"train": "train", "restval": "train", "val": "dev", "test": "test"}
TEST_1K = 1000  # pictures of MSCOCO's test split that the 1K figures' first fold is
HELD_OUT = 5000  # pictures of MSCOCO's dev and test splits
WANTED = "Karpathy's JSON or MSCOCO's annotations"


@dataclass(frozen=True)
class Options:
    json: Annotated[list[str], "Karpathy's JSON or MSCOCO's captions_*.json", "JSON"]
    out: Annotated[str, "data set's folder to write, DATA_PATH/DATA_NAME"]
    train: Annotated[int | None, "only the first N pictures of train (all of them)"] = None

    def __post_init__(self) -> None:
        check_range(self, ("train",), 1)


@dataclass(frozen=True)
class Picture:
    """A picture and what is said of it."""

    key: str
    name: str  # of its file, with the subfolder that the JSON gives
    split: str
    captions: tuple[str, ...]
    of_coco: bool


def plain(value: Any, kind: type, what: str) -> Any:
    """A value of a JSON file that must be of a type. Raises InputError that says what it is."""
    fits = isinstance(value, kind) and not isinstance(value, bool)
    names = "a list" if kind is list else {dict: "an object", str: "text", int: "a number"}[kind]
    require(fits, f"{what}: {brief_repr(value)}; expected {names}")
    return value


def file_name(parts: Sequence[str], what: str) -> str:
    """A relative name without a way out of the pictures' folder. Raises InputError."""
    name = "/".join(part for part in parts if part)
    message = f"{what}: file name {name!r}; expected one inside the pictures' folder"
    require(stays_inside(name), message)
    return name


def first_five(sentences: Sequence[Any], what: str) -> tuple[str, ...]:
    """The first five sentences, each made one line. Raises InputError that names the picture."""
    require(
        len(sentences) >= CAPTIONS_PER_IMAGE,
        f"{what}: {len(sentences)} sentences; expected {CAPTIONS_PER_IMAGE}",
    )
    lines = []
    for number, sentence in enumerate(sentences[:CAPTIONS_PER_IMAGE], 1):
        line = " ".join(plain(sentence, str, f"{what}, sentence {number}").split())
        whole = 0 < len(line) <= LONGEST_CAPTION and not any(
            "\ud800" <= c <= "\udfff" for c in line
        )
        found = f"{what}, sentence {number}: {line[:40]!r}, {len(line)} characters"
        require(whole, f"{found}; expected text of 1 to {LONGEST_CAPTION} characters")
        lines.append(line)
    return tuple(lines)


def of_karpathy(path: Path, content: dict[str, Any]) -> Iterator[Picture]:
    """The pictures of Karpathy's JSON, in its order. Raises InputError."""
    for place, image in enumerate(plain(content["images"], list, f"{path}: images")):
        what = f"{path}: image {place}"
        plain(image, dict, what)
        names = [plain(image.get(k, ""), str, f"{what}, {k}") for k in ("filepath", "filename")]
        name = file_name(names, what)
        what = f"{path}: {name}"
        split = image.get("split")
        known = isinstance(split, str) and split in SPLITS
        require(known, f"{what}: split {brief_repr(split)}; expected one of {', '.join(SPLITS)}")
        key = "cocoid" if "cocoid" in image else "imgid"
        number = plain(image.get(key), int, f"{what}, {key}")
        sentences = plain(image.get("sentences"), list, f"{what}, sentences")
        raw = [plain(s, dict, f"{what}, sentences").get("raw") for s in sentences]
        yield Picture(str(number), name, SPLITS[split], first_five(raw, what), key == "cocoid")


def of_annotations(path: Path, content: dict[str, Any]) -> Iterator[Picture]:
    """The pictures of MSCOCO's annotations, by id. Raises InputError."""
    for part, fields in {
        "images": {"id": int, "file_name": str},
        "annotations": {"id": int, "image_id": int, "caption": str},
    }.items():
        for place, entry in enumerate(plain(content.get(part), list, f"{path}: {part}")):
            plain(entry, dict, f"{path}: {part} {place}")
            for field, kind in fields.items():
                plain(entry.get(field), kind, f"{path}: {part} {place}, {field}")
    kinds = [kind for kind in ("train", "val") if path.name.startswith(f"captions_{kind}")]
    require(bool(kinds), f"{path}: expected a name that begins with captions_train or captions_val")
    pictures = path.stem.removeprefix("captions_")  # train2014, say: the folder they come in
    counts = Counter(image["id"] for image in content["images"])
    twice = [str(number) for number, times in counts.items() if times > 1]
    require(
        not twice, f"{path}: images hold id {summarise(twice)} twice; expected an id of its own"
    )
    owners = {said["image_id"] for said in content["annotations"]}
    strange = sorted(map(str, owners - counts.keys()))
    require(not strange, f"{path}: annotations of image {summarise(strange)}, which is not there")
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does
        coco.createIndex()
    ids = sorted(coco.imgs)
    held = min(HELD_OUT, len(ids) // 2) if kinds == ["val"] else 0
    for place, number in enumerate(ids):
        what = f"{path}: {coco.imgs[number]['file_name']}"
        said = sorted(coco.imgToAnns[number], key=lambda annotation: annotation["id"])
        captions = first_five([annotation["caption"] for annotation in said], what)
        name = file_name([pictures, coco.imgs[number]["file_name"]], what)
        split = "dev" if place < held else "test" if place < 2 * held else "train"
        yield Picture(str(number), name, split, captions, True)


def read(path: Path) -> list[Picture]:
    """The pictures of one JSON file. Raises InputError."""
    content = read_json(path, WANTED)
    require("images" in content, f"{path}: has no images; expected {WANTED}")
    reader = of_annotations if "annotations" in content else of_karpathy
    return list(reader(path, content))


def splits_of(pictures: Sequence[Picture], train: int | None) -> dict[str, list[Picture]]:
    """The pictures of each split that has any; of MSCOCO also testall.

    Of train it is the first `train` ones, where that is given.
    """
    found = {s: [p for p in pictures if p.split == s] for s in ("train", "dev", "test")}
    found["train"] = found["train"][:train]
    if any(picture.of_coco for picture in pictures):
        found["testall"] = found["test"]
        found["test"] = found["testall"][:TEST_1K]
    return {name: chosen for name, chosen in found.items() if chosen}


def check_there(folder: Path, splits: Mapping[str, list[Picture]]) -> None:
    """Raise InputError where what is there is of other pictures: rows and ids would not fit."""
    for name in get_args(SplitName):
        features, captions = split_files(folder, name)
        ids, pictures = ids_file(folder, name), splits.get(name)
        if pictures is None:
            for path in (features, captions, ids):
                message = f"{path}: is of a split that the JSON has not; move it away"
                require(not os.path.lexists(path), message)
        elif os.path.lexists(features):
            message = f"{features}: is of other pictures or in another order; move it away"
            require(are_of(pictures, folder, ids), message)


def are_of(pictures: Sequence[Picture], folder: Path, ids: Path) -> bool:
    """Whether a split's ids and file names are those of these pictures, in their order."""
    try:
        before, names = read_lines(ids, "ids, one a line"), read_names(folder)
    except InputError:
        return False
    return [(key, names.get(key)) for key in before] == [(p.key, p.name) for p in pictures]


def main() -> None:
    options = parse(Options, None, __doc__)
    pictures: list[Picture] = []
    with progress("reading", len(options.json), "file") as bar:
        for path in options.json:
            pictures += read(Path(path))
            bar.update()
    require(bool(pictures), f"{options.json[0]}: holds no picture")
    key, times = Counter(picture.key for picture in pictures).most_common(1)[0]
    sources = summarise(options.json)
    require(times == 1, f"{sources}: id {key} is {times} pictures'; expected an id for each")
    folder, splits = Path(options.out), splits_of(pictures, options.train)
    outputs = {os.path.realpath(path) for name in splits for path in files_of(folder, name)}
    for path in options.json:
        free = os.path.realpath(path) not in outputs
        require(free, f"--out {folder}: {path} would be written over; expected another folder")
    with explain_os_errors(folder, "a folder to write to"):
        folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder / LOCK):
        check_there(folder, splits)
        write(folder, splits)


def write(folder: Path, splits: Mapping[str, list[Picture]]) -> None:
    """Write captions, ids and file names."""
    pictures = [picture for chosen in splits.values() for picture in chosen]
    write_json(names_file(folder), {picture.key: picture.name for picture in pictures})
    for name, chosen in splits.items():
        _, captions = split_files(folder, name)
        write_lines(captions, [caption for picture in chosen for caption in picture.captions])
        write_lines(ids_file(folder, name), [picture.key for picture in chosen])
        print_line(f"{name}: {len(chosen)} pictures, {CAPTIONS_PER_IMAGE * len(chosen)} captions\n")


if __name__ == "__main__":
    run(main)
