"""space.py — the routing space (SPEC §6): densely connected layers of cells, then the score.

Kept apart from model.py, which encodes and compares batches, because how pairs are worked on, in
slices, compiled, within a memory, is decided here alone. The axes are those of `router.py`.
"""

import logging
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from cells import CellSizes
from common.compile import Compiled, gains_by_compiling
from common.config import CELLS, LAYERS, CellName, Precision
from common.memory import chunk_size, free_memory, used_memory
from router import ContextProjections, MergeLayer, Modality, RoutingLayer

log = logging.getLogger(__name__)

PATH_SIZE = 128  # width of the embedding that path vectors are compared in
WORTH_COMPILING = 2_000_000  # pairs to be scored from which the minutes of compiling are won back
# What is kept of a pair for the backward pass, in tensors [L, D], as counted in autograd's graph:
# for a cell and the mixing of its paths, and for the score.
KEPT_FOR: dict[CellName, float] = {"ric": 2, "glgc": 5, "imrc": 7.5, "cmrc": 9.6}
KEPT_FOR_SCORE = 1.5
BYTES_KEPT: dict[Precision, float] = {"fp32": 4, "bf16": 2.4}  # a number; some stay in float32
AT_WORK = 1.35  # what a pair of the slice at work takes, in times what is kept of it
BESIDE = 500e6  # bytes of gradients, Adam's moments, buffers of libraries
COMPILER = 250e6  # bytes of what compiles, and of what it made
SAFE_SHARE = 0.7  # of the free memory that training takes
LIMIT_SHARE = 0.97  # of a limit: libraries take some more at one time than at another


class RoutingSpace(nn.Module):
    """Layers of cells, densely connected, then one score a pair (§6).

    Pairs are worked on in slices that fit a processor's caches or a GPU's memory. Training can be
    sliced, too, since batch normalisation is the last thing before the score.
    """

    def __init__(
        self, sizes: CellSizes, layers: int = LAYERS, cells: Sequence[CellName] = CELLS
    ) -> None:
        super().__init__()
        count, hard = len(cells), sizes.routing == "hard"
        self.layers = nn.ModuleList(
            RoutingLayer({name: sizes.cell(name, count) for name in cells}, hard)
            for _ in range(layers - 1)
        )
        self.merge = MergeLayer({name: sizes.cell(name, 1) for name in cells}, hard)
        self.norm = nn.BatchNorm1d(sizes.dim)
        self.path_mapping = nn.Linear((layers - 1) * count * count + count, PATH_SIZE)
        self.kept_pairs: float = math.inf  # of a training batch, whose activations are kept
        self._compiled: Compiled | None = None

    def forward(
        self, query: Modality, context: Modality, pairs: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores `[Q, C]` and path vectors `[Q, C, K]`, both float32; about `pairs` at a time."""
        assert query.tokens.shape[-1] == context.tokens.shape[-1] == self.norm.num_features
        pairs = pairs or chunk_size(query.tokens.device, query.tokens.shape[-1])
        layers = [*self.layers, self.merge]
        left = len(query) * len(context)  # pairs that are not routed yet
        columns = []
        for some, width in self._parts(context, pairs // self._least):
            views = [layer.views(some) for layer in layers]
            rows = []
            for part, height in self._parts(query, pairs // len(some)):
                keep = left <= self.kept_pairs or not torch.is_grad_enabled()
                found = self._slice(part.tokens, views, len(some), keep)
                rows.append([figures[:, :height, :width] for figures in found])
                left -= height * width
            columns.append([torch.cat(found, 1) for found in zip(*rows, strict=True)])
        summary, (paths,) = (torch.cat(parts, 2) for parts in zip(*columns, strict=True))
        positions = query.tokens[..., 0].numel() * len(context)
        return (self._pooled(*summary, positions) * context.pooled).sum(-1), paths

    def _parts(self, items: Modality, size: int) -> Iterator[tuple[Modality, int]]:
        """Items by parts of that many, the last one smaller, and how many of a part count."""
        size = max(self._least, size)
        for first in range(0, len(items), size):
            part = items[first : first + size]
            count = len(part)
            if self.is_compiled:  # its code is bound to what inputs are views of
                part = part[torch.arange(max(self._least, count)) % count].copied()
            yield part, count

    @property
    def _least(self) -> int:
        """Queries and contexts of a slice, at least: compiled code is bound to sizes of 1."""
        return 2 if self.is_compiled else 1

    def _slice(
        self, tokens: Tensor, views: Sequence[ContextProjections], contexts: int, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """What `_route` gives, its activations kept for the backward pass, or computed again."""
        route = self._compiled or self._route
        if keep:
            return route(tokens, views, contexts)
        with set_checkpoint_early_stop(False):  # by an exception, which is none to fall back for
            return checkpoint(
                route, tokens, views, contexts, use_reentrant=False, preserve_rng_state=False
            )

    def _route(
        self, tokens: Tensor, views: Sequence[ContextProjections], contexts: int
    ) -> tuple[Tensor, Tensor]:
        """Query tokens `[Q, L, D]` through all layers with C contexts.

        Of the refined tokens, mean, variance, maximum and minimum over L, `[4, Q, C, D]`; and path
        vectors `[1, Q, C, K]`.
        """
        xs = (tokens.unsqueeze(1),) * len(self.merge.cells)  # N x [Q, 1, L, D]
        gates = []
        for layer, view in zip([*self.layers, self.merge], views, strict=True):
            xs, layer_gates = layer(xs, view)
            gates.append(layer_gates)
        shape = (len(tokens), contexts, -1)
        paths = torch.cat([g.flatten(2).expand(shape) for g in gates], -1)  # [Q, C, K]
        # REFERENCE: padded words count as tokens, here and in the batch normalisation.
        refined = xs.float()  # [Q, C, L, D], or [Q, 1, L, D] where no cell has seen a context
        # by hand, since var_mean is the slowest operation of all
        mean = refined.mean(-2)
        variance = (refined - mean.unsqueeze(-2)).square().mean(-2)
        summary = torch.stack([mean, variance, refined.amax(-2), refined.amin(-2)])
        return summary.expand(-1, *shape), paths.unsqueeze(0)

    def _pooled(
        self, mean: Tensor, variance: Tensor, high: Tensor, low: Tensor, positions: int
    ) -> Tensor:
        """Refined queries `[Q, C, D]` of unit length: normalised, mean and maximum over tokens.

        Batch normalisation is a scale and a shift of each channel, so these figures of the tokens,
        each `[Q, C, D]`, are all that it needs of them. Its statistics run over every pair and
        position, extra negatives included.
        """
        norm = self.norm
        if self.training:
            centre = mean.mean((0, 1))
            spread = (variance + (mean - centre).square()).mean((0, 1))
            self._observe(centre.detach(), spread.detach() * positions / (positions - 1))
        else:
            centre, spread = norm.running_mean, norm.running_var
        scale = norm.weight * (spread + norm.eps).rsqrt()
        shift = norm.bias - centre * scale
        extreme = torch.where(scale > 0, high, low)  # a negative scale turns them around
        return F.normalize((mean + extreme) * scale + 2 * shift, dim=-1)

    @torch.no_grad()
    def _observe(self, centre: Tensor, spread: Tensor) -> None:
        """Move the running statistics towards those of a batch."""
        self.norm.running_mean.lerp_(centre, self.norm.momentum)
        self.norm.running_var.lerp_(spread, self.norm.momentum)
        self.norm.num_batches_tracked += 1

    def compile_routes(self) -> None:
        """Compile the routing at its first use; go on without where that fails."""
        self._compiled = Compiled(self._route, self.parameters)

    @property
    def is_compiled(self) -> bool:
        """Whether it is compiled, or to be at its first use, and has not failed to be."""
        return self._compiled is not None and not self._compiled.failed

    def skip_nothing(self) -> None:
        """Send every pair through every cell, also where its gates are closed."""
        for layer in [*self.layers, self.merge]:
            for cell in layer.cells.values():
                cell.skips = False

    def compile_where_it_pays(self, choice: bool | None, pairs: int, precision: Precision) -> None:
        """Compile the routing if `choice` is so, or if it is left open and `pairs` are many."""
        if choice is None:
            device = self.path_mapping.weight.device
            choice = pairs >= WORTH_COMPILING and gains_by_compiling(device, precision)
        if choice:
            log.info(
                "compiling the routing, which takes a minute or two; --no-compile goes without"
            )
            self.compile_routes()

    def keep_within(
        self, limit: float | None, pairs: int, tokens: int, precision: Precision
    ) -> None:
        """Keep as many activations of a batch for its backward pass as memory allows.

        `limit` is in bytes of this process, None for what is free; a batch is of `pairs` pairs of
        `tokens` tokens. What is not kept is computed again, to the same gradients.
        """
        device, size = self.path_mapping.weight.device, self.pair_memory(tokens, precision)
        if limit is None:
            room = SAFE_SHARE * free_memory(device)
        else:
            room = LIMIT_SHARE * limit - used_memory(device)
        at_once = min(pairs, chunk_size(device, self.norm.num_features))
        room -= step_memory(at_once, 0, size) + COMPILER * self.is_compiled
        self.kept_pairs = max(0, int(room / size))
        if limit is not None and room < 0:
            log.warning("training will take about %.1f GB all the same", (limit - room) / 1e9)
        if self.kept_pairs < pairs:
            share = 100 * (1 - self.kept_pairs / pairs)
            log.info("activations of %.0f %% of the pairs are computed twice, to fit memory", share)

    def pair_memory(self, tokens: int, precision: Precision) -> float:
        """Bytes that are kept for the backward pass of a pair of `tokens` query tokens."""
        cells, dim = self.merge.cells, self.norm.num_features
        kept = {name: KEPT_FOR[name] for name in cells}
        if "imrc" in kept:  # its inner layer and attention weights, at any sizes
            inner = cells["imrc"].fc1.out_features + cells["imrc"].heads * tokens
            kept["imrc"] += inner / dim
        if "cmrc" in kept:  # its affinities and weights, of about as many context tokens
            kept["cmrc"] += 3 * tokens / dim
        later = sum(kept.values()) + ("ric" not in kept)  # without RIC, what a dead path carries
        # in the first layer RIC and IMRC work on queries, not on pairs
        tensors = kept.get("glgc", 0) + kept.get("cmrc", 0) + len(self.layers) * later
        tensors += KEPT_FOR_SCORE
        return tensors * tokens * dim * BYTES_KEPT[precision]

    def closed(self, paths: Tensor) -> Tensor:
        """How many pairs of path vectors `[Q, C, K]` a cell has no part in: `[layers, N]`.

        All its gates are 0 for them.
        """
        highest = [layer.amax(-2) for layer in self.gates(paths)]  # [Q, C, N]
        return torch.stack([(gate == 0).sum((0, 1)) for gate in highest])

    def gates(self, paths: Tensor) -> list[Tensor]:
        """The gates `[..., O, N]` of each layer in path vectors `[..., K]`; the last one's raw."""
        count = len(self.merge.cells)
        *dense, last = paths.split([count * count] * len(self.layers) + [count], -1)
        return [*(layer.unflatten(-1, (count, count)) for layer in dense), last.unsqueeze(-2)]

    def embed_paths(self, paths: Tensor) -> Tensor:
        """Path embeddings `[Q, PATH_SIZE]` of path vectors `[Q, C, K]`, unit length."""
        return F.normalize(self.path_mapping(paths.mean(1)), dim=-1)


def step_memory(at_once: int, kept: int, size: float) -> float:
    """Bytes that training takes beside what was there before it, `at_once` pairs worked on at once.

    The activations of `kept` pairs are kept, of each `size` bytes.
    """
    return (at_once * AT_WORK + kept) * size + BESIDE
