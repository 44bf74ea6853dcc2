"""opened.py — the options of a program that looks at one model on one split, and what they open."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from checkpoint.bert import Bert, bert_files
from checkpoint.checkpoint import (
    Checkpoint,
    bert_folder,
    bert_of,
    common_option,
    json_beside,
    read_checkpoint,
)
from common.layout import SplitName, files_of
from data import Split


@dataclass(frozen=True, kw_only=True)
class ModelOnSplit:
    model_path: Annotated[str, "a checkpoint, own, published or .safetensors"]
    data_path: Annotated[
        str | None, "folder that holds the data sets' folders (default: the checkpoint's)"
    ] = None
    data_name: Annotated[str | None, "data set's folder (default: the checkpoint's)"] = None
    bert_path: Annotated[str | None, "folder of BERT (default: the checkpoint's)"] = None
    split: Annotated[SplitName, "which images"] = "test"
    device: Annotated[str, "auto, cpu, cuda, cuda:1, ..."] = "auto"

    def open(self) -> tuple[Checkpoint, Bert, Split]:
        """The model's checkpoint, its BERT, and the split. Raises InputError."""
        checkpoint = read_checkpoint(self.model_path)
        bert = bert_of(checkpoint, self.bert_path)
        path = self.data_path or common_option([checkpoint], "data_path")
        folder = Path(path) / (self.data_name or common_option([checkpoint], "data_name"))
        return checkpoint, bert, Split.open(folder, self.split, checkpoint.config.img_dim)

    def files(self, checkpoint: Checkpoint, split: Split) -> list[str | Path]:
        """What was opened: nothing may be written in its place."""
        model = [self.model_path, json_beside(checkpoint.path)]
        bert = bert_files(bert_folder(checkpoint, self.bert_path))
        return [*model, *files_of(split.path.parent, self.split), *bert]
