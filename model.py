"""model.py — the DIME model (SPEC §1-§3, §7): encoders, routing space, score and losses.

One code path serves both directions: the modality whose tokens are refined is the query, the other
is the context, and `DIME.score` swaps them in one place. It knows nothing of files or metrics. The
axes are those of `router.py`.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertModel

from cells import CellSizes
from common.compile import compiling_pays, needs_fixed_shapes
from common.config import Direction, ModelConfig, Precision
from common.distributed import Rows, SharedBatch
from common.precision import product_precision
from router import PATH_SIZE, Modality, RoutingSpace

log = logging.getLogger(__name__)

WINDOWS = (1, 2, 3)  # widths of the text convolutions, in words
WORD_BUCKET = 8  # a context is trimmed to a multiple of it, so that few shapes occur
# Added to the affinity of a padded word. Below it, bfloat16 has only -inf, and a softmax over
# nothing but -inf is NaN.
MASKED = torch.finfo(torch.bfloat16).min


class ImageEncoder(nn.Module):
    """Region features as tokens, their mean as the whole image (§2)."""

    def __init__(
        self, img_dim: int, dim: int, batch_norm: bool, unit: bool = True, use_abs: bool = False
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(img_dim, dim)
        bound = math.sqrt(6 / (img_dim + dim))
        nn.init.uniform_(self.fc.weight, -bound, bound)
        nn.init.zeros_(self.fc.bias)
        # REFERENCE: only t2i normalises the mean of the regions by batch statistics.
        self.norm = nn.BatchNorm1d(dim) if batch_norm else nn.Identity()
        self.unit, self.use_abs = unit, use_abs

    def forward(self, regions: Tensor) -> Modality:
        """Encode features `[I, L, img_dim]`: tokens `[I, L, D]`, pooled `[I, D]`, a full mask."""
        return self.pool(self.embed(regions))

    def embed(self, regions: Tensor) -> Modality:
        """Return tokens of unit length, their mean before the batch normalisation, a full mask."""
        tokens = self.fc(regions).float()
        mean = tokens.mean(1)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Modality(F.normalize(tokens, dim=-1), mean, mask)

    def pool(self, images: Modality) -> Modality:
        """Return the images with pooled vectors; a batch normalisation has to see all of them."""
        pooled = self.norm(images.pooled)
        if self.unit:
            pooled = F.normalize(pooled, dim=-1)
        if self.use_abs:
            pooled = pooled.abs()
        return replace(images, pooled=pooled)


class TextEncoder(nn.Module):
    """Frozen BERT, then convolutions over words and a shortcut around them (§1)."""

    def __init__(self, bert: BertModel, dim: int) -> None:
        super().__init__()
        self.bert = bert
        self.bert.requires_grad_(False)
        hidden = bert.config.hidden_size
        self.convs = nn.ModuleList(nn.Conv1d(hidden, dim, window) for window in WINDOWS)
        self.mapping = nn.Linear(len(WINDOWS) * dim, dim)
        self.fc = nn.Linear(hidden, dim)

    @torch.no_grad()
    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return BERT's last hidden states `[T, M, hidden]` of ids and mask `[T, M]`."""
        # REFERENCE: BERT is frozen, yet its dropout stays on while the rest trains.
        # `BertModel.forward` asks whether any word is padded, and a GPU must finish all its work
        # before the answer. The encoder takes a mask `[T, 1, M, M]` as it is.
        added = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, MASKED)
        added = added[:, None, None].expand(-1, -1, mask.shape[1], -1)
        words = self.bert.embeddings(input_ids=ids)
        return self.bert.encoder(words, attention_mask=added).last_hidden_state.float()

    def forward(self, hidden: Tensor, mask: Tensor) -> Modality:
        """Encode hidden states `[T, M, hidden]`: words `[T, M, D]` and sentences `[T, D]`."""
        # REFERENCE: padded positions take part in the convolutions, the mean and the maxima.
        grams = torch.cat(
            [
                self._convolve(conv, window, hidden)
                for conv, window in zip(self.convs, WINDOWS, strict=True)
            ],
            1,
        )  # [T, 3D, M]
        short = self.fc(hidden)  # [T, M, D]
        words = self.mapping(grams.mT).float() + short.float()
        sentences = self.mapping(grams.amax(-1)).float() + short.mean(1, dtype=torch.float32)
        return Modality(F.normalize(words, dim=-1), F.normalize(sentences, dim=-1), mask)

    @staticmethod
    def _convolve(conv: nn.Module, window: int, hidden: Tensor) -> Tensor:
        before = (window - 1) // 2  # windows 1, 2, 3 pad 0 + 0, 0 + 1 and 1 + 1 rows of zeros
        return conv(F.pad(hidden.mT, (before, window - 1 - before))).relu()  # [T, D, M]


@dataclass(frozen=True)
class Output:
    """The model's output for a training batch."""

    scores: Tensor  # [I, T], the first pairs on the diagonal
    # Of the path regulariser: a row for each pair, or no row if there is no routing space.
    paths: Tensor  # [pairs, PATH_SIZE] path embeddings, unit length
    sentence_targets: Tensor  # [pairs, hidden] means of BERT's hidden states, unit length


class DIME(nn.Module):
    """Two encoders and a routing space between them (SIGIR 2021), for one direction.

    With `num_layer_routing` 0 there is no routing space: the score of a pair is the product of its
    pooled vectors.
    """

    def __init__(self, config: ModelConfig, bert: BertModel) -> None:
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
        self.space = _new_space(config) if config.num_layer_routing else None
        self.precision: Precision = "fp32"

    @property
    def direction(self) -> Direction:
        """The modality that is refined."""
        return self.config.direction

    def compile_if_it_pays(self, choice: bool | None, pairs: int) -> None:
        """Compile the routing if `choice` is true, or if it is None and `pairs` are many enough."""
        if self.space is None:
            return
        if choice is None:
            device = self.space.norm.weight.device.type
            choice = compiling_pays(device, self.precision, pairs)
        if choice:
            log.info("compiling the routing: a minute or two (--no-compile avoids it)")
            self.space.compile_routes()

    @property
    def is_compiled(self) -> bool:
        """Whether the routing is compiled (or will be at its first use)."""
        return self.space is not None and self.space.is_compiled

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluate within: no dropout, no gradients, the precision. Afterwards restore all."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad(), product_precision(self.precision):
                yield
        finally:
            self.train(training)

    def encode_images(self, regions: Tensor) -> Modality:
        """Encode region features `[I, L, img_dim]`."""
        with self.autocast(regions):
            return self.image(regions)

    def encode_captions(self, ids: Tensor, mask: Tensor) -> Modality:
        """Encode captions, given as ids and mask `[T, M]`."""
        with self.autocast(ids):
            return self.text(self.text.read(ids, mask), mask)

    def score(
        self,
        images: Modality,
        captions: Modality,
        pairs: int | None = None,
        rows: Rows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return scores `[I, T]` and path vectors `[Q, C, K]` of all pairs.

        About `pairs` pairs are routed at a time (default: the device's chunk size). If the queries
        are one process's share, `rows`, the scores of all are gathered; path vectors are not.
        """
        if self.config.direction == "i2t":
            return self._pair(images, _trim(captions), pairs, rows)
        # REFERENCE: in t2i every word position counts, padding too, so nothing is trimmed.
        scores, paths = self._pair(captions, images, pairs, rows)
        return scores.T, paths

    def gates(self, images: Modality, captions: Modality, pairs: int | None = None) -> Tensor:
        """Return the gates `[I, T, P, N]` of all pairs; `pairs` is that of `score`.

        Layer by layer there are P paths, one to each cell of the next layer or, at last, to the
        score; each comes from the N cells of its layer.
        """
        assert self.space is not None
        _, paths = self.score(images, captions, pairs)  # [Q, C, K]
        paths = paths if self.direction == "i2t" else paths.transpose(0, 1)  # [I, T, K]
        return paths.unflatten(-1, (-1, len(self.config.cell_names)))

    def forward(
        self,
        regions: Tensor,
        ids: Tensor,
        mask: Tensor,
        pairs: int,
        hidden_states: Tensor | None = None,
        shared: SharedBatch | None = None,
    ) -> Output:
        """Return scores, path embeddings and targets of a training batch.

        The first `pairs` images and captions match one to one. Further captions (i2t) or images
        (t2i) are negatives only; the refined modality has none, so each pair has one path
        embedding. `hidden_states` replace BERT's if they are already known. If the batch is
        `shared`, the input is one process's share, and the output is that of the whole batch.
        """
        assert pairs <= min(len(regions), len(ids)) or shared is not None
        assert ids.shape == mask.shape
        with self.autocast(ids):
            hidden = self.text.read(ids, mask) if hidden_states is None else hidden_states
            captions = self.text(hidden, mask)
            images = self.image.embed(regions)
        if shared is not None:
            images, captions = self._gather_contexts(images, captions, shared.contexts)
        rows = shared.queries if shared is not None else None
        scores, paths = self.score(self.image.pool(images), captions, rows=rows)
        if self.space is None:
            return Output(scores, scores.new_empty(0, PATH_SIZE), hidden[:0, 0])
        targets = F.normalize(hidden[: len(paths)].mean(1), dim=-1)
        embedded = self.space.embed_paths(paths)
        if rows is not None:
            embedded, targets = rows.gather(embedded), rows.gather(targets)
        return Output(scores, embedded, targets)

    def _gather_contexts(
        self, images: Modality, captions: Modality, rows: Rows
    ) -> tuple[Modality, Modality]:
        """Return images and captions; the side that is the context with those of all processes."""
        if self.config.direction == "i2t":
            return images, captions.map(rows.gather)
        return images.map(rows.gather), captions

    def _pair(
        self, query: Modality, context: Modality, pairs: int | None, rows: Rows | None
    ) -> tuple[Tensor, Tensor]:
        """Return scores `[Q, C]`, gathered if there are `rows`, and path vectors `[Q, C, K]`."""
        if self.space is None:
            scores = query.pooled @ context.pooled.T  # [Q, C]
            paths = scores.new_empty(*scores.shape, 0)
        else:
            with self.autocast(query.tokens):
                if self.precision == "bf16":
                    query = Modality(query.tokens.bfloat16(), query.pooled, query.mask)
                scores, paths = self.space(query, context, pairs, rows)
        return scores if rows is None else rows.gather(scores), paths

    def autocast(self, example: Tensor) -> torch.autocast:
        """Return the autocast context of the model's precision, on the device of `example`."""
        return torch.autocast(example.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def _new_space(config: ModelConfig) -> RoutingSpace:
    sizes = CellSizes(
        dim=config.embed_size,
        heads=config.num_head_IMRC,
        hidden=config.hid_IMRC,
        router_hidden=config.hid_router,
        affinity_norm=config.raw_feature_norm_CMRC,
        smooth=config.lambda_softmax_CMRC,
        routing=config.routing,
    )
    return RoutingSpace(
        config.embed_size,
        config.cell_names,
        config.num_layer_routing,
        sizes.cell,
        hard=config.routing == "hard",
    )


def _trim(captions: Modality) -> Modality:
    """Return the captions without the positions that no caption uses, unless shapes are fixed.

    Masked positions of a context have no influence on scores (SPEC §5.3), so this saves time only.
    """
    if needs_fixed_shapes(captions.mask.device):
        return captions
    longest = int(captions.mask.sum(1).max())
    width = min(captions.mask.shape[1], -(-longest // WORD_BUCKET) * WORD_BUCKET)
    return Modality(captions.tokens[:, :width], captions.pooled, captions.mask[:, :width])


def triplet_loss(scores: Tensor, pairs: int, margin: float, hardest: bool = True) -> Tensor:
    """Return the hinge loss in both directions (§7) of scores `[I, T]`, summed over the pairs.

    Pair b is (b, b) for b < pairs; further rows or columns are negatives only. `hardest` takes the
    largest violation of each row and column, otherwise all of them are summed.
    """
    matching = torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)
    own = scores.diagonal()[:pairs]
    cost = (margin + scores).masked_fill(matching, -torch.inf)
    captions = (cost[:pairs] - own[:, None]).relu()  # [pairs, T]
    images = (cost[:, :pairs] - own).relu()  # [I, pairs]
    if hardest:
        return captions.amax(1).sum() + images.amax(0).sum()
    return captions.sum() + images.sum()


def path_loss(paths: Tensor, sentence_targets: Tensor, batch_size: int) -> Tensor:
    """Return the path regulariser (§7): sentences of similar meaning should take similar paths.

    `paths` and `sentence_targets` are `[pairs, …]`, of unit length.
    """
    gap = paths @ paths.T - sentence_targets @ sentence_targets.T
    # REFERENCE: divided by the option, also for a smaller last batch.
    return gap.square().sum() / batch_size
