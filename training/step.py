"""step.py — one training step: losses, gradient, clipping, Adam (SPEC §7, §8).

Reads and writes no files, so that a benchmark can time it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from common.cli import keep_float32, warn_if_bf16_is_slow
from common.errors import InputError
from data import Batch
from model import DIME, path_loss, triplet_loss
from training.config import TrainConfig

WITHOUT_FLOAT64 = {"mps"}  # device types
STEP_IN_SCORES = 3  # a training step costs about three scorings: forward, and backward twice that


class BadBatch(InputError):
    """The loss or the gradient of a batch is NaN or infinite."""


class TrainStep:
    """A model and its optimiser."""

    def __init__(self, config: TrainConfig, model: DIME, device: torch.device) -> None:
        keep_float32()
        self.config, self.model, self.device = config, model, device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.learning_rate)
        model.precision = config.precision

    def prepare(self, steps: int) -> None:
        """Set up compilation and memory for a run of `steps` steps."""
        config = self.config
        warn_if_bf16_is_slow(config.precision, self.device)
        pairs = config.batch_size**2 * (1 + config.extra_stc + config.extra_img)
        self.model.compile_if_it_pays(config.compile, steps * pairs * STEP_IN_SCORES)
        if self.model.space is not None:
            self.model.space.activation_checkpointing = config.activation_checkpointing

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Train on a batch; returns losses, gradient norm and the number of pairs.

        Raises BadBatch if loss or gradient are not finite; model and optimiser are then unchanged.
        """
        config = self.config
        # The forward pass moves the running statistics of batch normalisation.
        buffers = list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        self.model.train()
        output = self.model(batch.regions, batch.ids, batch.mask, batch.pairs, batch.hidden_states)
        rank = triplet_loss(output.scores, batch.pairs, config.margin, config.max_violation)
        path = path_loss(output.paths, output.sentence_targets, config.batch_size)
        loss = rank + config.trade_off * path
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = gradient_norm(self.parameters)
        nn.utils.clip_grads_with_norm_(self.parameters, config.grad_clip or torch.inf, norm)
        if not (loss + norm).isfinite():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            captions = ", ".join(map(str, batch.captions.tolist()))
            losses = f"loss {loss.item()}, gradient norm {norm.item()}"
            raise BadBatch(f"{losses} for the captions {captions}")
        self.optimizer.step()
        pairs = torch.tensor(output.scores.numel())
        figures = {"Rank": rank, "Path": path, "Le": loss, "grad_norm": norm}
        return {name: value.detach() for name, value in figures.items()} | {"pairs": pairs}


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the joint L2 norm of all gradients, a float32 scalar on their device or on the CPU.

    Squares are summed in float64. A region of zeros has a gradient of up to 1e24 in the first step,
    because §2 divides its norm, 0, by 1e-12; float32 cannot hold the square of that.
    """
    gradients = (parameter.grad for parameter in parameters if parameter.grad is not None)
    held = (g.cpu() if g.device.type in WITHOUT_FLOAT64 else g for g in gradients)
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in held]
    return torch.stack(norms).norm().float()
