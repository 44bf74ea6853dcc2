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
CONTIGUOUS = torch.contiguous_format
WORTH_SKIPPING = 0.1  # share of closed pairs from which picking the open ones out pays


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

    def to(self, device: torch.device) -> "Modality":
        """The same items on another device; of pinned ones without waiting for it."""
        return Modality(*(part.to(device, non_blocking=True) for part in vars(self).values()))

    def pinned(self) -> "Modality":
        """The same items where a GPU can fetch them."""
        return Modality(*(part.pin_memory() for part in vars(self).values()))

    def copied(self) -> "Modality":
        """The same items, contiguous and no views of others."""
        return Modality(*(part.clone(memory_format=CONTIGUOUS) for part in vars(self).values()))


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


class UniformRouter(nn.Module):
    """No router: every gate is 1 (an ablation)."""

    def __init__(self, paths: int) -> None:
        super().__init__()
        self.paths = paths

    def forward(self, x: Tensor) -> Tensor:
        """Gates `[Q, C, O]` for tokens `[Q, C, L, D]`."""
        return x.new_ones(*x.shape[:2], self.paths, dtype=torch.float32)


class Cell(nn.Module):
    """What a layer needs of a cell: its router, its view of the contexts, and its refinement.

    `forward(x, *view)` refines tokens `[Q, C, L, D]`; C = 1 where they do not depend on the
    context yet. What a cell does is in cells.py.
    """

    skips = True  # whether it is worth while to leave out what has closed gates

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def view(self, context: Modality) -> tuple[Tensor, ...]:
        """What the cell needs of contexts, made once for all queries: tensors `[1, C, ...]`."""
        return ()


ContextProjections = Sequence[tuple[Tensor, ...]]  # of the cells of a layer


class Layer(nn.Module):
    """Cells side by side, each on its own input; `hard` takes the largest gate alone."""

    def __init__(self, cells: Mapping[str, Cell], hard: bool = False) -> None:
        super().__init__()
        self.cells = nn.ModuleDict(cells)
        self.hard = hard

    def views(self, context: Modality) -> ContextProjections:
        """What each cell needs of contexts."""
        return [cell.view(context) for cell in self.cells.values()]

    def _gates(self, xs: Sequence[Tensor]) -> Tensor:
        """What the routers give, `[Q, C, O, N]`."""
        cells = self.cells.values()
        return torch.stack([cell.router(x) for cell, x in zip(cells, xs, strict=True)], -1)

    def _outputs(
        self, xs: Sequence[Tensor], views: ContextProjections, gates: Tensor
    ) -> tuple[Tensor, ...]:
        """N outputs `[Q, C, L, D]`, zeros where all of a cell's `gates` `[Q, C, O, N]` are 0."""
        return tuple(map(_refine, self.cells.values(), xs, views, gates.unbind(-1)))


class RoutingLayer(Layer):
    """A dense layer (§6): every cell feeds every cell of the next layer."""

    def forward(
        self, xs: Sequence[Tensor], views: ContextProjections
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Out-paths, O tensors `[Q, C, L, D]`, and normalised gates `[Q, C, O, N]`."""
        raw = self._gates(xs)
        total = raw.sum(-1, keepdim=True)  # [Q, C, O, 1]
        dead = (total < CLOSED).to(raw)
        gates = raw / (total + EPSILON)
        if self.hard:  # one, with the gradient of all (straight through)
            gates = _largest(gates) + (gates - gates.detach())
        # with hard routing, what is not chosen has no part in a score, but in a gradient
        ys = self._outputs(xs, views, raw if torch.is_grad_enabled() else gates)
        if "ric" in self.cells:  # a dead out-path carries RIC's output, which has no gate then
            weights = torch.cat([gates[..., :1] + dead, gates[..., 1:]], -1)
        else:
            ys, weights = (*ys, xs[0].relu()), torch.cat([gates, dead], -1)
        return _mix(ys, weights).unbind(2), gates


class MergeLayer(Layer):
    """The last layer (§6): one out-path, the mean of the cells weighted by their gates."""

    def forward(self, xs: Sequence[Tensor], views: ContextProjections) -> tuple[Tensor, Tensor]:
        """The refined tokens `[Q, C, L, D]` and the raw gates `[Q, C, 1, N]`."""
        gates = self._gates(xs)
        dead = (gates < CLOSED / len(self.cells)).to(gates)  # such a cell passes its input on
        if self.hard:
            chosen = _largest(gates, closed=True)
            gates, dead = gates * chosen, dead * chosen
        total = (gates + dead).sum(-1, keepdim=True)  # [Q, C, 1, 1]
        shares = gates / total
        if self.hard:  # g / g, whose gradient would be rounding alone
            shares = torch.where(dead > 0, shares, chosen)
        mixed = _mix(self._outputs(xs, views, gates), shares)
        if torch.compiler.is_compiling() or dead.any():
            mixed = mixed + _mix(xs, dead / total)
        return mixed.squeeze(2), gates


def _largest(gates: Tensor, closed: bool = False) -> Tensor:
    """1 for the largest of N gates `[..., N]`, the first of equal ones, and 0 for the others.

    Where all are 0 there is none, unless `closed` gates count.
    """
    highest, first = gates.amax(-1, keepdim=True), gates.argmax(-1, keepdim=True)
    return torch.zeros_like(gates).scatter(-1, first, ((highest > 0) | closed).to(gates))


def _refine(cell: Cell, x: Tensor, view: tuple[Tensor, ...], gates: Tensor) -> Tensor:
    """The cell's output, for gates `[Q, C, O]`; zeros where all are 0, for nothing takes it there.

    What has closed gates is not sent through the cell, which changes no score and no gradient.
    """
    if not cell.skips or torch.compiler.is_compiling():  # whose shapes cannot depend on gates
        return cell(x, *view)
    open_ = gates.any(-1)  # [Q, C]
    if open_.float().mean() > 1 - WORTH_SKIPPING:
        return cell(x, *view)
    query, context = open_.nonzero(as_tuple=True)  # P open pairs, or queries where C = 1
    if x.shape[1] == 1:
        y = cell(x[query], *view)  # [P, C, L, D]
        return y.new_zeros(len(x), *y.shape[1:]).index_put((query,), y)
    y = cell(x[query, context].unsqueeze(1), *(part[0, context].unsqueeze(1) for part in view))
    return y.new_zeros(x.shape).index_put((query, context), y.squeeze(1))  # y was [P, 1, L, D]


def _mix(parts: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sums of parts `[Q, C, L, D]`, N of them, by weights `[Q, C, O, N]`: `[Q, C, O, L, D]`."""
    # One product a pair: three times as fast as adding N parts O times.
    stacked = torch.stack(torch.broadcast_tensors(*parts), 2)  # [Q, C, N, L, D]
    weights = weights.to(stacked.dtype).expand(*stacked.shape[:2], -1, -1)
    return (weights @ stacked.flatten(3)).unflatten(-1, stacked.shape[3:])
