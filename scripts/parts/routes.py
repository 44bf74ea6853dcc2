"""routes.py — the routes of matching pairs: path vectors, attention, clusters, tables.

scripts/inspect_routes.py writes the tables, scripts/parts/route_figures.py draws.
"""

import csv
import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cells import CrossModalRefinement
from common.cli import progress
from common.files import write_text
from common.layout import CAPTIONS_PER_IMAGE
from data import Split
from evaluation import Encoded, evaluation_mode
from model import DIME
from router import CLOSED, EPSILON, Modality
from vocab import Vocabulary

log = logging.getLogger(__name__)

NEIGHBOURS = 10  # of a point in the graph that spectral clustering cuts
DIGITS = 6  # of a gate: smaller differences are rounding


@dataclass(frozen=True)
class Pairs:
    """The encoded images and captions of a split, and the model that routes them."""

    model: DIME
    split: Split
    vocabulary: Vocabulary
    encoded: Encoded

    @property
    def cells(self) -> list[str]:
        """The names of a layer's cells."""
        return [name.upper() for name in self.model.config.cell_names]

    def paths(self, images: int) -> Tensor:
        """Return path vectors `[pairs, K]` of the first images, each with its five captions."""
        vectors = []
        with progress("routing", images, "images") as bar:
            for image in range(images):
                first = image * CAPTIONS_PER_IMAGE
                vectors.append(self.route(image, range(first, first + CAPTIONS_PER_IMAGE)))
                bar.update()
        return torch.cat(vectors)

    def route(self, image: int, captions: Sequence[int]) -> Tensor:
        """Return path vectors `[captions, K]` of an image with some captions."""
        with evaluation_mode(self.model):
            _, paths = self.model.score(*self._modalities(image, captions), len(captions))
        return paths.flatten(0, 1).cpu()

    def layers(self, paths: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return gates and bypasses, both `[pairs, O, N]`, of each layer of path vectors."""
        gates = self.model.space.gates(paths)
        return [*zip(gates, bypasses(gates, self.model.config.routing == "hard"), strict=True)]

    def attention(self, image: int, caption: int) -> np.ndarray:
        """Return weights `[words, regions]` of the first layer's CMRC, without `[CLS]`, `[SEP]`.

        Only the first layer attends from the encoders' output, one token a region or word; deeper
        layers attend from mixtures. In i2t each region spreads a weight of 1 over the words,
        `[CLS]` and `[SEP]` included; in t2i each word spreads it over the regions.
        """
        images, captions = self._modalities(image, [caption])
        i2t = self.model.direction == "i2t"
        query, context = (images, captions) if i2t else (captions, images)
        cell = self.model.space.all_layers[0].cells["cmrc"]
        assert isinstance(cell, CrossModalRefinement)
        with evaluation_mode(self.model):
            tokens, mask, _ = cell.project_context(context)
            weights = cell.attention(query.tokens[:, None], tokens, mask)[0, 0]
        words = int(captions.mask.sum())
        return (weights.T if i2t else weights)[1 : words - 1].cpu().numpy()

    def words(self, caption: int) -> list[str]:
        """Return the WordPieces of a caption that the model reads, without `[CLS]` and `[SEP]`."""
        text = self.split.captions[caption]
        ids, mask = self.vocabulary.encode([text], self.model.config.max_words)
        return [self.vocabulary.entries[i] for i in ids[mask].tolist()][1:-1]

    def _modalities(self, image: int, captions: Sequence[int]) -> tuple[Modality, Modality]:
        device = next(self.model.parameters()).device
        text = torch.as_tensor(self.encoded.text[list(captions)])
        images = self.encoded.images[torch.tensor([image])]
        return images.to(device), self.encoded.captions[text].to(device)


def bypasses(gates: Sequence[Tensor], hard: bool) -> list[Tensor]:
    """Return which cells' inputs bypass closed cells (SPEC §6), `[pairs, O, N]` a layer, 0 or 1.

    A path whose gates are all closed carries the first cell's input, rectified. In the last layer
    the input of a closed cell counts with a weight of 1; with `hard` routing only the chosen cell's
    does. Path vectors hold normalised gates, hence the normalised threshold of the dense layers.
    """
    *dense, last = gates
    count = last.shape[-1]
    weights = []
    for layer in dense:
        dead = layer.sum(-1, keepdim=True) < CLOSED / (CLOSED + EPSILON)
        weights.append(F.pad(dead.float(), (0, count - 1)))
    closed = last < CLOSED / count
    if hard:
        closed &= F.one_hot(last.argmax(-1), count).bool()
    return [*weights, closed.float()]


@dataclass(frozen=True)
class Clusters:
    """Path vectors in a plane and in clusters."""

    points: np.ndarray  # [pairs, 2]
    labels: np.ndarray  # [pairs] from 0

    def central_pairs(self, paths: Tensor) -> list[int]:
        """Return the pair of each cluster that is the closest to the cluster's mean."""
        members = [np.flatnonzero(self.labels == label) for label in np.unique(self.labels)]
        return [int(m[(paths[m] - paths[m].mean(0)).norm(dim=-1).argmin()]) for m in members]


def cluster(paths: Tensor, count: int) -> Clusters | None:
    """Return t-SNE and spectral clusters of path vectors `[pairs, K]`; None if too few differ."""
    from sklearn.cluster import SpectralClustering
    from sklearn.manifold import TSNE

    # Pairs with the same route are one point, otherwise they would be each other's neighbours.
    vectors, same = np.unique(paths.double().numpy().round(DIGITS), axis=0, return_inverse=True)
    if len(vectors) < count + 2:
        log.warning("no clusters: there are only %d different path vectors", len(vectors))
        return None
    neighbours = min(NEIGHBOURS, len(vectors) - 1)
    spectral = SpectralClustering(
        count, affinity="nearest_neighbors", n_neighbors=neighbours, random_state=0
    )
    with warnings.catch_warnings():  # of separate parts, which are good clusters
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        labels = spectral.fit_predict(vectors)
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    init = "pca" if vectors.shape[1] > 1 else "random"  # one number has no second component
    points = TSNE(2, perplexity=perplexity, init=init, random_state=0).fit_transform(vectors)
    same = same.reshape(-1)  # numpy 2.0 returns a second axis
    return Clusters(points[same], labels[same])


def write_tables(pairs: Pairs, paths: Tensor, clusters: Clusters | None, out: Path) -> None:
    """Write gates.csv and routes.csv."""
    means: list[list[object]] = []
    layers = pairs.layers(paths)
    for layer, (gates, bypass) in enumerate(layers, 1):
        for o, target in enumerate(pairs.cells if layer < len(layers) else ["score"]):
            for n, cell in enumerate(pairs.cells):
                parts = gates[:, o, n], (gates[:, o, n] == 0).float(), bypass[:, o, n]
                means.append([layer, target, cell, *_rounded([part.mean() for part in parts])])
    head = ["layer", "path", "cell", "mean gate", "share closed", "share bypassed"]
    _write_csv(out / "gates.csv", head, means)
    columns = [f"{layer} {cell}>{target}" for layer, target, cell, *_ in means]
    head = ["image", "caption", "text", *columns, *(["cluster", "x", "y"] if clusters else [])]
    rows: list[list[object]] = []
    for k, vector in enumerate(paths):
        rows.append([k // CAPTIONS_PER_IMAGE, k, pairs.split.captions[k], *_rounded(vector)])
        if clusters:
            rows[-1] += [int(clusters.labels[k]), *_rounded(clusters.points[k])]
    _write_csv(out / "routes.csv", head, rows)


def _rounded(numbers: Sequence | Tensor | np.ndarray) -> list[float]:
    return [round(float(number), DIGITS) for number in numbers]


def _write_csv(path: Path, head: list[str], rows: list[list]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    write_text(path, text.getvalue())
