"""evaluated.py — a checkpoint's model with all that it is evaluated with: its BERT and a split."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.bert import Bert
from checkpoint.checkpoint import Checkpoint, bert_of, build_with_precision, warn_of_selection
from common.config import Precision
from common.files import sha256_of
from common.layout import SplitName
from data import Split
from model import DIME


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that is ready to encode a split."""

    checkpoint: Checkpoint
    split: Split
    bert: Bert
    model: DIME

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        folder: Path,
        name: SplitName,
        device: torch.device,
        bert_path: str | None = None,
        precision: Precision | None = None,
    ) -> "EvaluatedModel":
        """Build a checkpoint's model and open a split of the data in `folder`.

        Raises InputError if they do not fit each other.
        """
        split = Split.open(folder, name, checkpoint.config.img_dim)
        dev_data = checkpoint.state.get("dev_data")
        warn_of_selection(checkpoint.path, name, dev_data, split.fingerprint)
        bert = bert_of(checkpoint, bert_path, split.captions)
        model = build_with_precision(checkpoint, bert, device, precision)
        return cls(checkpoint, split, bert, model)

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """SHA-256 of what the model reads now, and of the data it was trained on."""
        inputs = {"data": self.split.fingerprint, "bert": self.bert.fingerprint}
        return inputs | {"training": self.checkpoint.state.get("train_data")}


def identify(models: Sequence[EvaluatedModel]) -> dict[str, str]:
    """Return what the scores of an ensemble are of; it is the same in all jobs that share them."""
    return {
        "models": " ".join(sha256_of(each.checkpoint.path) for each in models),
        "berts": " ".join(each.bert.fingerprint for each in models),
        "data": models[0].split.fingerprint,
        "directions": " ".join(each.model.direction for each in models),
        "precisions": " ".join(each.model.precision for each in models),
    }
