"""train.py — train a DIME model for one direction (SPEC §8, §9)."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import parse, parse_in_all, run
from common.errors import require
from common.lock import LOCK, only_writer
from common.world import World
from training.config import GROUPS, TrainConfig

if TYPE_CHECKING:
    from data import Split, TrainingBatches
    from training.loop import Trainer
    from vocab import Vocabulary

DESCRIPTION = """Train a DIME model for one direction on precomputed region features.

  python train.py --data_path data --data_name f30k_precomp --bert_path bert/uncased \\
      --logger_name runs/f30k --direction i2t --extra_stc 1 --lambda_softmax 4
  python train.py ... --resume auto       # continue where the run was cut off
  python train.py ... --init MODEL        # begin with the weights of a trained model

Writes checkpoint.pth.tar, model_best.pth.tar, metrics.jsonl, run.json, train.log and TensorBoard's
events to LOGGER_NAME/DIRECTION. Evaluate the models with evaluate_models.py."""


def main(argv: Sequence[str] | None = None) -> None:
    world = World.of()
    config = parse_in_all(lambda: _options(argv, world), world)
    from common.distributed import agreed, connected  # here, so that --help answers at once

    with connected(world), ExitStack() as held:
        with agreed(world):
            if world.rank == 0:
                held.enter_context(only_writer(config.folder / LOCK))
        train(config, world)


def _options(argv: Sequence[str] | None, world: World) -> TrainConfig:
    config = parse(TrainConfig, argv, DESCRIPTION, groups=GROUPS)
    problem = f"--batch_size {config.batch_size}: expected at least {world.size}"
    require(config.batch_size >= world.size, f"{problem}, a pair for each process")
    return config


def train(config: TrainConfig, world: World) -> None:
    """Train in the run's folder. Raises InputError."""
    from common.distributed import agreed, check_equal
    from training.resume import clear
    from training.text_cache import cache_text

    with agreed(world):
        trainer = new_trainer(config, world)
    check_equal(world, trainer.facts())
    if trainer.resumed is None and world.rank == 0:
        clear(config.folder)
    if config.cache_text and not trainer.complete:
        bert, captions = trainer.bert, trainer.batches.split.captions
        for ranks in (range(1), range(1, world.size)):  # the first process writes the file
            with agreed(world):
                if world.rank in ranks:
                    states = cache_text(
                        config.folder, trainer.model.text, bert, captions, config.max_words
                    )
        trainer.batches = replace(trainer.batches, hidden_states=states)
    trainer.train()


def new_trainer(config: TrainConfig, world: World) -> "Trainer":
    """Return the training of this process, new or resumed. Raises InputError."""
    import torch

    from checkpoint.checkpoint import bert_to_train_with, check_positions
    from common.cli import pick_device
    from common.distributed import device_name
    from data import Split
    from model import DIME
    from training.device_features import load_features
    from training.initial import load_initial_weights, read_initial
    from training.loop import Trainer
    from training.resume import find_checkpoint

    device = pick_device(device_name(config.device, world), config.precision)
    checkpoint = find_checkpoint(config.folder, config.resume, config.overwrite)
    initial = read_initial(config) if checkpoint is None else None
    bert = bert_to_train_with(config.bert_path, checkpoint or initial)
    check_positions(bert, config)
    folder = Path(config.data_path) / config.data_name
    split = Split.open(folder, "train", config.img_dim, training=True)
    config = replace(config, img_dim=split.img_dim)
    if checkpoint is not None:  # the record of how the run began stays
        config = replace(config, init=checkpoint.options.get("init"))
    dev = Split.open(folder, "dev", config.img_dim)
    batches = replace(new_batches(config, split, bert.vocabulary), world=world)
    torch.manual_seed(config.seed)
    model = DIME(config, bert.model).to(device)
    trainer = Trainer(config, model, bert, batches, dev, device, world)
    if initial is not None:
        trainer.log.run["init_sha256"] = load_initial_weights(trainer.model, initial, config, bert)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    if not trainer.complete:
        features = load_features(split, device, config.features_on_device)
        trainer.batches = replace(batches, features=features)
    return trainer


def new_batches(config: TrainConfig, split: "Split", vocabulary: "Vocabulary") -> "TrainingBatches":
    """Return the training batches. Raises InputError if an epoch has none."""
    from data import TrainingBatches

    skips = config.skips_single(split.regions_per_image)
    batches = TrainingBatches(split, vocabulary, config, config.max_words, skips)
    reason = "without extra negatives: batch normalisation needs two items in a batch"
    require(len(batches) > 0, f"--batch_size {config.batch_size} {reason}")
    return batches


if __name__ == "__main__":
    run(main)
