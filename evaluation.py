"""evaluation.py — what a score matrix is worth (SPEC §10): ranks, recalls, folds.

It needs no model, and knows nothing of how the scores came about.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError, require
from common.files import map_array
from common.layout import CAPTIONS_PER_IMAGE

# Named by MSCOCO's: the mean of five folds, and the whole split, of however many images.
Protocol = Literal["1k5", "5k"]
Ranks = tuple[np.ndarray, np.ndarray]  # of images [I] and of captions [T], from 0

FOLDS = 5
MSCOCO_IMAGES = 5000  # that its protocols are of
LEVEL = 95  # percent of the intervals
NO_NUMBERS = "the scores hold NaN or inf; expected numbers"
ROW_BLOCK = 256  # rows of a score matrix ranked at a time


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

    @classmethod
    def of(cls, of_images: np.ndarray, of_captions: np.ndarray) -> "Retrieval":
        """From the ranks of images `[I]` and captions `[T]`, from 0."""
        return cls(Recall.of(of_images), Recall.of(of_captions))

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


def image_of_caption(captions: int) -> np.ndarray:
    """The image `[captions]` that each caption describes, where five follow each other."""
    return np.arange(captions) // CAPTIONS_PER_IMAGE


def ranks(scores: Tensor | np.ndarray, owner: Sequence[int]) -> Ranks:
    """Ranks from 0: of each image's best caption `[I]`, and of each caption's image `[T]`.

    `scores` is `[I, T]`, a memory map too; caption t describes image `owner[t]`. Equal scores count
    against the model, so one that has collapsed scores 0. Raises InputError on NaN or infinite
    scores.
    """
    if isinstance(scores, Tensor):
        scores = scores.detach().to("cpu", torch.promote_types(scores.dtype, torch.float32)).numpy()
    owner = np.asarray(owner)
    own = scores[owner, np.arange(len(owner))]  # [T]
    own = own.astype(np.promote_types(own.dtype, np.float32))
    require(bool(np.isfinite(own).all()), NO_NUMBERS)
    best = np.full(len(scores), -np.inf, dtype=own.dtype)  # [I] of an image's captions
    np.maximum.at(best, owner, own)
    # What reaches a relevant score ranks before it, but for what is relevant itself.
    # DEVIATION: equal scores count against the model (their published order is arbitrary).
    of_images = -np.bincount(owner, own >= best[owner], len(scores)).astype(np.int64)
    of_captions = torch.full((len(owner),), -1)
    own, best = torch.from_numpy(own), torch.from_numpy(best)
    for first in range(0, len(scores), ROW_BLOCK):
        stop = min(first + ROW_BLOCK, len(scores))
        block = torch.from_numpy(np.array(scores[first:stop]))
        # DEVIATION: scores that are no numbers are an error (the published code ranked NaN).
        require(bool(block.isfinite().all()), NO_NUMBERS)
        of_images[first:stop] += (block >= best[first:stop, None]).sum(1).numpy()
        of_captions += (block >= own).sum(0)
    return of_images, of_captions.numpy()


def retrieval(scores: Tensor | np.ndarray, owner: Sequence[int]) -> Retrieval:
    """Both recalls of a score matrix `[I, T]`, where caption t describes image `owner[t]`."""
    return Retrieval.of(*ranks(scores, owner))


def best_items(scores: np.ndarray, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """The `count` best columns of every row of `[rows, columns]`, best first.

    A block of rows at a time: its first row, and its columns `[block, count]`.
    """
    for first in range(0, len(scores), ROW_BLOCK):
        block = torch.from_numpy(np.array(scores[first : first + ROW_BLOCK], order="C"))
        yield first, block.topk(min(count, block.shape[1]), dim=1).indices.numpy()


def ceiling(known: np.ndarray, owner: Sequence[int]) -> dict[str, float]:
    """How many queries, in percent, have a right answer among the `known` pairs `[I, T]`."""
    own = known[np.asarray(owner), np.arange(len(owner))]  # [T]
    images = np.bincount(owner, own, len(known)) > 0
    return {"i2t": 100 * float(images.mean()), "t2i": 100 * float(own.mean())}


def check_folds(images: int, source: str | Path = "scores") -> None:
    """Raise InputError where the images of `source` cannot be cut into equal folds."""
    found = f"--fold5, --protocols 1k5: {source}: {images} images"
    require(images > 0 and images % FOLDS == 0, f"{found}; expected a multiple of {FOLDS}")


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


def ranked(scores: np.ndarray, protocol: Protocol) -> list[Ranks]:
    """Ranks by fold, of scores `[I, T]` whose captions follow each other by five an image."""
    owner = image_of_caption(scores.shape[1])
    parts = folds(scores, owner) if protocol == "1k5" else [(scores, owner)]
    return [ranks(*part) for part in parts]


def measured(found: Sequence[Ranks], protocol: Protocol, samples: int) -> dict[str, Any]:
    """Metrics, those of each fold, and with `samples` their intervals, as plain numbers."""
    results = [Retrieval.of(*fold) for fold in found]
    return {
        "metrics": mean_of(results).as_dict(),
        "folds": [result.as_dict() for result in results] if protocol == "1k5" else [],
        "intervals": intervals(found, samples) if samples else None,
    }


def mean_matrix(matrices: Iterable[np.ndarray]) -> np.ndarray:
    """The mean of matrices, which are made one after the other."""
    total, count = None, 0
    for matrix in matrices:
        total = matrix if total is None else np.add(total, matrix, out=total)
        count += 1
    return np.divide(total, count, out=total)


def mean_of_files(paths: Sequence[str | Path], matrices: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of matrices that are only read. Raises InputError where it is no number."""
    kind = np.result_type(np.float32, *matrices)
    try:
        with np.errstate(over="raise"):
            return mean_matrix(np.array(matrix, kind) for matrix in matrices)
    except FloatingPointError as error:
        names = ", ".join(map(str, paths))
        raise InputError(f"{names}: their sum is beyond {kind}; expected smaller scores") from error


def intervals(found: Sequence[Ranks], samples: int, seed: int = 0) -> dict[str, Any]:
    """Intervals of every figure from `samples` bootstrap samples: `[low, high]` in its place.

    Images are drawn with replacement within each fold, and their captions go with them; what is
    searched stays whole. The interval lies between the percentiles that leave out LEVEL's rest.
    """
    rng = np.random.default_rng(seed)
    tails = (100 - LEVEL) / 2
    figures = [_flat(mean_of([_resampled(*fold, rng) for fold in found])) for _ in range(samples)]
    bounds = np.percentile(figures, (tails, 100 - tails), axis=0).T.tolist()
    names = list(Recall.__dataclass_fields__)
    i2t, t2i = bounds[: len(names)], bounds[len(names) : -1]
    sides = {"i2t": dict(zip(names, i2t, strict=True)), "t2i": dict(zip(names, t2i, strict=True))}
    return {**sides, "rsum": bounds[-1]}


def _resampled(
    of_images: np.ndarray, of_captions: np.ndarray, rng: np.random.Generator
) -> Retrieval:
    """The results of as many images, drawn with replacement."""
    chosen = rng.integers(len(of_images), size=len(of_images))
    captions = of_captions.reshape(len(of_images), CAPTIONS_PER_IMAGE)[chosen]
    return Retrieval.of(of_images[chosen], captions.ravel())


def _flat(result: Retrieval) -> list[float]:
    """Every figure of a result, rsum last."""
    return [*asdict(result.i2t).values(), *asdict(result.t2i).values(), result.rsum]


def lines(result: dict[str, Any]) -> str:
    """The family's lines (§10) for the metrics of a result, with intervals where there are some."""
    metrics, between = result["metrics"], result["intervals"]
    text = [f"rsum: {metrics['rsum']:.1f}"]
    for side, title in (("i2t", "Image to text"), ("t2i", "Text to image")):
        figures = metrics[side]
        mean = (figures["r1"] + figures["r5"] + figures["r10"]) / 3
        text.append(f"Average {side} Recall: {mean:.1f}")
        text.append(f"{title}: {' '.join(f'{value:.1f}' for value in figures.values())}")
        if between:
            bounds = " ".join(f"{low:.1f}-{high:.1f}" for low, high in between[side].values())
            text.append(f"{LEVEL} % intervals: {bounds}")
    if between:
        low, high = between["rsum"]
        text.append(f"{LEVEL} % interval of rsum: {low:.1f}-{high:.1f}")
    return "\n".join(text) + "\n"


def as_text(result: dict[str, Any]) -> str:
    """The lines that an evaluation prints: every protocol's, and the extended figures."""
    text = [_approximate(result["shortlist"])] if result["shortlist"] else []
    every = result["protocols"]
    for protocol, part in every.items():
        if len(every) > 1 and protocol == "5k":
            text.append("All images\n")
        for number, fold in enumerate(part["folds"], 1):
            text.append(f"Fold {number}\n{lines({'metrics': fold, 'intervals': None})}")
        if part["folds"]:
            text.append(f"Mean of {FOLDS} folds\n")
        text.append(lines(part))
    for name, ways in (result["extended"] or {}).items():
        text.append(f"{name}: i2t {ways['i2t']:.1f}, t2i {ways['t2i']:.1f}\n")
    return "".join(text)


def _approximate(limits: dict[str, Any]) -> str:
    """What is said of results by a shortlist."""
    best = limits["ceiling"]
    return (
        f"Approximate: only the best {limits['count']} each way by pooled vectors were scored, "
        f"{100 * limits['share']:.1f} % of all pairs; a right answer is among them for "
        f"{best['i2t']:.1f} % of the images and {best['t2i']:.1f} % of the captions, which no R@k "
        f"of the whole split with k up to {limits['count']} can exceed\n"
    )


def map_scores(path: Path) -> np.ndarray:
    """A score matrix `[I, 5 I]` by memory map. Raises InputError where it is none."""
    matrix = map_array(path, "a score matrix, a .npy file")
    fits = matrix.ndim == 2 and matrix.shape[1] == CAPTIONS_PER_IMAGE * len(matrix) > 0
    fits = fits and matrix.dtype in (np.float16, np.float32, np.float64)  # of this byte order
    found = f"{matrix.dtype}, shape {matrix.shape}"
    wanted = "floats of this machine's byte order (images, five captions an image)"
    require(fits, f"{path}: {found}; expected {wanted}")
    for first in range(0, len(matrix), ROW_BLOCK):
        whole = np.isfinite(matrix[first : first + ROW_BLOCK]).all()
        require(bool(whole), f"{path}: {NO_NUMBERS}")
    return matrix
