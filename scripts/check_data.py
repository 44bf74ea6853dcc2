"""check_data.py — check the folder of a data set (SPEC §10) before a training does.

    python -m scripts.check_data DATA_PATH/DATA_NAME                   # a table, problems, warnings
    python -m scripts.check_data data/f30k_precomp --bert_path bert    # BERT and WordPieces, too
    python -m scripts.check_data data/f30k_precomp --full              # reads every row

The table has images, captions an image, ids, regions x width, and with --bert_path the longest
caption in WordPieces and the number of captions that --max_words cuts. Problems are missing or cut
files, surplus bytes, rows that do not fit the captions, repeated rows that differ, NaN or inf,
numbers that no feature can be, different widths, ids that return, that occur in two splits or have
no file name, features of other images than the ids, and a vocabulary that makes more than 5 % of a
split's WordPieces [UNK]. Warnings are empty captions and rows that are all zeros. Without --full,
200 images of each split, spread evenly, are read; files up to 256 MiB are checked entirely even so.

Exit status 0: no problem; 1: problems, the first ones of each split; 2: no data set or no
vocabulary.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

from common.cli import parse, print_line, progress, run
from common.errors import InputError, check_range, require, summarise
from common.files import explain_os_errors, read_json
from common.layout import (
    SplitName,
    check_named,
    extraction_file,
    ids_file,
    images_digest,
    map_features,
    names_file,
    read_ids,
    read_lines,
    read_names,
)
from scripts.parts.tables import markdown

if TYPE_CHECKING:
    from data import Split
    from vocab import Vocabulary

HAS_PROBLEMS = 1  # exit status
HEAD = ["split", "images", "captions an image", "ids", "regions", "longest caption", "captions cut"]
SAMPLED_IMAGES = 200  # of a split
CAPTIONS_AT_ONCE = 1000
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
class Report:
    """The result of a check."""

    rows: list[list[str]] = field(default_factory=list)  # of the table, one a split
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    bert: list[str] = field(default_factory=list)  # lines that describe the folder of BERT

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Note an InputError of the block as a problem, and continue after the block."""
        try:
            yield
        except InputError as error:
            self.problems.append(str(error))

    def text(self) -> str:
        parts = [markdown(HEAD, self.rows)]
        titles = {"BERT": self.bert, "Problems": self.problems, "Warnings": self.warnings}
        for title, lines in titles.items():
            if lines:
                parts.append(f"{title}:\n" + "".join(f"* {line}\n" for line in lines))
        return "\n".join(parts if self.problems else [*parts, "No problem.\n"])


def check(options: Options) -> Report:
    """Check all splits of a folder. Raises InputError if it has none, or BERT no vocabulary."""
    from data import Split

    folder, report, vocabulary = Path(options.folder), Report(), None
    splits, names = splits_in(folder), dict[str, str]()
    if names_file(folder).exists():
        with report.collect():
            names = read_names(folder)
    if options.bert_path:
        from checkpoint.bert import describe_bert
        from vocab import Vocabulary

        vocabulary = Vocabulary.load(options.bert_path)
        with report.collect():
            report.bert = describe_bert(options.bert_path)
    ids: dict[SplitName, tuple[str, ...]] = {}
    widths: dict[SplitName, int] = {}
    for name in splits:
        with report.collect():
            split = Split.open(folder, name, None, training=name == "train")
            widths[name] = split.img_dim
            if "" in split.captions:
                empty = split.captions.count("")
                report.warnings.append(f"{folder}: {empty} captions of {name} are empty")
            with report.collect():
                ids[name] = image_ids(folder, name, split, names)
            with report.collect():
                check_features(report, split, options.full)
            words = ["-", "-"]
            with report.collect():
                if vocabulary:
                    words = count_words(name, split.captions, vocabulary, options.max_words)
            shape = f"{split.regions_per_image} x {split.img_dim}"
            counts = f"{split.images:,}", str(split.groups), f"{len(ids.get(name, ())):,}"
            report.rows.append([name, *counts, shape, *words])
    report.problems += problems_between(folder, widths, ids)
    return report


def splits_in(folder: Path) -> list[SplitName]:
    """Return the splits that a folder has files of. Raises InputError if there are none."""
    with explain_os_errors(folder, "the folder of a data set"):
        files = {path.name for path in folder.iterdir()}
    parts = ("ims.npy", "caps.txt", "ids.txt")
    splits = [s for s in get_args(SplitName) if any(f"{s}_{part}" in files for part in parts)]
    require(bool(splits), f"{folder}: no split; expected train_ims.npy, train_caps.txt, ...")
    return splits


def image_ids(
    folder: Path, name: SplitName, split: "Split", names: dict[str, str]
) -> tuple[str, ...]:
    """Return the ids of a split's images, or nothing if the folder has none.

    Raises InputError if they are wrong, lack file names, or the features are of other images.
    """
    path, record = ids_file(folder, name), extraction_file(folder, name)
    if not path.exists():
        return ()
    lines = read_lines(path, "ids, one a line")
    if split.images < len(split.captions) == len(set(lines)):  # the captions' ids
        return ()
    ids = read_ids(path, split.images)
    if names:
        check_named(path, ids, names)
        if record.exists():
            check_extraction(record, images_digest(ids, names))
    return ids


def check_extraction(path: Path, digest: str) -> None:
    """Raise InputError if extract_regions made the features of other images than `digest` names."""
    record = read_json(path, "the record of extract_regions")
    problem = f"{path}: features and boxes may be of two extractions; run extract_regions again"
    require(not record.get("renaming"), problem)
    about = record.get("about")
    if not isinstance(about, dict) or about.get("ids") != digest:
        problem = f"{path}: features are of other images than the ids and id_mapping.json name"
        raise InputError(f"{problem}; extract_regions --overwrite makes them again")


def check_features(report: Report, split: "Split", full: bool) -> None:
    """Read rows, all or those of some images.

    Raises InputError as `Split.checked_rows` does, or if the file is longer than its header says.
    """
    from data import spread

    features, empty = map_features(split.path), 0
    surplus = split.path.stat().st_size - features.offset - features.nbytes
    require(surplus == 0, f"{split.path}: {surplus} bytes more than its header asks for")
    images = spread(split.images, split.images if full else SAMPLED_IMAGES)
    total = len(split.rows_of(images))
    with progress(f"reading {split.path.name}", total, "rows") as bar:
        for rows in split.checked_rows(images):
            empty += int((~rows.any((1, 2))).sum())
            bar.update(len(rows))
    if empty:
        report.warnings.append(
            f"{split.path}: {empty} of the {total} rows read are all zeros, "
            "as an extraction that was cut off leaves them"
        )


def count_words(
    name: SplitName, captions: Sequence[str], vocabulary: "Vocabulary", max_words: int
) -> list[str]:
    """Return the WordPieces of the longest caption, and how many captions `max_words` cuts.

    Raises InputError if the vocabulary is not of the captions' language.
    """
    longest = cut = pieces = unknown = 0
    with progress(f"tokenising {name}", len(captions), "captions") as bar:
        for first in range(0, len(captions), CAPTIONS_AT_ONCE):
            lengths, unk = vocabulary.lengths(captions[first : first + CAPTIONS_AT_ONCE])
            longest = max(longest, int(lengths.max()))
            cut += int((lengths > max_words).sum())
            pieces += int((lengths - 2).sum())  # without [CLS] and [SEP]
            unknown += int(unk.sum())
            bar.update(len(lengths))
    share = unknown / max(1, pieces)
    if share > MOST_UNKNOWN:
        raise InputError(
            f"{vocabulary.path}: {share:.0%} of the WordPieces of {name} are [UNK]; expected a "
            "vocabulary of the captions' language"
        )
    return [str(longest), str(cut)]


def problems_between(
    folder: Path, widths: dict[SplitName, int], ids: dict[SplitName, tuple[str, ...]]
) -> Iterator[str]:
    """Yield a problem if widths of features differ, and for splits that share images."""
    if len(set(widths.values())) > 1:
        sizes = ", ".join(f"{width} in {name}" for name, width in widths.items())
        yield f"{folder}: widths of features differ: {sizes}; expected one width"
    for one, other in combinations(ids, 2):
        shared = sorted(set(ids[one]) & set(ids[other]))
        if shared and {one, other} != SAME_IMAGES:
            problem = f"{ids_file(folder, other)}: {summarise(shared)} is in {one}_ids.txt"
            yield f"{problem}, too; expected other images in every split"


def main() -> None:
    report = check(parse(Options, None, __doc__))
    print_line(report.text())
    if report.problems:
        sys.exit(HAS_PROBLEMS)


if __name__ == "__main__":
    run(main)
