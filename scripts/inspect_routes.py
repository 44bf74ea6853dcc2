"""inspect_routes.py — which paths a model takes: tables and drawings of its routing space.

    python -m scripts.inspect_routes --model_path runs/f30k/i2t/model_best.pth.tar --out routes
    python -m scripts.inspect_routes --model_path ... --out routes --images pictures --pair 3 17

For matching pairs of a split it writes
  gates.csv       each layer's, path's and cell's mean gate, and the share of pairs it is closed for
  entropy.csv     how evenly the cells share each path, in bits, and how often all are closed
  routes.csv      every pair's path vector, its cluster and its place in the plane
  space.png       the routing space, its paths as open as their mean gates
  different.png   the pairs that take the most different routes
  clusters.png    path vectors by t-SNE, in spectral clusters (the paper's Fig. 6)
and with --pair IMAGE CAPTION (numbers in the split, from 0) that pair's route, pair_3_17.png, and
where its words are seen, words_3_17.png, if the pictures and the boxes of the regions are known.
Clusters need scikit-learn (pip install scikit-learn).
"""

import csv
import importlib.util
import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from checkpoint import bert_of, build_model, read_checkpoint
from data import CAPTIONS_PER_IMAGE, Split, SplitName
from files import check_writable, map_array, naming, write_text
from model import DIME
from options import check_range, parse, pick_device, progress, require, run, say
from pictures import read_picture
from regions import REGIONS, grid_boxes
from router import Modality
from scoring import Encoded, encode_split, evaluating
from scripts import route_figures as figures
from scripts.plot_run import write_figure
from scripts.show_retrievals import SIDE, picture_files, shown
from vocab import Vocabulary

log = logging.getLogger(__name__)

EXAMPLES = 4  # routes that are drawn as the most different ones
NEIGHBOURS = 10  # of the graph that the clusters are cut from
DIGITS = 6  # of gates: what differs behind them is rounding
# What is refined, and what a weight of cross-modal attention is.
QUERIES = {"i2t": "regions", "t2i": "words"}
WEIGHTS = {
    "i2t": "share of a region's attention that is on this word, %",
    "t2i": "share of this word's attention that is on a region, %",
}


@dataclass(frozen=True)
class Options:
    model_path: Annotated[str, "a checkpoint, own or published"]
    out: Annotated[str, "folder to write to"]
    data_path: Annotated[
        str | None, "folder that holds the data sets' folders (default: the checkpoint's)"
    ] = None
    data_name: Annotated[str | None, "data set's folder (default: the checkpoint's)"] = None
    bert_path: Annotated[str | None, "folder of BERT (default: the checkpoint's)"] = None
    split: Annotated[SplitName, "which images"] = "test"
    count: Annotated[int, "first images of the split, each with its five captions"] = 200
    clusters: Annotated[int, "spectral clusters, 8 at most; 0: none, and no t-SNE"] = 5
    images: Annotated[str | None, "folder of the pictures that id_mapping.json names"] = None
    grid: Annotated[
        bool, "regions are an even 6x6 grid, whatever boxes there are (default: {split}_boxes.npy)"
    ] = False
    pair: Annotated[list[int] | None, "an image and a caption, by number in the split"] = None
    device: Annotated[str, "auto, cpu, cuda, cuda:1, ..."] = "auto"

    def __post_init__(self) -> None:
        check_range(self, ("count",), 1)
        check_range(self, ("clusters",), 0, len(figures.MARKERS))
        require(self.pair is None or len(self.pair) == 2, "--pair: expected an image and a caption")


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
            tokens, mask, _ = cell.view(context)
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


def opened(options: Options) -> Pairs:
    """The model, and the images and captions that are asked for. Raises InputError."""
    device = pick_device(options.device)
    checkpoint = read_checkpoint(options.model_path)
    bert = bert_of(checkpoint, options.bert_path)
    model = build_model(checkpoint, bert, device)
    where = [
        getattr(options, name) or checkpoint.options.get(name)
        for name in ("data_path", "data_name")
    ]
    require(all(where), f"{options.model_path}: names no data; --data_path and --data_name do")
    split = Split.open(Path(where[0]) / where[1], options.split, checkpoint.config.img_dim)
    count = min(options.count, split.images)
    if options.pair:
        image, caption = options.pair
        known = 0 <= image < split.images and 0 <= caption < len(split.captions)
        sizes = f"{split.images} images and {len(split.captions)} captions"
        require(known, f"--pair {image} {caption}: {split.path} has {sizes}")
        count = max(count, image + 1, caption // CAPTIONS_PER_IMAGE + 1)
    words = checkpoint.config.max_words
    encoded = encode_split(model, split, bert.vocabulary, words, device=device, images=count)
    return Pairs(model, split, bert.vocabulary, encoded)


def entropies(gates: Tensor) -> Tensor:
    """Bits by which cells share each path, for gates `[pairs, O, N]`: 0 for one cell, 2 for four.

    A path whose gates are all closed has 0.
    """
    shares = gates / gates.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
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
    places = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(vectors)
    same = same.reshape(-1)  # numpy 2.0 gave it a second axis
    return Clusters(places[same], numbers[same])


def write_tables(pairs: Pairs, paths: Tensor, clusters: Clusters | None, out: Path) -> None:
    """The three CSV files."""
    means, shared, columns = [], [], []
    for layer, gates in enumerate(pairs.model.space.gates(paths), 1):
        closed = (gates == 0).float()
        for o, path in enumerate(pairs.cells if gates.shape[1] > 1 else ["score"]):
            of_path = [entropies(gates)[:, o].mean(), closed[:, o].amin(-1).mean()]
            shared.append([layer, path, *rounded(of_path)])
            for n, cell in enumerate(pairs.cells):
                of_cell = [gates[:, o, n].mean(), closed[:, o, n].mean()]
                means.append([layer, path, cell, *rounded(of_cell)])
                columns.append(f"{layer} {cell}>{path}")
    write_csv(out / "gates.csv", ["layer", "path", "cell", "mean gate", "share closed"], means)
    write_csv(out / "entropy.csv", ["layer", "path", "mean bits", "share all closed"], shared)
    head, rows = ["image", "caption", "text", *columns], []
    for k, vector in enumerate(paths):
        rows.append([k // CAPTIONS_PER_IMAGE, k, pairs.split.captions[k], *rounded(vector)])
    if clusters:
        head += ["cluster", "x", "y"]
        for row, number, place in zip(rows, clusters.numbers, clusters.places, strict=True):
            row += [int(number), *rounded(place)]
    write_csv(out / "routes.csv", head, rows)


def rounded(numbers: Sequence | Tensor | np.ndarray) -> list[float]:
    """As a table has them."""
    return [round(float(number), DIGITS) for number in numbers]


def write_csv(path: Path, head: list[str], rows: list[list]) -> None:
    """Write a table."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    write_text(path, text.getvalue())


class Drawings:
    """Writes the drawings into the folder --out."""

    def __init__(
        self, pairs: Pairs, paths: Tensor, files: Sequence[Path], options: Options
    ) -> None:
        self.pairs, self.paths, self.files, self.options = pairs, paths, files, options
        self.space = figures.Space(pairs.cells, QUERIES[pairs.model.direction])
        self.gates = pairs.model.space.gates(paths)
        self.means = [layer.mean(0).numpy() for layer in self.gates]

    def mean_gates(self) -> None:
        """The routing space."""
        closed = [(layer == 0).float().mean(0).numpy() for layer in self.gates]
        options, direction = self.options, self.pairs.model.direction
        title = f"{options.model_path} ({direction}): mean gates of {len(self.paths)} "
        title += f"matching pairs of {options.split}"
        self._write("space", figures.space_figure(self.means, closed, self.space, title))

    def different(self) -> None:
        """The most different routes."""
        chosen = most_different(self.paths, EXAMPLES)
        numbers = [(k // CAPTIONS_PER_IMAGE, k) for k in chosen]
        self._routes("different", self.paths[chosen], numbers)

    def clusters(self, found: Clusters) -> None:
        """Path vectors in a plane."""
        examples = [self.pairs.split.captions[k] for k in found.middle(self.paths)]
        self._write("clusters", figures.clusters_figure(found.places, found.numbers, examples))

    def _routes(self, name: str, paths: Tensor, numbers: Sequence[tuple[int, int]]) -> None:
        """Routes by path vectors `[pairs, K]` and the numbers of images and captions."""
        layers = self.pairs.model.space.gates(paths)
        routes = [[layer[k].numpy() for layer in layers] for k in range(len(paths))]
        titles = [self.pairs.title(*pair) for pair in numbers]
        pictures = [shown(self.files[image]) for image, _ in numbers] if self.files else []
        drawn = figures.routes_figure(routes, self.means, titles, pictures, self.space)
        self._write(name, drawn)

    def pair(self, image: int, caption: int) -> None:
        """One pair's route, and where its words are seen."""
        pairs, name = self.pairs, f"{image}_{caption}"
        self._routes(f"pair_{name}", pairs.of(image, [caption]), [(image, caption)])
        words, boxes = pairs.words(caption), self._boxes_file()
        missing = {
            "--images": self.files,
            f"{boxes} or --grid": self.options.grid or boxes.exists(),
            "a model with CMRC": "CMRC" in pairs.cells,
            "a caption with words": words,
        }
        absent = [what for what, there in missing.items() if not there]
        if absent:
            log.info("no words_%s.png, which needs %s", name, ", ".join(absent))
            return
        drawn = figures.words_figure(
            pairs.attention(image, caption),
            words,
            self._seen(image),
            pairs.title(image, caption),
            WEIGHTS[pairs.model.direction],
        )
        self._write(f"words_{name}", drawn)

    def _boxes_file(self) -> Path:
        return self.pairs.split.path.with_name(f"{self.options.split}_boxes.npy")

    def _seen(self, image: int) -> figures.Seen:
        """An image's picture, small, with the boxes of its regions in it. Raises InputError."""
        picture, split = read_picture(self.files[image]), self.pairs.split
        size = np.array(picture.size)
        if self.options.grid:
            fits = split.regions_per_image == REGIONS
            require(fits, f"--grid: {split.path} has {split.regions_per_image} regions an image")
            boxes = grid_boxes(*picture.size)
        else:
            path = self._boxes_file()
            every = map_array(path, "boxes of the regions, a .npy file")
            wanted = (split.images, split.regions_per_image, 4)
            require(every.shape == wanted, f"{path}: shape {every.shape}; expected {wanted}")
            boxes = every[image]
        picture.thumbnail((SIDE, SIDE))
        return figures.Seen(picture, boxes * np.tile(picture.size / size, 2))

    def _write(self, name: str, figure: figures.Figure) -> None:
        write_figure(figure, Path(self.options.out) / f"{name}.png")


def main() -> None:
    options = parse(Options, None, __doc__)
    present = not options.clusters or importlib.util.find_spec("sklearn") is not None
    require(present, "--clusters: a package is missing: pip install scikit-learn (or --clusters 0)")
    out = Path(options.out)
    with naming(out, "a folder to write to"):
        out.mkdir(parents=True, exist_ok=True)
    check_writable(out / "gates.csv")
    pairs = opened(options)
    split, files = pairs.split, ()
    if options.images:
        where = split.path.parent, options.split, len(split.captions), Path(options.images)
        files = picture_files(*where)
    paths = pairs.paths(min(options.count, split.images))
    drawings = Drawings(pairs, paths, files, options)
    drawings.mean_gates()
    drawings.different()
    if options.pair:
        drawings.pair(*options.pair)
    clusters = clustered(paths, options.clusters) if options.clusters else None
    write_tables(pairs, paths, clusters, out)
    if clusters:
        drawings.clusters(clusters)
    say(f"{len(paths)} pairs of {split.path}: see {out}\n")


if __name__ == "__main__":
    run(main)
