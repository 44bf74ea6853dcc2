"""data_needs.py — what training and evaluation will take in memory and on the disk, by estimate.

For scripts/check_data.py, which prints it.
"""

from types import SimpleNamespace
from typing import Any

import torch
from scoring import scoring_memory
from scripts.parts.data_problems import Found
from space import step_memory
from torch import nn

from common.memory import chunk_size
from model import DIME
from training.config import TrainConfig

CPU = torch.device("cpu")
BASE_HIDDEN = 768  # of bert-base, where no BERT is given
FLOAT = 4  # bytes
# Bytes of the programs once BERT is read, without its weights: freed memory is kept, so it is the
# peak until then, measured with torch 2.14 on Linux.
PROGRAM = 890_000_000
COPIES = 3  # of the weights in a checkpoint: themselves and Adam's two moments
CHECKPOINTS = 4  # the newest, the one before, the best, and one that is being written


def bert_sizes(bert_path: str) -> tuple[int, int]:
    """Bytes of BERT's weights, and its width. Raises InputError where no configuration is there."""
    # asked for here, since it brings transformers, which take 200 MB
    from bert import bert_config, bert_parameters

    config = bert_config(bert_path)
    return FLOAT * bert_parameters(config), config.hidden_size


def needs(
    splits: list[Found], bert: tuple[int, int] | None, max_words: int
) -> list[dict[str, Any]]:
    """Estimates of memory and disk, in bytes, from what the rooms say that they take.

    `bert` is what `bert_sizes` gives, None where it is not known: its weights are not counted.
    """
    weights, hidden = bert or (0, BASE_HIDDEN)
    base = PROGRAM + weights
    usable = {split.name: split for split in splits if split.repeats and split.images}
    rows = []
    for direction in ("i2t", "t2i") if "train" in usable else ():
        rows.append(of_training(usable["train"], direction, base, hidden, max_words))
    for name in [name for name in ("dev", "test", "testall") if name in usable]:
        split = usable[name]
        for models, title in ((1, "one model"), (2, "an ensemble")):
            sizes = (split.images, len(split.captions), split.shape[1], max_words)
            memory = base + scoring_memory(*sizes, TrainConfig().embed_size, models)
            scores = split.images * len(split.captions) * FLOAT
            what = f"evaluation of {title} on {name}"
            rows.append({"what": what, "least": memory, "most": memory, "scores": scores})
    return rows


def of_training(
    split: Found, direction: str, base: int, hidden: int, max_words: int
) -> dict[str, Any]:
    """What training takes: with no activation kept, and with all of them."""
    extra = {"extra_stc": 1} if direction == "i2t" else {"extra_img": 1}
    regions, img_dim = split.shape[1:]
    config = TrainConfig(direction=direction, img_dim=img_dim, max_words=max_words, **extra)
    pairs = 2 * config.batch_size**2
    at_once = min(pairs, chunk_size(CPU, config.embed_size))
    model = without_weights(config, hidden)
    size = model.space.pair_memory(regions if direction == "i2t" else max_words, "fp32")
    least, most = (base + int(step_memory(at_once, kept, size)) for kept in (0, pairs))
    learned = sum(weight.numel() for weight in model.parameters())
    return {
        "what": f"training {direction}",
        "least": least,
        "most": most,
        "checkpoints": CHECKPOINTS * COPIES * FLOAT * learned,
        "cache_text": len(split.captions) * max_words * hidden * FLOAT,
    }


def without_weights(config: TrainConfig, hidden: int) -> DIME:
    """A model beside a BERT of that width, in name alone: neither takes memory."""
    bert = nn.Module()
    bert.config = SimpleNamespace(hidden_size=hidden)
    with torch.device("meta"):
        return DIME(config, bert)
