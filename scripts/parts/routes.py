"""routes.py — the routes of matching pairs: path vectors, attention, clusters, tables.

scripts/inspect_routes.py writes the tables, scripts/parts/route_figures.py draws.
"""

import csv
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
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

    def gates(self, paths: Tensor) -> list[Tensor]:
        """Return the gates `[pairs, O, N]` of each layer in path vectors `[pairs, K]`."""
        return self.model.space.gates(paths)

    def bypasses(self, paths: Tensor) -> list[Tensor]:
        """Return the weights `[pairs, O, N]` of inputs that bypass closed cells, see `bypasses`."""
        return bypasses(self.gates(paths), self.model.config.routing == "hard")

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

    def title(self, image: int, caption: int) -> str:
        """Return the title of a pair in a drawing."""
        return f"image {image}, caption {caption}: {self.split.captions[caption]}"

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


def entropies(weights: Tensor) -> Tensor:
    """Return how evenly cells share each path, in bits, of weights `[pairs, O, N]`.

    0 is one cell alone (or none), 2 is four cells alike.
    """
    shares = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return torch.special.entr(shares).sum(-1) / np.log(2)


def most_different(paths: Tensor, count: int) -> list[int]:
    """Return up to `count` pairs whose path vectors `[pairs, K]` lie far apart, none alike.

    The first is the farthest from the mean, each further one the farthest from those before it.
    """
    chosen = [int((paths - paths.mean(0)).norm(dim=-1).argmax())]
    distance = (paths - paths[chosen[0]]).norm(dim=-1)
    while len(chosen) < count and distance.max() > 10**-DIGITS:
        chosen.append(int(distance.argmax()))
        distance = distance.minimum((paths - paths[chosen[-1]]).norm(dim=-1))
    return chosen


@dataclass(frozen=True)
class Clusters:
    """Path vectors in a plane and in clusters."""

    points: np.ndarray  # [pairs, 2]
    labels: np.ndarray  # [pairs] from 0
    method: str

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
    log.info("t-SNE and %d clusters of %d different path vectors", count, len(vectors))
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
    method = f"{len(vectors)} different ones; t-SNE of perplexity {perplexity:.0f}, seed 0; "
    method += f"spectral clusters of the graph of {neighbours} neighbours"
    return Clusters(points[same], labels[same], method)


def write_tables(pairs: Pairs, paths: Tensor, clusters: Clusters | None, out: Path) -> None:
    """Write gates.csv, entropy.csv and routes.csv."""
    gates, entropy, columns = [], [], []
    for name, weights, bypass in _by_path(pairs, paths):
        layer, path = name
        closed, bits = weights == 0, entropies(weights + bypass)
        entropy.append([layer, path, *_rounded([bits.mean(), closed.all(-1).float().mean()])])
        for n, cell in enumerate(pairs.cells):
            means = [part[:, n].float().mean() for part in (weights, closed, bypass)]
            gates.append([layer, path, cell, *_rounded(means)])
            columns.append(f"{layer} {cell}>{path}")
    head = ["layer", "path", "cell", "mean gate", "share closed", "share bypassed"]
    _write_csv(out / "gates.csv", head, gates)
    _write_csv(out / "entropy.csv", ["layer", "path", "mean bits", "share all closed"], entropy)
    head = ["image", "caption", "text", *columns, *(["cluster", "x", "y"] if clusters else [])]
    rows: list[list[object]] = []
    for k, vector in enumerate(paths):
        rows.append([k // CAPTIONS_PER_IMAGE, k, pairs.split.captions[k], *_rounded(vector)])
        if clusters:
            rows[-1] += [int(clusters.labels[k]), *_rounded(clusters.points[k])]
    _write_csv(out / "routes.csv", head, rows)


def _by_path(pairs: Pairs, paths: Tensor) -> Iterator[tuple[tuple[int, str], Tensor, Tensor]]:
    """Yield layer and target of each path, its gates and its bypasses, `[pairs, N]`."""
    layers = pairs.gates(paths)
    both = zip(layers, pairs.bypasses(paths), strict=True)
    for layer, (gates, bypass) in enumerate(both, 1):
        for o, target in enumerate(pairs.cells if layer < len(layers) else ["score"]):
            yield (layer, target), gates[:, o], bypass[:, o]


def _rounded(numbers: Sequence | Tensor | np.ndarray) -> list[float]:
    return [round(float(number), DIGITS) for number in numbers]


def _write_csv(path: Path, head: list[str], rows: list[list]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    write_text(path, text.getvalue())
