"""caption_files.py — images and their captions from the files that data sets come with.

    Karpathy's JSON       {"images": [{"imgid", "filename", "split", "sentences": [{"raw"}]}]}
    MSCOCO's annotations  {"images": [{"id", "file_name"}],
                           "annotations": [{"id", "image_id", "caption"}]}
    token file            NAME#0 TAB caption, as in Flickr30K's results_20130124.token
    bar-separated file    NAME| 0| caption, as in results.csv of Flickr30K on Kaggle
    CSV table             with columns image or file_name, and caption or text
    JSON lines            {"file_name", "caption" or "text"} a line

The content decides the format. In the last four, lines of one file name are one image's captions. A
split is the field `split`, or the first folder of the file name; metadata.csv and metadata.jsonl
may lie in that folder, as in an image folder of Hugging Face.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from common.errors import InputError, brief_repr, require, summarise
from common.files import read_text
from common.layout import LONGEST_CAPTION, SplitName, is_one_line, stays_inside

SPLITS: dict[str, SplitName] = {
    **{"train": "train", "restval": "train", "test": "test"},
    **dict.fromkeys(("dev", "val", "valid", "validation"), "dev"),
}
HELD_OUT = 5000  # images of MSCOCO's dev and test splits
TOKEN_LINE = re.compile(r"(?P<file_name>[^\t]+)#[0-9]+\t(?P<caption>.*)")
# Line 20,000 of Kaggle's file lacks the second bar.
BAR_LINE = re.compile(r"(?P<file_name>[^|]+?)\s*\|\s*[0-9]+\s*\|?(?P<caption>.*)")
BAR_HEADER = ["image_name", "comment_number", "comment"]
FILE_NAME, CAPTION = ("file_name", "image"), ("caption", "text")  # fields of tables
EXPECTED = (
    "Karpathy's JSON, MSCOCO's annotations, a token file (NAME#0 TAB caption), a CSV table whose "
    "header has image,caption or file_name,text, or JSON lines with file_name and caption or text"
)


@dataclass(frozen=True)
class CaptionedImage:
    """An image and its captions."""

    key: str  # its id
    name: str  # of its file, with the subfolder that the data set gives
    split: SplitName | None  # None: the file has no splits
    captions: tuple[str, ...]  # at least one
    of_coco: bool


Record = dict[str, Any]  # the fields of one line


def read(path: Path) -> tuple[str, list[CaptionedImage]]:
    """Return the name of the file's format, and its images, all with a split or all without one.

    Raises InputError if the file has none of the formats, or an image or caption is unusable.
    """
    form, reader = recognise(path, read_text(path, EXPECTED))
    images: list[CaptionedImage] = []
    try:
        for image in reader:
            images.append(image)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        # A value is missing or of another type; annotations are counted in the order of ids.
        reason = f"{type(error).__name__}: {error}"[:200]
        raise InputError(f"{path}: image {len(images)}: {reason}; expected {form}") from error
    require(bool(images), f"{path}: holds no image; expected {EXPECTED}")
    without = [image.name for image in images if image.split is None]
    problem = f"{path}: no split of {summarise(without)}; expected one, as other images have"
    require(len(without) in (0, len(images)), problem)
    return form, images


def recognise(path: Path, text: str) -> tuple[str, Iterator[CaptionedImage]]:
    """Return the name of a file's format, and the reader of its content `text`."""
    first = text.lstrip().partition("\n")[0].rstrip()
    columns = columns_of(re.split("[,|]", first.replace('"', "")))
    if first.startswith("{"):
        return recognise_json(path, text)
    if TOKEN_LINE.fullmatch(first):
        return "token file", read_records(path, pattern_records(path, text, TOKEN_LINE))
    if columns == BAR_HEADER:
        records = pattern_records(path, text.lstrip().removeprefix(first), BAR_LINE)
        return "bar-separated file", read_records(path, records)
    if set(FILE_NAME) & set(columns) and set(CAPTION) & set(columns):
        return "CSV table", read_records(path, csv_records(path, text))
    raise InputError(f"{path}: begins with {brief_repr(first[:60])}; expected {EXPECTED}")


def recognise_json(path: Path, text: str) -> tuple[str, Iterator[CaptionedImage]]:
    """Tell JSON lines, whose first object has a file name, from one JSON object."""
    try:
        content, end = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}; expected {EXPECTED}") from error
    if set(FILE_NAME) & set(content):
        return "JSON lines", read_records(path, json_records(path, text))
    has_images = isinstance(content.get("images"), list)
    problem = f"{path}: a JSON object of {summarise([*map(repr, content)]) or 'nothing'}, no images"
    require(has_images, f"{problem}; expected {EXPECTED}")
    rest = text.lstrip()[end:].strip()
    require(not rest, f"{path}: {brief_repr(rest[:60])} after its JSON object; expected one object")
    if "annotations" in content:
        return "MSCOCO's annotations", read_annotations(path, content)
    return "Karpathy's JSON", read_karpathy(path, content)


def columns_of(header: Sequence[str]) -> list[str]:
    return [column.strip().lower() for column in header]


# One JSON object


def read_karpathy(path: Path, content: Record) -> Iterator[CaptionedImage]:
    """Yield the images of Karpathy's JSON, in its order."""
    for image in content["images"]:
        name = "/".join(part for part in (image.get("filepath"), image["filename"]) if part)
        of_coco = "cocoid" in image
        key = image["cocoid" if of_coco else "imgid"]
        texts = [sentence["raw"] for sentence in image["sentences"]]
        yield captioned_image(path, key, name, image.get("split"), texts, of_coco)


def read_annotations(path: Path, content: Record) -> Iterator[CaptionedImage]:
    """Yield the images of MSCOCO's annotations, or of others in that form, by id.

    MSCOCO's are known by the names of their files, which give splits and subfolders.
    """
    from pycocotools.coco import COCO

    is_val = path.name.startswith("captions_val")
    of_coco = is_val or path.name.startswith("captions_train")
    subfolder = path.stem.removeprefix("captions_") + "/" if of_coco else ""  # train2014/
    coco = COCO()
    coco.dataset = content
    with redirect_stdout(io.StringIO()):  # it prints what it does
        coco.createIndex()
    images = sorted(content["images"], key=lambda image: image["id"])
    held_out = min(HELD_OUT, len(images) // 2) if is_val else 0
    for number, image in enumerate(images):
        split = "train" if of_coco else None
        if number < 2 * held_out:
            split = "dev" if number < held_out else "test"
        annotations = sorted(coco.imgToAnns[image["id"]], key=lambda a: a["id"])
        texts = [a["caption"] for a in annotations]
        name = f"{subfolder}{image['file_name']}"
        yield captioned_image(path, image["id"], name, split, texts, of_coco)


# Lines: each reader yields the number of a line and its fields


def filled_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers from 1."""
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def pattern_records(
    path: Path, text: str, pattern: re.Pattern[str]
) -> Iterator[tuple[int, Record]]:
    """Read lines of a file name, the number of a caption, and the caption."""
    for number, line in filled_lines(text):
        match = pattern.fullmatch(line.strip())
        problem = f"{path}: line {number} is {brief_repr(line[:60])}"
        if match is None:
            raise InputError(f"{problem}; expected a file name, a number and a caption")
        yield number, match.groupdict()


def csv_records(path: Path, text: str) -> Iterator[tuple[int, Record]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] = []
    try:
        for row in filter(None, rows):
            if not columns:
                columns = columns_of(row)
                continue
            problem = f"{path}: line {rows.line_num}: {len(row)} fields; expected {len(columns)}"
            require(len(row) == len(columns), f"{problem}, text with a comma in quotes")
            yield rows.line_num, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}: line {rows.line_num}: {error}; expected a CSV table") from error


def json_records(path: Path, text: str) -> Iterator[tuple[int, Record]]:
    for number, line in filled_lines(text):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = f"{path}: line {number}: not JSON: {error}"
            raise InputError(f"{problem}; expected one object a line") from error
        require(isinstance(record, dict), f"{path}: line {number}: expected a JSON object")
        yield number, record


def read_records(path: Path, records: Iterable[tuple[int, Record]]) -> Iterator[CaptionedImage]:
    """Yield the images of records with a caption each, in the order of their first captions."""
    folder = path.absolute().parent.name
    subfolder = f"{folder}/" if path.stem == "metadata" and folder in SPLITS else ""
    captions: dict[str, list[str]] = {}
    splits: dict[str, Any] = {}
    for line, record in records:
        where = f"{path}: line {line}"
        name = subfolder + text_field(where, record, FILE_NAME)
        captions.setdefault(name, []).append(text_field(where, record, CAPTION))
        split = record.get("split") or split_of(name)
        known = splits.setdefault(name, split)
        problem = f"{where}: {name}: split {brief_repr(split)}"
        require(split == known, f"{problem}; expected {brief_repr(known)}, as before")
    for name, texts in captions.items():
        yield captioned_image(path, name.strip(), name, splits[name], texts)


def text_field(where: str, record: Record, names: Sequence[str]) -> str:
    """Return the first of these fields that the record has. Raises InputError if it is no text."""
    value = next((record[name] for name in names if name in record), None)
    if not isinstance(value, str):
        raise InputError(f"{where}: {brief_repr(value)}; expected text as {' or '.join(names)}")
    return value


def split_of(name: str) -> str | None:
    """Return the first folder of a file name if it is called like a split."""
    folder = PurePosixPath(name).parts[:-1][:1]
    return folder[0] if folder and folder[0] in SPLITS else None


def captioned_image(
    path: Path, key: Any, name: str, split: Any, sentences: Sequence[str], of_coco: bool = False
) -> CaptionedImage:
    """Return an image with its captions, each on one line.

    Raises InputError if the id is no line of text, the name leaves the folder of the images, the
    split is unknown, or a caption is missing or unusable.
    """
    expected = "expected a name inside the folder of the images"
    require(stays_inside(name), f"{path}: file name {name!r}; {expected}")
    what = f"{path}: {name}"
    is_id = isinstance(key, int | str) and is_one_line(str(key)) and str(key).strip() == str(key)
    require(is_id and key != "", f"{what}: id {brief_repr(key)}; expected a line of text")
    is_known = split is None or split in SPLITS
    require(is_known, f"{what}: split {brief_repr(split)}; expected one of {', '.join(SPLITS)}")
    captions = tuple(" ".join(sentence.split()) for sentence in sentences)
    require(bool(captions), f"{what}: no caption; expected one or more")
    for number, line in enumerate(captions, 1):
        problem = f"{what}, caption {number}: {line[:40]!r}, {len(line)} characters"
        expected = f"expected text of 1 to {LONGEST_CAPTION} characters"
        require(0 < len(line) <= LONGEST_CAPTION, f"{problem}; {expected}")
        line.encode()  # raises ValueError for half a surrogate pair, which UTF-8 cannot hold
    return CaptionedImage(
        str(key), name, None if split is None else SPLITS[split], captions, of_coco
    )
