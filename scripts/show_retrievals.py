"""show_retrievals.py — a picture of what a model finds: right and wrong answers of some queries.

    python -m scripts.show_retrievals --scores s.npy --data data/own --images photos --out p.png

SCORES is what `evaluate_models.py --save_scores` wrote for the split. Above: captions, each with
its five best pictures. Below: pictures, each with its five best captions. Queries are taken evenly
through the split, so that nobody chose the good ones.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.cli import parse, run
from common.errors import check_range, require
from common.files import check_writable
from common.layout import (
    SplitName,
    count_images,
    files_of,
    read_captions,
    split_files,
)
from evaluation import image_of_caption, map_scores
from scripts.parts.figures import COLOURS, picture_files, shown, write_figure

RIGHT, WRONG = COLOURS[0], COLOURS[1]
SHOWN = 5  # answers of a query


@dataclass(frozen=True)
class Options:
    scores: Annotated[str, ".npy file of --save_scores: (images, captions)"]
    data: Annotated[str, "the data set's folder, DATA_PATH/DATA_NAME"]
    images: Annotated[str, "folder of the pictures"]
    out: Annotated[str, "picture to write, .png"]
    split: Annotated[SplitName, "split of the scores"] = "test"
    queries: Annotated[int, "queries of each kind"] = 4

    def __post_init__(self) -> None:
        check_range(self, ("queries",), 1, 50)


@dataclass(frozen=True)
class Found:
    """A split with its scores."""

    scores: np.ndarray  # [I, T]
    captions: tuple[str, ...]
    files: tuple[Path, ...]


def opened(chosen: Options) -> Found:
    """Scores, captions and the pictures' files. Raises InputError where they do not fit."""
    folder = Path(chosen.data)
    _, path = split_files(folder, chosen.split)
    captions = read_captions(path)
    images = count_images(path, captions)
    files = picture_files(folder, chosen.split, images, Path(chosen.images))
    path = Path(chosen.scores)
    scores = map_scores(path)
    wanted = f"{len(files)} images and {len(captions)} captions, as {folder} has"
    fits = scores.shape == (len(files), len(captions))
    require(fits, f"{path}: shape {scores.shape}; expected the scores of {wanted}")
    return Found(scores, captions, files)


def put(axes: Axes, path: Path, right: bool | None) -> None:
    """One picture; of an answer, whether it is right."""
    axes.imshow(shown(path))
    axes.set(xticks=[], yticks=[])
    if right is not None:
        frame(axes, right)
        axes.set_xlabel("right" if right else "wrong", fontsize=8)


def frame(axes: Axes, right: bool) -> None:
    """Right answers have a thick blue frame, wrong ones a thin dashed orange one."""
    for side in axes.spines.values():
        side.set(color=RIGHT if right else WRONG, linewidth=4 if right else 1.5)
        side.set_linestyle("-" if right else "--")


def text(axes: Axes, lines: Sequence[str], colours: Sequence[str]) -> None:
    """Lines of text, evenly spread over a panel."""
    axes.axis("off")
    for number, (line, colour) in enumerate(zip(lines, colours, strict=True)):
        height = 1 - (number + 0.5) / len(lines)
        axes.text(0, height, line, color=colour, va="center", fontsize=9, parse_math=False)


def figure(found: Found, queries: int) -> Figure:
    """Rows of captions with pictures, then rows of pictures with captions."""
    owner = image_of_caption(len(found.captions))
    picture = Figure(figsize=(13, 4.2 * queries), layout="constrained")
    above, below = picture.subfigures(2, 1)
    above.suptitle("Captions, and the best pictures of each")
    below.suptitle("Pictures, and the best captions of each")
    rows = above.subplots(queries, 1 + SHOWN, width_ratios=[1.6] + [1] * SHOWN, squeeze=False)
    for row, caption in zip(rows, evenly(len(found.captions), queries), strict=True):
        text(row[0], [textwrap.fill(found.captions[caption], 30)], ["black"])
        best = np.argsort(-found.scores[:, caption], kind="stable")[:SHOWN]
        for axes in row[1:]:
            axes.axis("off")
        for axes, image in zip(row[1:], best, strict=False):
            axes.axis("on")
            put(axes, found.files[image], bool(image == owner[caption]))
    rows = below.subplots(queries, 2, width_ratios=[1, 5.6], squeeze=False)
    for row, image in zip(rows, evenly(len(found.files), queries), strict=True):
        put(row[0], found.files[image], None)
        best = np.argsort(-found.scores[image], kind="stable")[:SHOWN]
        rights = [bool(owner[caption] == image) for caption in best]
        lines = [f"{'right' if r else 'wrong'}: {found.captions[c][:140]}"
                 for r, c in zip(rights, best, strict=True)]  # fmt: skip
        text(row[1], lines, [RIGHT if right else WRONG for right in rights])
    return picture


def evenly(count: int, queries: int) -> list[int]:
    """Places through `count` items, each in the middle of its part."""
    return [(2 * k + 1) * count // (2 * queries) for k in range(queries)]


def main() -> None:
    chosen = parse(Options, None, __doc__)
    out = Path(chosen.out)
    require(out.suffix == ".png", f"--out {out}: expected a name that ends in .png")
    check_writable(out)
    found = opened(chosen)
    check_writable(out, [*found.files, chosen.scores, *files_of(chosen.data, chosen.split)])
    write_figure(figure(found, min(chosen.queries, len(found.files))), out)


if __name__ == "__main__":
    run(main)
