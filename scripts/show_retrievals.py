"""show_retrievals.py — what a model retrieves: right and wrong answers of some queries.

    python -m scripts.show_retrievals --scores s.npy --data data/own --images photos --out p.png

SCORES is the file of `evaluate_models.py --save_scores` for the split. Above: captions, each with
its five best images. Below: images, each with its five best captions. Queries are spread evenly
over the split, so nobody chooses the good ones.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

from common.cli import parse, run
from common.layout import (
    SplitName,
    files_of,
    read_captions,
    read_groups_of_scores,
    split_files,
)
from scripts.parts.figures import (
    COLOURS,
    check_figure,
    image_files,
    new_figure,
    thumbnail,
    write_figure,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WORD = {True: "right", False: "wrong"}
COLOUR = {True: COLOURS[0], False: COLOURS[1]}
TEXT: dict[str, Any] = {"va": "center", "fontsize": 9}
QUERIES, ANSWERS = 4, 5  # queries of each kind, answers of a query


@dataclass(frozen=True)
class Options:
    scores: Annotated[str, ".npy file of --save_scores: (images, captions)"]
    data: Annotated[str, "the data set's folder, DATA_PATH/DATA_NAME"]
    images: Annotated[str, "folder of the images"]
    out: Annotated[str, "drawing to write, .png"]
    split: Annotated[SplitName, "split of the scores"] = "test"


def draw_image(axes: Axes, path: Path, right: bool | None = None) -> None:
    """Draw an image; right answers get a thick blue frame, wrong ones a thin dashed orange one."""
    axes.axis("on")
    axes.imshow(thumbnail(path))
    axes.set(xticks=[], yticks=[])
    if right is not None:
        width, dashes = (4, "-") if right else (1.5, "--")
        axes.spines[:].set(color=COLOUR[right], linewidth=width, linestyle=dashes)
        axes.set_xlabel(WORD[right], fontsize=8)


def draw(
    scores: np.ndarray, owner: np.ndarray, captions: Sequence[str], files: Sequence[Path]
) -> Figure:
    """Return rows of captions with images, then rows of images with captions.

    `scores` are `[I, T]`, `owner` `[T]` the image of each caption, `files` the images.
    """
    queries = min(QUERIES, len(files))
    figure = new_figure(13, 4.2 * queries)
    above, below = figure.subfigures(2, 1)  # type: ignore[misc]  # an array of two
    above.suptitle("Captions, and the best images of each")
    below.suptitle("Images, and the best captions of each")
    rows = above.subplots(queries, 1 + ANSWERS, width_ratios=[1.6] + [1] * ANSWERS, squeeze=False)
    for row, caption in zip(rows, spread(len(captions), queries), strict=True):
        for axes in row:
            axes.axis("off")
        row[0].text(0, 0.5, textwrap.fill(captions[caption], 30), **TEXT)
        for axes, image in zip(row[1:], best(scores[:, caption]), strict=False):
            draw_image(axes, files[image], image == owner[caption])
    rows = below.subplots(queries, 2, width_ratios=[1, 5.6], squeeze=False)
    for row, image in zip(rows, spread(len(files), queries), strict=True):
        draw_image(row[0], files[image])
        row[1].axis("off")
        for place, caption in enumerate(best(scores[image])):
            right = image == owner[caption]
            text = f"{WORD[right]}: {captions[caption][:140]}"
            row[1].text(0, 1 - (place + 0.5) / ANSWERS, text, color=COLOUR[right], **TEXT)
    return figure


def best(scores: np.ndarray) -> list[int]:
    """Return the indices of a query's best answers."""
    return (-scores).argsort(kind="stable")[:ANSWERS].tolist()


def spread(count: int, queries: int) -> list[int]:
    """Return indices spread over `count` items."""
    return [(2 * k + 1) * count // (2 * queries) for k in range(queries)]


def main() -> None:
    options = parse(Options, None, __doc__)
    from common.score_files import map_scores

    path, folder, out = Path(options.scores), Path(options.data), Path(options.out)
    captions = read_captions(split_files(folder, options.split)[1])
    scores = map_scores(path)
    owner = read_groups_of_scores(path, scores.shape, folder, options.split).image_of_caption
    files = image_files(folder, options.split, len(scores), Path(options.images))
    check_figure(out, [*files, path, *files_of(folder, options.split)])
    write_figure(draw(scores, owner, captions, files), out)


if __name__ == "__main__":
    run(main)
