"""router.py: gates, dense layers and the merging layer against SPEC §4 and §6."""

import oracle
import pytest
import torch
from torch import Tensor, nn

from router import INACTIVE, Cell, MergeLayer, Modality, Router, RoutingLayer

CONTEXT = Modality(torch.zeros(3, 4, 5), torch.zeros(3, 5), torch.ones(3, 4, dtype=torch.bool))


class FixedCell(Cell):
    """A cell that adds a number to its input and has the gates that a test gives it."""

    def __init__(self, number: float, gates: Tensor) -> None:
        super().__init__(nn.Identity())
        self.router.register_forward_hook(lambda *_: gates)
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x + self.number


def test_gates_equal_the_equation_start_open_and_can_close() -> None:
    """They start at tanh(1.5), but for what the inner layer adds."""
    router = Router(5, 7, 3)
    assert (router.mlp[2].bias == 1.5).all()
    assert router(torch.zeros(1, 1, 6, 5)).min() > 0.8
    nn.init.zeros_(router.mlp[2].bias)
    x = 3 * torch.randn(2, 4, 6, 5)
    gates = router(x)
    for q in range(2):
        for c in range(4):
            torch.testing.assert_close(gates[q, c], oracle.router(router, x[q, c]))
    assert (gates == 0).any() and (gates > 0).any()


def routed(layer: RoutingLayer | MergeLayer, xs: list[Tensor]) -> tuple:
    return layer(xs, layer.project_context(CONTEXT))


@pytest.mark.parametrize("total", [0.0, 0.9 * INACTIVE, 1.1 * INACTIVE, 1.7])
def test_a_dense_layer_mixes_and_a_dead_path_carries_the_rectified_input(total: float) -> None:
    share = torch.tensor([0.7, 0.3])
    gates = [total * s * torch.ones(2, 3, 2) for s in share]
    gates[0][..., 1], gates[1][..., 1] = 0.25, 0.75  # out-path 1 is open in any case
    layer = RoutingLayer({"a": FixedCell(1, gates[0]), "b": FixedCell(2, gates[1])})
    xs = [torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 5)]
    (first, second), shares = routed(layer, xs)
    inactive = total < INACTIVE
    weights = total * share / (total + 1e-8)
    expected = weights[0] * (xs[0] + 1) + weights[1] * (xs[1] + 2) + inactive * xs[0].relu()
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, 0.25 * (xs[0] + 1) + 0.75 * (xs[1] + 2))
    torch.testing.assert_close(shares[..., 0, :], weights.expand(2, 3, 2))


@pytest.mark.parametrize("other", [0.0, 0.4])
@pytest.mark.parametrize("gate", [0.0, 0.9 * INACTIVE / 2, 1.1 * INACTIVE / 2, 0.8])
def test_the_last_layer_averages_and_a_dead_cell_passes_its_input_on(
    gate: float, other: float
) -> None:
    gates, dead = (gate, other), [float(g < INACTIVE / 2) for g in (gate, other)]
    cells = [FixedCell(k, torch.full((2, 3, 1), g)) for k, g in enumerate(gates, 1)]
    xs = [torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 5)]
    merged, raw = routed(MergeLayer(dict(zip("ab", cells, strict=True))), xs)
    above = sum(gates[k] * (xs[k] + k + 1) + dead[k] * xs[k] for k in range(2))
    torch.testing.assert_close(merged, above / (sum(gates) + sum(dead)))
    torch.testing.assert_close(raw[..., 0, :], torch.tensor(gates).expand(2, 3, 2))


def test_hard_routing_takes_one_cell_and_has_the_gradient_of_all() -> None:
    values = torch.rand(2, 3, 2, 2)
    values[0, 0, 0] = 0  # an inactive out-path
    values[0, 1, 1] = 0.5  # equal gates: the first cell
    results = []
    for hard in (False, True):
        gates = values.clone().requires_grad_()
        cells = {"a": FixedCell(1, gates[..., 0]), "b": FixedCell(2, gates[..., 1])}
        xs = [torch.ones(2, 3, 6, 5), 3 * torch.ones(2, 3, 6, 5)]
        mixed, shares = routed(RoutingLayer(cells, hard), xs)
        sum(k * path.sum() for k, path in enumerate(mixed, 1)).backward()
        results.append((torch.stack(mixed, 2), shares.detach(), gates.grad))
    (_, soft_shares, soft_gradient), (mixed, shares, gradient) = results
    expected = torch.nn.functional.one_hot(soft_shares.argmax(-1), 2).float()
    expected[0, 0, 0] = 0
    assert torch.equal(shares, expected) and expected[0, 1, 1].tolist() == [1, 0]
    outputs = 2 * expected[..., 0] + 5 * expected[..., 1]
    outputs[0, 0, 0] = 1  # the rectified input
    torch.testing.assert_close(mixed, outputs[..., None, None].expand_as(mixed))
    torch.testing.assert_close(gradient, soft_gradient)


def test_hard_merging_takes_the_largest_gate_divided_by_itself() -> None:
    gates = torch.tensor([[[[0.3, 0.6]], [[0.2, 0.2]], [[0.0, 0.0]]]])  # [1, 3, 1, 2]
    cells = {"a": FixedCell(1, gates[..., 0]), "b": FixedCell(2, gates[..., 1])}
    xs = [torch.ones(1, 3, 6, 5), 3 * torch.ones(1, 3, 6, 5)]
    merged, raw = routed(MergeLayer(cells, hard=True), xs)
    assert merged[0, :, 0, 0].tolist() == [5, 2, 1]  # b, the first of equal ones, its input
    torch.testing.assert_close(raw[0, :, 0], torch.tensor([[0, 0.6], [0.2, 0], [0, 0]]))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("kind", [RoutingLayer, MergeLayer])
def test_layers_compile_as_one_graph_and_mix_alike(kind: type, hard: bool) -> None:
    """A graph break would be a question to the device. Some paths and cells are inactive."""
    paths = 2 if kind is RoutingLayer else 1
    gates = (torch.randn(2, 2, 3, paths) + 0.5).relu()
    gates[:, 0, 0] = 0
    layer = kind({"a": FixedCell(1, gates[0]), "b": FixedCell(2, gates[1])}, hard)
    xs = [torch.randn(2, 1, 6, 5), torch.randn(2, 3, 6, 5)]
    expected = routed(layer, xs)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(routed(compiled, xs), expected)
