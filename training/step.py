"""step.py — one training step: losses, gradient, clipping, Adam (SPEC §7, §8).

Reads and writes no files, so that a benchmark can time it, and asks the device nothing, so that the
host can launch the next step while this one runs.
"""

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from checkpoint.checkpoint import BERT_KEYS
from common.distributed import SharedBatch, add_up, send_from_first
from common.precision import product_precision, warn_if_bf16_is_slow
from common.recorded import CudaGraphs, Recorded
from common.world import ALONE, World
from data import Batch
from model import DIME, path_loss, triplet_loss
from training.config import TrainConfig

WITHOUT_FLOAT64 = {"mps"}  # device types
SKIPPING_ADAM = {"cpu", "cuda"}  # device types whose fused Adam leaves out a bad batch by itself
STEP_IN_SCORES = 3  # a training step costs about three scorings: forward, and backward twice that


class TrainStep:
    """A model and its optimiser; of several processes, each has an equal copy."""

    def __init__(
        self, config: TrainConfig, model: DIME, device: torch.device, world: World = ALONE
    ) -> None:
        self.config, self.model, self.device, self.world = config, model, device, world
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # What a forward pass changes: the running statistics of batch normalisation.
        named = model.named_buffers()
        self.statistics = [b for name, b in named if not name.startswith(BERT_KEYS)]
        self.optimizer = _new_adam(self.parameters, config.learning_rate, device)
        model.precision = config.precision

    def prepare(self, steps: int) -> None:
        """Set up compilation, recording and memory for a run of `steps` steps."""
        config = self.config
        send_from_first(self.world, [p.data for p in self.parameters] + self.statistics)
        warn_if_bf16_is_slow(config.precision, self.device)
        pairs = config.batch_size**2 * (1 + config.extra_stc + config.extra_img)
        pairs //= self.world.size  # that are routed here
        self.model.compile_if_it_pays(config.compile, steps * pairs * STEP_IN_SCORES)
        if self.model.space is not None:
            self.model.space.activation_checkpointing = config.activation_checkpointing
        # No recording holds the messages of several processes: nobody could end one that waits.
        is_recorded = self.world.size == 1 and config.compile is not False
        if self.device.type == "cuda" and is_recorded:
            recorded = Recorded(self.step, CudaGraphs(self.device))
            self.step = recorded  # type: ignore[method-assign, assignment]  # the same, but faster

    def set_learning_rate(self, rate: float) -> None:
        """Set Adam's learning rate of the next steps."""
        (group,) = self.optimizer.param_groups
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Train on a batch; returns losses, gradient norm and whether both are finite (1 or 0).

        They are scalars on the device. If they are not finite, model and optimiser are unchanged.
        """
        with product_precision(self.config.precision):
            return self._step(batch)

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        self.model.train()
        before = [buffer.clone() for buffer in self.statistics]
        losses = self._losses(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self._backward(losses["Le"])
        norm = gradient_norm(self.parameters)
        finite = (losses["Le"] + norm).isfinite()
        nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip or torch.inf, norm)
        self._update_weights(finite)
        for buffer, value in zip(self.statistics, before, strict=True):
            torch.where(finite, buffer, value, out=buffer)
        figures = losses | {"grad_norm": norm, "finite": finite.float()}
        return {name: figure.detach() for name, figure in figures.items()}

    def _backward(self, loss: Tensor) -> None:
        """Leave the gradients of the loss, of which every process has an equal copy."""
        if self.world.size == 1:
            loss.backward()
            return
        (loss / self.world.size).backward()  # together they minimise the sum of their losses
        # A weight has no gradient if the loss does not depend on it: on every rank alike.
        having = [parameter for parameter in self.parameters if parameter.grad is not None]
        flat = torch.cat([p.grad.flatten() for p in having if p.grad is not None])
        totals = add_up(self.world, flat).split([p.numel() for p in having])  # one message
        for parameter, total in zip(having, totals, strict=True):
            parameter.grad = total.view_as(parameter)

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of a batch under their published names; "Le" is their sum."""
        config, shared = self.config, None
        if self.world.size > 1:
            shared = SharedBatch(self.world, batch.pairs, batch.extras)
        output = self.model(
            *(batch.regions, batch.ids, batch.mask, batch.pairs, batch.hidden_states, shared)
        )
        rank = triplet_loss(output.scores, batch.pairs, config.margin, config.max_violation)
        path = path_loss(output.paths, output.sentence_targets, config.batch_size)
        return {"Rank": rank, "Path": path, "Le": rank + config.trade_off * path}

    def _update_weights(self, finite: Tensor) -> None:
        """Take a step of Adam if `finite`, a bool scalar on the device, is true."""
        if self.device.type in SKIPPING_ADAM:
            # As GradScaler does: then weights, moments and step count stay as they are.
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif finite:  # asks the device
            self.optimizer.step()


def _new_adam(
    parameters: Sequence[Tensor], rate: float, device: torch.device
) -> torch.optim.Optimizer:
    """Return Adam; on CUDA it can be recorded, and reads its learning rate from the device."""
    if device.type == "cuda":
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        on_device = torch.tensor(rate, device=device)
        return torch.optim.Adam(parameters, on_device, fused=True, capturable=True)
    return torch.optim.Adam(parameters, rate, fused=device.type in SKIPPING_ADAM)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the joint L2 norm of all gradients, a float32 scalar on their device.

    Squares are summed in float64. A region of zeros has a gradient of up to 1e24 in the first step,
    because §2 divides its norm, 0, by 1e-12; float32 cannot hold the square of that.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    device = gradients[0].device
    held = [g.cpu() for g in gradients] if device.type in WITHOUT_FLOAT64 else gradients
    norms = torch._foreach_norm(held, 2, dtype=torch.float64)  # a few kernels for all gradients
    return torch.linalg.vector_norm(torch.stack(norms)).float().to(device)
