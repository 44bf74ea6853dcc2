"""mscoco.py — further figures on MSCOCO's 5,000 test images, by PyPI's eccv_caption.

Kept apart from evaluation.py, which knows one right image a caption: ECCV Caption (Chun et al.,
ECCV 2022) and CxC (Parekh et al., EACL 2021) count more right answers, that people found.
"""

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError, require, summarise
from common.layout import CAPTIONS_PER_IMAGE, ids_file, names_file, read_ids, read_names
from evaluation import best_items

log = logging.getLogger(__name__)

LIST = 64  # best answers of a query that are looked at; none has more than 48 right ones
FIGURES = ("eccv_r1", "eccv_map_at_r", "eccv_rprecision", "cxc_recalls")
NUMBER = re.compile(r"(\d{1,18})(\.\w+)?$")  # an image's id, alone or at the end of its file's name


def eccv_metrics() -> Any:
    """The package's metrics. Raises InputError that names the pip command where it is missing."""
    try:
        with warnings.catch_warnings():  # it would like to have a faster reader of JSON
            warnings.simplefilter("ignore")
            from eccv_caption import Metrics

            return Metrics()
    except ImportError as error:
        found = f"--extended: a package is missing: pip install eccv_caption ({error})"
        raise InputError(found) from error


def caption_ids(metrics: Any, folder: Path, split: str, images: int) -> np.ndarray:
    """MSCOCO's ids `[I, 5]` of a split's captions, in the order that Karpathy's splits have.

    Raises InputError that says why, where the images are not MSCOCO's test images.
    """
    path, names = ids_file(folder, split), names_file(folder)
    ids = read_ids(path, images)
    files = read_names(folder) if names.exists() else {}
    found = [NUMBER.search(files.get(key, key)) for key in ids]
    known = metrics.coco_ids.reshape(-1, CAPTIONS_PER_IMAGE)
    rows = {metrics.coco_gts["t2i"][int(row[0])][0]: row for row in known}
    wanted = [rows.get(int(match[1])) if match else None for match in found]
    fits = len(wanted) == images == len(known) and all(row is not None for row in wanted)
    fits = fits and len({int(row[0]) for row in wanted}) == images
    unknown = [key for key, row in zip(ids, wanted, strict=True) if row is None]
    found = f"{images} ids, {len(unknown)} of them not MSCOCO's test images' ({summarise(unknown)})"
    require(fits, f"{path}: {found}; expected those of its {len(known)} test images, each once")
    return np.stack(wanted)


def known_ids(
    metrics: Any, folder: Path | None, split: str | None, images: int
) -> np.ndarray | None:
    """MSCOCO's ids for the extended figures; None, said in a line, where there are none."""
    try:
        require(
            folder is not None and split is not None, "--data_path, --data_name, --split needed"
        )
        return caption_ids(metrics, folder, split, images)
    except InputError as error:
        log.warning("no ECCV Caption and CxC figures: %s", error)
        return None


def extended(metrics: Any, scores: np.ndarray, captions: np.ndarray) -> dict[str, Any]:
    """Figures in percent of scores `[I, T]`, by name and direction; `captions` are ids `[I, 5]`.

    Answers of equal scores stand in no certain order; in `retrieval` they count against the model.
    """
    caption_of = captions.ravel()
    image_of = np.array([metrics.coco_gts["t2i"][int(c)][0] for c in captions[:, 0]])
    found = metrics.compute_all_metrics(
        _best(scores, image_of, caption_of),
        _best(scores.T, caption_of, image_of),
        target_metrics=FIGURES,
        verbose=False,
    )
    return {name: {way: 100 * float(v) for way, v in by.items()} for name, by in found.items()}


def _best(scores: np.ndarray, queries: np.ndarray, items: np.ndarray) -> dict[int, list[int]]:
    """The ids of each query's best items, best first."""
    best = np.concatenate([items[places] for _, places in best_items(scores, LIST)])
    return dict(zip(queries.tolist(), best.tolist(), strict=True))
