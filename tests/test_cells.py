"""cells.py against loops over pairs, heads and tokens written from SPEC §5."""

from dataclasses import replace

import oracle
import pytest
import torch
from torch import Tensor

from cells import AFFINITY_NORMS, CellSizes
from common.config import CELLS, ModelConfig
from router import Modality

Q, C, L, M, D = 2, 3, 5, 7, 12
LENGTHS = [7, 4, 1]
SIZES = CellSizes(D, heads=3, hidden=11, router_hidden=6, affinity_norm="clipped_l2norm", smooth=4)


def context() -> Modality:
    mask = torch.arange(M) < torch.tensor(LENGTHS)[:, None]
    return Modality(torch.randn(C, M, D), torch.randn(C, D), mask)


def run(cell, x: Tensor, seen: Modality) -> Tensor:
    return cell(x, *cell.project_context(seen))


def expected(name: str, cell, x: Tensor, seen: Modality, norm: str = "clipped_l2norm") -> Tensor:
    config = ModelConfig(raw_feature_norm_CMRC=norm)
    pairs = [
        oracle.run_cell(name, cell, x[q, c], seen.tokens[c, : LENGTHS[c]], seen.pooled[c], config)
        for q in range(Q)
        for c in range(C)
    ]
    return torch.stack(pairs).view(Q, C, L, D)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_cell_equals_one_pair_at_a_time(name: str, layer: int) -> None:
    """At layer 0 the tokens do not depend on the context and C = 1 broadcasts."""
    cell, seen = SIZES.cell(name, 4), context()
    x = torch.randn(Q, C if layer else 1, L, D)
    refined, gates = run(cell, x, seen), cell.router(x)
    every = x.expand(Q, C, L, D)
    torch.testing.assert_close(refined.expand(Q, C, L, D), expected(name, cell, every, seen))
    assert gates.shape == (*x.shape[:2], 4)
    for q in range(Q):
        torch.testing.assert_close(gates[q, 0], oracle.router(cell.router, x[q, 0]))


@pytest.mark.parametrize("norm", AFFINITY_NORMS)
def test_every_affinity_norm(norm: str) -> None:
    cell = replace(SIZES, affinity_norm=norm).cell("cmrc", 4)
    seen, x = context(), torch.randn(Q, C, L, D)
    torch.testing.assert_close(run(cell, x, seen), expected("cmrc", cell, x, seen, norm))


@pytest.mark.parametrize("norm", AFFINITY_NORMS)
def test_affinities_of_nothing_have_finite_gradients(norm: str) -> None:
    cell = replace(SIZES, affinity_norm=norm).cell("cmrc", 4)
    x = torch.zeros(Q, C, L, D, requires_grad=True)
    cell(x, *cell.project_context(context())).sum().backward()
    assert x.grad.isfinite().all()


def test_context_padding_is_invisible() -> None:
    """To the one cell that reads the context's tokens."""
    cell, seen, x = SIZES.cell("cmrc", 4), context(), torch.randn(Q, C, L, D)
    noisy = replace(seen, tokens=torch.where(seen.mask[..., None], seen.tokens, 9.0))
    torch.testing.assert_close(run(cell, x, seen), cell(x, *cell.project_context(noisy)))


def test_the_guide_acts_by_its_sign_alone_and_gets_no_gradient() -> None:
    cell, seen, x = SIZES.cell("glgc", 4), context(), torch.randn(Q, C, L, D)
    scaled = replace(seen, pooled=(5 * seen.pooled).requires_grad_())
    refined = run(cell, x, scaled)
    torch.testing.assert_close(refined, run(cell, x, seen))
    refined.sum().backward()
    assert scaled.pooled.grad is None or not scaled.pooled.grad.any()


def test_query_key_and_value_start_as_equal_copies() -> None:
    layer = SIZES.cell("imrc", 4).qkv
    for part in (layer.weight, layer.bias):
        query, key, value = part.chunk(3)
        assert torch.equal(query, key) and torch.equal(key, value)
    assert not torch.equal(layer.weight[0], layer.weight[1])


@pytest.mark.parametrize("name", AFFINITY_NORMS)
def test_norms_sum_in_float32_whatever_the_precision(name: str) -> None:
    """A sum over 4,000 tokens kept in bfloat16 would stop growing at 256 of them."""
    affinity = (torch.rand(1, 1, 4000, 2) + 0.5).bfloat16()
    exact = AFFINITY_NORMS[name](affinity.float())
    rounded = AFFINITY_NORMS[name](affinity).float()
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)
