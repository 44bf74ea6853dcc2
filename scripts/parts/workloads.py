"""workloads.py — what the benchmark times: scoring, training steps, the plain formulation.

Kept apart from benchmark.py, which is how it is timed and told.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from common.config import Direction, Precision
from data import Batch
from model import DIME
from router import Modality
from scripts.parts.plain import plain_scores
from training.config import TrainConfig
from training.step import TrainStep

LENGTHS = (9, 21)  # tokens of the shortest and the longest caption
BATCH = 32
REGIONS, WIDTH = 36, 2048  # of an image, and of their features
WORDS = 32  # of a caption, padding included
HIDDEN, ENTRIES = 384, 30522  # BERT's width and vocabulary
QUERIES, CONTEXTS = 16, 96  # scored at a time, in slices like those of a large set
PLAIN = 24  # images and captions of the plain formulation
Kind = Literal["score", "train", "train_under_2.5GB", "plain"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Work = Callable[[], Any]  # what is timed


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    direction: Direction
    precision: Precision
    compiled: bool
    kinds: tuple[str, ...]
    device: torch.device


def learner_of(case: Case) -> TrainStep:
    """A new model, with random weights and a BERT of MiniLM's size, and its optimiser."""
    i2t = case.direction == "i2t"
    config = TrainConfig(
        direction=case.direction,
        img_dim=WIDTH,
        precision=case.precision,
        compile=case.compiled,
        extra_stc=int(i2t),
        extra_img=int(not i2t),
        batch_size=BATCH,
        activation_checkpointing="train_under_2.5GB" in case.kinds,
    )
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 6, "intermediate_size": 1536}
    bert = BertModel(BertConfig(**sizes, num_attention_heads=12), add_pooling_layer=False)
    learner = TrainStep(config, DIME(config, bert).to(case.device), case.device)
    learner.prepare(steps=1)
    return learner


def encoded(model: DIME, images: int, captions: int) -> tuple[Modality, Modality]:
    """Random images and captions of the usual lengths, encoded."""
    device = model.text.fc.weight.device
    hidden = torch.randn(captions, WORDS, HIDDEN).to(device)
    lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (captions,))
    mask = torch.arange(WORDS) < lengths[:, None]
    with torch.no_grad():
        regions = torch.rand(images, REGIONS, WIDTH).to(device)
        return model.encode_images(regions), model.text(hidden, mask.to(device))


def scoring(learner: TrainStep, bert: bool) -> tuple[int, Work]:
    """Pairs, and what scores them."""
    model = learner.model
    i2t = learner.config.direction == "i2t"
    sizes = (QUERIES, CONTEXTS) if i2t else (CONTEXTS, QUERIES)
    images, captions = encoded(model, *sizes)
    return math.prod(sizes), torch.no_grad()(lambda: model.eval().score(images, captions))


def training(learner: TrainStep, bert: bool) -> tuple[int, Work]:
    """Pairs of a training step, and the step."""
    i2t = learner.config.direction == "i2t"
    images, captions = (BATCH, 2 * BATCH) if i2t else (2 * BATCH, BATCH)
    lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (captions,))
    mask = torch.arange(WORDS) < lengths[:, None]
    ids = torch.where(mask, torch.randint(1, ENTRIES, mask.shape), 0)
    states = None if bert else torch.randn(captions, WORDS, HIDDEN)
    regions = torch.rand(images, REGIONS, WIDTH)
    batch = Batch(regions, ids, mask, torch.arange(captions), BATCH, states)
    batch = batch.to(learner.device)
    return images * captions, lambda: learner.step(batch)


def plain(learner: TrainStep, bert: bool) -> tuple[int, Work]:
    """The same scores in the plain formulation, caption by caption and cell by cell."""
    model = learner.model.eval()
    images, captions = encoded(model, PLAIN, PLAIN)

    @torch.no_grad()
    def score() -> Tensor:
        with model.autocast(images.tokens):
            return plain_scores(model, images, captions)

    with torch.no_grad():
        exact = model.score(images, captions)[0]
    tolerance = 0.05 if model.precision == "bf16" else 1e-5
    torch.testing.assert_close(score(), exact, atol=tolerance, rtol=0)
    return PLAIN * PLAIN, score


WORK = {"score": scoring, "train": training, "train_under_2.5GB": training, "plain": plain}
