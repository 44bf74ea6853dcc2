"""router.py — the gates of DIME and how they mix paths (SPEC §4, §6).

Knows nothing of what a cell does inside: a cell is anything that takes query tokens and a context
and gives refined tokens and gates.

Axes, in every room and in this order:
Q queries   C contexts   L tokens of a query   M tokens of a context   D width
O out-paths   N cells of a layer   I images   T captions   H heads   K numbers of a path vector
A tensor that does not depend on the context has C = 1 and broadcasts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

OPEN_BIAS = 1.5  # tanh(1.5) = 0.91: every path starts open, so no cell is born dead
CLOSED = 1e-4  # an out-path whose gates sum to less carries the skip instead
EPSILON = 1e-8  # keeps the division finite where every gate of an out-path is 0


@dataclass(frozen=True)
class Modality:
    """Images or captions, encoded: all that the routing space knows of them."""

    tokens: Tensor  # [items, L, D] regions or words, unit length
    pooled: Tensor  # [items, D] whole image or whole sentence
    mask: Tensor  # [items, L] bool, True = a real token

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, items: slice | Tensor) -> "Modality":
        return Modality(self.tokens[items], self.pooled[items], self.mask[items])


class Router(nn.Module):
    """Soft router (§4): query tokens in, one gate in [0, 1) per out-path out."""

    def __init__(self, dim: int, hidden: int, paths: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, paths))
        nn.init.constant_(self.mlp[-1].bias, OPEN_BIAS)

    def forward(self, x: Tensor) -> Tensor:
        """Gates `[Q, C, O]` in float32 for tokens `[Q, C, L, D]`, exactly 0 where closed."""
        # REFERENCE: the mean runs over every position, padded words included.
        with torch.autocast(x.device.type, enabled=False):
            return self.mlp(x.mean(-2, dtype=torch.float32)).tanh().relu()


class RoutingLayer(nn.Module):
    """A dense layer (§6): every cell feeds every cell of the next layer."""

    def __init__(self, cells: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.cells = nn.ModuleDict(cells)

    def forward(self, xs: Sequence[Tensor], context: Modality) -> tuple[tuple[Tensor, ...], Tensor]:
        """Out-paths, O tensors `[Q, C, L, D]`, and normalised gates `[Q, C, O, N]`."""
        ys, gates = _run(self.cells, xs, context)
        total = gates.sum(-1, keepdim=True)  # [Q, C, O, 1]
        dead = total < CLOSED
        gates = gates / (total + EPSILON)
        # A dead out-path carries the first cell's input, rectified: RIC's output where RIC leads.
        parts, weights = [*ys, xs[0].relu()], torch.cat([gates, dead], -1)  # [Q, C, O, N+1]
        return tuple(_blend(parts, path) for path in weights.unbind(2)), gates


class MergeLayer(nn.Module):
    """The last layer (§6): one out-path, the mean of the cells weighted by their gates."""

    def __init__(self, cells: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.cells = nn.ModuleDict(cells)

    def forward(self, xs: Sequence[Tensor], context: Modality) -> tuple[Tensor, Tensor]:
        """The refined tokens `[Q, C, L, D]` and the raw gates `[Q, C, 1, N]`."""
        ys, gates = _run(self.cells, xs, context)
        open_ = gates.squeeze(2)  # [Q, C, N]
        dead = (open_ < CLOSED / len(self.cells)).to(open_)  # such a cell passes its input on
        total = (open_ + dead).sum(-1, keepdim=True)  # [Q, C, 1]
        weights = torch.cat([open_, dead], -1) / total  # [Q, C, 2N]
        return _blend([*ys, *xs], weights), gates


def _run(
    cells: nn.ModuleDict, xs: Sequence[Tensor], context: Modality
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Each cell on its own input: N outputs `[Q, C, L, D]` and their gates `[Q, C, O, N]`."""
    done = [cell(x, context) for cell, x in zip(cells.values(), xs, strict=True)]
    ys, gates = zip(*done, strict=True)
    return ys, torch.stack(gates, -1)


def _blend(parts: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The sum over parts of weight times part: `[Q, C, L, D]` for weights `[Q, C, parts]`."""
    scaled = (
        weight[..., None, None].to(part.dtype) * part
        for weight, part in zip(weights.unbind(-1), parts, strict=True)
    )
    return sum(scaled)
