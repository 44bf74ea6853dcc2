"""scoring.py — a model's scores of all pairs of a split, or of a shortlist of them.

Kept apart from evaluation.py, which measures score matrices and needs no model. It is given a model
and imports none: a model encodes images and captions and scores them.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from common.cli import progress
from common.errors import InputError
from common.layout import CAPTIONS_PER_IMAGE
from common.memory import chunk_size, free_memory, is_oom, no_memory
from common.workers import load
from data import ImageBlocks, Split
from evaluation import best_items
from router import Modality
from vocab import Vocabulary

log = logging.getLogger(__name__)

IMAGE_BLOCK = 128  # images encoded at a time
CAPTION_BLOCK = 256  # captions encoded at a time
TILE = 128  # images, and captions, that are on the device together
TENSORS = 40  # [L, D] that a pair takes while it is routed, at most
FLOAT = 4  # bytes of a float32
# Bytes that BERT's states of a block, the libraries' buffers and kept memory take beside what is
# counted: 0.67 GB of 1.8 GB when 200 images were scored with MiniLM.
BESIDE = 700_000_000
BEHIND = 4  # so far behind its product a pair lies below every score of unit vectors

Tile = tuple[Tensor, Tensor]  # numbers of images and of encoded captions, all of them paired


class BadScores(InputError):
    """A model gives scores that are no numbers."""


class Model(Protocol):
    """What scoring needs of a model."""

    training: bool

    @property
    def direction(self) -> str: ...
    def train(self, mode: bool = True) -> Any: ...
    def encode_images(self, regions: Tensor) -> Modality: ...
    def encode_captions(self, ids: Tensor, mask: Tensor) -> Modality: ...
    def score(self, images: Modality, captions: Modality, pairs: int) -> tuple[Tensor, Tensor]: ...
    def closed(self, paths: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Encoded:
    """A split's images and captions, encoded, in main memory; each distinct caption once."""

    images: Modality
    captions: Modality
    text: np.ndarray  # [T] the encoded caption that each caption is

    def expanded(self, columns: np.ndarray) -> np.ndarray:
        """`[I, T]` of what is known `[I, distinct captions]`."""
        return columns if columns.shape[1] == len(self.text) else columns[:, self.text]

    @property
    def pairs(self) -> int:
        """Pairs of an image and a distinct caption."""
        return len(self.images) * len(self.captions)

    def products(self) -> np.ndarray:
        """Products `[I, T]` of the pooled vectors."""
        return self.expanded((self.images.pooled @ self.captions.pooled.T).numpy())


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """The model in evaluation mode and without gradients, then as it was."""
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


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
    """Scores `[I, T]` float32 of a split's images (its first `images`) with all their captions."""
    encoded = encode_split(
        model, split, vocabulary, max_words, device=device, images=images, workers=workers
    )
    return Scorer(model, encoded, device).all_pairs()


def encode_split(
    model: Model,
    split: Split,
    vocabulary: Vocabulary,
    max_words: int,
    *,
    device: torch.device,
    images: int | None = None,
    workers: int = 0,
) -> Encoded:
    """A split's images (its first `images`) and all their captions, each distinct one once."""
    images = split.images if images is None else images
    captions = split.captions[: images * CAPTIONS_PER_IMAGE]
    numbers: dict[str, int] = {}
    text = np.array([numbers.setdefault(caption, len(numbers)) for caption in captions])
    places = [(i, min(i + IMAGE_BLOCK, images)) for i in range(0, images, IMAGE_BLOCK)]
    ids, mask = vocabulary.encode(list(numbers), max_words)
    with evaluating(model):
        regions = load(ImageBlocks(split), places, workers)
        encoded_images = _gathered(
            (model.encode_images(block.to(device)) for block in regions), "images", images
        )
        blocks = zip(ids.split(CAPTION_BLOCK), mask.split(CAPTION_BLOCK), strict=True)
        encoded_captions = _gathered(
            (model.encode_captions(i.to(device), m.to(device)) for i, m in blocks),
            "captions",
            len(numbers),
        )
    return Encoded(encoded_images, encoded_captions, text)


def _gathered(parts: Iterator[Modality], what: str, total: int) -> Modality:
    """Parts of a modality, `total` items in all, as one in main memory."""
    whole: dict[str, Tensor] = {}
    done = 0
    with progress(f"encoding {what}", total, what) as bar:
        for part in parts:
            for name, value in vars(part).items():
                if name not in whole:
                    whole[name] = torch.empty(total, *value.shape[1:], dtype=value.dtype)
                whole[name][done : done + len(part)] = value
            done += len(part)
            bar.update(len(part))
    return Modality(**whole)


class Scorer:
    """A model's scores of a split's pairs, a few at a time; fewer where memory runs out."""

    def __init__(
        self, model: Model, encoded: Encoded, device: torch.device, name: str = "the model"
    ) -> None:
        self.model, self.encoded, self.device, self.name = model, encoded, device, name
        queries = encoded.images if model.direction == "i2t" else encoded.captions
        size = queries.tokens[0].numel() * queries.tokens.element_size()
        fits = free_memory(device) // 2 // (TENSORS * size)
        self.pairs = max(1, min(chunk_size(device, queries.tokens.shape[-1]), fits))
        self.scored = 0
        self.closed: Tensor | int = 0  # [layers, N] scored pairs with all gates of a cell closed

    def all_pairs(self) -> np.ndarray:
        """Scores `[I, T]` float32 of all pairs; none depends on what it is scored with."""
        # Captions of like length share a tile, where words beyond the longest are left out.
        captions = self.encoded.captions.mask.sum(1).argsort(stable=True).split(TILE)
        images = torch.arange(len(self.encoded.images)).split(TILE)
        return self._scores([(i, c) for c in captions for i in images])

    def some_pairs(self, wanted: np.ndarray) -> np.ndarray:
        """Scores `[I, T]` float32 of the pairs that are `wanted` `[I, T]`, and 0 elsewhere."""
        order = self.encoded.text.argsort(kind="stable")  # captions of one text side by side
        _, firsts = np.unique(self.encoded.text[order], return_index=True)
        distinct = np.logical_or.reduceat(wanted[:, order], firsts, axis=1)
        if self.model.direction == "i2t":
            tiles = [([i], np.flatnonzero(row)) for i, row in enumerate(distinct)]
        else:
            tiles = [(np.flatnonzero(column), [c]) for c, column in enumerate(distinct.T)]
        some = [(torch.as_tensor(i), torch.as_tensor(c)) for i, c in tiles if len(i) and len(c)]
        return np.where(wanted, self._scores(some), np.float32(0))

    def _scores(self, tiles: Sequence[Tile]) -> np.ndarray:
        """Scores `[I, T]` of these tiles, and 0 elsewhere."""
        images, captions = self.encoded.images, self.encoded.captions
        scores = np.zeros((len(images), len(captions)), dtype=np.float32)
        total = sum(len(i) * len(c) for i, c in tiles)
        parts = ((images[i], captions[c]) for i, c in tiles)
        with evaluating(self.model), progress("scoring", total, "pairs") as bar:
            for (i, c), part in zip(tiles, moved_ahead(parts, self.device), strict=True):
                found = self._score(*part)
                # at once, not after hours
                if not found.isfinite().all():
                    raise BadScores(f"{self.name} gives scores of NaN or inf")
                scores[np.ix_(i.numpy(), c.numpy())] = found.cpu().numpy()
                bar.update(found.numel())
        return self.encoded.expanded(scores)

    def _score(self, images: Modality, captions: Modality) -> Tensor:
        """Scores of a tile, gone on with in smaller slices where memory runs out."""
        while True:
            try:
                scores, paths = self.model.score(images, captions, self.pairs)
            except Exception as error:
                if self.pairs == 1 or not is_oom(error):
                    raise
                self.pairs //= 2
                log.warning("%s; going on with %d pairs at a time", no_memory(error), self.pairs)
            else:
                self.closed = self.closed + self.model.closed(paths).cpu()
                self.scored += scores.numel()
                return scores


def scoring_memory(
    images: int, captions: int, regions: int, words: int, dim: int, models: int
) -> int:
    """Bytes that scoring all pairs takes on a CPU, by estimate, beside the models' weights.

    Of `models` models that are an ensemble: their items, encoded, and their matrices of scores.
    """
    items = images * regions + captions * words  # tokens, whose pooled vectors come beside
    encoded = (items + images + captions) * dim * FLOAT + items
    matrices = (models + 1) * images * captions * FLOAT  # one of distinct captions among them
    pairs = chunk_size(torch.device("cpu"), dim)
    routed = pairs * TENSORS * max(regions, words) * dim * FLOAT
    return models * encoded + matrices + routed + BESIDE


def moved_ahead(
    parts: Iterable[tuple[Modality, Modality]], device: torch.device
) -> Iterator[tuple[Modality, Modality]]:
    """Each part on the device; on a GPU the next one is copied while this one is worked on."""
    if device.type != "cuda":
        yield from ((images.to(device), captions.to(device)) for images, captions in parts)
        return
    stream, before = torch.cuda.Stream(device), None
    for images, captions in parts:
        with torch.cuda.stream(stream):
            part = images.pinned().to(device), captions.pinned().to(device)
        if before is not None:
            yield before
        torch.cuda.current_stream(device).wait_stream(stream)
        for tensor in (*vars(part[0]).values(), *vars(part[1]).values()):
            tensor.record_stream(torch.cuda.current_stream(device))
        before = part
    if before is not None:
        yield before


def shortlist(products: np.ndarray, count: int) -> np.ndarray:
    """Which pairs `[I, T]` are among the `count` best of their image or of their caption."""
    chosen = np.zeros(products.shape, dtype=bool)
    for matrix, marks in ((products, chosen), (products.T, chosen.T)):
        for first, places in best_items(matrix, count):
            np.put_along_axis(marks[first : first + len(places)], places, True, axis=1)
    return chosen


def shortlisted(scores: np.ndarray) -> bool:
    """Whether a matrix has what lies `behind`, far below scores of unit vectors.

    With `--no_imgnorm` scores of all pairs may lie as low.
    """
    return bool(scores.min() < -BEHIND / 2)


def behind(scores: np.ndarray, products: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The scores of pairs that are wanted, and for the others their product, below them all."""
    # Scores and products of unit vectors are within ±1; of others (--no_imgnorm) they may not be.
    gap = max(BEHIND, products.max() - scores[wanted].min() + 1)
    return np.where(wanted, scores, products - np.float32(gap))
