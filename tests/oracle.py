"""The model of SPEC §1-§7 one pair at a time, with plain loops: slow, and plainly right.

It takes weights from the model's modules and nothing else of their code.
"""

import math

import torch
from torch import Tensor, nn

from cells import CrossModalRefinement, GlobalLocalGuidance, IntraModalReasoning


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def unit(x: Tensor) -> Tensor:
    """Unit length of a vector."""
    return x / x.square().sum().sqrt().clamp(min=1e-12)


def relu(x: Tensor) -> Tensor:
    """Positive part, with gradient 0 at exactly 0, where `clamp` has 1 before torch 2.14.

    It matters with hard routing: a cell's input is RIC's output alone, which holds exact zeros,
    and the straight-through gates have a gradient even so.
    """
    return torch.where(x > 0, x, torch.zeros_like(x))


def router(module: nn.Module, x: Tensor) -> Tensor:
    """§4: gates [O] of tokens [L, D]."""
    hidden = relu(linear(module.mlp[0], sum(x) / len(x)))
    return relu(torch.tanh(linear(module.mlp[2], hidden)))


def guidance(cell: GlobalLocalGuidance, x: Tensor, guide: Tensor) -> Tensor:
    """§5.1, with the guide's value as the paper has it, not its sign."""
    product = linear(cell.fc, x) * guide
    columns = [unit(product[:, d]) for d in range(x.shape[1])]
    return (1 + torch.stack(columns, 1)) * x


def reasoning(cell: IntraModalReasoning, x: Tensor) -> Tensor:
    """§5.2."""
    width = x.shape[1]
    parts = [linear_rows(cell.qkv, x, i * width, (i + 1) * width) for i in range(3)]
    size = width // cell.heads
    attended = torch.zeros_like(x)
    for head in range(cell.heads):
        channels = slice(head * size, (head + 1) * size)
        query, key, value = (part[:, channels] for part in parts)
        for l in range(len(x)):  # noqa: E741
            weights = torch.stack([query[l] @ k for k in key]) / math.sqrt(size)
            attended[l, channels] = softmax(weights) @ value
    y = x + attended
    return y + linear(cell.fc2, relu(linear(cell.fc1, y)))


def linear_rows(layer: nn.Linear, x: Tensor, first: int, stop: int) -> Tensor:
    return x @ layer.weight[first:stop].T + layer.bias[first:stop]


def softmax(x: Tensor) -> Tensor:
    e = torch.exp(x - x.max())
    return e / e.sum()


def affinity(x: Tensor, norm: str) -> Tensor:
    """§5.3: affinities [L, C] normalised over the local positions, column by column."""
    leaky = torch.where(x > 0, x, 0.1 * x)
    columns = []
    for c in range(x.shape[1]):
        plain, clipped = x[:, c], leaky[:, c]
        columns.append(
            {
                "clipped_l2norm": unit(clipped),
                "l2norm": plain / (plain.square().sum().sqrt() + 1e-8),
                "l1norm": plain / (plain.abs().sum() + 1e-8),
                "clipped_l1norm": clipped / (clipped.abs().sum() + 1e-8),
                "clipped": clipped,
                "softmax": softmax(plain),
                "no_norm": plain,
            }[norm]
        )
    return torch.stack(columns, 1)


def refinement(
    cell: CrossModalRefinement, x: Tensor, context: Tensor, norm: str, smooth: float
) -> Tensor:
    """§5.3, on the real context tokens [C, D] alone."""
    width = x.shape[1]
    affinities = affinity(torch.stack([torch.stack([t @ c for c in context]) for t in x]), norm)
    rows = []
    for token, row in zip(x, affinities, strict=True):
        attended = (softmax(smooth * row) @ context)[None]
        scale = torch.tanh(linear_rows(cell.scale_shift, attended, 0, width))[0]
        shift = linear_rows(cell.scale_shift, attended, width, 2 * width)[0]
        hidden = relu(linear(cell.fc1, token * scale + shift))
        rows.append(token + linear(cell.fc2, hidden))
    return torch.stack(rows)


def run_cell(
    name: str, cell: nn.Module, x: Tensor, context: Tensor, guide: Tensor, config
) -> Tensor:
    if name == "ric":
        return relu(x)
    if name == "glgc":
        return guidance(cell, x, guide)
    if name == "imrc":
        return reasoning(cell, x)
    norm, smooth = config.raw_feature_norm_CMRC, config.lambda_softmax_CMRC
    return refinement(cell, x, context, norm, smooth)


def router_of(config, cell: nn.Module, x: Tensor, paths: int) -> Tensor:
    """The gates that a cell has by the routing of the model."""
    return torch.ones(paths) if config.routing == "uniform" else router(cell.router, x)


def only_largest(gates: Tensor, value: float) -> Tensor:
    """`value` in the place of the largest gate, the first of equal ones; 0 elsewhere."""
    best = 0
    for j in range(len(gates)):
        if gates[j] > gates[best]:
            best = j
    return torch.tensor([value if j == best else 0.0 for j in range(len(gates))])


def route(space: nn.Module, x: Tensor, context: Tensor, guide: Tensor, config) -> tuple:
    """§6 for one pair: refined tokens [L, D] and the path vector."""
    xs, path = [x] * len(space.merge.cells), []
    for layer in space.layers:
        cells = list(layer.cells.items())
        e = [run_cell(n, c, x, context, guide, config) for (n, c), x in zip(cells, xs, strict=True)]
        gates = torch.stack(
            [router_of(config, c, x, len(cells)) for (_, c), x in zip(cells, xs, strict=True)], 1
        )
        mixed = []
        for k in range(len(cells)):
            total = gates[k].sum()
            shares = gates[k] / (total + 1e-8)
            if config.routing == "hard" and total > 0:
                shares = only_largest(shares, 1.0) + (shares - shares.detach())  # straight through
            out = sum(share * y for share, y in zip(shares, e, strict=True))
            mixed.append(out + relu(xs[0]) if total < 1e-4 else out)
            path.extend(shares)
        xs = mixed
    above, below = 0, 0
    last = list(space.merge.cells.values())
    gates = torch.stack([router_of(config, c, x, 1)[0] for c, x in zip(last, xs, strict=True)])
    kept = torch.ones_like(gates)
    if config.routing == "hard":
        kept = only_largest(gates, 1.0)
    for j, ((name, cell), x) in enumerate(zip(space.merge.cells.items(), xs, strict=True)):
        gate = gates[j] * kept[j]
        path.append(gate)
        dead = float(kept[j] > 0 and gate < 1e-4 / len(xs))
        above = above + gate * run_cell(name, cell, x, context, guide, config) + dead * x
        below = below + gate + dead
    return above / below, torch.stack(path)


def score(model: nn.Module, images, captions, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Scores [I, T] and path vectors [Q, C, K] of encoded images and captions, pair by pair."""
    i2t = model.config.direction == "i2t"
    query, context = (images, captions) if i2t else (captions, images)
    refined, paths = [], []
    for q in range(len(query)):
        for c in range(len(context)):
            real = lengths[c] if i2t else context.tokens.shape[1]
            z, path = route(
                model.space,
                *(query.tokens[q], context.tokens[c, :real], context.pooled[c]),
                model.config,
            )
            refined.append(z)
            paths.append(path)
    z = normalised(model.space.norm, torch.stack(refined))  # [Q*C, L, D]
    whole = [unit(pair.mean(0) + pair.amax(0)) for pair in z]  # whose gradient equal ones share
    scores = [w @ context.pooled[i % len(context)] for i, w in enumerate(whole)]
    shape = (len(query), len(context))
    scores = torch.stack(scores).view(shape)
    return scores if i2t else scores.T, torch.stack(paths).view(*shape, -1)


def normalised(norm: nn.BatchNorm1d, z: Tensor) -> Tensor:
    """Batch normalisation of tokens [..., D] over all that is before D."""
    flat = z.reshape(-1, z.shape[-1])
    mean, var = norm.running_mean, norm.running_var
    if norm.training:
        mean, var = flat.mean(0), flat.var(0, unbiased=False)
    return (z - mean) / torch.sqrt(var + 1e-5) * norm.weight + norm.bias


def triplet(scores: Tensor, pairs: int, margin: float, hardest: bool) -> float:
    """§7, violation by violation."""
    total = 0.0
    for b in range(pairs):
        own = float(scores[b, b])
        row = [margin + float(s) - own for i, s in enumerate(scores[b]) if i != b]
        column = [margin + float(s) - own for i, s in enumerate(scores[:, b]) if i != b]
        for costs in (row, column):
            costs = [max(0.0, cost) for cost in costs]
            total += max(costs, default=0.0) if hardest else sum(costs)
    return total


def text(encoder: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """§1, steps 2 to 5, for one caption's states [W, h]: words [W, D] and the sentence [D]."""
    words, width = hidden.shape
    grams = []
    for conv, (before, after) in zip(encoder.convs, ((0, 0), (0, 1), (1, 1)), strict=True):
        padded = torch.cat([torch.zeros(before, width), hidden, torch.zeros(after, width)])
        window = before + after + 1
        outputs = []
        for w in range(words):
            products = [conv.weight[:, :, k] @ padded[w + k] for k in range(window)]
            outputs.append(relu(sum(products) + conv.bias))
        grams.append(torch.stack(outputs))
    short = linear(encoder.fc, hidden)
    each = linear(encoder.mapping, torch.cat(grams, 1)) + short
    largest = torch.cat([gram.max(0).values for gram in grams])
    sentence = linear(encoder.mapping, largest) + short.mean(0)
    return torch.stack([unit(word) for word in each]), unit(sentence)
