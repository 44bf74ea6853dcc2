"""check_data.py — check the folder of a data set (SPEC §10) before a training does.

    python -m scripts.check_data DATA_PATH/DATA_NAME                   # a table, problems, warnings
    python -m scripts.check_data data/f30k_precomp --bert_path bert    # BERT and WordPieces, too
    python -m scripts.check_data data/f30k_precomp --full              # reads every row

Exit status 0: no problem; 1: problems, the first one of each file; 2: no data set or no vocabulary.
A warning is worth knowing and not a problem. Without --full, the check for NaN and for wrong
repeated rows reads 200 images of each split, spread evenly.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import numpy as np

from common.cli import parse, print_line, progress, run
from common.errors import InputError, check_range, require, summarise
from common.files import explain_os_errors, read_json
from common.layout import (
    CAPTIONS_PER_IMAGE,
    SplitName,
    check_finite_rows,
    check_named,
    count_images,
    extraction_file,
    ids_file,
    images_digest,
    map_features,
    names_file,
    read_captions,
    read_ids,
    read_lines,
    read_names,
    read_rows,
    rows_per_image,
    split_files,
)
from scripts.parts.tables import markdown

if TYPE_CHECKING:
    from vocab import Vocabulary

HAS_PROBLEMS = 1  # exit status
HEAD = ["split", "images", "captions", "ids", "features", "type", "rows read"]
HEAD += ["longest caption", "cut"]
SAMPLED_IMAGES = 200  # of a split
IMAGES_AT_ONCE = 16  # 24 MB if SCAN's rows are repeated
CAPTIONS_AT_ONCE = 1000
PUBLISHED: dict[SplitName, tuple[int, ...]] = {  # images of Flickr30K and MSCOCO
    "train": (29_000, 113_287),
    "dev": (1_014, 1_000, 5_000),
    "test": (1_000,),
    "testall": (5_000,),
}
SAME_IMAGES = {"test", "testall"}  # MSCOCO's test is the first thousand images of testall
MOST_UNKNOWN = 0.05  # share of [UNK] above which the vocabulary is of another language


@dataclass(frozen=True)
class Options:
    folder: Annotated[str, "folder of the data set", "DATA_PATH/DATA_NAME"]
    bert_path: Annotated[str | None, "folder of BERT, which is described and reads captions"] = None
    max_words: Annotated[int, "WordPieces of a caption that training will read"] = 32
    full: Annotated[bool, "read every row of the features"] = False

    def __post_init__(self) -> None:
        check_range(self, ("max_words",), 2)


@dataclass
class SplitContent:
    """What the files of a split hold, as far as they can be read."""

    name: SplitName
    captions: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()  # one an image
    features: np.memmap | None = None
    rows_per_image: int = 1
    rows_read: int = 0
    longest: int | None = None  # WordPieces of the longest caption
    cut: int | None = None  # captions longer than --max_words

    @property
    def images(self) -> int:
        return len(self.captions) // CAPTIONS_PER_IMAGE

    def row(self) -> list[str]:
        """Return the split's row of the table."""
        counts = [f"{n:,}" for n in (self.images, len(self.captions), len(self.ids))]
        features = ["-"] * 3
        if self.features is not None:
            shape, rows = self.features.shape, f"{self.rows_read:,} of {len(self.features):,}"
            features = [" x ".join(map(str, shape)), str(self.features.dtype), rows]
        words = ["-" if n is None else str(n) for n in (self.longest, self.cut)]
        return [self.name, *counts, *features, *words]


@dataclass
class Report:
    """The result of a check."""

    splits: list[SplitContent] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    bert: list[str] = field(default_factory=list)  # lines that describe the folder of BERT

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Note an InputError of the block as a problem, and go on behind the block."""
        try:
            yield
        except InputError as error:
            self.problems.append(str(error))

    def text(self) -> str:
        parts = [markdown(HEAD, [split.row() for split in self.splits])]
        titles = {"BERT": self.bert, "Problems": self.problems, "Warnings": self.warnings}
        for title, lines in titles.items():
            if lines:
                parts.append(f"{title}:\n" + "".join(f"* {line}\n" for line in lines))
        return "\n".join(parts if self.problems else [*parts, "No problem.\n"])


def check(options: Options) -> Report:
    """Check all splits of a folder. Raises InputError if it has none, or BERT no vocabulary."""
    folder, report, vocabulary = Path(options.folder), Report(), None
    names = splits_in(folder)
    if options.bert_path:
        from checkpoint.bert import describe_bert
        from vocab import Vocabulary

        vocabulary = Vocabulary.load(options.bert_path)
        with report.collect():
            report.bert = describe_bert(options.bert_path)
    for name in names:
        split = SplitContent(name)
        report.splits.append(split)
        check_split(report, folder, split, options.full)
        if vocabulary is not None and split.captions:
            with report.collect():
                check_words(report, split, vocabulary, options.max_words)
    check_together(report, folder)
    warn_about_splits(report, folder)
    return report


def splits_in(folder: Path) -> list[SplitName]:
    """Return the splits that a folder has files of. Raises InputError if there are none."""
    with explain_os_errors(folder, "the folder of a data set"):
        files = {path.name for path in folder.iterdir()}
    parts = ("ims.npy", "caps.txt", "ids.txt")
    splits = [s for s in get_args(SplitName) if any(f"{s}_{part}" in files for part in parts)]
    require(bool(splits), f"{folder}: no split; expected train_ims.npy, train_caps.txt, ...")
    return splits


def check_split(report: Report, folder: Path, split: SplitContent, full: bool) -> None:
    """Read and check each file of a split."""
    path, captions_path = split_files(folder, split.name)
    ids_path = ids_file(folder, split.name)
    with report.collect():
        captions = read_captions(captions_path, allow_empty=split.name != "train")
        count_images(captions_path, captions)
        split.captions = captions
        if "" in captions:
            report.warnings.append(f"{captions_path}: {captions.count('')} captions are empty")
    with report.collect():
        split.features = map_features(path)
        surplus = path.stat().st_size - split.features.offset - split.features.nbytes
        require(surplus == 0, f"{path}: {surplus} bytes more than its header asks for")
        if split.captions:
            split.rows_per_image = rows_per_image(path, len(split.features), len(split.captions))
        check_values(report, path, split, split.features, full)
    with report.collect():
        if split.captions and ids_path.exists():
            lines = read_lines(ids_path, "ids, one a line")
            if (
                not len(lines) == len(set(lines)) == len(split.captions)
            ):  # else they are the captions'
                split.ids = read_ids(ids_path, split.images)


def check_values(
    report: Report, path: Path, split: SplitContent, features: np.memmap, full: bool
) -> None:
    """Read rows, all or a sample.

    Raises InputError if a row holds NaN, or if the repeated rows of an image differ.
    """
    repeats, empty_rows = split.rows_per_image, 0
    images = len(features) // repeats
    sample = np.unique(np.linspace(0, images - 1, images if full else SAMPLED_IMAGES, dtype=int))
    with progress(f"reading {path.name}", len(sample), "images") as bar:
        for first in range(0, len(sample), IMAGES_AT_ONCE):
            chosen = sample[first : first + IMAGES_AT_ONCE]
            rows = (chosen[:, None] * repeats + np.arange(repeats)).ravel()
            values = read_rows(features, rows)
            check_finite_rows(path, values, rows)
            empty_rows += int((~values.any((1, 2))).sum())
            grouped = values.reshape(len(chosen), repeats, -1)
            unequal = chosen[(grouped != grouped[:, :1]).any((1, 2))]
            if len(unequal):
                problem = f"{path}: the five rows of image {unequal[0]} differ"
                raise InputError(f"{problem}; expected one row, repeated for each caption")
            split.rows_read += len(rows)
            bar.update(len(chosen))
    if empty_rows:
        report.warnings.append(
            f"{path}: {empty_rows} of the {split.rows_read} rows read are all zeros, as an "
            "extraction that was cut off leaves them"
        )


def check_words(
    report: Report, split: SplitContent, vocabulary: "Vocabulary", max_words: int
) -> None:
    """Count the WordPieces of captions. Raises InputError if the vocabulary is not theirs."""
    parts, unknown = [], 0
    with progress(f"tokenising {split.name}", len(split.captions), "captions") as bar:
        for first in range(0, len(split.captions), CAPTIONS_AT_ONCE):
            lengths, unk = vocabulary.lengths(split.captions[first : first + CAPTIONS_AT_ONCE])
            parts.append(lengths.numpy())
            unknown += int(unk.sum())
            bar.update(len(lengths))
    every = np.concatenate(parts)  # [T], [CLS] and [SEP] included
    split.longest, split.cut = int(every.max()), int((every > max_words).sum())
    if split.cut:
        report.warnings.append(
            f"{split.name}: {split.cut} captions are longer than --max_words {max_words} and will "
            f"be cut; the longest has {split.longest} WordPieces"
        )
    share = unknown / max(1, int((every - 2).sum()))
    if share > MOST_UNKNOWN:
        raise InputError(
            f"{vocabulary.path}: {share:.0%} of the WordPieces of {split.name} are [UNK]; expected "
            "a vocabulary of the captions' language"
        )


def check_together(report: Report, folder: Path) -> None:
    """Check what splits have in common, and the file names of their images."""
    widths = {s.name: s.features.shape[2] for s in report.splits if s.features is not None}
    if len(set(widths.values())) > 1:
        sizes = ", ".join(f"{width} in {name}" for name, width in widths.items())
        report.problems.append(f"{folder}: widths of features differ: {sizes}; expected one width")
    for one, other in combinations(report.splits, 2):
        shared = sorted(set(one.ids) & set(other.ids))
        if shared and {one.name, other.name} != SAME_IMAGES:
            problem = (
                f"{ids_file(folder, other.name)}: {summarise(shared)} is in {one.name}_ids.txt"
            )
            report.problems.append(f"{problem}, too; expected other images in every split")
    if names_file(folder).exists():
        with report.collect():
            names = read_names(folder)
            for split in report.splits:
                with report.collect():
                    check_named(ids_file(folder, split.name), split.ids, names)
                    check_extraction(folder, split, names)


def check_extraction(folder: Path, split: SplitContent, names: dict[str, str]) -> None:
    """Raise InputError if extract_regions made the features of other images than the ids name."""
    path = extraction_file(folder, split.name)
    if not path.exists() or not split.ids:
        return
    record = read_json(path, "the record of extract_regions")
    problem = f"{path}: features and boxes may be of two extractions; run extract_regions again"
    require(not record.get("renaming"), problem)
    about = record.get("about")
    digest = about.get("ids") if isinstance(about, dict) else None
    problem = f"{path}: features are of other images than {split.name}_ids.txt and id_mapping.json"
    advice = "extract_regions --overwrite makes them again"
    require(digest == images_digest(split.ids, names), f"{problem} name; {advice}")


def warn_about_splits(report: Report, folder: Path) -> None:
    """Note what is unusual about the splits together."""
    names = {split.name for split in report.splits}
    for name in ("train", "dev"):
        if name not in names:
            report.warnings.append(f"{folder}: no {name}, which train.py needs")
    if not names & SAME_IMAGES:
        report.warnings.append(f"{folder}: no test, the default split of evaluate_models.py")
    own = [split.name for split in report.splits if split.images not in PUBLISHED[split.name]]
    if own:
        sizes = f"the numbers of images in {', '.join(own)}"
        report.warnings.append(f"{folder}: {sizes} are neither Flickr30K's nor MSCOCO's")


def main() -> None:
    report = check(parse(Options, None, __doc__ or ""))
    print_line(report.text())
    if report.problems:
        sys.exit(HAS_PROBLEMS)


if __name__ == "__main__":
    run(main)
