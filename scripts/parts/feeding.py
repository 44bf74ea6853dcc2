"""feeding.py — steps on the batches that train.py gives them, for benchmark.py to time."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.layout import CAPTIONS_PER_IMAGE, SplitName, split_files
from scripts.parts.workload import LENGTHS, REGIONS, WIDTH, WORDS, Sizes, Work

if TYPE_CHECKING:
    from data import TrainingBatches
    from training.step import TrainStep

ENTRIES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(1000)))  # of a vocabulary


def write_data(folder: Path, images: int, name: SplitName = "train") -> Path:
    """Write random features, float16, and captions of a split; return the folder."""
    rng = np.random.default_rng(images)
    features_path, captions_path = split_files(folder, name)
    shape = (images, REGIONS, WIDTH)
    features = np.lib.format.open_memmap(features_path, "w+", dtype=np.float16, shape=shape)
    for image in range(images):
        features[image] = rng.random(shape[1:], dtype=np.float32)
    features.flush()
    words, special = ENTRIES[4:], 2  # [CLS] and [SEP]
    lengths = rng.integers(
        LENGTHS[0] - special, LENGTHS[1] - special + 1, images * CAPTIONS_PER_IMAGE
    )
    captions_path.write_text("".join(" ".join(rng.choice(words, n)) + "\n" for n in lengths))
    return folder


def loops(
    train_step: "TrainStep", step: Work, sizes: Sizes, data: Path
) -> Iterator[tuple[str, Work]]:
    """Yield names and functions, each of which does `sizes.steps` training steps.

    `bare` repeats `step`, `workers` trains on batches of the folder `data` that worker processes
    read, and `on_device` on batches of features that a GPU holds.
    """
    from data import Split, TrainingBatches
    from training.device_features import load_features
    from vocab import Vocabulary

    yield "bare", lambda: [step() for _ in range(sizes.steps)]
    split = Split.open(data, "train", WIDTH, training=True)
    vocabulary = Vocabulary(data, ENTRIES)
    batches = TrainingBatches(split, vocabulary, train_step.config, WORDS, skip_single=False)
    yield "workers", _loop(train_step, batches, sizes)
    features = load_features(split, train_step.device, None)
    if features is not None:
        yield "on_device", _loop(train_step, replace(batches, features=features), sizes)


def _loop(train_step: "TrainStep", batches: "TrainingBatches", sizes: Sizes) -> Work:
    """Return a function that trains on the next batches, after some to warm up."""
    given = batches.epoch(0, 0, train_step.device)

    def train(steps: int) -> None:
        for batch in islice(given, steps):
            train_step.step(batch)

    train(sizes.warm_up)
    return lambda: train(sizes.steps)
