"""space.py — the routing space (SPEC §6): densely connected layers of cells, then the score.

Kept apart from model.py, which encodes and compares batches, because how pairs are worked on, in
slices, compiled, within a memory, is decided here alone. The axes are those of `router.py`.
"""

import importlib.util
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cells import CELLS, CellName, CellSizes
from memory import free_memory, most_pairs, out_of_memory, used_memory
from router import MergeLayer, Modality, RoutingLayer, Views

log = logging.getLogger(__name__)

LAYERS = 3  # PAPER: three layers of cells, the last of which merges
PATH_SIZE = 128  # width of the embedding that path vectors are compared in
WORTH_COMPILING = 2_000_000  # pairs to be scored from which the minutes of compiling are won back
# A training batch's memory, in tensors [L, D] a pair: what the routing keeps for the backward
# pass, and what is made of all pairs at once.
KEPT, WHOLE = 70, 8
SAFE_SHARE = 0.7  # of the free memory that training takes


class RoutingSpace(nn.Module):
    """Layers of cells, densely connected, then one score a pair (§6).

    Pairs are worked on in slices that fit a processor's caches or a GPU's memory. Training can be
    sliced, too, since batch normalisation is the last thing before the score.
    """

    def __init__(
        self, sizes: CellSizes, layers: int = LAYERS, cells: Sequence[CellName] = CELLS
    ) -> None:
        super().__init__()
        count = len(cells)
        self.layers = nn.ModuleList(
            RoutingLayer({name: sizes.cell(name, count) for name in cells})
            for _ in range(layers - 1)
        )
        self.merge = MergeLayer({name: sizes.cell(name, 1) for name in cells})
        self.norm = nn.BatchNorm1d(sizes.dim)
        self.path_mapping = nn.Linear((layers - 1) * count * count + count, PATH_SIZE)
        self.kept_pairs: float = math.inf  # of a training batch, whose activations are kept
        self._compiled: Callable[..., tuple[Tensor, Tensor]] | None = None

    def forward(
        self, query: Modality, context: Modality, pairs: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores `[Q, C]` and path vectors `[Q, C, K]`, both float32; about `pairs` at a time."""
        pairs = pairs or most_pairs(query.tokens.device)
        layers = [*self.layers, self.merge]
        left = len(query) * len(context)  # pairs that are not routed yet
        columns = []
        for some in context.split(pairs):
            views = [layer.views(some) for layer in layers]
            rows = []
            for part in query.split(max(1, pairs // len(some))):
                keep = left <= self.kept_pairs or not torch.is_grad_enabled()
                rows.append(self._slice(part.tokens, views, some.pooled, keep))
                left -= len(part) * len(some)
            columns.append([torch.cat(found) for found in zip(*rows, strict=True)])
        found, paths = (torch.cat(parts, 1) for parts in zip(*columns, strict=True))
        return self._compare(found, context.pooled) if self.training else found, paths

    def _slice(
        self, tokens: Tensor, views: Sequence[Views], pooled: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """What `_route` gives, its activations kept for the backward pass, or computed again."""
        route = self._compiled or self._route
        if keep:
            return route(tokens, views, pooled)
        return checkpoint(
            route, tokens, views, pooled, use_reentrant=False, preserve_rng_state=False
        )

    def _route(
        self, tokens: Tensor, views: Sequence[Views], pooled: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Query tokens `[Q, L, D]` through all layers; path vectors `[Q, C, K]`, and the scores.

        In training the refined tokens `[Q, C, L, D]` stand for the scores, which need them all.
        """
        xs = (tokens.unsqueeze(1),) * len(self.merge.cells)  # N x [Q, 1, L, D]
        gates = []
        for layer, view in zip([*self.layers, self.merge], views, strict=True):
            xs, layer_gates = layer(xs, view)
            gates.append(layer_gates)
        shape = (len(tokens), len(pooled), -1)
        paths = torch.cat([g.flatten(2).expand(shape) for g in gates], -1)  # [Q, C, K]
        refined = xs.expand(*shape[:2], -1, -1)
        return (refined if self.training else self._compare(refined, pooled)), paths

    def compile_routes(self) -> None:
        """Compile the routing at its first use; go on without where that fails."""
        # One compilation serves every number of queries, contexts and context words.
        compiled = torch.compile(self._route, dynamic=True)

        def route(*given: Any) -> tuple[Tensor, Tensor]:
            try:
                return compiled(*given)
            except Exception as error:  # no compiler, or one that cannot: many types, one remedy
                if out_of_memory(error):
                    raise
                reason = (str(error) or type(error).__name__).splitlines()[0]
                log.warning("not compiled, going on without: %s", reason)
                self._compiled = None
                return self._route(*given)

        self._compiled = route

    def compile_where_it_pays(self, choice: bool | None, pairs: int) -> None:
        """Compile the routing if `choice` is so, or if it is left open and `pairs` are many."""
        device = self.path_mapping.weight.device
        if choice or (choice is None and pairs >= WORTH_COMPILING and has_compiler(device)):
            log.info(
                "compiling the routing, which takes a minute or two; --no-compile goes without"
            )
            self.compile_routes()

    def keep_within(self, limit: float | None, pairs: int, tokens: int, itemsize: int) -> None:
        """Keep as many activations of a batch for its backward pass as memory allows.

        `limit` is in bytes of this process, None for what is free; a batch is of `pairs` pairs of
        `tokens` tokens, whose numbers take `itemsize` bytes. What is not kept is computed again, to
        the same gradients.
        """
        weight = self.path_mapping.weight
        size = tokens * self.norm.num_features * itemsize
        free = free_memory(weight.device) if limit is None else limit - used_memory(weight.device)
        room = SAFE_SHARE * free if limit is None else free
        self.kept_pairs = max(0, int((room - pairs * size * WHOLE) / (size * KEPT)))
        if self.kept_pairs < pairs:
            share = 100 * (1 - self.kept_pairs / pairs)
            log.info("activations of %.0f %% of the pairs are computed twice, to fit memory", share)

    def _compare(self, refined: Tensor, pooled: Tensor) -> Tensor:
        """Scores `[Q, C]` of refined tokens `[Q, C, L, D]` with contexts `[C, D]`."""
        refined = refined.float()
        # Statistics over every pair and position, extra negatives included.
        normed = self.norm(refined.flatten(0, 2)).view_as(refined)
        whole = F.normalize(normed.mean(-2) + normed.amax(-2), dim=-1)  # [Q, C, D]
        return (whole * pooled).sum(-1)

    def closed(self, paths: Tensor) -> Tensor:
        """How many pairs of path vectors `[Q, C, K]` a cell has no part in: `[layers, N]`.

        All its gates are 0 for them.
        """
        count = len(self.merge.cells)
        *dense, last = paths.split([count * count] * len(self.layers) + [count], -1)
        gates = [layer.unflatten(-1, (count, count)).amax(-2) for layer in dense]  # [Q, C, N]
        return torch.stack([(gate == 0).sum((0, 1)) for gate in [*gates, last]])

    def embed_paths(self, paths: Tensor) -> Tensor:
        """Path embeddings `[Q, PATH_SIZE]` of path vectors `[Q, C, K]`, unit length."""
        return F.normalize(self.path_mapping(paths.mean(1)), dim=-1)


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile finds what it needs: Triton for a GPU, else a C++ compiler."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return shutil.which(os.environ.get("CXX", "g++")) is not None
