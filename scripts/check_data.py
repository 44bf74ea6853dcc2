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

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from common.cli import parse, print_line, run
from common.errors import InputError, check_range, require
from common.files import check_writable, explain_os_errors, write_json
from common.layout import SplitName, files_of
from common.memory import free_memory, used_memory
from scripts.parts.data_needs import CPU, bert_sizes, needs
from scripts.parts.data_problems import between, look_at_words, looked_at, remarks_on
from scripts.parts.tables import markdown
from vocab import Vocabulary

FAULTY = 1  # exit status
HEAD = ["split", "images", "captions", "ids", "features", "type", "rows an image", "GB"]
HEAD += ["rows read", "longest caption", "cut"]
DISK = {"checkpoints": "checkpoints", "cache_text": "--cache_text", "scores": "--save_scores"}


@dataclass(frozen=True)
class Options:
    folder: Annotated[str, "the data set's folder", "DATA_PATH/DATA_NAME"]
    bert_path: Annotated[str | None, "folder of BERT: captions are held to its vocabulary"] = None
    max_words: Annotated[int, "WordPieces of a caption that training will read"] = 32
    full: Annotated[bool, "read every row of the features, not some"] = False
    json: Annotated[str | None, "write all that was found here"] = None

    def __post_init__(self) -> None:
        check_range(self, ("max_words",), 2)


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
    with explain_os_errors(folder, "a data set's folder"):
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
    print_line(said(report))
    if report["faults"]:
        sys.exit(FAULTY)


if __name__ == "__main__":
    run(main)
