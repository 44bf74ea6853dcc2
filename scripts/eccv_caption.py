"""eccv_caption.py — ECCV Caption and CxC figures of saved scores on MSCOCO's 5,000 test images.

    pip install eccv_caption
    python -m scripts.eccv_caption --scores i2t.npy t2i.npy --data data/coco_precomp

People found further correct answers for both benchmarks: ECCV Caption (Chun et al., ECCV 2022) and
CxC (Parekh et al., EACL 2021). `evaluate_models.py --save_scores` writes the scores; the mean of
several files is an ensemble's. {split}_ids.txt in the data's folder has to name MSCOCO's images.
"""

import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

from common.cli import parse, print_line, run
from common.errors import InputError, require, summarise
from common.layout import CAPTIONS_PER_IMAGE, SplitName, ids_file, names_file, read_ids, read_names

if TYPE_CHECKING:
    import numpy as np

BEST = 64  # answers of a query that are passed on; no query has more than 48 correct ones
FIGURES = ("eccv_r1", "eccv_map_at_r", "eccv_rprecision", "cxc_recalls")
NUMBER = re.compile(r"(\d{1,18})(\.\w+)?$")  # MSCOCO's id, alone or at the end of a file name


@dataclass(frozen=True)
class Options:
    scores: Annotated[list[str], "saved score matrices (images, captions), .npy"]
    data: Annotated[str, "the data set's folder"]
    split: Annotated[SplitName, "the split of the scores"] = "testall"


def load_metrics() -> Any:
    """Return the package's metrics. Raises InputError if it is not installed."""
    warnings.filterwarnings("ignore", module="eccv_caption")  # it recommends a faster JSON reader
    try:
        from eccv_caption import Metrics
    except ImportError as error:
        raise InputError(f"missing package: pip install eccv_caption ({error})") from error
    return Metrics()


def caption_ids(metrics: Any, folder: Path, split: SplitName, images: int) -> "np.ndarray":
    """Return MSCOCO's caption ids `[images, 5]` of a split, in its order.

    Raises InputError if the images are not MSCOCO's test images, each once.
    """
    import numpy as np

    path = ids_file(folder, split)
    ids = read_ids(path, images)
    names = read_names(folder) if names_file(folder).exists() else {}
    known = metrics.coco_ids.reshape(-1, CAPTIONS_PER_IMAGE)
    captions_of = {metrics.coco_gts["t2i"][int(row[0])][0]: row for row in known}
    numbers = [NUMBER.search(names.get(key, key)) for key in ids]
    image_ids = [int(match[1]) if match else -1 for match in numbers]
    unknown = [key for key, i in zip(ids, image_ids, strict=True) if i not in captions_of]
    if unknown or not len(set(image_ids)) == images == len(known):
        problem = f"{path}: {images} ids, {len(unknown)} unknown ({summarise(unknown)})"
        raise InputError(f"{problem}; expected MSCOCO's {len(known)} test images, each once")
    return np.stack([captions_of[i] for i in image_ids])


def compute(metrics: Any, scores: "np.ndarray", captions: "np.ndarray") -> dict[str, Any]:
    """Return the figures in percent of scores `[I, T]`, by name and direction.

    `captions` are MSCOCO's caption ids `[I, 5]`. Equal scores are ranked in arbitrary order.
    """
    import numpy as np

    from evaluation import best_items

    caption_of = captions.ravel()
    image_of = np.array([metrics.coco_gts["t2i"][int(c)][0] for c in captions[:, 0]])
    best = []  # by direction: the ids of each query's best items, best first
    for matrix, queries, items in (scores, image_of, caption_of), (scores.T, caption_of, image_of):
        ids = np.concatenate([items[columns] for _, columns in best_items(matrix, BEST)])
        best.append(dict(zip(queries.tolist(), ids.tolist(), strict=True)))
    figures = metrics.compute_all_metrics(*best, target_metrics=FIGURES, verbose=False)
    return {k: {way: 100 * float(v) for way, v in ways.items()} for k, ways in figures.items()}


def main() -> None:
    options = parse(Options, None, __doc__)
    metrics = load_metrics()
    from common.score_files import map_scores
    from evaluation import mean_matrix

    matrices = [map_scores(Path(path)) for path in options.scores]
    shapes = {matrix.shape for matrix in matrices}
    captions = caption_ids(metrics, Path(options.data), options.split, len(matrices[0]))
    shape = (len(captions), captions.size)
    require(shapes == {shape}, f"--scores: matrices of shapes {shapes}; expected {shape}")
    scores = mean_matrix(matrix.astype("float64") for matrix in matrices)
    for name, ways in compute(metrics, scores, captions).items():
        print_line(f"{name}: i2t {ways['i2t']:.1f}, t2i {ways['t2i']:.1f}\n")


if __name__ == "__main__":
    run(main)
