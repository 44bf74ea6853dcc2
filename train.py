"""train.py — train a DIME model for one direction (SPEC §8, §9).

The command line: it opens what the options name and hands it to the trainer.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

import runlog
from checkpoint import Checkpoint, check_positions, load_bert, read_checkpoint
from data import Split, TrainingBatches
from model import DIME
from options import parse, pick_device, require, run
from trainer import BEST, NEWEST, TrainConfig, Trainer


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(TrainConfig, argv, DESCRIPTION)
    device = pick_device(config.device)
    found = to_resume(config)
    bert = load_bert(config.bert_path)
    check_positions(bert, config)
    folder = Path(config.data_path) / config.data_name
    train = Split.open(folder, "train", config.img_dim, training=True)
    dev = Split.open(folder, "dev", config.img_dim)
    skips = config.skips_single(train.regions_per_image)
    batches = TrainingBatches(train, bert.vocabulary, config, config.max_words, skips)
    require(
        len(batches) > 0,
        f"--batch_size {config.batch_size} without extra negatives: batch normalisation needs "
        "two items of a batch",
    )
    torch.manual_seed(config.seed)
    trainer = Trainer(config, DIME(config, bert.model).to(device), bert, batches, dev, device)
    runlog.make_folder(config.folder)
    if found is None:
        runlog.remove(config.folder / NEWEST)
        runlog.remove(config.folder / BEST)
        runlog.clear(config.folder)
    else:
        trainer.restore(found)
    trainer.train()


def to_resume(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint to go on from, or None to start afresh.

    Raises InputError where the folder holds a run that is neither gone on with nor given up.
    """
    folder = config.folder
    written = [path for path in (folder / NEWEST, folder / BEST) if path.exists()]
    held = bool(written) or runlog.held_by_run(folder)
    if config.resume == "auto":
        return read_checkpoint(written[0]) if written else None
    if config.resume:
        path = Path(config.resume)
        require(
            not held or path.resolve().parent == folder.resolve(),
            f"{folder}: holds another run than {path}; give another --logger_name",
        )
        return read_checkpoint(path)
    # DEVIATION: a folder that holds a run is not written over (the published one was).
    require(
        not held or config.overwrite,
        f"{folder}: holds a run; --resume auto goes on with it, --overwrite starts again",
    )
    return None


DESCRIPTION = """Train a DIME model for one direction on precomputed region features.

  python train.py --data_path data --data_name f30k_precomp --bert_path bert/uncased \\
      --logger_name runs/f30k --direction i2t --extra_stc 1 --lambda_softmax 4
  python train.py ... --resume auto       # go on where it was cut off

Writes checkpoint.pth.tar, model_best.pth.tar, metrics.jsonl, run.json, train.log and TensorBoard's
events to LOGGER_NAME/DIRECTION. Evaluate the models with evaluate_models.py."""


if __name__ == "__main__":
    run(main)
