"""model.py — the DIME model (SPEC §1-§3, §6, §7): encoders, routing space, score and losses.

One code path for both directions: the modality whose tokens are refined is the query, the other
the context; `DIME.score` swaps them in one place. Knows nothing of files or metrics. The axes are
those of `router.py`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cells import CellSizes
from common.config import Direction, ModelConfig, Precision
from router import Modality
from space import RoutingSpace

WINDOWS = (1, 2, 3)  # widths of the text convolutions, in words
WORD_BUCKET = 8  # a context is trimmed to a multiple of it, so that few shapes occur


class ImageEncoder(nn.Module):
    """Precomputed region features as tokens, their mean as the whole image (§2)."""

    def __init__(
        self, img_dim: int, dim: int, batch_norm: bool, unit: bool = True, use_abs: bool = False
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(img_dim, dim)
        bound = math.sqrt(6 / (img_dim + dim))
        nn.init.uniform_(self.fc.weight, -bound, bound)
        nn.init.zeros_(self.fc.bias)
        self.norm = nn.BatchNorm1d(dim) if batch_norm else nn.Identity()
        self.unit, self.use_abs = unit, use_abs

    def forward(self, regions: Tensor) -> Modality:
        """Features `[I, L, img_dim]` as tokens `[I, L, D]` and images `[I, D]`."""
        tokens = self.fc(regions).float()
        pooled = self.norm(tokens.mean(1))
        if self.unit:
            pooled = F.normalize(pooled, dim=-1)
        if self.use_abs:
            pooled = pooled.abs()
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Modality(F.normalize(tokens, dim=-1), pooled, mask)


class TextEncoder(nn.Module):
    """Frozen BERT, then convolutions over words and a shortcut around them (§1).

    `bert` maps (ids, mask) to hidden states, as `transformers.BertModel` does.
    """

    def __init__(self, bert: nn.Module, dim: int) -> None:
        super().__init__()
        self.bert = bert.requires_grad_(False)
        hidden = bert.config.hidden_size
        self.convs = nn.ModuleList(nn.Conv1d(hidden, dim, window) for window in WINDOWS)
        self.mapping = nn.Linear(len(WINDOWS) * dim, dim)
        self.fc = nn.Linear(hidden, dim)

    @torch.no_grad()
    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """BERT's last hidden states `[T, M, hidden]`, its dropout on in training mode."""
        # REFERENCE: BERT is frozen, yet its dropout stays on while the rest trains.
        return self.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()

    def forward(self, hidden: Tensor, mask: Tensor) -> Modality:
        """States `[T, M, hidden]` as words `[T, M, D]` and sentences `[T, D]`."""
        # REFERENCE: padded positions take part in the convolutions, the mean and the maxima.
        grams = torch.cat([self._convolve(conv, hidden) for conv in self.convs], 1)  # [T, 3D, M]
        short = self.fc(hidden)  # [T, M, D]
        words = self.mapping(grams.mT).float() + short.float()
        sentences = self.mapping(grams.amax(-1)).float() + short.mean(1, dtype=torch.float32)
        return Modality(F.normalize(words, dim=-1), F.normalize(sentences, dim=-1), mask)

    @staticmethod
    def _convolve(conv: nn.Conv1d, hidden: Tensor) -> Tensor:
        window = conv.kernel_size[0]
        before = (window - 1) // 2  # windows 1, 2, 3 pad 0+0, 0+1 and 1+1 rows
        return conv(F.pad(hidden.mT, (before, window - 1 - before))).relu()  # [T, D, M]


@dataclass(frozen=True)
class Output:
    """What a training batch gives."""

    scores: Tensor  # [I, T], the first pairs on the diagonal
    paths: Tensor  # [pairs, PATH_SIZE] path embeddings, unit length
    meanings: Tensor  # [pairs, hidden] sentence targets of the path regulariser, unit length


class DIME(nn.Module):
    """Two encoders and a routing space between them (SIGIR 2021), for one direction."""

    def __init__(self, config: ModelConfig, bert: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.image = ImageEncoder(
            config.img_dim,
            config.embed_size,
            batch_norm=config.direction == "t2i",
            unit=not config.no_imgnorm,
            use_abs=config.use_abs,
        )
        self.text = TextEncoder(bert, config.embed_size)
        sizes = CellSizes(
            dim=config.embed_size,
            heads=config.num_head_IMRC,
            hidden=config.hid_IMRC,
            router_hidden=config.hid_router,
            affinity_norm=config.raw_feature_norm_CMRC,
            smooth=config.lambda_softmax_CMRC,
            routing=config.routing,
        )
        self.space = RoutingSpace(sizes, config.num_layer_routing, config.cell_names)
        self.precision: Precision = "fp32"

    @property
    def direction(self) -> Direction:
        """Which modality is refined."""
        return self.config.direction

    def compile_where_it_pays(self, choice: bool | None, pairs: int) -> None:
        """Compile the routing if `choice` is so, or if it is left open and `pairs` are many."""
        self.space.compile_where_it_pays(choice, pairs, self.precision)

    def closed(self, paths: Tensor) -> Tensor:
        """How many pairs have all gates of a cell closed, `[layers, cells]`."""
        return self.space.closed(paths)

    def encode_images(self, regions: Tensor) -> Modality:
        """Region features `[I, L, img_dim]`, encoded."""
        with self.autocast(regions):
            return self.image(regions)

    def encode_captions(self, ids: Tensor, mask: Tensor) -> Modality:
        """Captions as ids and mask `[T, M]`, encoded."""
        with self.autocast(ids):
            return self.text(self.text.read(ids, mask), mask)

    def score(
        self, images: Modality, captions: Modality, pairs: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores `[I, T]` and path vectors `[Q, C, K]` of all pairs, about `pairs` at a time."""
        if self.config.direction == "i2t":
            return self._pair(images, _trim(captions), pairs)
        # REFERENCE: in t2i every word position counts, padding too, so nothing is trimmed.
        scores, paths = self._pair(captions, images, pairs)
        return scores.T, paths

    def forward(
        self, regions: Tensor, ids: Tensor, mask: Tensor, pairs: int, states: Tensor | None = None
    ) -> Output:
        """A training batch, whose first `pairs` images and captions match one to one.

        Further captions (i2t) or images (t2i) are negatives only; the modality that is refined
        has none, so there is one path embedding a pair. `states` are BERT's, where they are known.
        """
        assert pairs <= min(len(regions), len(ids)) and ids.shape == mask.shape
        with self.autocast(ids):
            hidden = self.text.read(ids, mask) if states is None else states
            captions = self.text(hidden, mask)
        scores, paths = self.score(self.encode_images(regions), captions)
        meanings = F.normalize(hidden[:pairs].mean(1), dim=-1)
        return Output(scores, self.space.embed_paths(paths), meanings)

    def _pair(self, query: Modality, context: Modality, pairs: int | None) -> tuple[Tensor, Tensor]:
        with self.autocast(query.tokens):
            if self.precision == "bf16":
                query = Modality(query.tokens.bfloat16(), query.pooled, query.mask)
            return self.space(query, context, pairs)

    def autocast(self, example: Tensor) -> torch.autocast:
        """The precision of products, on the device of an example."""
        return torch.autocast(example.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def _trim(captions: Modality) -> Modality:
    """Captions without the positions that none of them uses; masked positions never count."""
    longest = int(captions.mask.sum(1).max())
    width = min(captions.mask.shape[1], -(-longest // WORD_BUCKET) * WORD_BUCKET)
    return Modality(captions.tokens[:, :width], captions.pooled, captions.mask[:, :width])


def triplet_loss(scores: Tensor, pairs: int, margin: float, hardest: bool = True) -> Tensor:
    """Hinge loss both ways (§7) on scores `[I, T]`, summed over the matching pairs.

    Pair b is (b, b) for b < pairs; further rows or columns are negatives only. `hardest` takes
    the largest violation of a row or column, else all of them are summed.
    """
    matching = torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)
    own = scores.diagonal()[:pairs]
    cost = (margin + scores).masked_fill(matching, -torch.inf)
    captions = (cost[:pairs] - own[:, None]).relu()  # [pairs, T]
    images = (cost[:, :pairs] - own).relu()  # [I, pairs]
    if hardest:
        return captions.amax(1).sum() + images.amax(0).sum()
    return captions.sum() + images.sum()


def path_loss(paths: Tensor, meanings: Tensor, batch_size: int) -> Tensor:
    """Path regulariser (§7): what means the same should take the same path.

    `paths` and `meanings` are `[pairs, …]` of unit length.
    """
    gap = paths @ paths.T - meanings @ meanings.T
    # REFERENCE: divided by the option, also for a smaller last batch.
    return gap.square().sum() / batch_size
