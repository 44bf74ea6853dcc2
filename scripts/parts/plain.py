"""plain.py — the published model's scores as its equations read, a caption and a cell at a time.

What scripts/benchmark.py compares with: right, and slower.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cells import LEAK
from common.config import CELLS
from model import DIME
from router import CLOSED, EPSILON, Modality


def plain_scores(model: DIME, images: Modality, captions: Modality) -> Tensor:
    """Scores `[I, T]`."""
    i2t = model.direction == "i2t"
    queries, contexts = (images, captions) if i2t else (captions, images)
    columns = []
    for words, pooled, mask in zip(contexts.tokens, contexts.pooled, contexts.mask, strict=True):
        columns.append(plain_column(model.space, queries.tokens, words[mask], pooled))
    scores = torch.stack(columns, 1)
    return scores if i2t else scores.T


def plain_column(space: torch.nn.Module, tokens: Tensor, words: Tensor, pooled: Tensor) -> Tensor:
    """Scores `[Q]` of all queries with one context."""
    xs = [tokens] * len(CELLS)
    for layer in space.layers:
        cells = list(layer.cells.values())
        ys = [plain_cell(cell, x, words, pooled) for cell, x in zip(cells, xs, strict=True)]
        gates = torch.stack([cell.router(x) for cell, x in zip(cells, xs, strict=True)], 2)
        total = gates.sum(2)  # [Q, O]
        shares = gates / (total[:, :, None] + EPSILON)
        mixed = []
        for k in range(len(CELLS)):
            y = (total[:, k] < CLOSED)[:, None, None] * ys[0]
            for j in range(len(CELLS)):
                y = y + shares[:, k, j, None, None] * ys[j]
            mixed.append(y)
        xs = mixed
    cells = list(space.merge.cells.values())
    gates = torch.cat([cell.router(x) for cell, x in zip(cells, xs, strict=True)], 1)
    dead = (gates < CLOSED / len(CELLS)).float()
    z = 0
    for j, cell in enumerate(cells):
        y = plain_cell(cell, xs[j], words, pooled)
        z = z + gates[:, j, None, None] * y + dead[:, j, None, None] * xs[j]
    z = z / (gates + dead).sum(1)[:, None, None]
    z = space.norm(z.float().flatten(0, 1)).view_as(z)
    return (F.normalize(z.mean(1) + z.amax(1), dim=-1) * pooled).sum(-1)


def plain_cell(cell: torch.nn.Module, x: Tensor, words: Tensor, pooled: Tensor) -> Tensor:
    """A cell's output `[Q, L, D]`, its products made pair by pair."""
    if hasattr(cell, "qkv"):
        parts = cell.qkv(x).chunk(3, -1)
        heads = [part.unflatten(-1, (cell.heads, -1)).transpose(1, 2) for part in parts]
        y = x + F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return y + cell.fc2(cell.fc1(y).relu())
    if hasattr(cell, "scale_shift"):
        affinity = F.normalize(F.leaky_relu(x @ words.T, LEAK), dim=1)
        attended = (cell.smooth * affinity).softmax(-1) @ words  # [Q, L, D]
        scale, shift = cell.scale_shift(attended).chunk(2, -1)
        return x + cell.fc2(cell.fc1(x * scale.tanh() + shift).relu())
    if hasattr(cell, "fc"):
        return (1 + F.normalize(cell.fc(x) * pooled, dim=1)) * x
    return x.relu()
