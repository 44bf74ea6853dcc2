"""workload.py — what a benchmark times: a chunk to score and a training step, of a random model."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from common.config import Direction, Precision
from common.precision import product_precision
from common.world import ALONE, World

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import BertConfig

    from training.step import TrainStep

WORDS, REGIONS, WIDTH, ENTRIES = 32, 36, 2048, 30522  # ENTRIES of BERT's vocabulary
LENGTHS = (9, 21)  # tokens of the shortest and the longest caption
# Operations of a pair, fixed so that rows can be compared. A training step counts three times as
# many, whatever it recomputes.
FLOPS: dict[Direction, float] = {"i2t": 111e6, "t2i": 102e6}
TRAINING = 3

What = Literal["score", "train", "train_checkpointing"]
Way = Literal["eager", "compiled"]
Size = Literal["minilm", "bert_base", "tiny"]
Work = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """How much a row computes."""

    hidden: int  # BERT's width
    layers: int  # of BERT
    batch: int = 32
    queries: int = 16
    contexts: int = 96  # queries and contexts scored at a time: one chunk of a large set
    product: tuple[int, int, int] = (36 * 1024, 256, 256)
    copied: int = 2**28  # bytes
    warm_up: int = 1  # runs that are not timed: they compile, and record launches
    runs: int = 5  # a row is their median
    steps: int = 3  # of train.py's loop, beside as many bare ones
    images: int = 2000  # that the loop reads
    one_process: bool = False  # even on a CPU, where a process of its own measures its peak memory


SIZES = {
    "minilm": Sizes(384, 6),
    "bert_base": Sizes(
        *(768, 12),
        queries=64,
        contexts=128,
        product=(8192, 8192, 8192),
        copied=2**30,
        warm_up=8,
        runs=20,
        steps=60,
    ),
    "tiny": Sizes(
        *(24, 1, 2, 2, 3),
        product=(64, 8, 8),
        copied=2**10,
        runs=1,
        images=5,
        one_process=True,
    ),
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    direction: Direction
    precision: Precision
    compiled: bool
    what: What

    @property
    def name(self) -> str:
        way = "compiled" if self.compiled else "eager"
        return f"{self.direction} {self.precision} {way} {self.what}"


def new_train_step(
    case: Case, sizes: Sizes, device: "torch.device", world: World = ALONE
) -> "TrainStep":
    """Return a new model with random weights, BERT included, and its optimiser."""
    from transformers import BertModel

    from model import DIME
    from training.config import TrainConfig
    from training.step import TrainStep

    i2t = case.direction == "i2t"
    config = TrainConfig(
        direction=case.direction,
        img_dim=WIDTH,
        precision=case.precision,
        compile=case.compiled,
        extra_stc=int(i2t),
        extra_img=int(not i2t),
        batch_size=sizes.batch,
        activation_checkpointing=case.what == "train_checkpointing",
    )
    bert = BertModel(bert_config(sizes), add_pooling_layer=False)
    train_step = TrainStep(config, DIME(config, bert).to(device), device, world)
    train_step.prepare(steps=1)
    return train_step


def bert_config(sizes: Sizes) -> "BertConfig":
    """Return the configuration of a BERT of that size."""
    from transformers import BertConfig

    return BertConfig(
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        intermediate_size=4 * sizes.hidden,
        num_attention_heads=12,
    )


def random_inputs(images: int, captions: int) -> tuple["Tensor", "Tensor", "Tensor"]:
    """Return regions `[images, REGIONS, WIDTH]`, ids and mask `[captions, WORDS]`."""
    import torch

    lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (captions, 1))
    mask = torch.arange(WORDS) < lengths
    ids = torch.where(mask, torch.randint(1, ENTRIES, mask.shape), 0)
    return torch.rand(images, REGIONS, WIDTH), ids, mask


def scoring(train_step: "TrainStep", sizes: Sizes) -> tuple[int, Work]:
    """Return a number of pairs, and a function that scores them."""
    import torch

    model = train_step.model.eval()
    counts = (sizes.queries, sizes.contexts)
    inputs = random_inputs(*(counts if model.direction == "i2t" else reversed(counts)))
    regions, ids, mask = (tensor.to(train_step.device) for tensor in inputs)
    with torch.no_grad():
        images, captions = model.encode_images(regions), model.encode_captions(ids, mask)

    def score() -> None:
        with torch.no_grad(), product_precision(model.precision):
            model.score(images, captions)

    return math.prod(counts), score


def training(train_step: "TrainStep", sizes: Sizes) -> tuple[int, Work]:
    """Return the number of pairs of a training step, and the step, BERT included.

    Of several processes, each steps on its share, and all together on those pairs.
    """
    import torch

    from data import Batch

    n, i2t = sizes.batch, train_step.model.direction == "i2t"
    own = train_step.world.largest_share(n)
    inputs = random_inputs(*((own, 2 * own) if i2t else (2 * own, own)))
    every = torch.arange(2 * n if i2t else n)
    batch = Batch(*inputs, every, pairs=n, extras=n).to(train_step.device)
    return n * 2 * n, lambda: train_step.step(batch)
