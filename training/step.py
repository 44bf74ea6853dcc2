"""learner.py — a model and its optimiser: one training step (SPEC §8).

Knows no files: neither a data set nor checkpoints are needed to take a step, or to time one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from common.cli import keep_float32, warn_if_bf16_is_slow
from common.errors import InputError
from data import Batch
from model import DIME, path_loss, triplet_loss
from training.config import TrainConfig

STEP_IN_SCORES = 3  # a training step's work on a pair, in scorings of one


class BadBatch(InputError):
    """A batch whose loss, or the length of its gradient, is no number."""


class TrainStep:
    """A model that is trained, and Adam, which trains it."""

    def __init__(self, config: TrainConfig, model: DIME, device: torch.device) -> None:
        keep_float32()
        self.config, self.model, self.device = config, model, device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.learning_rate)
        model.precision = config.precision

    def prepare(self, tokens: int, steps: int) -> None:
        """Fit what comes to the machine: compiled where that pays, within the memory there is.

        A run of `steps` refines `tokens` of each pair.
        """
        config = self.config
        warn_if_bf16_is_slow(config.precision, self.device)
        pairs = config.batch_size**2 * (1 + config.extra_stc + config.extra_img)
        self.model.compile_if_it_pays(config.compile, steps * pairs * STEP_IN_SCORES)
        self.model.space.activation_checkpointing = config.activation_checkpointing

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step on a batch of the device; its losses, and the number of pairs scored.

        Raises BadBatch, and leaves the weights as they are, where loss or gradient is no number.
        """
        config = self.config
        self.model.train()
        output = self.model(batch.regions, batch.ids, batch.mask, batch.pairs, batch.hidden_states)
        rank = triplet_loss(output.scores, batch.pairs, config.margin, config.max_violation)
        path = path_loss(output.paths, output.sentence_targets, config.batch_size)
        loss = rank + config.trade_off * path
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = gradient_length(self.parameters)
        nn.utils.clip_grads_with_norm_(self.parameters, config.grad_clip or torch.inf, norm)
        if not (loss + norm).isfinite():
            captions = ", ".join(map(str, batch.captions.tolist()))
            found = f"the loss is {loss.item()}, its gradient's length {norm.item()}"
            raise BadBatch(f"{found}, its captions {captions}")
        self.optimizer.step()
        pairs = torch.tensor(output.scores.numel())
        losses = {"Rank": rank, "Path": path, "Le": loss, "grad_norm": norm}
        return {name: value.detach() for name, value in losses.items()} | {"pairs": pairs}


def gradient_length(parameters: Iterable[Tensor]) -> Tensor:
    """The joint length of all gradients, a float32 scalar.

    Squares are summed in float64: a region of zeros has a gradient of up to 1e24 in the first step
    (§3 divides its length, 0, by 1e-12), whose square float32 cannot hold.
    """
    gradients = (parameter.grad for parameter in parameters if parameter.grad is not None)
    lengths = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
    return torch.stack(lengths).norm().float()
