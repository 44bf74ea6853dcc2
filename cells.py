"""cells.py — the four interaction cells of DIME (SPEC §5): RIC, GLGC, IMRC, CMRC.

A cell refines query tokens `[Q, C, L, D]`, given its projections of the contexts. It knows nothing
of the layer it sits in, of direction or of loss. The axes are those of `router.py`: C = 1 if
nothing depends on the context yet, and broadcasting does the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import AffinityNorm, Routing
from router import Cell, Modality, Router, UniformRouter

LEAK = 0.1  # slope of the leaky ReLU in the affinities, as in SCAN
NO_LENGTH = 1e-12  # a shorter vector is divided by this, as in `F.normalize`
NO_SUM = 1e-8  # added to the divisor of l1norm and l2norm


class RectifiedIdentity(Cell):
    """RIC (§5.0), rectified identity: `relu(x)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


class GlobalLocalGuidance(Cell):
    """GLGC (§5.1): the whole of the other modality, u, guides each token.

    `(1 + norm_L(fc(x) * u)) * x`
    """

    def __init__(self, dim: int, router: nn.Module) -> None:
        super().__init__(router)
        self.fc = nn.Linear(dim, dim)

    def project_context(self, context: Modality) -> tuple[Tensor, ...]:
        return (context.pooled.sign()[None, :, None, :],)  # [1, C, 1, D]

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        # REFERENCE: norm_L(fc(x) * guide), over tokens and not over channels. The guide u is
        # constant along L, so norm_L(fc(x) u) = u / |u| norm_L(fc(x)) = sign(u) norm_L(fc(x)): only
        # its sign acts, no gradient reaches it, and the norm needs no product for each pair.
        x = x.contiguous()  # one call then multiplies and adds the bias
        scaled = self.fc(x)
        scale = guide.to(x.dtype) * _inverse_length(scaled)  # [Q, C, 1, D]
        return torch.addcmul(x, scaled * scale, x)  # (1 + guide * unit) * x


class IntraModalReasoning(Cell):
    """IMRC (§5.2): self-attention among the tokens, then a feed-forward layer.

    `y = x + MHA(x)`, `y + fc2(relu(fc1(y)))`
    """

    def __init__(self, dim: int, heads: int, hidden: int, router: nn.Module) -> None:
        super().__init__(router)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)  # query, key and value in one product
        start = nn.Linear(dim, dim)
        # REFERENCE: query, key and value start as equal copies of one layer.
        self.qkv.weight.data = start.weight.data.repeat(3, 1)
        self.qkv.bias.data = start.bias.data.repeat(3)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        # Adding in place to tensors that no gradient needs saves a pass through memory.
        x = x.contiguous()
        y = self._attend(x).add_(x)
        return self.fc2(self.fc1(y).relu_()).add_(y)

    def _attend(self, x: Tensor) -> Tensor:
        # Two batched products: with 16 channels a head, `scaled_dot_product_attention` is slower
        # on a CPU.
        # REFERENCE: no mask (padded words attend and are attended to), no output projection.
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [Q, C, L, 3, H, D/H]
        query, key, value = split.movedim(-3, 0).transpose(-3, -2)  # each [Q, C, H, L, D/H]
        scale = query.shape[-1] ** -0.5
        affinity = (query * scale) @ key.transpose(-2, -1)  # [Q, C, H, L, L]
        return (_softmax(affinity) @ value).transpose(-3, -2).flatten(-2)  # [Q, C, L, D]


class CrossModalRefinement(Cell):
    """CMRC (§5.3): each token attends to the tokens c of the other modality, which refine it.

    `a = softmax_M(smooth * norm(x c^T)) c`, `x + fc2(relu(fc1(x * tanh(scale(a)) + shift(a))))`
    """

    def __init__(self, dim: int, norm: AffinityNorm, smooth: float, router: nn.Module) -> None:
        super().__init__(router)
        self.norm = AFFINITY_NORMS[norm]
        self.smooth = smooth
        self.scale_shift = nn.Linear(dim, 2 * dim)
        self.fc1 = nn.Linear(dim, dim)
        self.fc2 = nn.Linear(dim, dim)

    def project_context(self, context: Modality) -> tuple[Tensor, ...]:
        # The attention weights P sum to one, so Linear(P c) = P Linear(c): a context is projected
        # once, and not once for each query.
        projected = self.scale_shift(context.tokens)  # [C, M, 2D]
        return context.tokens, context.mask[None, :, None, :], projected

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor, projected: Tensor) -> Tensor:
        # A product for each context, with the tokens of all queries: one for each pair would
        # copy the context for every query, and then add up its gradients.
        weights = self.attention(x, tokens, mask)  # [Q, C, L, M]
        attended = torch.einsum("qclm,cmd->qcld", weights, projected)  # [Q, C, L, 2D]
        scale, shift = attended.chunk(2, -1)  # [Q, C, L, D] each
        # x tanh(scale) + shift, by tanh(s) = 1 - 2 sigmoid(-2s): on a CPU `tanh` is slower than
        # `sigmoid`. In float32, because a sigmoid near 1/2 in bfloat16 loses a small tanh.
        sigmoid = (-2 * scale.float()).sigmoid_()
        modulated = torch.addcmul(x + shift.float(), x, sigmoid, value=-2)
        modulated = modulated.contiguous()  # `attended` lies in memory as [C, Q, L, 2D]
        return self.fc2(self.fc1(modulated).relu_()).add_(x)

    def attention(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return attention weights `[Q, C, L, M]` over the context tokens, 0 on masked ones."""
        affinity = self.norm(torch.einsum("qcld,cmd->qclm", x, tokens.to(x.dtype)))
        return _softmax((self.smooth * affinity).masked_fill(~mask, -torch.inf))


def _softmax(x: Tensor) -> Tensor:
    """Return the softmax over the last axis, in the type of `x`."""
    # It adds in float32 in any case. Without `dtype`, autocast on a GPU would copy `x` to float32
    # and the weights back.
    return x.softmax(-1, dtype=x.dtype)


def _unit_over_tokens(x: Tensor) -> Tensor:
    """Return `x` with unit length along the token axis L."""
    return x * _inverse_length(x)


def _inverse_length(x: Tensor) -> Tensor:
    """Return 1 / length of `x` along the token axis L; the sum of squares is in float32."""
    squares = x.float().square().sum(-2, keepdim=True)
    return squares.clamp_min(NO_LENGTH**2).rsqrt().to(x.dtype)


# DEVIATION: l1norm and clipped_l1norm work (they crashed in the published code).
def _over_sum(x: Tensor) -> Tensor:
    total = x.float().abs().sum(-2, keepdim=True)
    return x / (total + NO_SUM).to(x.dtype)


def _over_length(x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x.float(), dim=-2, keepdim=True)
    return x / (length + NO_SUM).to(x.dtype)


def _clip(x: Tensor) -> Tensor:
    return F.leaky_relu(x, LEAK)


# `raw_feature_norm_CMRC`: each normalises over the query tokens L, for every context token.
AFFINITY_NORMS: dict[AffinityNorm, Callable[[Tensor], Tensor]] = {
    "clipped_l2norm": lambda a: _unit_over_tokens(_clip(a)),
    "l2norm": _over_length,
    "l1norm": _over_sum,
    "clipped_l1norm": lambda a: _over_sum(_clip(a)),
    "clipped": _clip,
    "softmax": lambda a: a.softmax(-2),
    "no_norm": lambda a: a,
}


@dataclass(frozen=True)
class CellSizes:
    """The sizes and options that the cells of every layer share."""

    dim: int  # D
    heads: int  # H of IMRC
    hidden: int  # inner width of IMRC
    router_hidden: int
    affinity_norm: AffinityNorm
    smooth: float  # inverse temperature of CMRC's attention (lambda_softmax)
    routing: Routing = "soft"

    def cell(self, name: str, paths: int) -> Cell:
        """Return a new cell with a router for `paths` out-paths."""
        router: nn.Module
        if self.routing == "uniform":
            router = UniformRouter(paths)
        else:
            router = Router(self.dim, self.router_hidden, paths)
        if name == "ric":
            return RectifiedIdentity(router)
        if name == "glgc":
            return GlobalLocalGuidance(self.dim, router)
        if name == "imrc":
            return IntraModalReasoning(self.dim, self.heads, self.hidden, router)
        return CrossModalRefinement(self.dim, self.affinity_norm, self.smooth, router)
