"""routes.py — the routes of pairs: gates, attention, clusters, tables.

A layer has N cells, and a path leads to each cell of the next layer; one leads from the last layer
to the score. A path vector is the gates `[P, N]` of all P paths, layer by layer: those of the cells
that a path comes from. scripts/inspect_routes.py writes the tables, parts/route_figures.py draws.
"""

import csv
import io
import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cells import CrossModalRefinement
from common.cli import progress
from common.files import write_text
from evaluation import Encoded
from model import DIME
from router import EPSILON, INACTIVE, Modality
from vocab import Vocabulary

log = logging.getLogger(__name__)

NEIGHBOURS = 10  # of a point in the graph that spectral clustering cuts
DIGITS = 6  # of a gate: smaller differences are rounding


@dataclass(frozen=True)
class Pairs:
    """Encoded images and captions, of a split or of one's own, and the model that routes them."""

    model: DIME
    captions: Sequence[str]  # [T]
    image_of_caption: np.ndarray  # [T] ascending: the image that each caption describes
    vocabulary: Vocabulary
    encoded: Encoded

    @property
    def cells(self) -> list[str]:
        """The names of a layer's cells."""
        return [name.upper() for name in self.model.config.cell_names]

    @property
    def path_ends(self) -> list[tuple[int, str]]:
        """The layer, from 1, and the end of each of the P paths: a cell, or the score."""
        layers = self.model.config.num_layer_routing
        dense = [(layer, cell) for layer in range(1, layers) for cell in self.cells]
        return [*dense, (layers, "score")]

    def route(self, image: int, captions: Sequence[int]) -> np.ndarray:
        """Return gates `[captions, P, N]` of an image with some captions."""
        with self.model.evaluating():
            gates = self.model.gates(*self._modalities(image, captions), len(captions))
        return gates[0].cpu().numpy()

    def routes(self, images: int) -> np.ndarray:
        """Return gates `[pairs, P, N]` of the first images, each with all its captions."""
        gates = []
        with progress("routing", images, "images") as bar:
            for image in range(images):
                captions = np.flatnonzero(self.image_of_caption == image)
                gates.append(self.route(image, captions.tolist()))
                bar.update()
        return np.concatenate(gates)

    def bypasses(self, gates: np.ndarray) -> np.ndarray:
        """Return which cells' inputs bypass closed cells (SPEC §6), `[pairs, P, N]`, 0 or 1.

        A path whose gates are all closed carries the first cell's input, rectified. In the last
        layer the input of a closed cell counts with a weight of 1; with `hard` routing only that
        of the chosen cell. Path vectors hold normalised gates, hence the normalised threshold.
        """
        weights, last = np.zeros_like(gates), gates[:, -1]
        weights[:, :-1, 0] = gates[:, :-1].sum(-1) < INACTIVE / (INACTIVE + EPSILON)
        weights[:, -1] = last < INACTIVE / last.shape[-1]
        if self.model.config.routing == "hard":
            weights[:, -1] *= np.arange(last.shape[-1]) == last.argmax(-1)[:, None]
        return weights

    def attention(self, image: int, caption: int) -> np.ndarray:
        """Return weights `[words, regions]` of the first layer's CMRC, without `[CLS]`, `[SEP]`.

        Only the first layer attends from the encoders' output, one token a region or word; deeper
        layers attend from mixtures. In i2t each region spreads a weight of 1 over the words,
        `[CLS]` and `[SEP]` included; in t2i each word spreads it over the regions.
        """
        images, captions = self._modalities(image, [caption])
        i2t = self.model.direction == "i2t"
        query, context = (images, captions) if i2t else (captions, images)
        assert self.model.space is not None
        cell = self.model.space.all_layers[0].cells["cmrc"]
        assert isinstance(cell, CrossModalRefinement)
        with self.model.evaluating():
            tokens, mask, _ = cell.project_context(context)
            weights = cell.attention(query.tokens[:, None], tokens, mask)[0, 0]
        words = int(captions.mask.sum())
        return (weights.T if i2t else weights)[1 : words - 1].cpu().numpy()

    def words(self, caption: int) -> list[str]:
        """Return the WordPieces of a caption that the model reads, without `[CLS]` and `[SEP]`."""
        texts = [self.captions[caption]]
        ids, mask = self.vocabulary.encode(texts, self.model.config.max_words)
        return [self.vocabulary.entries[i] for i in ids[mask].tolist()][1:-1]

    def _modalities(self, image: int, captions: Sequence[int]) -> tuple[Modality, Modality]:
        device = next(self.model.parameters()).device
        text = torch.as_tensor(self.encoded.text[list(captions)])
        images = self.encoded.images[torch.tensor([image])]
        return images.to(device), self.encoded.captions[text].to(device)


def cluster(gates: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return t-SNE `[pairs, 2]` and spectral clusters `[pairs]` of gates `[pairs, P, N]`.

    None, with a warning, if too few pairs differ or scikit-learn is missing.
    """
    try:
        from sklearn.cluster import SpectralClustering
        from sklearn.manifold import TSNE
    except ImportError as error:
        log.warning("no clusters: pip install scikit-learn (%s)", error)
        return None
    # Pairs with the same route are one point, otherwise they would be each other's neighbours.
    rounded = gates.reshape(len(gates), -1).astype(np.float64).round(DIGITS)
    vectors, same = np.unique(rounded, axis=0, return_inverse=True)
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
    return points[same], labels[same]


def write_tables(
    pairs: Pairs, gates: np.ndarray, clusters: tuple[np.ndarray, np.ndarray] | None, out: Path
) -> None:
    """Write gates.csv and routes.csv."""
    paths = [(*path, cell) for path in pairs.path_ends for cell in pairs.cells]
    shares = [part.mean(0).ravel() for part in (gates, gates == 0, pairs.bypasses(gates))]
    head = ["layer", "path", "cell", "mean gate", "share closed", "share bypassed"]
    rows = zip(paths, _rounded(np.stack(shares, 1)), strict=True)
    _write_csv(out / "gates.csv", head, ([*path, *row] for path, row in rows))
    head = ["image", "caption", "text", *(f"{layer} {cell}>{end}" for layer, end, cell in paths)]
    numbers = _rounded(gates.reshape(len(gates), -1))
    captions = zip(pairs.image_of_caption.tolist(), pairs.captions, numbers, strict=False)
    routes = [[image, k, text, *row] for k, (image, text, row) in enumerate(captions)]
    if clusters:
        head += ["cluster", "x", "y"]
        points, labels = clusters
        for row, label, point in zip(routes, labels.tolist(), _rounded(points), strict=True):
            row += [label, *point]
    _write_csv(out / "routes.csv", head, routes)


def _rounded(numbers: np.ndarray) -> list[list[float]]:
    return numbers.astype(np.float64).round(DIGITS).tolist()


def _write_csv(path: Path, head: list[str], rows: Iterable[list]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    write_text(path, text.getvalue())
