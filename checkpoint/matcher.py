"""matcher.py — trained models without a data set: they encode, score and route what they are given.

    from checkpoint import Matcher

    matcher = Matcher.open(["i2t.safetensors", "t2i.safetensors"], "bert")
    images = matcher.encode_images(features)  # [I, L, img_dim]
    captions = matcher.encode_captions(["two dogs on a beach"])
    scores = matcher.score(images, captions)  # [I, 1]

Items are encoded once and scored as often as needed. A pair's score is the one that
evaluate_models.py computes.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoint.bert import Bert
from checkpoint.checkpoint import (
    Checkpoint,
    bert_of,
    build_with_precision,
    check_space,
    read_checkpoint,
)
from common.cli import pick_device
from common.config import Precision
from common.errors import InputError, brief_repr, require
from common.layout import LONGEST_CAPTION
from evaluation import (
    IMAGE_BLOCK,
    Encoded,
    encode_captions,
    encode_images,
    mean_matrix,
    score_all,
)
from model import DIME
from router import Modality
from vocab import UNK

SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which UTF-8 cannot hold


@dataclass(frozen=True)
class Items:
    """Encoded images or captions, for each model of a Matcher; `items[1:3]` are two of them.

    Tokens may be float16 and a memory map: each pair is scored in float32.
    """

    of_models: tuple[Modality, ...]  # tokens [n, L, D], pooled [n, D], mask [n, L]

    def __len__(self) -> int:
        return len(self.of_models[0])

    def __getitem__(self, items: slice | Tensor) -> "Items":
        return Items(tuple(each[items] for each in self.of_models))


class Matcher:
    """One model, or an ensemble of models with the same BERT and features.

    Attributes: `models`, their `checkpoints`, the `bert` and its vocabulary, the `device`, and
    `img_dim`, the width of the features. It may have no routing space (`--num_layer_routing 0`);
    then a pair's score is the product of its pooled vectors.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        models: Sequence[DIME],
        bert: Bert,
        device: torch.device,
    ) -> None:
        self.checkpoints, self.models = tuple(checkpoints), tuple(models)
        self.bert, self.device = bert, device
        self.img_dim = models[0].config.img_dim

    @classmethod
    def open(
        cls,
        model_paths: str | Path | Sequence[str | Path],
        bert_path: str | Path | None = None,
        device: str = "auto",
        precision: Precision | None = None,
    ) -> "Matcher":
        """Open checkpoints, native, official or .safetensors; several are an ensemble.

        BERT's folder and the precision default to the checkpoints'. Raises InputError if a file
        cannot be used, or if the models have different features, BERTs or tokenisations.
        """
        paths = [model_paths] if isinstance(model_paths, str | Path) else model_paths
        require(len(paths) > 0, "model_paths: is empty; expected one checkpoint or several")
        checkpoints = [read_checkpoint(path) for path in paths]
        used = pick_device(device, precision)
        first = checkpoints[0]
        for other in checkpoints[1:]:
            problem = f"{other.path}: takes features {other.config.img_dim} wide"
            expected = f"expected {first.config.img_dim}, as {first.path}"
            require(other.config.img_dim == first.config.img_dim, f"{problem}; {expected}")
        bert = _common_bert(checkpoints, bert_path)
        models = [build_with_precision(each, bert, used, precision) for each in checkpoints]
        return cls(checkpoints, models, bert, used)

    def encode_images(self, features: np.ndarray | Tensor) -> Items:
        """Encode region features `[I, L, img_dim]`, I at least 1; a memory map is read in blocks.

        Raises InputError if the features have another shape, or hold NaN or infinity.
        """
        shape = tuple(features.shape)
        is_right = len(shape) == 3 and 0 not in shape and shape[2] == self.img_dim
        require(is_right, f"features: shape {shape}; expected (images, regions, {self.img_dim})")
        sides = [encode_images(m, _blocks(features), shape[0], self.device) for m in self.models]
        return Items(tuple(sides))

    def encode_captions(self, texts: Sequence[str]) -> Items:
        """Encode T captions, at least 1, each as many words of it as the model reads.

        Raises InputError if one is longer than LONGEST_CAPTION or cannot be written as UTF-8.
        """
        _check_texts(texts)
        words = self.bert.vocabulary
        return Items(tuple(encode_captions(m, texts, words, self.device) for m in self.models))

    def encoded(self, images: Items, captions: Items) -> list[Encoded]:
        """Return for each model the images and captions, in float32, as `score_all` takes them."""
        sides = zip(images.of_models, captions.of_models, strict=True)
        every = np.arange(len(captions))
        return [Encoded(_float32(i), _float32(c), every) for i, c in sides]

    def score(self, images: Items, captions: Items) -> np.ndarray:
        """Return scores `[I, T]` float32 of all pairs, the mean of the models.

        Raises InputError if a model gives NaN or infinity.
        """
        names = [str(checkpoint.path) for checkpoint in self.checkpoints]
        every = zip(self.models, self.encoded(images, captions), names, strict=True)
        return mean_matrix(score_all(m, encoded, self.device, name) for m, encoded, name in every)

    def routes(self, images: Items, captions: Items) -> list[np.ndarray]:
        """Return for each model the gates `[I, T, P, N]` of all pairs, as `DIME.gates` has them.

        Raises InputError for a model without a routing space.
        """
        for checkpoint in self.checkpoints:
            check_space(checkpoint, wanted=True)
        routes = []
        for model, encoded in zip(self.models, self.encoded(images, captions), strict=True):
            i, c = encoded.images, encoded.captions
            with model.evaluating():
                gates = model.gates(i.to(self.device), c.to(self.device))
            routes.append(gates.cpu().numpy())
        return routes

    def pooled(self, items: Items) -> np.ndarray:
        """Return the pooled vectors `[n, D]` float32, whose products are the scores of pairs.

        Raises InputError unless this is a single model without a routing space: in other models no
        loss makes these vectors good for ranking.
        """
        for checkpoint in self.checkpoints:
            check_space(checkpoint, wanted=False)
        names = ", ".join(str(checkpoint.path) for checkpoint in self.checkpoints)
        require(len(self.models) == 1, f"{names}: expected a single model")
        return items.of_models[0].pooled.cpu().numpy()

    def unknown(self, text: str) -> bool:
        """Return whether the models read no known WordPiece of a text: all are `[UNK]`, or none.

        Raises InputError like `encode_captions`.
        """
        _check_texts([text])
        words = self.bert.vocabulary
        ids, mask = words.encode([text], max(model.config.max_words for model in self.models))
        return bool((ids[mask][1:-1] == words.entries.index(UNK)).all())


def _common_bert(checkpoints: Sequence[Checkpoint], bert_path: str | Path | None) -> Bert:
    """Return the BERT of all checkpoints. Raises InputError if they read captions differently."""
    first, *others = checkpoints
    bert = bert_of(first, bert_path, captions=())  # a warning here would come with every query
    for other in others:
        fingerprint = other.bert_fingerprint
        if fingerprint is None:  # an official checkpoint brings BERT's weights
            fingerprint = bert_of(other, bert_path).fingerprint
        expected = f"expected that of {first.path}, {bert.fingerprint[:12]}"
        problem = f"{other.path}: was trained with another BERT, {fingerprint[:12]}; {expected}"
        require(fingerprint == bert.fingerprint, problem)
        rules = ", ".join(other.tokenization.rules)
        expected = f"expected {', '.join(first.tokenization.rules)}, as {first.path}"
        problem = f"{other.path}: reads captions as {rules}; {expected}"
        require(other.tokenization == first.tokenization, problem)
    return bert


def _blocks(features: np.ndarray | Tensor) -> Iterator[Tensor]:
    """Yield features of at most IMAGE_BLOCK images. Raises InputError on NaN or infinity."""
    for first in range(0, len(features), IMAGE_BLOCK):
        block = features[first : first + IMAGE_BLOCK]
        if not isinstance(block, Tensor):  # copied: torch warns of arrays that are read-only
            block = torch.from_numpy(np.array(block, dtype=np.float32))
        problem = f"features: images {first} to {first + len(block) - 1}: NaN or infinite numbers"
        require(bool(block.isfinite().all()), problem)
        yield block


def _check_texts(texts: Sequence[str]) -> None:
    """Raise InputError unless these are captions, one or more."""
    is_list = len(texts) > 0 and not isinstance(texts, str)
    require(is_list, f"texts: {brief_repr(texts)}; expected a list of captions, one or more")
    for text in texts:
        if len(text) > LONGEST_CAPTION or SURROGATE.search(text):
            problem = f"text {text[:40]!r} of {len(text)} characters"
            raise InputError(f"{problem}; expected Unicode, at most {LONGEST_CAPTION} characters")


def _float32(items: Modality) -> Modality:
    return replace(items, tokens=items.tokens.float())
