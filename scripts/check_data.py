"""check_data.py — whether a data set's folder is whole, and what working with it will take.

    python -m scripts.check_data DATA_PATH/DATA_NAME                   # a table, what is wrong
    python -m scripts.check_data data/f30k_precomp --bert_path bert    # captions' WordPieces, too
    python -m scripts.check_data data/f30k_precomp --full              # every row is read

Exit status 0: nothing is wrong; 1: there are faults, and each is named; 2: there is no such folder.
Remarks are what you may want to know and is no fault. Without --full, NaN and repeated rows are
looked for in 200 images of a split, spread evenly. Needs are estimates for the published sizes
(256 wide, batches of 32 with one extra negative a pair) in float32 on a CPU. Training takes less
where activations are computed twice (a small --memory), and most where all are kept. Beside peaks
that were measured (Flickr8k with MiniLM, both directions) the less was 16 % too low, the most 13 %
too high in batches of 24, and evaluation on 200 images (i2t) 2 % too high.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, TypeVar, get_args

import numpy as np
import torch
from torch import nn

from files import check_writable, map_array, naming, read_json, write_json
from layout import (
    CAPTIONS_PER_IMAGE,
    SplitName,
    boxes_file,
    caption_faults,
    count_faults,
    count_images,
    extraction_file,
    files_of,
    finite_rows,
    id_faults,
    ids_file,
    kind_faults,
    name_faults,
    nameless_faults,
    names_file,
    number_faults,
    one_an_image,
    pictures_digest,
    read_lines,
    read_rows,
    rows_per_image,
    split_files,
)
from memory import free_memory, most_pairs, used_memory
from model import DIME
from options import InputError, check_range, parse, progress, require, run, say, some
from scoring import scoring_memory
from scripts.paper_table import markdown
from space import step_memory
from trainconfig import TrainConfig
from vocab import Vocabulary

SAMPLE = 200  # images of a split whose rows are read
BLOCK = 16  # images read at a time: 24 MB where SCAN's rows are repeated
CAPTION_BLOCK = 1000  # captions tokenised at a time
BASE_HIDDEN = 768  # of bert-base, where no BERT is given
FLOAT = 4  # bytes
# Bytes of the programs once BERT is read, without its weights: freed memory is kept, so it is the
# peak until then, measured with torch 2.14 on Linux.
PROGRAM = 890_000_000
COPIES = 3  # of the weights in a checkpoint: themselves and Adam's two moments
CHECKPOINTS = 4  # the newest, the one before, the best, and one that is being written
KNOWN = {
    "Flickr30K": {"train": 29_000, "dev": 1_014, "test": 1_000},
    "MSCOCO": {"train": 113_287, "test": 1_000, "testall": 5_000},
}
SAME_IMAGES = {"test", "testall"}  # MSCOCO's test is the first thousand of testall
UNREADABLE = 0.05  # share of [UNK] above which the vocabulary is not the captions'

FAULTY = 1  # exit status
CPU = torch.device("cpu")
HEAD = ["split", "images", "captions", "ids", "features", "type", "rows an image", "GB"]
HEAD += ["rows read", "longest caption", "cut"]
DISK = {"checkpoints": "checkpoints", "cache_text": "--cache_text", "scores": "--save_scores"}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Options:
    folder: Annotated[str, "the data set's folder", "DATA_PATH/DATA_NAME"]
    bert_path: Annotated[str | None, "folder of BERT: captions are held to its vocabulary"] = None
    max_words: Annotated[int, "WordPieces of a caption that training will read"] = 32
    full: Annotated[bool, "read every row of the features, not some"] = False
    json: Annotated[str | None, "write all that was found here"] = None

    def __post_init__(self) -> None:
        check_range(self, ("max_words",), 2)


@dataclass
class Found:
    """What is found of one split."""

    name: SplitName
    path: Path  # of the features
    captions: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()  # one an image
    shape: tuple[int, ...] | None = None  # of the features
    dtype: str = ""
    bytes: int = 0
    repeats: int = 0  # rows an image, 0 where features and captions do not fit each other
    rows_read: int = 0
    lengths: np.ndarray | None = None  # [T] WordPieces of each caption, uncut
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def attempt(self, work: Callable[..., Result], *given: object) -> Result | None:
        """What some work gives; where it cannot be done, that is a fault."""
        try:
            return work(*given)
        except InputError as error:
            self.faults.append(str(error))
            return None

    @property
    def images(self) -> int:
        """Images that there are captions of."""
        return len(self.captions) // CAPTIONS_PER_IMAGE

    def as_dict(self, max_words: int) -> dict[str, Any]:
        """Plain data."""
        about = {
            "name": self.name,
            "images": self.images,
            "captions": len(self.captions),
            "ids": len(self.ids),
            "shape": self.shape,
            "dtype": self.dtype,
            "rows_per_image": self.repeats,
            "bytes": self.bytes,
            "rows_read": self.rows_read,
        }
        if self.lengths is None:
            return about
        cut = int((self.lengths > max_words).sum())
        return about | {"longest": int(self.lengths.max()), "cut": cut}


def looked_at(folder: Path, name: SplitName, full: bool) -> Found:
    """All that is wrong with a split's own files."""
    path, captions_path = split_files(folder, name)
    found = Found(name, path)
    captions = found.attempt(read_lines, captions_path, "captions, one a line")
    if captions is not None:
        found.captions = captions
        found.faults += caption_faults(captions_path, captions, allow_empty=name != "train")
        if name != "train" and "" in captions:
            found.remarks.append(f"{captions_path}: {captions.count('')} captions are empty")
        found.attempt(count_images, captions_path, captions)
    features = found.attempt(map_array, path, "region features, a .npy file")
    if features is not None:
        look_at_features(found, features, full)
    ids_path, boxes_path = ids_file(folder, name), boxes_file(folder, name)
    if os.path.lexists(ids_path):
        look_at_ids(found, ids_path)
    if os.path.lexists(boxes_path) and found.repeats:
        boxes = found.attempt(map_array, boxes_path, "boxes, a .npy file")
        if boxes is not None:
            found.faults += box_faults(boxes_path, boxes, (found.images, features.shape[1], 4))
    return found


def box_faults(path: Path, boxes: np.ndarray, shape: tuple[int, ...]) -> Iterator[str]:
    """Boxes that are none of a split's regions."""
    if boxes.shape != shape or boxes.dtype.kind != "f":
        yield f"{path}: shape {boxes.shape}, {boxes.dtype}; expected {shape} of floats"
    elif not finite_rows(boxes).all():
        yield f"{path}: row {finite_rows(boxes).argmin()} holds NaN or infinite numbers"


def look_at_features(found: Found, features: np.memmap, full: bool) -> None:
    """Kind, size on the disk, rows for captions, and what the rows hold."""
    path = found.path
    found.shape, found.dtype = features.shape, str(features.dtype)
    found.bytes = path.stat().st_size
    more = found.bytes - features.offset - features.nbytes
    if more:
        found.faults.append(f"{path}: {more} bytes more than its header asks for")
    kinds = list(kind_faults(path, features))
    found.faults += kinds
    if kinds:
        return
    if not features.flags.c_contiguous:
        found.remarks.append(
            f"{path}: is stored in Fortran's order, in which rows are slow to read"
        )
    if found.captions:
        found.repeats = rows_per_image(len(features), len(found.captions))
        if len(found.captions) % CAPTIONS_PER_IMAGE == 0:  # else it is said already
            found.faults += count_faults(path, len(features), len(found.captions))
    read_through(found, features, full)


def read_through(found: Found, features: np.memmap, full: bool) -> None:
    """Rows of all images, or of some: whether they are numbers, and equal where repeated."""
    together = found.repeats or 1
    images = len(features) // together
    chosen = np.unique(np.linspace(0, images - 1, images if full else SAMPLE, dtype=int))
    bad, unequal, zero = [], [], 0
    with progress(f"reading {found.path.name}", len(chosen), "images") as bar:
        for first in range(0, len(chosen), BLOCK):
            block = chosen[first : first + BLOCK]
            rows = (block[:, None] * together + np.arange(together)).ravel()
            numbers = read_rows(features, rows)
            bad += rows[~finite_rows(numbers)].tolist()
            zero += int((~numbers.any((1, 2))).sum())
            bits = numbers.view(np.int32).reshape(len(block), together, -1)  # NaN equals itself
            unequal += block[(bits != bits[:, :1]).any((1, 2))].tolist()
            found.rows_read += len(rows)
            bar.update(len(block))
    found.faults += number_faults(found.path, bad)
    if unequal:
        found.faults.append(
            f"{found.path}: the five rows of image {some([str(image) for image in unequal])} "
            "differ; expected one row five times, since there is a row for each caption"
        )
    if zero:
        found.remarks.append(
            f"{found.path}: {zero} of the {found.rows_read} rows read hold zeros alone, as where "
            "an extraction was cut off"
        )


def look_at_ids(found: Found, path: Path) -> None:
    """A line for each image or for each caption, and no image twice."""
    ids = found.attempt(read_lines, path, "ids, one a line")
    if ids is None or not found.images or len(found.captions) % CAPTIONS_PER_IMAGE:
        return
    if len(ids) == len(found.captions) == len(set(ids)):
        return  # of captions, which name no images
    faults = list(id_faults(path, ids, found.images))
    found.faults += faults
    if not faults:
        found.ids = one_an_image(ids, found.images)


def between(splits: list[Found], folder: Path) -> Iterator[str]:
    """Faults of splits that do not go together, and of ids without a file."""
    wide = [split for split in splits if split.shape and len(split.shape) == 3]
    for split in wide[1:]:
        if split.shape[2] != wide[0].shape[2]:
            yield (
                f"{split.path}: features are {split.shape[2]} wide; expected {wide[0].shape[2]}, "
                f"as in {wide[0].path.name}"
            )
    for number, one in enumerate(splits):
        for other in splits[number + 1 :]:
            shared = sorted(set(one.ids) & set(other.ids))
            if shared and {one.name, other.name} != SAME_IMAGES:
                yield (
                    f"{ids_file(folder, other.name)}: {some(shared)} is in {one.name}_ids.txt, "
                    "too; expected other images in every split"
                )
    mapping = names_file(folder)
    if os.path.lexists(mapping):
        try:
            names = read_json(mapping, "the file name of each id")
        except InputError as error:
            yield str(error)
            return
        yield from name_faults(mapping, names)
        for split in splits:
            yield from nameless_faults(ids_file(folder, split.name), names, split.ids)
            yield from picture_faults(split, folder, names)


def picture_faults(split: Found, folder: Path, names: dict[str, Any]) -> Iterator[str]:
    """Features that extract_regions made of other pictures than the ids are of now."""
    path = extraction_file(folder, split.name)
    if not path.exists() or not split.ids or any(key not in names for key in split.ids):
        return
    try:
        record = read_json(path, "what extract_regions did")
    except InputError as error:
        yield str(error)
        return
    if record.get("renaming"):
        yield f"{path}: features and boxes may be of two extractions; extract_regions goes on"
    about = record.get("about")
    then = about.get("ids") if isinstance(about, dict) else None
    if then != pictures_digest(split.ids, names):
        yield (
            f"{path}: features are of other pictures than {split.name}_ids.txt and "
            f"{names_file(folder).name} tell; extract_regions --overwrite makes them anew"
        )


def remarks_on(splits: list[Found], folder: Path) -> Iterator[str]:
    """What is no fault of the splits together."""
    names = {split.name for split in splits}
    for name in ("train", "dev"):
        if name not in names:
            yield f"{folder}: holds no {name}, which train.py needs"
    if not names & SAME_IMAGES:
        yield f"{folder}: holds no test, which evaluate_models.py reads if not told otherwise"
    regions = {split.shape[1] for split in splits if split.shape and len(split.shape) == 3}
    if len(regions) > 1:
        yield f"{folder}: images have {' or '.join(map(str, sorted(regions)))} regions, by split"
    yield counts_remark({split.name: split.images for split in splits})


def counts_remark(counts: Mapping[str, int]) -> str:
    """Whether the numbers of images are those of a data set that is published."""
    told = []
    for title, known in KNOWN.items():
        shared = counts.keys() & known.keys()
        if shared and all(counts[name] == known[name] for name in shared):
            return f"the numbers of images are {title}'s"
        told.append(f"{title}'s ({', '.join(f'{n:,} {name}' for name, n in known.items())})")
    return f"the numbers of images are not {', nor '.join(told)}"


def look_at_words(found: Found, vocabulary: Vocabulary, max_words: int) -> None:
    """Lengths of captions, and whether the vocabulary is theirs."""
    parts, unknown = [], 0
    with progress(f"tokenising {found.name}", len(found.captions), "captions") as bar:
        for first in range(0, len(found.captions), CAPTION_BLOCK):
            lengths, unk = vocabulary.lengths(found.captions[first : first + CAPTION_BLOCK])
            parts.append(lengths.numpy())
            unknown += int(unk.sum())
            bar.update(len(lengths))
    found.lengths = np.concatenate(parts) if parts else None
    if found.lengths is None:
        return
    cut = int((found.lengths > max_words).sum())
    if cut:
        found.remarks.append(
            f"{found.name}: {cut} captions are longer than --max_words {max_words} and will be "
            f"cut; the longest has {found.lengths.max()} WordPieces"
        )
    share = unknown / max(1, int(found.lengths.sum()) - 2 * len(found.lengths))
    if share > UNREADABLE:
        found.faults.append(
            f"{vocabulary.path}: {100 * share:.0f} % of the WordPieces of {found.name} are [UNK]; "
            "expected the vocabulary of the captions' language"
        )


def bert_sizes(bert_path: str) -> tuple[int, int]:
    """Bytes of BERT's weights, and its width. Raises InputError where no configuration is there."""
    # asked for here, since it brings transformers, which take 200 MB
    from bert import bert_config, bert_parameters

    config = bert_config(bert_path)
    return FLOAT * bert_parameters(config), config.hidden_size


def needs(
    splits: list[Found], bert: tuple[int, int] | None, max_words: int
) -> list[dict[str, Any]]:
    """Estimates of memory and disk, in bytes, from what the rooms say that they take.

    `bert` is what `bert_sizes` gives, None where it is not known: its weights are not counted.
    """
    weights, hidden = bert or (0, BASE_HIDDEN)
    base = PROGRAM + weights
    usable = {split.name: split for split in splits if split.repeats and split.images}
    rows = []
    for direction in ("i2t", "t2i") if "train" in usable else ():
        rows.append(of_training(usable["train"], direction, base, hidden, max_words))
    for name in [name for name in ("dev", "test", "testall") if name in usable]:
        split = usable[name]
        for models, title in ((1, "one model"), (2, "an ensemble")):
            sizes = (split.images, len(split.captions), split.shape[1], max_words)
            memory = base + scoring_memory(*sizes, TrainConfig().embed_size, models)
            scores = split.images * len(split.captions) * FLOAT
            what = f"evaluation of {title} on {name}"
            rows.append({"what": what, "least": memory, "most": memory, "scores": scores})
    return rows


def of_training(
    split: Found, direction: str, base: int, hidden: int, max_words: int
) -> dict[str, Any]:
    """What training takes: with no activation kept, and with all of them."""
    extra = {"extra_stc": 1} if direction == "i2t" else {"extra_img": 1}
    regions, img_dim = split.shape[1:]
    config = TrainConfig(direction=direction, img_dim=img_dim, max_words=max_words, **extra)
    pairs = 2 * config.batch_size**2
    at_once = min(pairs, most_pairs(CPU, config.embed_size))
    size = (regions if direction == "i2t" else max_words) * config.embed_size * FLOAT
    least, most = (base + int(step_memory(at_once, kept, size)) for kept in (0, pairs))
    return {
        "what": f"training {direction}",
        "least": least,
        "most": most,
        "checkpoints": CHECKPOINTS * COPIES * FLOAT * weights_of(config, hidden),
        "cache_text": len(split.captions) * max_words * hidden * FLOAT,
    }


def weights_of(config: TrainConfig, hidden: int) -> int:
    """Numbers that a model learns, beside a BERT of that width."""
    bert = nn.Module()
    bert.config = SimpleNamespace(hidden_size=hidden)
    with torch.device("meta"):
        return sum(weight.numel() for weight in DIME(config, bert).parameters())


def said(report: dict[str, Any]) -> str:
    """The report as text."""
    rows = []
    for split in report["splits"]:
        shape = " x ".join(map(str, split["shape"] or ())) or "none"
        read = f"{split['rows_read']:,} of {split['shape'][0]:,}" if split["shape"] else "none"
        words = [str(split[key]) if key in split else "-" for key in ("longest", "cut")]
        counts = [f"{split[key]:,}" for key in ("images", "captions", "ids")]
        gigabytes = f"{split['bytes'] / 1e9:.2f}"
        repeats = str(split["rows_per_image"] or "-")
        rows.append(
            [split["name"], *counts, shape, split["dtype"], repeats, gigabytes, read, *words]
        )
    parts = [markdown(HEAD, rows)]
    for title, lines in (("Faults", report["faults"]), ("Remarks", report["remarks"])):
        parts.append(f"{title}:{'' if lines else ' none'}\n" + "".join(f"* {x}\n" for x in lines))
    if report["needs"]:
        parts.append(f"{needs_title(report)}:\n\n{needs_table(report['needs'])}")
    return "\n".join(parts)


def needs_title(report: dict[str, Any]) -> str:
    """What the estimates stand for."""
    bert = "" if report["bert_bytes"] else ", BERT's weights not counted (give --bert_path)"
    return f"Needs, estimated in GB; {report['free_memory'] / 1e9:.1f} GB are free here{bert}"


def needs_table(rows: list[dict[str, Any]]) -> str:
    """Memory and disk."""
    lines = []
    for row in rows:
        least, most = (f"{row[key] / 1e9:.1f}" for key in ("least", "most"))
        disk = [f"{row[key] / 1e9:.2f} {title}" for key, title in DISK.items() if key in row]
        memory = least if least == most else f"{least} to {most}"
        lines.append([row["what"], memory, ", ".join(disk)])
    return markdown(["program", "memory", "disk"], lines)


def inputs_of(options: Options) -> list[Path]:
    """Every file that may be read."""
    found = [path for name in get_args(SplitName) for path in files_of(options.folder, name)]
    if options.bert_path is not None:
        from bert import bert_files  # here, as in `bert_sizes`

        found += bert_files(options.bert_path)
    return found


def splits_of(folder: Path) -> list[SplitName]:
    """The splits that a folder holds a file of. Raises InputError where there is none."""
    with naming(folder, "a data set's folder"):
        there = {path.name for path in folder.iterdir()}
    parts = ("ims.npy", "caps.txt", "ids.txt")
    names = get_args(SplitName)
    held = [n for n in names if any(f"{n}_{part}" in there for part in parts)]
    require(bool(held), f"{folder}: holds no split; expected train_ims.npy, train_caps.txt, ...")
    return held


def checked(options: Options) -> dict[str, Any]:
    """All that is found of a data set, plain data. Raises InputError where there is none."""
    folder = Path(options.folder)
    names = splits_of(folder)
    vocabulary, bert, remarks = None, None, []
    if options.bert_path:
        vocabulary = Vocabulary.load(options.bert_path)
        try:  # before the long work
            bert = bert_sizes(options.bert_path)
        except InputError as error:
            remarks.append(f"{error}; the vocabulary alone is made use of")
    splits = [looked_at(folder, name, options.full) for name in names]
    for split in splits:
        if vocabulary is not None and split.captions:
            look_at_words(split, vocabulary, options.max_words)
    estimated, free = needs(splits, bert, options.max_words), free_memory(CPU)
    tight = [row["what"] for row in estimated if row["least"] - used_memory(CPU) > free]
    faults = [fault for split in splits for fault in split.faults]
    remarks += [remark for split in splits for remark in split.remarks]
    remarks += remarks_on(splits, folder)
    if tight:
        remarks.append(f"this machine has too little free memory for {', '.join(tight)}")
    return {
        "folder": str(folder),
        "bert_path": options.bert_path,
        "bert_bytes": bert[0] if bert else None,
        "splits": [split.as_dict(options.max_words) for split in splits],
        "faults": [*faults, *between(splits, folder)],
        "remarks": remarks,
        "needs": estimated,
        "free_memory": free,
    }


def main() -> None:
    options = parse(Options, None, __doc__)
    if options.json:
        check_writable(Path(options.json), inputs_of(options))
    report = checked(options)
    if options.json:
        write_json(Path(options.json), report)
    say(said(report))
    if report["faults"]:
        sys.exit(FAULTY)


if __name__ == "__main__":
    run(main)
