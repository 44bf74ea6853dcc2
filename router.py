"""router.py — gates, and how they mix paths: routers, layers, the routing space (SPEC §4, §6).

It knows nothing of what a cell does inside: a cell is anything that takes query tokens and
projected contexts and returns refined tokens, and owns a router.

Axes, in every module and in this order:
Q queries   C contexts   L tokens of a query   M tokens of a context   D width
O out-paths   N cells of a layer   I images   T captions   H heads   K numbers of a path vector
A tensor that does not depend on the context has C = 1 and broadcasts.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from common.compile import Compiled, needs_fixed_shapes
from common.distributed import Rows
from common.memory import chunk_size

OPEN_BIAS = 1.5  # tanh(1.5) = 0.91: every path starts open, so no cell is inactive from the start
INACTIVE = 1e-4  # an out-path whose gates sum to less carries the rectified identity instead
EPSILON = 1e-8  # keeps the division finite if every gate of an out-path is 0
PATH_SIZE = 128  # width of the embedding in which path vectors are compared
CONTIGUOUS = torch.contiguous_format


@dataclass(frozen=True)
class Modality:
    """Encoded images or captions: all that the routing space knows of them."""

    tokens: Tensor  # [items, L, D] regions or words, unit length
    pooled: Tensor  # [items, D] whole image or whole sentence
    mask: Tensor  # [items, L] bool, True = a real token

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, items: slice | Tensor) -> "Modality":
        return Modality(self.tokens[items], self.pooled[items], self.mask[items])

    def to(self, device: torch.device) -> "Modality":
        """Return the same items on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def copy(self) -> "Modality":
        """Return the same items in new, contiguous tensors that share no memory with these."""
        return self.map(lambda tensor: tensor.clone(memory_format=CONTIGUOUS))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Modality":
        """Return what `change` makes of each tensor."""
        return Modality(*map(change, vars(self).values()))


class Router(nn.Module):
    """Soft router (§4): query tokens in, one gate in [0, 1) per out-path out."""

    def __init__(self, dim: int, hidden: int, paths: int) -> None:
        super().__init__()
        first, last = nn.Linear(dim, hidden), nn.Linear(hidden, paths)
        nn.init.constant_(last.bias, OPEN_BIAS)
        self.mlp = nn.Sequential(first, nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        """Return gates `[Q, C, O]` in float32 for tokens `[Q, C, L, D]`; a closed gate is 0."""
        # REFERENCE: the mean runs over every position, padded words included.
        # In float32 also under autocast: gates are compared with INACTIVE, 1e-4, which is below the
        # resolution of bfloat16 near 1.
        with torch.autocast(x.device.type, enabled=False):
            return self.mlp(x.mean(-2, dtype=torch.float32)).tanh().relu()


class UniformRouter(nn.Module):
    """Every gate is 1: an ablation without routers."""

    def __init__(self, paths: int) -> None:
        super().__init__()
        self.paths = paths

    def forward(self, x: Tensor) -> Tensor:
        """Return gates `[Q, C, O]` for tokens `[Q, C, L, D]`."""
        return x.new_ones(*x.shape[:2], self.paths, dtype=torch.float32)


class Cell(nn.Module):
    """The base of a cell: its router and its projection of the contexts (cells.py has the rest).

    `forward(x, *projections)` refines tokens `[Q, C, L, D]`. At layer 0 the tokens do not depend on
    the context, so C = 1.
    """

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def project_context(self, context: Modality) -> tuple[Tensor, ...]:
        """Return what the cell needs of the contexts, once for all queries: tensors of C items."""
        return ()


ContextProjections = Sequence[tuple[Tensor, ...]]  # one tuple for each cell of a layer


class Layer(nn.Module):
    """Cells side by side, each on its own input. `hard` keeps the largest gate only (ablation)."""

    def __init__(self, cells: Mapping[str, Cell], hard: bool = False) -> None:
        super().__init__()
        self.cells = nn.ModuleDict(cells)
        self.hard = hard

    @property
    def _cells(self) -> list[Cell]:
        return cast(list[Cell], list(self.cells.values()))

    def project_context(self, context: Modality) -> ContextProjections:
        """Return the projections of every cell."""
        return [cell.project_context(context) for cell in self._cells]

    def _gates(self, xs: Sequence[Tensor]) -> Tensor:
        """Return the gates of all routers, `[Q, C, O, N]`."""
        return torch.stack([cell.router(x) for cell, x in zip(self._cells, xs, strict=True)], -1)

    def _refine(self, xs: Sequence[Tensor], projections: ContextProjections) -> list[Tensor]:
        """Return the N outputs of the cells, `[Q, C, L, D]` each."""
        return [cell(x, *p) for cell, x, p in zip(self._cells, xs, projections, strict=True)]


class RoutingLayer(Layer):
    """A dense layer (§6): every cell feeds every cell of the next layer."""

    def forward(
        self, xs: Sequence[Tensor], projections: ContextProjections
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return O out-paths, `[Q, C, L, D]` each, and normalised gates `[Q, C, O, N]`."""
        gates = self._gates(xs)
        total = gates.sum(-1, keepdim=True)  # [Q, C, O, 1]
        # An inactive path would carry almost nothing, and every later cell would work on noise. It
        # carries the rectified identity instead. The flag is a constant: no gradient opens it.
        inactive = (total < INACTIVE).to(gates)
        gates = gates / (total + EPSILON)
        if self.hard:  # one-hot in the forward pass, the gradient of all gates (straight through)
            gates = _one_hot_of_largest(gates) + (gates - gates.detach())
        ys = self._refine(xs, projections)
        if "ric" in self.cells:  # an inactive path carries its output
            weights = torch.cat([gates[..., :1] + inactive, gates[..., 1:]], -1)
        else:
            ys, weights = [*ys, xs[0].relu()], torch.cat([gates, inactive], -1)
        return _mix(ys, weights), gates


class MergeLayer(Layer):
    """The last layer (§6): one out-path, the mean of the cells weighted by their gates."""

    def forward(
        self, xs: Sequence[Tensor], projections: ContextProjections
    ) -> tuple[Tensor, Tensor]:
        """Return the refined tokens `[Q, C, L, D]` and the raw gates `[Q, C, 1, N]`."""
        gates = self._gates(xs)
        inactive = (gates < INACTIVE / len(self.cells)).to(gates)  # such a cell passes its input on
        if self.hard:
            chosen = _one_hot_of_largest(gates, any_gate=True)
            gates, inactive = gates * chosen, inactive * chosen
        total = (gates + inactive).sum(-1, keepdim=True)  # [Q, C, 1, 1]
        shares = gates / total
        if self.hard:  # the share of the only gate is g / g: its gradient would be rounding noise
            shares = torch.where(inactive > 0, shares, chosen)
        parts = self._refine(xs, projections)
        # To ask is quicker on a CPU, where hardly any cell is inactive. It would make a GPU wait.
        fixed = torch.compiler.is_compiling() or needs_fixed_shapes(gates.device)
        if fixed or inactive.any():
            parts, shares = [*parts, *xs], torch.cat([shares, inactive / total], -1)
        (mixed,) = _mix(parts, shares)
        return mixed, gates


def _one_hot_of_largest(gates: Tensor, any_gate: bool = False) -> Tensor:
    """Return 1 for the largest of N gates `[..., N]` (the first of equal ones) and 0 for others.

    If all gates are 0 the result is all 0, unless `any_gate` allows one of them.
    """
    highest, first = gates.amax(-1, keepdim=True), gates.argmax(-1, keepdim=True)
    return torch.zeros_like(gates).scatter(-1, first, ((highest > 0) | any_gate).to(gates))


def _mix(parts: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, ...]:
    """Return O sums `[Q, C, L, D]` of N parts `[Q, C, L, D]` by weights `[Q, C, O, N]`."""
    if torch.compiler.is_compiling():
        # Compiled, all O sums are one pass over the parts, which the cells' last operations and the
        # next routers' means join.
        paths = weights.to(parts[0].dtype)[..., None, None].unbind(2)  # O x [Q, C, N, 1, 1]
        return tuple(reduce(torch.add, map(torch.mul, w.unbind(2), parts)) for w in paths)
    # One product for each pair is faster than adding N parts O times.
    stacked = torch.stack(torch.broadcast_tensors(*parts), 2)  # [Q, C, N, L, D]
    weights = weights.to(stacked.dtype).expand(*stacked.shape[:2], -1, -1)
    return (weights @ stacked.flatten(3)).unflatten(-1, stacked.shape[3:]).unbind(2)


class TokenNorm(nn.BatchNorm1d):
    """Batch normalisation of the refined tokens, then their pooled vector (§6).

    It is affine per channel: z' = a z + b. So mean_L z' = a mean_L(z) + b; and max_L z' is
    a max_L(z) + b if a > 0, but a min_L(z) + b if a < 0. Four statistics of z are enough, and z
    need not be kept: pairs can be routed in chunks, in training too.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def pool(self, statistics: Tensor, positions: int, rows: Rows | None = None) -> Tensor:
        """Return mean plus maximum over the normalised tokens, unit length, `[Q, C, D]`.

        `statistics` are mean, variance, maximum and minimum over the tokens of each pair,
        `[4, Q, C, D]`; `positions` is the number of tokens of all pairs. Of several processes, each
        has the statistics of its queries, which are `rows`.
        """
        mean, variance, high, low = statistics
        if self.training:
            # Over every pair and position, extra negatives included. The variance of all is the
            # mean of the pairs' variances plus the variance of their means.
            centre = _mean_of_pairs(mean, rows)
            spread = _mean_of_pairs(variance + (mean - centre).square(), rows)
            unbiased = spread.detach() * positions / (positions - 1)
            with torch.no_grad():  # as BatchNorm1d does
                self.running_mean.lerp_(centre.detach(), self.momentum)
                self.running_var.lerp_(unbiased, self.momentum)
                self.num_batches_tracked += 1
        else:
            centre, spread = self.running_mean, self.running_var
        scale = self.weight * (spread + self.eps).rsqrt()
        shift = self.bias - centre * scale
        extreme = torch.where(scale > 0, high, low)
        return F.normalize((mean + extreme) * scale + 2 * shift, dim=-1)


def _mean_of_pairs(values: Tensor, rows: Rows | None) -> Tensor:
    """Return the mean `[D]` of `[Q, C, D]` over all pairs, those of other processes included."""
    return values.mean((0, 1)) if rows is None else rows.mean(values)


class RoutingSpace(nn.Module):
    """Densely connected layers of cells, then one score for each pair (§6)."""

    def __init__(
        self,
        dim: int,
        cells: Sequence[str],
        layers: int,
        make_cell: Callable[[str, int], Cell],
        hard: bool = False,
    ) -> None:
        """Build `layers` layers of `cells`; `make_cell(name, out_paths)` returns a new cell."""
        super().__init__()
        count = len(cells)
        self.layers = nn.ModuleList(
            RoutingLayer({name: make_cell(name, count) for name in cells}, hard)
            for _ in range(layers - 1)
        )
        self.merge = MergeLayer({name: make_cell(name, 1) for name in cells}, hard)
        self.norm = TokenNorm(dim)
        self.path_mapping = nn.Linear((layers - 1) * count * count + count, PATH_SIZE)
        self.activation_checkpointing = False
        self.compiled: Compiled | None = None

    @property
    def all_layers(self) -> list[Layer]:
        """The dense layers, then the merging layer."""
        return cast(list[Layer], [*self.layers, self.merge])

    def forward(
        self,
        query: Modality,
        context: Modality,
        pairs: int | None = None,
        rows: Rows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return scores `[Q, C]` and path vectors `[Q, C, K]`, both float32.

        About `pairs` pairs are routed at a time (default: the device's chunk size). Of several
        processes, each has its share of the queries, which are `rows`, and all contexts.
        """
        assert query.tokens.shape[-1] == context.tokens.shape[-1] == self.norm.num_features
        device, dim = query.tokens.device.type, query.tokens.shape[-1]
        pairs = pairs or chunk_size(device, dim, self._recomputes)
        statistics, paths = self._route_in_chunks(query, context, pairs)
        queries = len(query) if rows is None else rows.count
        positions = queries * query.tokens.shape[1] * len(context)
        refined = self.norm.pool(statistics, positions, rows)  # [Q, C, D]
        return (refined * context.pooled).sum(-1), paths

    def route(
        self, tokens: Tensor, projections: Sequence[ContextProjections], contexts: int
    ) -> tuple[Tensor, Tensor]:
        """Send query tokens `[Q, L, D]` through all layers, with C contexts.

        Returns mean, variance, maximum and minimum over L of the refined tokens, `[4, Q, C, D]`,
        and path vectors `[1, Q, C, K]`.
        """
        xs = (tokens.unsqueeze(1),) * len(self.merge.cells)  # N x [Q, 1, L, D]
        gates = []
        for layer, layer_projections in zip(self.layers, projections[:-1], strict=True):
            xs, layer_gates = layer(xs, layer_projections)
            gates.append(layer_gates)
        merged, merge_gates = self.merge(xs, projections[-1])
        gates.append(merge_gates)
        shape = (len(tokens), contexts, -1)
        paths = torch.cat([g.flatten(2).expand(shape) for g in gates], -1)  # [Q, C, K]
        # REFERENCE: padded words count as tokens, here and in the batch normalisation.
        refined = merged.float()  # [Q, C, L, D]; C = 1 if no cell has seen a context
        mean = refined.mean(-2)
        # Written out: `var_mean` is the slowest CPU operation of all.
        variance = (refined - mean.unsqueeze(-2)).square().mean(-2)
        statistics = torch.stack([mean, variance, refined.amax(-2), refined.amin(-2)])
        return statistics.expand(-1, *shape), paths.unsqueeze(0)

    def _route_in_chunks(
        self, query: Modality, context: Modality, pairs: int
    ) -> tuple[Tensor, Tensor]:
        """Return statistics `[4, Q, C, D]` and paths `[Q, C, K]`; chunks of about `pairs` pairs."""
        # torch.compile specialises on size 1, so code for all shapes needs at least 2 items.
        fixed = self.compiled is not None and self.compiled.fixed
        least = 2 if self.is_compiled and not fixed else 1
        columns = []
        for contexts, width in _chunks(context, pairs // least, least, fixed):
            projections = [layer.project_context(contexts) for layer in self.all_layers]
            rows = []
            for queries, height in _chunks(query, pairs // len(contexts), least, fixed):
                outputs = self._run_chunk(queries.tokens, projections, len(contexts))
                rows.append([output[:, :height, :width] for output in outputs])
            columns.append([torch.cat(outputs, 1) for outputs in zip(*rows, strict=True)])
        statistics, paths = (torch.cat(outputs, 2) for outputs in zip(*columns, strict=True))
        return statistics, paths.squeeze(0)

    def _run_chunk(
        self, tokens: Tensor, projections: Sequence[ContextProjections], contexts: int
    ) -> tuple[Tensor, Tensor]:
        """Return `route(...)`, compiled and with activation checkpointing if they are on."""
        route = self.compiled or self.route
        if not self._recomputes:
            return route(tokens, projections, contexts)
        # Early stop ends the recomputation by an exception, which the compiled function would take
        # for a failure of the compiler.
        with set_checkpoint_early_stop(False):
            return checkpoint(
                route, tokens, projections, contexts, use_reentrant=False, preserve_rng_state=False
            )

    @property
    def _recomputes(self) -> bool:
        """Whether the backward pass recomputes the activations."""
        return self.activation_checkpointing and torch.is_grad_enabled()

    def compile_routes(self) -> None:
        """Compile the routing at its first use; if that fails, go on with eager code."""
        fixed = needs_fixed_shapes(self.norm.weight.device)
        self.compiled = Compiled(self.route, self.parameters, fixed)

    @property
    def is_compiled(self) -> bool:
        """Whether the routing is compiled (or will be at its first use)."""
        return self.compiled is not None and not self.compiled.failed

    def embed_paths(self, paths: Tensor) -> Tensor:
        """Return path embeddings `[Q, PATH_SIZE]` of path vectors `[Q, C, K]`, unit length."""
        return F.normalize(self.path_mapping(paths.mean(1)), dim=-1)


def _chunks(items: Modality, size: int, least: int, equal: bool) -> Iterator[tuple[Modality, int]]:
    """Yield `(chunk, n)` of at most `size` items; `n` are real, the rest pad to `least` items.

    If `equal`, every chunk has the same size, and the last one is padded.
    """
    size = max(least, size)
    if equal:
        size = math.ceil(len(items) / math.ceil(len(items) / size))
    for first in range(0, len(items), size):
        chunk = items[first : first + size]
        count = len(chunk)
        padded = size if equal else max(least, count)
        if padded > count:
            chunk = chunk[torch.arange(padded, device=chunk.tokens.device) % count]
        if least > 1:  # compiled code is also specialised on which tensors are views of others
            chunk = chunk.copy()
        yield chunk, count
