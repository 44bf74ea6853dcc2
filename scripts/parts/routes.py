"""routes.py — the routes that a model sends matching pairs: path vectors, weights, clusters.

Computes only; scripts/inspect_routes.py writes tables and drawings of it.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.cli import progress
from common.layout import CAPTIONS_PER_IMAGE
from data import Split
from evaluation import Encoded
from evaluation import evaluation_mode as evaluating
from model import DIME
from router import CLOSED, EPSILON, Modality
from vocab import Vocabulary

log = logging.getLogger(__name__)

NEIGHBOURS = 10  # of the graph that the clusters are cut from
DIGITS = 6  # of gates: what differs behind them is rounding


@dataclass(frozen=True)
class Pairs:
    """Images and captions of a split, encoded, and the model that routes them."""

    model: DIME
    split: Split
    vocabulary: Vocabulary
    encoded: Encoded

    @property
    def cells(self) -> list[str]:
        """Names of the cells of a layer."""
        return [name.upper() for name in self.model.config.cell_names]

    def paths(self, images: int) -> Tensor:
        """Path vectors `[pairs, K]` of the first images, each with its five captions."""
        found = []
        with progress("routing", images, "images") as bar:
            for image in range(images):
                first = image * CAPTIONS_PER_IMAGE
                found.append(self.of(image, range(first, first + CAPTIONS_PER_IMAGE)))
                bar.update()
        return torch.cat(found)

    def of(self, image: int, captions: Sequence[int]) -> Tensor:
        """Path vectors `[captions, K]` of an image with some captions."""
        with evaluating(self.model):
            _, paths = self.model.score(*self._some(image, captions), len(captions))
        return paths.flatten(0, 1).cpu()

    def passed_on(self, paths: Tensor) -> list[Tensor]:
        """What goes on where gates of path vectors `[pairs, K]` are closed, see `passed_on`."""
        return passed_on(self.model.space.gates(paths), self.model.config.routing == "hard")

    def attention(self, image: int, caption: int) -> np.ndarray:
        """Weights `[words, regions]` of the first layer's CMRC, without `[CLS]` and `[SEP]`.

        Of all layers it alone attends from what the encoders give, one token a region or word;
        deeper ones attend from mixtures. In i2t each region spreads a weight of 1 over the words,
        `[CLS]` and `[SEP]` among them; in t2i each word spreads it over the regions.
        """
        images, captions = self._some(image, [caption])
        i2t = self.model.direction == "i2t"
        query, context = (images, captions) if i2t else (captions, images)
        space = self.model.space
        cell = [*space.layers, space.merge][0].cells["cmrc"]
        with evaluating(self.model):
            tokens, mask, _ = cell.project_context(context)
            weights = cell.attention(query.tokens[:, None], tokens, mask)[0, 0]
        words = int(captions.mask.sum())
        return (weights.T if i2t else weights)[1 : words - 1].cpu().numpy()

    def words(self, caption: int) -> list[str]:
        """WordPieces of a caption, without `[CLS]` and `[SEP]`, as far as the model reads."""
        ids, mask = self.vocabulary.encode(
            [self.split.captions[caption]], self.model.config.max_words
        )
        return [self.vocabulary.entries[i] for i in ids[mask].tolist()][1:-1]

    def title(self, image: int, caption: int) -> str:
        """What a pair is called in a drawing."""
        return f"image {image}, caption {caption}: {self.split.captions[caption]}"

    def _some(self, image: int, captions: Sequence[int]) -> tuple[Modality, Modality]:
        device = next(self.model.parameters()).device
        text = torch.as_tensor(self.encoded.text[list(captions)])
        images = self.encoded.images[torch.tensor([image])]
        return images.to(device), self.encoded.captions[text].to(device)


def passed_on(gates: Sequence[Tensor], hard: bool) -> list[Tensor]:
    """What goes on where gates are closed (SPEC §6), `[pairs, O, N]` a layer: 1 where it does.

    A path whose gates are all closed carries the first cell's input, rectified. A cell of the last
    layer whose gate is closed passes its input on, weighted by 1 where the others have their gates;
    with `hard` routing so does the chosen cell alone. What goes on where hard routing's gates to a
    dense layer sum to less than 1e-4, but not to 0, is not told: here they are 1 already.
    """
    *dense, last = gates
    count = last.shape[-1]
    found = []
    for layer in dense:
        dead = layer.sum(-1, keepdim=True) < CLOSED / (CLOSED + EPSILON)  # of normalised gates
        found.append(F.pad(dead.float(), (0, count - 1)))
    closed = last < CLOSED / count
    if hard:
        closed &= F.one_hot(last.argmax(-1), count).bool()
    return [*found, closed.float()]


def entropies(weights: Tensor) -> Tensor:
    """Bits by which cells share each path, of weights `[pairs, O, N]`: 0 for one cell, 2 for four.

    A path that has none has 0.
    """
    shares = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return torch.special.entr(shares).sum(-1) / np.log(2)


def most_different(paths: Tensor, count: int) -> list[int]:
    """Up to `count` pairs whose path vectors `[pairs, K]` lie far apart, none of them alike.

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

    places: np.ndarray  # [pairs, 2]
    numbers: np.ndarray  # [pairs] from 0
    about: str  # how they were found

    def middle(self, paths: Tensor) -> list[int]:
        """The pair of each cluster whose path vector is the closest to the cluster's mean."""
        members = [np.flatnonzero(self.numbers == c) for c in np.unique(self.numbers)]
        return [
            int(own[(paths[own] - paths[own].mean(0)).norm(dim=-1).argmin()]) for own in members
        ]


def clustered(paths: Tensor, count: int) -> Clusters | None:
    """t-SNE and spectral clusters of path vectors `[pairs, K]`; None where too few differ."""
    vectors = paths.double().numpy().round(DIGITS)
    # pairs that take one route are one point, for the graph's neighbours are to be others
    vectors, same = np.unique(vectors, axis=0, return_inverse=True)
    if len(vectors) < count + 2:
        log.warning("no clusters: there are only %d different path vectors", len(vectors))
        return None
    from sklearn.cluster import SpectralClustering
    from sklearn.manifold import TSNE

    log.info("t-SNE and %d clusters of %d different path vectors", count, len(vectors))
    spectral = SpectralClustering(
        count,
        affinity="nearest_neighbors",
        n_neighbors=min(NEIGHBOURS, len(vectors) - 1),
        random_state=0,
    )
    with warnings.catch_warnings():  # a graph of separate parts is what one hopes for
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        numbers = spectral.fit_predict(vectors)
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    init = "pca" if vectors.shape[1] > 1 else "random"  # there is no second component of one number
    places = TSNE(2, perplexity=perplexity, init=init, random_state=0).fit_transform(vectors)
    same = same.reshape(-1)  # numpy 2.0 gave it a second axis
    about = f"{len(vectors)} different ones; t-SNE of perplexity {perplexity:.0f}, seed 0; "
    about += f"spectral clusters of the graph of {spectral.n_neighbors} neighbours"
    return Clusters(places[same], numbers[same], about)
