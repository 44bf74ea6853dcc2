"""evaluation.py — scores of all pairs in blocks, ranks, recalls, folds, ensembles (SPEC §10).

It is given a model and imports none: a model encodes images and captions and scores them. Knows
nothing of how it was trained.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data import CAPTIONS_PER_IMAGE, ImageBlocks, Split, load
from options import progress, require
from router import Modality
from vocab import Vocabulary

FOLDS = 5
IMAGE_BLOCK = 128  # images encoded at a time
CAPTION_BLOCK = 256  # captions encoded at a time
PAIR_BLOCK = 512  # pairs scored at a time: a block's tensors should fit the processor's caches
ROW_BLOCK = 256  # rows of a score matrix ranked at a time


class Model(Protocol):
    """What evaluation needs of a model."""

    training: bool

    def train(self, mode: bool = True) -> Any: ...
    def encode_images(self, regions: Tensor) -> Modality: ...
    def encode_captions(self, ids: Tensor, mask: Tensor) -> Modality: ...
    def score(self, images: Modality, captions: Modality) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Recall:
    """Recalls in percent, and median and mean rank from 1."""

    r1: float
    r5: float
    r10: float
    medr: float
    meanr: float

    @classmethod
    def of(cls, ranks: np.ndarray) -> "Recall":
        """From ranks `[queries]` of the best match, from 0."""
        r1, r5, r10 = (float(100 * np.mean(ranks < k)) for k in (1, 5, 10))
        return cls(r1, r5, r10, float(np.floor(np.median(ranks)) + 1), float(ranks.mean() + 1))


@dataclass(frozen=True)
class Retrieval:
    """Both ways of retrieval: captions of an image, images of a caption."""

    i2t: Recall
    t2i: Recall

    @property
    def rsum(self) -> float:
        """Sum of the six recalls."""
        return sum(side.r1 + side.r5 + side.r10 for side in (self.i2t, self.t2i))

    @property
    def selection(self) -> float:
        """What the best model has the most of."""
        # REFERENCE: R@1 + R@5 of both ways, four recalls, though the published name is best_rsum.
        return sum(side.r1 + side.r5 for side in (self.i2t, self.t2i))

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, unrounded, for JSON."""
        return {**asdict(self), "rsum": self.rsum}


def owners(captions: int) -> np.ndarray:
    """The image `[captions]` that each caption describes, where five follow each other."""
    return np.arange(captions) // CAPTIONS_PER_IMAGE


def ranks(scores: Tensor | np.ndarray, owner: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Ranks from 0: of each image's best caption `[I]`, and of each caption's image `[T]`.

    `scores` is `[I, T]`; caption t describes image `owner[t]`. Equal scores count against the
    model, so one that has collapsed scores 0. Raises InputError on NaN or infinite scores.
    """
    if isinstance(scores, Tensor):
        scores = scores.detach().to("cpu", torch.promote_types(scores.dtype, torch.float32)).numpy()
    owner = np.asarray(owner)
    own = scores[owner, np.arange(len(owner))]  # [T]
    of_images = np.empty(len(scores), dtype=np.int64)
    of_captions = np.zeros(len(owner), dtype=np.int64)
    for first in range(0, len(scores), ROW_BLOCK):
        block = np.array(scores[first : first + ROW_BLOCK])
        # DEVIATION: scores that are no numbers are an error (the published code ranked NaN).
        require(bool(np.isfinite(block).all()), "the scores hold NaN or inf; expected numbers")
        # DEVIATION: equal scores count against the model (their published order is arbitrary).
        relevant = owner == np.arange(first, first + len(block))[:, None]  # [rows, T]
        best = np.where(relevant, block, -np.inf).max(1, keepdims=True)  # [rows, 1]
        of_images[first : first + len(block)] = (~relevant & (block >= best)).sum(1)
        of_captions += (~relevant & (block >= own)).sum(0)
    return of_images, of_captions


def retrieval(scores: Tensor | np.ndarray, owner: Sequence[int]) -> Retrieval:
    """Both recalls of a score matrix `[I, T]`, where caption t describes image `owner[t]`."""
    of_images, of_captions = ranks(scores, owner)
    return Retrieval(Recall.of(of_images), Recall.of(of_captions))


def check_folds(images: int) -> None:
    """Raise InputError where the images cannot be cut into equal folds."""
    require(
        images > 0 and images % FOLDS == 0,
        f"--fold5: {images} images; expected a multiple of {FOLDS}",
    )


def folds(scores: np.ndarray, owner: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scores and owners of five consecutive equal slices of the images, with their captions."""
    check_folds(len(scores))
    # DEVIATION: folds are slices of one score matrix, ensembles too (the published ensemble used
    # the caption lengths of the first fold for every fold).
    size = len(scores) // FOLDS
    for first in range(0, len(scores), size):
        captions = np.flatnonzero((owner >= first) & (owner < first + size))
        yield scores[first : first + size][:, captions], owner[captions] - first


def mean_of(results: Sequence[Retrieval]) -> Retrieval:
    """Every figure averaged."""

    def mean(side: str) -> Recall:
        rows = [list(asdict(getattr(result, side)).values()) for result in results]
        return Recall(*np.mean(rows, axis=0).tolist())

    return Retrieval(mean("i2t"), mean("t2i"))


@torch.no_grad()
def score_split(
    model: Model,
    split: Split,
    vocabulary: Vocabulary,
    max_words: int,
    *,
    device: torch.device,
    images: int | None = None,
    workers: int = 0,
) -> np.ndarray:
    """Scores `[I, T]` float32 of a split's images (its first `images`) with all their captions.

    The model is in evaluation mode meanwhile. Each image and each caption is encoded once.
    """
    images = split.images if images is None else images
    captions = split.captions[: images * CAPTIONS_PER_IMAGE]
    training = model.training
    model.train(False)
    try:
        encoded_images = _encode_images(model, split, images, workers, device)
        encoded_captions = _encode_captions(model, vocabulary, captions, max_words, device)
        return score_pairs(model, encoded_images, encoded_captions)
    finally:
        model.train(training)


def score_pairs(
    model: Model, images: Modality, captions: Modality, block: int = PAIR_BLOCK
) -> np.ndarray:
    """Scores `[I, T]` float32 of all pairs, about `block` at a time; no score depends on it."""
    # Captions of like length share a block, where words beyond the longest are left out.
    order = captions.mask.sum(1).argsort(stable=True)
    rows = min(len(images), max(1, int(block**0.5)))
    columns = min(len(captions), max(1, block // rows))
    scores = np.empty((len(images), len(captions)), dtype=np.float32)
    with progress("scoring", scores.size, "pairs") as bar:
        for left in range(0, len(captions), columns):
            chosen = order[left : left + columns]
            some = captions[chosen]
            for top in range(0, len(images), rows):
                part, _ = model.score(images[top : top + rows], some)
                scores[top : top + rows, chosen.cpu().numpy()] = part.cpu().numpy()
                bar.update(part.numel())
    return scores


def _encode_images(
    model: Model, split: Split, images: int, workers: int, device: torch.device
) -> Modality:
    places = [(i, min(i + IMAGE_BLOCK, images)) for i in range(0, images, IMAGE_BLOCK)]
    blocks = load(ImageBlocks(split), places, workers)
    return _joined([model.encode_images(regions.to(device)) for regions in blocks])


def _encode_captions(
    model: Model,
    vocabulary: Vocabulary,
    captions: Sequence[str],
    max_words: int,
    device: torch.device,
) -> Modality:
    ids, mask = (tensor.to(device) for tensor in vocabulary.encode(captions, max_words))
    blocks = zip(ids.split(CAPTION_BLOCK), mask.split(CAPTION_BLOCK), strict=True)
    return _joined([model.encode_captions(*block) for block in blocks])


def _joined(parts: Sequence[Modality]) -> Modality:
    return Modality(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.pooled for part in parts]),
        torch.cat([part.mask for part in parts]),
    )
