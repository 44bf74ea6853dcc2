"""search_models.py — the models of a search index, and what it stores of an item."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint.checkpoint import check_space, json_beside
from checkpoint.matcher import Items, Matcher
from common.cli import pick_device
from common.config import Precision
from common.errors import require
from common.files import sha256_of
from common.layout import check_finite_rows, read_rows
from common.precision import has_fast_bf16
from router import Modality
from scripts.parts.regions import REGIONS
from scripts.parts.search_files import RECORD, Kind, Record, Specs

log = logging.getLogger(__name__)

FLOAT = np.dtype("float32")


def digest_of_model(path: Path) -> str:
    """SHA-256 of a checkpoint; of `.safetensors`, of the options beside it.

    The options change scores, too, and hold the SHA-256 of the weights, which is checked when they
    are read.
    """
    return sha256_of(json_beside(path) if path.suffix == ".safetensors" else path)


@dataclass(frozen=True)
class SearchModels:
    """The models that score pairs and, if there is one, that of the first stage."""

    matcher: Matcher
    first: Matcher | None

    @classmethod
    def open(
        cls,
        model_path: Sequence[str | Path],
        first_stage: str | Path | None,
        bert_path: str | Path | None,
        device: str,
        precision: Precision | None = None,
    ) -> "SearchModels":
        """Open the models. Raises InputError if they do not fit each other.

        The precision is by default that of the models, or float32 if the device emulates bfloat16.
        """
        # There bfloat16 is slower than float32, which changes scores little.
        if precision is None and not has_fast_bf16(pick_device(device)):
            precision = "fp32"
        matcher = Matcher.open(model_path, bert_path, device, precision)
        if first_stage is None:
            return cls(matcher, None)
        bert = matcher.bert.vocabulary.path.parent
        first = Matcher.open(first_stage, bert, device, precision)
        problem = f"{first_stage}: features are {first.img_dim} wide"
        require(first.img_dim == matcher.img_dim, f"{problem}; expected {matcher.img_dim}")
        check_space(first.checkpoints[0], wanted=False, where="--first_stage ")
        return cls(matcher, first)

    @classmethod
    def reopen(
        cls,
        folder: Path,
        record: Record,
        device: str,
        bert_path: str | Path | None,
        model_path: str | Path | Sequence[str | Path],
    ) -> "SearchModels":
        """Open the models of the index in `folder`.

        `model_path` are files that were moved. Raises InputError if one is not of this index, or if
        a model or BERT is another one today.
        """
        given = [model_path] if isinstance(model_path, str | Path) else model_path
        moved = {digest_of_model(Path(path)): Path(path) for path in given}
        known = [*record.about["model_path"], record.about["first_stage"]]
        for digest, path in moved.items():
            problem = f"--model_path {path}: SHA-256 {digest[:12]}"
            require(digest in known, f"{problem}; {folder} is of other models")
        places = [*record.places["model_path"], record.places["first_stage"]]
        paths = []
        for digest, place in zip(known, places, strict=True):
            if place is not None:
                paths.append(moved.get(digest) or Path(place))
                problem = f"{paths[-1]}: not found; --model_path says where a model is now"
                require(paths[-1].exists(), problem)
                problem = f"{paths[-1]}: was changed since {folder} was made"
                is_same = digest_of_model(paths[-1]) == digest
                require(is_same, f"{problem}; expected SHA-256 {digest[:12]}")
        count = len(record.places["model_path"])
        first = paths[count] if len(paths) > count else None
        bert_path, precision = bert_path or record.places["bert_path"], record.about["precision"]
        models = cls.open(paths[:count], first, bert_path, device, precision)
        bert, expected = models.matcher.bert.fingerprint, record.about["bert_path"]
        problem = f"{models.places['bert_path']}: BERT {bert[:12]}"
        require(bert == expected, f"{problem}; expected {expected[:12]}, as in {folder / RECORD}")
        return models

    @property
    def about(self) -> dict[str, Any]:
        """What the rows of an index depend on."""
        paths = [each.path for each in self.matcher.checkpoints]
        first = None if self.first is None else digest_of_model(self.first.checkpoints[0].path)
        models = {"model_path": list(map(digest_of_model, paths)), "first_stage": first}
        return models | {"bert_path": self.matcher.bert.fingerprint}

    @property
    def places(self) -> dict[str, Any]:
        """Where that is: absolute paths."""
        paths = [str(each.path.absolute()) for each in self.matcher.checkpoints]
        first = None if self.first is None else str(self.first.checkpoints[0].path.absolute())
        bert = str(self.matcher.bert.vocabulary.path.parent.absolute())
        return {"model_path": paths, "first_stage": first, "bert_path": bert}

    def specs(self, kind: Kind, dtype: np.dtype) -> Specs:
        """Return shape and type of an item in each array; `dtype` is that of the tokens."""
        specs: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for i, model in enumerate(self.matcher.models):
            config = model.config
            length = REGIONS if kind == "images" else config.max_words
            specs[f"tokens_{i}"] = (length, config.embed_size), dtype
            specs[f"pooled_{i}"] = (config.embed_size,), FLOAT
            if kind == "sentences":
                specs[f"mask_{i}"] = (length,), np.dtype(bool)
        if kind == "images":
            specs["boxes"] = (REGIONS, 4), FLOAT
        if self.first is not None:
            specs["vectors"] = (self.first.models[0].config.embed_size,), FLOAT
        return specs

    def encode_images(self, features: np.ndarray) -> "EncodedItems":
        """Encode features `[n, 36, img_dim]`."""
        first = None if self.first is None else self.first.encode_images(features)
        return self._with_vectors(self.matcher.encode_images(features), first)

    def encode_sentences(self, texts: Sequence[str]) -> "EncodedItems":
        """Encode n sentences."""
        first = None if self.first is None else self.first.encode_captions(texts)
        return self._with_vectors(self.matcher.encode_captions(texts), first)

    def _with_vectors(self, items: Items, first: Items | None) -> "EncodedItems":
        if self.first is None or first is None:
            return EncodedItems(items, None)
        return EncodedItems(items, self.first.pooled(first))


@dataclass(frozen=True)
class EncodedItems:
    """Images or sentences as all models of an index encode them."""

    items: Items
    vectors: np.ndarray | None  # [n, D] of the first stage

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What an index stores of them, by the names of `SearchModels.specs`."""
        arrays = {
            f"{name}_{i}": values.cpu().numpy()
            for i, side in enumerate(self.items.of_models)
            for name, values in vars(side).items()
        }
        return arrays if self.vectors is None else arrays | {"vectors": self.vectors}


def items_of(arrays: Mapping[str, np.memmap], folder: Path, models: int, rows: np.ndarray) -> Items:
    """Return some rows of the arrays in `folder` as encoded items, in main memory.

    Raises InputError if they hold NaN or infinity.
    """
    sides = []
    for i in range(models):
        tokens = read_rows(arrays[f"tokens_{i}"], rows)
        pooled = read_rows(arrays[f"pooled_{i}"], rows)
        check_finite_rows(folder / f"tokens_{i}.npy", tokens, rows)
        check_finite_rows(folder / f"pooled_{i}.npy", pooled[:, None], rows)
        mask = np.ones(tokens.shape[:2], bool)
        if f"mask_{i}" in arrays:
            mask = read_rows(arrays[f"mask_{i}"], rows)
        sides.append(Modality(*map(torch.from_numpy, (tokens, pooled, mask))))
    return Items(tuple(sides))
