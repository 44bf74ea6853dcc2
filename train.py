"""train.py — train a DIME model for one direction (SPEC §8, §9).

The command line: it opens what the options name and hands it to the trainer.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint.bert import load_bert
from checkpoint.checkpoint import check_positions
from common.cli import parse, pick_device, run
from common.errors import require
from data import Split, TrainingBatches
from model import DIME
from training.config import TrainConfig
from training.loop import Trainer
from training.runfolder import clear, own_folder, to_resume
from training.text_cache import cached_text


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(TrainConfig, argv, DESCRIPTION)
    device = pick_device(config.device)
    with own_folder(config.folder):
        train(config, device)


def train(config: TrainConfig, device: torch.device) -> None:
    """Train in the run's folder, which is this program's alone. Raises InputError."""
    found = to_resume(config.folder, config.resume, config.overwrite)
    bert = load_bert(config.bert_path)
    check_positions(bert, config)
    folder = Path(config.data_path) / config.data_name
    split = Split.open(folder, "train", config.img_dim, training=True)
    config = replace(config, img_dim=split.img_dim)
    dev = Split.open(folder, "dev", config.img_dim)
    skips = config.skips_single(split.regions_per_image)
    batches = TrainingBatches(split, bert.vocabulary, config, config.max_words, skips)
    require(
        len(batches) > 0,
        f"--batch_size {config.batch_size} without extra negatives: batch normalisation needs "
        "two items of a batch",
    )
    torch.manual_seed(config.seed)
    trainer = Trainer(config, DIME(config, bert.model).to(device), bert, batches, dev, device)
    if found is None:
        clear(config.folder)
    else:
        trainer.restore(found)
        del found  # its copy of the weights
    if config.cache_text and not trainer.complete:
        encoder, captions = trainer.model.text, split.captions
        path = cached_text(config.folder, encoder, bert, captions, config.max_words)
        trainer.batches = replace(batches, hidden_states=path)
    trainer.train()


DESCRIPTION = """Train a DIME model for one direction on precomputed region features.

  python train.py --data_path data --data_name f30k_precomp --bert_path bert/uncased \\
      --logger_name runs/f30k --direction i2t --extra_stc 1 --lambda_softmax 4
  python train.py ... --resume auto       # go on where it was cut off

Writes checkpoint.pth.tar, model_best.pth.tar, metrics.jsonl, run.json, train.log and TensorBoard's
events to LOGGER_NAME/DIRECTION. Evaluate the models with evaluate_models.py."""


if __name__ == "__main__":
    run(main)
