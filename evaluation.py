"""evaluation.py — scores of all pairs of a split, and their ranks, recalls and folds (SPEC §10).

It is given a model that encodes and scores, and knows nothing of checkpoints or options.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.bootstrap import bootstrap_ci
from common.cli import progress
from common.compile import needs_fixed_shapes
from common.distributed import agreed, gather_at_first
from common.errors import require
from common.memory import chunk_size, describe_oom, is_oom, storage_device
from common.results import ProtocolResult, Ranks, Retrieval
from common.score_files import NOT_FINITE, ROW_BLOCK
from common.workers import load
from common.world import ALONE, World
from data import ImageBlocks, Split, to_device
from model import DIME
from router import Modality
from vocab import Vocabulary

log = logging.getLogger(__name__)

TILE = 128  # images, and captions, that are scored on the device together
IMAGE_BLOCK, CAPTION_BLOCK = TILE, 256  # images and captions encoded at a time
BAND = 16 * TILE**2  # pairs after which their scores are fetched: a GPU is waited for only then
FOLDS = 5
RERANK_GAP = 4  # scores and coarse scores of unit vectors are within ±1, so 4 separates them

Tile = tuple[Tensor, Tensor]  # indices of images and of encoded captions, all of them paired


@dataclass(frozen=True)
class Encoded:
    """A split's encoded images and captions; each distinct caption once.

    They stay on the device of the model if they fit there, otherwise they are in main memory.
    """

    images: Modality
    captions: Modality
    text: np.ndarray  # [T] index of the encoded caption of each caption

    def expand(self, columns: np.ndarray) -> np.ndarray:
        """Return `[I, T]` from columns of distinct captions, `[I, distinct captions]`."""
        return columns if columns.shape[1] == len(self.text) else columns[:, self.text]

    def coarse_scores(self) -> np.ndarray:
        """Return the products `[I, T]` of the pooled vectors."""
        return self.expand((self.images.pooled.cpu() @ self.captions.pooled.cpu().T).numpy())


def encode_split(
    model: DIME,
    split: Split,
    vocabulary: Vocabulary,
    *,
    device: torch.device,
    images: int | None = None,
    rows: range | None = None,
    workers: int = 0,
) -> Encoded:
    """Encode a split's images (or its first `images`) and all their captions.

    Of the images, only those with numbers in `rows` are encoded.
    """
    images = split.images if images is None else images
    rows = range(images) if rows is None else rows
    indices: dict[str, int] = {}
    captions = split.captions[: split.groups.counts[:images].sum()]
    text = np.array([indices.setdefault(caption, len(indices)) for caption in captions])
    keys = [(i, min(i + IMAGE_BLOCK, rows.stop)) for i in rows[::IMAGE_BLOCK]]
    blocks = load(ImageBlocks(split), keys, workers, pin=device.type == "cuda")
    encoded_images = encode_images(model, blocks, len(rows), device)
    return Encoded(encoded_images, encode_captions(model, list(indices), vocabulary, device), text)


def encode_images(
    model: DIME, blocks: Iterable[Tensor], total: int, device: torch.device
) -> Modality:
    """Encode blocks of region features `[images, L, img_dim]`, `total` images together."""
    with model.evaluating():
        sent = (to_device(block, device).float() for block in blocks)
        return _gather(map(model.encode_images, sent), "images", total)


def encode_captions(
    model: DIME, captions: Sequence[str], vocabulary: Vocabulary, device: torch.device
) -> Modality:
    """Encode captions, each as many words of it as the model reads."""
    ids, mask = vocabulary.encode(captions, model.config.max_words)
    blocks = zip(ids.split(CAPTION_BLOCK), mask.split(CAPTION_BLOCK), strict=True)
    with model.evaluating():
        sent = ((to_device(i, device), to_device(m, device)) for i, m in blocks)
        return _gather(starmap(model.encode_captions, sent), "captions", len(captions))


def rows_of_part(images: int, part: World) -> range:
    """Return which of some images are those of a part, perhaps none.

    They are whole blocks and tiles: scores of other tiles could differ in the last bit.
    """
    tiles = part.share(-(-images // TILE))
    return range(min(tiles.start * TILE, images), min(tiles.stop * TILE, images))


def _gather(parts: Iterator[Modality], what: str, total: int) -> Modality:
    """Return the parts of a modality, `total` items together, as one, where `Encoded` has it."""
    tensors: dict[str, Tensor] = {}
    done = 0
    with progress(f"encoding {what}", total, what) as bar:
        for part in parts:
            if not tensors:
                size = total * sum(value[0].nbytes for value in vars(part).values())
                place = storage_device(part.tokens.device, size)
                for name, value in vars(part).items():
                    tensors[name] = value.new_empty(total, *value.shape[1:], device=place)
            for name, value in vars(part).items():
                tensors[name][done : done + len(part)] = value
            done += len(part)
            bar.update(len(part))
    return Modality(**tensors)


def score_split(
    model: DIME,
    split: Split,
    vocabulary: Vocabulary,
    *,
    device: torch.device,
    images: int | None = None,
    workers: int = 0,
    stop: Callable[[], None] | None = None,
    world: World = ALONE,
) -> np.ndarray:
    """Return scores `[I, T]` float32 of a split's images (or its first `images`) and captions.

    Of several processes each scores its share, and rank 0 has the result; other ranks return no
    rows. `stop` is called before each tile, equally often by all ranks, and may raise. Raises
    InputError on NaN or inf.
    """
    with agreed(world):
        encoded = encode_split(
            model, split, vocabulary, device=device, images=images, workers=workers
        )
    return score_all(model, encoded, device, stop=stop, world=world)


def score_all(
    model: DIME,
    encoded: Encoded,
    device: torch.device,
    name: str = "the model",
    stop: Callable[[], None] | None = None,
    world: World = ALONE,
) -> np.ndarray:
    """Return scores `[I, T]` float32 of all pairs, at rank 0; tiles depend on the split alone."""
    # Captions of similar length share a tile, where words beyond the longest are left out.
    captions = encoded.captions.mask.cpu().sum(1).argsort(stable=True).split(TILE)
    images = torch.arange(len(encoded.images)).split(TILE)
    tiles = [(i, c) for c in captions for i in images]
    least = TILE if needs_fixed_shapes(device) else 1
    return _score_tiles(model, encoded, tiles, device, name, world, stop, least)


def score_some(
    model: DIME,
    encoded: Encoded,
    wanted: np.ndarray,
    device: torch.device,
    name: str = "the model",
    world: World = ALONE,
) -> np.ndarray:
    """Return scores `[I, T]` of the pairs that are `wanted` `[I, T]`, 0 elsewhere, at rank 0."""
    order = encoded.text.argsort(kind="stable")  # captions with equal text side by side
    _, firsts = np.unique(encoded.text[order], return_index=True)
    distinct = np.logical_or.reduceat(wanted[:, order], firsts, axis=1)
    if model.direction == "i2t":
        tiles = [(np.array([i]), np.flatnonzero(row)) for i, row in enumerate(distinct)]
    else:
        tiles = [(np.flatnonzero(column), np.array([c])) for c, column in enumerate(distinct.T)]
    some = [(torch.as_tensor(i), torch.as_tensor(c)) for i, c in tiles if len(i) and len(c)]
    scores = _score_tiles(model, encoded, some, device, name, world)
    return np.where(wanted[: len(scores)], scores, np.float32(0))


def _score_tiles(
    model: DIME,
    encoded: Encoded,
    tiles: Sequence[Tile],
    device: torch.device,
    name: str,
    world: World,
    stop: Callable[[], None] | None = None,
    least: int = 1,
) -> np.ndarray:
    """Return scores `[I, T]` of these tiles, and 0 elsewhere; ranks but the first return no rows.

    A tile has at least `least` images and captions for the device: the first ones are repeated.
    """
    rows = len(encoded.images) if world.rank == 0 else 0
    scores = np.zeros((rows, len(encoded.captions)), dtype=np.float32)
    pairs = chunk_size(device.type, encoded.images.tokens.shape[-1])
    total = sum(map(_size, tiles))
    with model.evaluating(), progress("scoring", total, "pairs") as bar:
        for band in _bands(tiles, BAND * world.size):
            scored = []
            for first in range(0, len(band), world.size):
                turn = band[first : first + world.size]  # one for each rank, at the end for some
                if stop is not None:
                    stop()
                for i, c in turn[world.rank : world.rank + 1]:
                    images = _take(encoded.images, i, device, least)
                    captions = _take(encoded.captions, c, device, least)
                    tile, pairs = _score_tile(model, images, captions, pairs)
                    scored.append(tile[: len(i), : len(c)])
                bar.update(sum(map(_size, turn)))
            for (i, c), values in _fetch(band, scored, name, world):
                scores[np.ix_(i.numpy(), c.numpy())] = values.view(len(i), len(c)).numpy()
    return encoded.expand(scores)


def _size(tile: Tile) -> int:
    return len(tile[0]) * len(tile[1])


def _bands(tiles: Sequence[Tile], least: int) -> Iterator[list[Tile]]:
    """Yield consecutive tiles together, as soon as they have `least` pairs."""
    band: list[Tile] = []
    for tile in tiles:
        band.append(tile)
        if sum(map(_size, band)) >= least:
            yield band
            band = []
    if band:
        yield band


def _fetch(
    band: Sequence[Tile], own: Sequence[Tensor], name: str, world: World
) -> Iterator[tuple[Tile, Tensor]]:
    """Yield at rank 0 the tiles of a band and their scores `[pairs]`, in main memory.

    `own` are the scores of this rank, of every size-th tile: neighbours have captions of similar
    length, which cost the same. Raises InputError on NaN or inf.
    """
    values = torch.cat([tile.flatten() for tile in own]).cpu() if own else torch.empty(0)
    with agreed(world):  # checked here, not after hours of scoring
        require(bool(values.isfinite().all()), f"{name} gives scores of NaN or inf")
    shares = [band[rank :: world.size] for rank in range(world.size)]
    counts = [sum(map(_size, share)) for share in shares]
    for share, scores in zip(shares, gather_at_first(world, values, counts), strict=False):
        yield from zip(share, scores.split(list(map(_size, share))), strict=True)


def _take(items: Modality, index: Tensor, device: torch.device, least: int) -> Modality:
    """Return items on the device, at least `least`: the first ones are repeated."""
    index = index[torch.arange(max(least, len(index))) % len(index)]
    if items.tokens.device.type == device.type:
        return items[to_device(index, device)]
    return Modality(*(to_device(tensor[index], device) for tensor in vars(items).values()))


def _score_tile(
    model: DIME, images: Modality, captions: Modality, pairs: int
) -> tuple[Tensor, int]:
    """Return a tile's scores and the chunk size, which is halved whenever memory runs out."""
    while True:
        try:
            return model.score(images, captions, pairs)[0], pairs
        except Exception as error:
            if pairs == 1 or not is_oom(error):
                raise
            pairs //= 2
            log.warning("%s; continuing with %d pairs at a time", describe_oom(error), pairs)


def shortlist(coarse_scores: np.ndarray, count: int) -> np.ndarray:
    """Return which pairs `[I, T]` are among the `count` best of their image or their caption."""
    chosen = np.zeros(coarse_scores.shape, dtype=bool)
    for matrix, marks in ((coarse_scores, chosen), (coarse_scores.T, chosen.T)):
        for first, items in best_items(matrix, count):
            np.put_along_axis(marks[first : first + len(items)], items, True, axis=1)
    return chosen


def rank_last(scores: np.ndarray, coarse_scores: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the scores of wanted pairs; other pairs get their coarse score, below all of them."""
    # Scores of images without unit length (--no_imgnorm) are not within ±1.
    gap = max(RERANK_GAP, coarse_scores.max() - scores[wanted].min() + 1)
    return np.where(wanted, scores, coarse_scores - np.float32(gap))


def is_reranked(scores: np.ndarray) -> bool:
    """Return whether a matrix holds values that only `rank_last` makes (or --no_imgnorm)."""
    return bool(scores.min() < -RERANK_GAP / 2)


def best_items(scores: np.ndarray, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the `count` best columns of every row of `[rows, columns]`, best first.

    Each block of rows gives its first row and its columns `[block, count]`.
    """
    for first in range(0, len(scores), ROW_BLOCK):
        block = torch.from_numpy(np.array(scores[first : first + ROW_BLOCK], order="C"))
        yield first, block.topk(min(count, block.shape[1]), dim=1).indices.numpy()


def recall_upper_bound(known: np.ndarray, owner: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Return the percentage of queries with a correct answer among the `known` pairs `[I, T]`."""
    own = known[np.asarray(owner), np.arange(len(owner))]  # [T]
    images = np.bincount(owner, own, len(known)) > 0
    return {"i2t": 100 * float(images.mean()), "t2i": 100 * float(own.mean())}


def ranks(scores: Tensor | np.ndarray, owner: Sequence[int] | np.ndarray) -> Ranks:
    """Return ranks from 0: of each image's best caption `[I]`, of each caption's image `[T]`.

    `scores` is `[I, T]`, also a memory map; caption t describes image `owner[t]`. Equal scores
    count against the model, so a collapsed model has recall 0. Raises InputError on NaN or inf.
    """
    if isinstance(scores, Tensor):
        scores = scores.detach().to("cpu", torch.promote_types(scores.dtype, torch.float32)).numpy()
    owner = np.asarray(owner)
    own = scores[owner, np.arange(len(owner))]  # [T]
    own = own.astype(np.promote_types(own.dtype, np.float32))
    require(bool(np.isfinite(own).all()), NOT_FINITE)
    best = np.full(len(scores), -np.inf, dtype=own.dtype)  # [I] score of an image's best caption
    np.maximum.at(best, owner, own)
    # Every score that reaches the relevant one ranks before it, except for relevant ones.
    # DEVIATION: equal scores count against the model (their published order is arbitrary).
    of_images = -np.bincount(owner, own >= best[owner], len(scores)).astype(np.int64)
    of_captions = torch.full((len(owner),), -1)
    own_tensor, best_tensor = torch.from_numpy(own), torch.from_numpy(best)
    for first in range(0, len(scores), ROW_BLOCK):
        stop = min(first + ROW_BLOCK, len(scores))
        block = torch.from_numpy(np.array(scores[first:stop]))
        # DEVIATION: scores that are not finite are an error (the published code ranked NaN).
        require(bool(block.isfinite().all()), NOT_FINITE)
        of_images[first:stop] += (block >= best_tensor[first:stop, None]).sum(1).numpy()
        of_captions += (block >= own_tensor).sum(0)
    return of_images, of_captions.numpy()


def retrieval(scores: Tensor | np.ndarray, owner: Sequence[int] | np.ndarray) -> Retrieval:
    """Return the metrics of scores `[I, T]`, where caption t describes image `owner[t]`."""
    return Retrieval.of(*ranks(scores, owner))


def check_folds(images: int, source: str | Path = "scores") -> None:
    """Raise InputError if the images of `source` cannot be divided into equal folds."""
    message = f"--fold5: {source}: {images} images; expected a multiple of {FOLDS}"
    require(images > 0 and images % FOLDS == 0, message)


def ranks_by_fold(scores: np.ndarray, owner: np.ndarray) -> list[Ranks]:
    """Return the ranks of five equal consecutive slices of the images with their captions."""
    check_folds(len(scores))
    # DEVIATION: folds are slices of one score matrix, ensembles too (the published ensemble used
    # the caption lengths of the first fold for every fold).
    size = len(scores) // FOLDS
    folds = []
    for first in range(0, len(scores), size):
        captions = np.flatnonzero((owner >= first) & (owner < first + size))
        folds.append(ranks(scores[first : first + size][:, captions], owner[captions] - first))
    return folds


def evaluate_whole(scores: np.ndarray, owner: np.ndarray, bootstrap: int = 0) -> ProtocolResult:
    """Return the metrics of scores `[I, T]`; with `bootstrap` samples also their intervals."""
    whole = ranks(scores, owner)
    intervals = bootstrap_ci([whole], owner, bootstrap) if bootstrap else None
    return ProtocolResult(Retrieval.of(*whole), intervals=intervals)


def evaluate_folds(scores: np.ndarray, owner: np.ndarray, bootstrap: int = 0) -> ProtocolResult:
    """Return the mean metrics of five folds of scores `[I, T]`, and their intervals if asked."""
    folds = ranks_by_fold(scores, owner)
    results = tuple(Retrieval.of(*fold) for fold in folds)
    intervals = bootstrap_ci(folds, owner, bootstrap) if bootstrap else None
    return ProtocolResult(Retrieval.mean(results), results, intervals)


def mean_matrix(matrices: Iterable[np.ndarray]) -> np.ndarray:
    """Return the mean of matrices that are made one after the other (the first is changed)."""
    iterator = iter(matrices)
    total, count = next(iterator), 1
    for matrix in iterator:
        np.add(total, matrix, out=total)
        count += 1
    return np.divide(total, count, out=total)
