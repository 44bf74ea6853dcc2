"""search_recall.py — what the first stage of search can find: the upper bound of reranking."""

from pathlib import Path
from typing import Any

import numpy as np

from common.layout import SplitName
from data import Split
from evaluation import best_items
from scripts.parts.search_models import SearchModels

CANDIDATES = (5, 20, 50, 100, 500)
TOP = 10  # answers that are compared with those of all pairs


def recall_rows(models: SearchModels, folder: Path, split_name: SplitName) -> list[dict[str, Any]]:
    """Return a row for each first stage, direction of the query and number of candidates.

    Beside the encoders alone, the pooled vectors of each reranking model are tried as a first
    stage. Queries and answers are the images of a split and the first caption of each. Raises
    InputError if the split does not fit the models.
    """
    matcher, encoders = models.matcher, models.first
    assert encoders is not None
    split = Split.open(folder, split_name, matcher.img_dim)
    features = split.regions(np.arange(split.images))
    texts = [split.captions[first] for first in split.groups.first]
    images, captions = matcher.encode_images(features), matcher.encode_captions(texts)
    scores = matcher.score(images, captions)  # [I, I], the right pairs on the diagonal
    encoded = encoders.encode_images(features), encoders.encode_captions(texts)
    stages = {"encoders alone": encoders.score(*encoded)}
    for model, i, c in zip(matcher.models, images.of_models, captions.of_models, strict=True):
        stages[f"pooled vectors of {model.direction}"] = (i.pooled @ c.pooled.T).cpu().numpy()
    return [
        {"first_stage": name, "query": query, "items": split.images, "candidates": count}
        | kept(*matrices, count)
        for name, coarse in stages.items()
        for query, matrices in {"text": (scores.T, coarse.T), "image": (scores, coarse)}.items()
        for count in CANDIDATES
        if count < split.images
    ]


def kept(scores: np.ndarray, coarse: np.ndarray, count: int) -> dict[str, float]:
    """Return what the `count` best answers by coarse scores keep, in percent.

    Both matrices are `[queries, answers]`; answer q is the right one of query q. `found` is the
    share of queries whose right answer is among those. `top_10` is the share of the TOP best
    answers by `scores` that reranking returns, too.
    """
    candidates = _best(coarse, count)  # [Q, count]
    order = _best(np.take_along_axis(scores, candidates, axis=1), TOP)
    reranked = np.take_along_axis(candidates, order, axis=1)  # [Q, TOP]
    found = (candidates == np.arange(len(scores))[:, None]).any(1)
    same = (_best(scores, TOP)[:, :, None] == reranked[:, None]).any(2)  # [Q, TOP]
    return {"found": 100 * float(found.mean()), "top_10": 100 * float(same.mean())}


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([items for _, items in best_items(scores, count)])
