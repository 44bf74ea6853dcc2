"""results.py — the metrics of an evaluation as values, JSON and text (SPEC §10). No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from common.errors import InputError

Ranks = tuple[np.ndarray, np.ndarray]  # of images [I] and of captions [T], from 0

MSCOCO_IMAGES = 5000  # a split of this size is reported as 1K (five folds) and as 5K (whole)


@dataclass(frozen=True)
class Recall:
    """Recalls in percent; median and mean rank, counted from 1."""

    r1: float
    r5: float
    r10: float
    medr: float
    meanr: float

    @classmethod
    def of(cls, ranks: np.ndarray) -> "Recall":
        """Return the metrics of ranks `[queries]` of the best match, counted from 0."""
        r1, r5, r10 = (float(100 * np.mean(ranks < k)) for k in (1, 5, 10))
        return cls(r1, r5, r10, float(np.floor(np.median(ranks)) + 1), float(ranks.mean() + 1))


@dataclass(frozen=True)
class Retrieval:
    """Metrics of both directions: captions of an image, images of a caption."""

    i2t: Recall
    t2i: Recall

    @classmethod
    def of(cls, of_images: np.ndarray, of_captions: np.ndarray) -> "Retrieval":
        """Return the metrics of ranks of images `[I]` and captions `[T]`, counted from 0."""
        return cls(Recall.of(of_images), Recall.of(of_captions))

    @classmethod
    def mean(cls, results: Sequence["Retrieval"]) -> "Retrieval":
        """Return the mean of every metric."""
        i2t, t2i = (
            Recall(*np.mean([list(asdict(side).values()) for side in sides], axis=0).tolist())
            for sides in ([r.i2t for r in results], [r.t2i for r in results])
        )
        return cls(i2t, t2i)

    @property
    def rsum(self) -> float:
        """Sum of the six recalls."""
        return sum(side.r1 + side.r5 + side.r10 for side in (self.i2t, self.t2i))

    @property
    def selection(self) -> float:
        """Model selection criterion: R@1 + R@5 of both directions."""
        # REFERENCE: four recalls, though the published name of the criterion is best_rsum.
        return sum(side.r1 + side.r5 for side in (self.i2t, self.t2i))

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers, unrounded, rsum included."""
        return {**asdict(self), "rsum": self.rsum}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Retrieval":
        """Return the metrics of `to_json`. Raises KeyError, TypeError or ValueError."""
        i2t, t2i = ({k: float(v) for k, v in content[way].items()} for way in ("i2t", "t2i"))
        return cls(Recall(**i2t), Recall(**t2i))


@dataclass(frozen=True)
class ProtocolResult:
    """Metrics of one protocol: of the whole split, or the mean of its folds."""

    metrics: Retrieval
    folds: tuple[Retrieval, ...] = ()
    # The JSON of `metrics` with `[low, high]` in place of each value; None without --bootstrap.
    intervals: dict[str, Any] | None = None

    @property
    def lines(self) -> list[str]:
        """The family's lines of metrics, with intervals if there are some."""
        text = [f"rsum: {self.metrics.rsum:.1f}"]
        for side, title in (("i2t", "Image to text"), ("t2i", "Text to image")):
            recall = getattr(self.metrics, side)
            mean = (recall.r1 + recall.r5 + recall.r10) / 3
            text.append(f"Average {side} Recall: {mean:.1f}")
            text.append(f"{title}: {' '.join(f'{value:.1f}' for value in asdict(recall).values())}")
            if self.intervals:
                bounds = (self.intervals[side][name] for name in asdict(recall))
                text.append(
                    f"95 % intervals: {' '.join(f'{low:.1f}-{high:.1f}' for low, high in bounds)}"
                )
        if self.intervals:
            low, high = self.intervals["rsum"]
            text.append(f"95 % interval of rsum: {low:.1f}-{high:.1f}")
        return text

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "metrics": self.metrics.to_json(),
            "folds": [fold.to_json() for fold in self.folds],
            "intervals": self.intervals,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ProtocolResult":
        """Return the result of `to_json`. Raises KeyError, TypeError or ValueError."""
        folds = tuple(Retrieval.from_json(fold) for fold in content["folds"])
        return cls(Retrieval.from_json(content["metrics"]), folds, content["intervals"])


@dataclass(frozen=True)
class EvaluationResult:
    """What was evaluated, how, and the metrics. A value is None if it is not known."""

    models: list[str] | None  # checkpoints, or
    scores: list[str] | None  # saved score matrices
    data_name: str | None
    split: str | None
    images: int
    captions: int
    # For each model SHA-256 of its "data", its "bert" and the data of its "training".
    fingerprints: list[dict[str, str | None]] | None
    seconds: float | None  # of encoding and scoring
    # Of --shortlist: "count", "share" of pairs scored, "recall_upper_bound" {i2t, t2i} in percent.
    shortlist: dict[str, Any] | None
    whole: ProtocolResult  # all images at once (MSCOCO 5K)
    fold5: ProtocolResult | None  # mean of five folds (MSCOCO 1K)
    fold5_asked: bool = False

    @property
    def metrics(self) -> Retrieval:
        """The metrics that were asked for: the mean of five folds with --fold5, else the whole."""
        return (self.fold5 if self.fold5 and self.fold5_asked else self.whole).metrics

    def to_json(self) -> dict[str, Any]:
        """Return plain data, as `evaluate_models.py --json` writes it."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        fold5 = self.fold5.to_json() if self.fold5 else None
        return content | {"whole": self.whole.to_json(), "fold5": fold5}

    def to_text(self) -> str:
        """Return the lines that an evaluation prints (SPEC §10)."""
        text = []
        if self.shortlist:
            count, bound = self.shortlist["count"], self.shortlist["recall_upper_bound"]
            share = 100 * self.shortlist["share"]
            text.append(
                f"Approximate: only the best {count} in each direction by pooled vectors were "
                f"scored, {share:.1f} % of all pairs; they hold a correct answer for "
                f"{bound['i2t']:.1f} % of the images and {bound['t2i']:.1f} % of the captions"
            )
        if self.fold5:
            for number, fold in enumerate(self.fold5.folds, 1):
                text += [f"Fold {number}", *ProtocolResult(fold).lines]
            text += [f"Mean of {len(self.fold5.folds)} folds", *self.fold5.lines]
        if not self.fold5 or self.images == MSCOCO_IMAGES:
            text += ["All images"] if self.fold5 else []
            text += self.whole.lines
        return "\n".join(text)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: object) -> "EvaluationResult":
        """Return the result of `to_json`. Raises InputError naming `source` if it is not one."""
        try:
            known = {field.name: content[field.name] for field in fields(cls)}
            whole = ProtocolResult.from_json(known["whole"])
            fold5 = ProtocolResult.from_json(known["fold5"]) if known["fold5"] else None
            return cls(**known | {"whole": whole, "fold5": fold5})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{source}: not the result of an evaluation ({reason})") from error
