"""search_index.py — a search index that is open: sentences find images, images find sentences.

    index = Index.open("index")
    for hit in index.images("two dogs on a beach", top=5):
        print(hit.score, hit.name)

The first stage finds candidates by the product of two vectors. The routing space scores them again,
and the mean of the models' scores ranks them. Without a first stage all items are candidates.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from checkpoint.matcher import Items, Matcher
from common.errors import brief_repr, require
from scripts.parts.images import make_upright, read_image
from scripts.parts.regions import Backbone, reopen_backbone, to_pixels
from scripts.parts.routes import Pairs
from scripts.parts.search_files import FAISS, RECORD, Kind, Part, Record
from scripts.parts.search_first_stage import Faiss, FirstStage, Matrix, best_rows
from scripts.parts.search_models import EncodedItems, SearchModels, items_of

BLOCK = 1024  # items whose tokens are in memory at a time


@dataclass(frozen=True)
class Hit:
    """An item that was found."""

    name: str  # path of the image, relative to the indexed folder; or the sentence
    score: float  # mean of the models' scores; after the candidates, that of the first stage
    row: int  # in the index


@dataclass(frozen=True)
class Answer:
    """What was found for a query, best first. Iterates over the hits."""

    query: str  # sentence, or name of a file
    hits: tuple[Hit, ...]
    seconds: dict[str, float]  # of "encode", "first_stage" and "rerank"; of an image "regions", too
    candidates: int  # how many the models scored; later hits have the score of the first stage
    total: int  # items of the index

    def __len__(self) -> int:
        return len(self.hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


@dataclass(frozen=True)
class Side:
    """The images, or the sentences, of an open index."""

    folder: Path
    names: list[str]
    arrays: Mapping[str, np.memmap]
    first_stage: FirstStage | None

    def items(self, models: int, rows: np.ndarray) -> Items:
        """Return the encoded items of some rows."""
        return items_of(self.arrays, self.folder, models, rows)


class Index:
    """An open index. Threads may share it.

    Attributes: its `folder`, the `images_folder`, the `matcher` with the models, `names` of images
    and `sentences` in the order of the rows, `boxes` `[n, 36, 4]` of the regions in pixels of the
    upright image, and `lock`, which is held while a model computes.
    """

    def __init__(self, folder: Path, record: Record, models: SearchModels) -> None:
        self.folder, self.record, self.models = folder, record, models
        self.images_folder = Path(record.places["images"])
        self.matcher: Matcher = models.matcher
        self.lock = threading.RLock()
        self._images = self._open_side("images")
        self._sentences = self._open_side("sentences") if record.sentences else None
        self.names = self._images.names
        self.sentences = self._sentences.names if self._sentences else []
        self.boxes = self._images.arrays["boxes"]

    @classmethod
    def open(
        cls,
        folder: str | Path,
        device: str = "auto",
        bert_path: str | Path | None = None,
        model_path: str | Path | Sequence[str | Path] = (),
    ) -> "Index":
        """Open a complete index.

        `bert_path` and `model_path` say where BERT and the checkpoints are now, if they were moved.
        Raises InputError if the index is damaged or unfinished, or if a model was changed.
        """
        folder = Path(folder)
        record = Record.read(folder)
        problem = f"{folder}: is unfinished, {record.rows('images')} images are done"
        require(record.complete, f"{problem}; finish it with: {record.command}")
        return cls(
            folder, record, SearchModels.reopen(folder, record, device, bert_path, model_path)
        )

    def _open_side(self, kind: Kind) -> Side:
        record, rows = self.record, self.record.rows(kind)
        part = Part(self.folder / kind, self.models.specs(kind, np.dtype(record.about["dtype"])))
        arrays = part.open(rows)
        digest = record.about["images" if kind == "images" else "captions"]
        names = part.names(digest, getattr(record, kind))
        first: FirstStage | None = None
        if "vectors" in arrays:
            first = Matrix(arrays["vectors"], part.folder / "vectors.npy")
        if record.faiss and kind == "images":
            width = arrays["vectors"].shape[1]
            first = Faiss(part.folder / FAISS, record.faiss["sha256"], rows, width)
        return Side(part.folder, names, arrays, first)

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone of the images, opened when it is used. Raises InputError if it is gone."""
        places, device = self.record.places, self.matcher.device
        about, weights = self.record.about["backbone"], Path(places["weights"])
        return reopen_backbone(about, weights, device, self.folder / RECORD)

    def images(self, text: str, top: int = 10, rerank: int = 100) -> Answer:
        """Return the `top` images for a sentence.

        The models score the `rerank` best images of the first stage, or all without one. Raises
        InputError if no word of the sentence is known.
        """
        problem = f"{brief_repr(text)}: has no word that the models know; expected a sentence"
        require(not self.matcher.unknown(text), problem)
        with self.lock:
            clock = Clock()
            query = self.models.encode_sentences([text])
            clock.stop("encode")
            return self._search(text, self._images, query, top, rerank, clock)

    def sentences_of(
        self, image: str | Path | Image.Image, top: int = 10, rerank: int = 100
    ) -> Answer:
        """Return the `top` sentences for an image: a file, or an open image.

        `rerank` is that of `images`. Raises InputError if the image cannot be read, or if the index
        has no sentences.
        """
        problem = f"{self.folder}: has no sentences; `index` with --captions makes an index of them"
        require(self._sentences is not None, problem)
        assert self._sentences is not None
        name = "the image" if isinstance(image, Image.Image) else Path(image).name
        with self.lock:
            backbone, clock = self.backbone, Clock()
            if isinstance(image, Image.Image):
                upright = make_upright(image, name)
            else:
                upright = read_image(Path(image))
            features, _ = backbone.encode([to_pixels(upright, backbone.resize)])
            clock.stop("regions")
            query = self.models.encode_images(features)
            clock.stop("encode")
            return self._search(name, self._sentences, query, top, rerank, clock)

    def pairs(self, rows: Sequence[int], text: str) -> list[Pairs]:
        """Return, for each model, the images of some rows with a sentence, which describes each.

        Image i is the one of `rows[i]`, and the caption is number 0. Hold `lock` while they route.
        """
        with self.lock:
            images = self._images.items(len(self.matcher.models), np.array(rows))
            captions = self.matcher.encode_captions([text])
            every = self.matcher.encoded(images, captions)
        words, owner = self.matcher.bert.vocabulary, np.zeros(1, np.int64)
        models = zip(self.matcher.models, every, strict=True)
        return [Pairs(model, [text], owner, words, encoded) for model, encoded in models]

    def _search(
        self, name: str, side: Side, query: EncodedItems, top: int, rerank: int, clock: "Clock"
    ) -> Answer:
        """Return the best items of a side for an encoded query."""
        require(top >= 1 and rerank >= 0, f"top {top}, rerank {rerank}: expected 1 or more, and 0")
        rows, coarse = np.arange(len(side.names)), np.zeros(0, np.float32)
        candidates = rows
        if side.first_stage is not None and query.vectors is not None:
            rows, coarse = side.first_stage.search(query.vectors[0], max(top, rerank))
            candidates = np.sort(rows[:rerank])
        clock.stop("first_stage")
        scores = self._score(side, candidates, query.items)
        best = best_rows(scores, len(scores))
        ranked = list(zip(candidates[best], scores[best], strict=True))
        ranked += list(zip(rows[rerank:], coarse[rerank:], strict=False))
        clock.stop("rerank")
        hits = [Hit(side.names[row], float(score), int(row)) for row, score in ranked[:top]]
        return Answer(name, tuple(hits), clock.seconds, len(candidates), len(side.names))

    def _score(self, side: Side, rows: np.ndarray, query: Items) -> np.ndarray:
        """Return the models' scores of some rows of a side with the query."""
        scores = [np.zeros(0, np.float32)]
        for first in range(0, len(rows), BLOCK):
            block = side.items(len(self.matcher.models), rows[first : first + BLOCK])
            is_image = side is self._images
            pair = (block, query) if is_image else (query, block)
            scores.append(self.matcher.score(*pair).reshape(-1))
        return np.concatenate(scores)


class Clock:
    """Seconds of the parts of a query, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.since = perf_counter()

    def stop(self, part: str) -> None:
        """Note the seconds since the last part."""
        now = perf_counter()
        self.seconds[part], self.since = now - self.since, now
