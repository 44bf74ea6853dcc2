"""bootstrap.py — confidence intervals of retrieval metrics (SPEC §10). Imports no torch."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from common.layout import CaptionGroups
from common.results import Ranks, Recall, Retrieval

LEVEL = 95  # percent of the confidence intervals


def bootstrap_ci(
    folds: Sequence[Ranks], owner: np.ndarray, samples: int, seed: int = 0
) -> dict[str, Any]:
    """Return confidence intervals: the JSON of `Retrieval` with `[low, high]` as values.

    `owner` `[T]` is the image of each caption of all folds together, ascending. Images are drawn
    with replacement within each fold, together with their captions; the searched items stay all.
    The interval covers the choice of test images, not the variance between training seeds.
    """
    groups = [CaptionGroups(counts) for counts in np.split(np.bincount(owner), len(folds))]
    rng = np.random.default_rng(seed)
    parts = list(zip(folds, groups, strict=True))
    drawn = [Retrieval.mean([_resample(*part, rng) for part in parts]) for _ in range(samples)]
    values = [[*asdict(r.i2t).values(), *asdict(r.t2i).values(), r.rsum] for r in drawn]
    tail = (100 - LEVEL) / 2
    bounds = np.percentile(values, (tail, 100 - tail), axis=0).T.tolist()
    names = list(Recall.__dataclass_fields__)
    sides = {
        "i2t": dict(zip(names, bounds[: len(names)], strict=True)),
        "t2i": dict(zip(names, bounds[len(names) : -1], strict=True)),
    }
    return {**sides, "rsum": bounds[-1]}


def _resample(ranks: Ranks, groups: CaptionGroups, rng: np.random.Generator) -> Retrieval:
    """Return the metrics of as many images, drawn with replacement."""
    of_images, of_captions = ranks
    chosen = rng.integers(len(of_images), size=len(of_images))
    return Retrieval.of(of_images[chosen], of_captions[groups.captions_of(chosen)])
