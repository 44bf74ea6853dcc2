"""inspect_routes.py — which paths a model takes: tables and drawings of its routing space.

    python -m scripts.inspect_routes --model_path runs/f30k/i2t/model_best.pth.tar --out routes
    python -m scripts.inspect_routes --model_path ... --out routes --images pictures --pair 3 17

For matching pairs of a split it writes
  gates.csv       each layer's, path's and cell's mean gate, and how often it is closed
  entropy.csv     how evenly the cells share each path, in bits
  routes.csv      every pair's path vector, its cluster and its place in the plane
  space.png       the routing space, its paths as open as their mean gates
  different.png   the pairs that take the most different routes
  clusters.png    path vectors by t-SNE, in spectral clusters (the paper's Fig. 6; scikit-learn)
and with --pair IMAGE CAPTION (numbers in the split, from 0) that pair's route and, where the boxes
of the regions and the pictures are known, where its words are seen: pair.png and words.png.
"""

import csv
import importlib.util
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from checkpoint import bert_of, build_model, read_checkpoint
from data import CAPTIONS_PER_IMAGE, Split
from files import map_array, read_json, read_text, whole_file
from model import DIME
from options import InputError, check_range, parse, pick_device, progress, require, run, say
from router import Modality
from scoring import Encoded, encode_split, evaluating
from vocab import Vocabulary

log = logging.getLogger(__name__)

EXAMPLES = 4  # routes that are drawn as the most different ones
NEIGHBOURS = 10  # of the graph that the clusters are cut from


@dataclass(frozen=True)
class Options:
    model_path: Annotated[str, "a checkpoint, own or published"]
    out: Annotated[str, "folder to write to"]
    data_path: Annotated[str | None, "folder that holds the data sets' folders"] = None
    data_name: Annotated[str | None, "data set's folder"] = None
    bert_path: Annotated[str | None, "folder of the BERT that the model was trained with"] = None
    split: Annotated[Literal["train", "dev", "test", "testall"], "which images"] = "test"
    count: Annotated[int, "images, each with its five captions"] = 200
    clusters: Annotated[int, "spectral clusters of the path vectors, 8 at most"] = 5
    images: Annotated[str | None, "folder of the pictures, named by id_mapping.json"] = None
    pair: Annotated[list[int] | None, "numbers of an image and a caption of the split"] = None
    device: Annotated[str, "auto, cpu, cuda, cuda:1, ..."] = "auto"

    def __post_init__(self) -> None:
        check_range(self, ("count",), 1)
        check_range(self, ("clusters",), 1, 8)
        require(self.pair is None or len(self.pair) == 2, "--pair: expected an image and a caption")


class Pairs:
    """Matching pairs of a split, and the routes that a model sends them."""

    def __init__(self, model: DIME, split: Split, encoded: Encoded) -> None:
        self.model, self.split, self.encoded = model, split, encoded

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
        """What the first layer's CMRC looks at: weights `[words, regions]`, special ones left out.

        In i2t each region spreads its weight over the words, in t2i each word over the regions.
        """
        images, captions = self._some(image, [caption])
        i2t = self.model.direction == "i2t"
        query, context = (images, captions) if i2t else (captions, images)
        cell = self.model.space.layers[0].cells["cmrc"]
        with evaluating(self.model):
            tokens, mask, _ = cell.view(context)
            weights = cell.attention(query.tokens[:, None], tokens, mask)[0, 0]
        words = int(captions.mask.sum())
        every = weights.T if i2t else weights
        return every[1 : words - 1].cpu().numpy()

    def _some(self, image: int, captions: Sequence[int]) -> tuple[Modality, Modality]:
        device = next(self.model.parameters()).device
        text = torch.as_tensor(self.encoded.text[list(captions)])
        images = self.encoded.images[torch.tensor([image])]
        return images.to(device), self.encoded.captions[text].to(device)


def opened(options: Options) -> tuple[Pairs, Vocabulary]:
    """The model, and the split's images and captions, encoded by it."""
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
    return Pairs(model, split, encoded), bert.vocabulary


def entropies(gates: Tensor) -> Tensor:
    """Bits by which cells share each path, for gates `[pairs, O, N]`: 0 for one cell, 2 for four.

    A path whose gates are all closed has none.
    """
    shares = gates / gates.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
    return -(shares * shares.clamp_min(torch.finfo(gates.dtype).tiny).log2()).sum(-1)


def most_different(paths: Tensor, count: int) -> list[int]:
    """Pairs whose path vectors lie far apart: each the farthest from those before it."""
    chosen = [int((paths - paths.mean(0)).norm(dim=-1).argmax())]
    distance = (paths - paths[chosen[0]]).norm(dim=-1)
    while len(chosen) < min(count, len(paths)):
        chosen.append(int(distance.argmax()))
        distance = distance.minimum((paths - paths[chosen[-1]]).norm(dim=-1))
    return chosen


def clustered(paths: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Places `[pairs, 2]` by t-SNE and spectral clusters `[pairs]` of path vectors."""
    from sklearn.cluster import SpectralClustering
    from sklearn.manifold import TSNE

    vectors = paths.double().numpy()
    neighbours = min(NEIGHBOURS, len(vectors) - 1)
    spectral = SpectralClustering(
        count, affinity="nearest_neighbors", n_neighbors=neighbours, random_state=0
    )
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    places = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(vectors)
    return places, spectral.fit_predict(vectors)


def check_clustering(options: Options, pairs: int) -> None:
    """Raise InputError before the work where there can be no clusters."""
    present = importlib.util.find_spec("sklearn") is not None
    require(present, "clusters need a package that is missing: pip install scikit-learn")
    require(
        pairs > options.clusters + 1, f"--clusters {options.clusters}: {pairs} pairs are too few"
    )


def write_tables(
    pairs: Pairs, paths: Tensor, places: np.ndarray, clusters: np.ndarray, out: Path
) -> None:
    """The three CSV files."""
    space = pairs.model.space
    names = [name.upper() for name in space.merge.cells]
    means, shared, columns = [], [], []
    for layer, gates in enumerate(space.gates(paths), 1):
        to = names if gates.shape[1] > 1 else ["score"]
        for o, path in enumerate(to):
            shared.append([layer, path, round(float(entropies(gates)[:, o].mean()), 4)])
            for n, cell in enumerate(names):
                gate = gates[:, o, n]
                closed = float((gate == 0).float().mean())
                means.append([layer, path, cell, round(float(gate.mean()), 6), round(closed, 6)])
                columns.append(f"{layer} {cell}>{path}")
    write_csv(out / "gates.csv", ["layer", "path", "cell", "mean gate", "share closed"], means)
    write_csv(out / "entropy.csv", ["layer", "path", "mean entropy, bits"], shared)
    rows = [
        [k // CAPTIONS_PER_IMAGE, k, pairs.split.captions[k], int(clusters[k]), *places[k], *vector]
        for k, vector in enumerate(paths.tolist())
    ]
    head = ["image", "caption", "text", "cluster", "x", "y", *columns]
    write_csv(out / "routes.csv", head, rows)


def write_csv(path: Path, head: list[str], rows: list[list]) -> None:
    """Write a table."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    data = text.getvalue().encode()
    with whole_file(path, len(data)) as file:
        file.write(data)


def picture_of(options: Options, split: Split, image: int) -> np.ndarray | None:
    """An image's picture, where a folder of pictures is given. Raises InputError."""
    if options.images is None:
        return None
    folder, name = split.path.parent, f"{options.split}_ids.txt"
    ids = read_text(folder / name, "image ids, one a line").splitlines()
    require(len(ids) == split.images, f"{folder / name}: {len(ids)} ids for {split.images} images")
    files = read_json(folder / "id_mapping.json", "the file of each image id")
    path = Path(options.images) / str(files.get(ids[image].strip()))
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: no picture: {error}") from error


def draw(
    pairs: Pairs, paths: Tensor, places: np.ndarray, clusters: np.ndarray, options: Options
) -> None:
    """The pictures of all pairs together."""
    from scripts import route_figures as figures

    space, out = pairs.model.space, Path(options.out)
    cells = [name.upper() for name in space.merge.cells]
    means = [gates.mean(0).numpy() for gates in space.gates(paths)]
    title = f"{options.model_path}: mean gates of {len(paths)} matching pairs"
    figures.save(figures.space_figure(means, cells, title), out / "space.png")
    chosen = most_different(paths, EXAMPLES)
    routes = [[gates[k].numpy() for gates in space.gates(paths)] for k in chosen]
    captions = [pairs.split.captions[k] for k in chosen]
    pictures = [picture_of(options, pairs.split, k // CAPTIONS_PER_IMAGE) for k in chosen]
    figures.save(figures.routes_figure(routes, captions, pictures, cells), out / "different.png")
    examples = [
        pairs.split.captions[int(np.flatnonzero(clusters == c)[0])] for c in np.unique(clusters)
    ]
    figures.save(figures.clusters_figure(places, clusters, examples), out / "clusters.png")


def draw_pair(pairs: Pairs, vocabulary: Vocabulary, options: Options) -> None:
    """One pair's route, and where its words are seen."""
    from scripts import route_figures as figures

    (image, caption), split, out = options.pair, pairs.split, Path(options.out)
    space = pairs.model.space
    route = [gates[0].numpy() for gates in space.gates(pairs.of(image, [caption]))]
    cells = [name.upper() for name in space.merge.cells]
    picture, text = picture_of(options, split, image), split.captions[caption]
    figures.save(figures.routes_figure([route], [text], [picture], cells), out / "pair.png")
    boxes = split.path.with_name(f"{options.split}_boxes.npy")
    if (
        picture is None
        or not boxes.exists()
        or "cmrc" not in space.merge.cells
        or not len(space.layers)
    ):
        log.info("no words.png: it needs --images, %s and a first layer with CMRC", boxes)
        return
    ids, mask = vocabulary.encode([text], pairs.model.config.max_words)
    words = [vocabulary.entries[i] for i in ids[0][mask[0]].tolist()][1:-1]
    regions = map_array(boxes, "boxes of the regions, a .npy file")
    wanted = (split.images, split.regions_per_image, 4)
    require(regions.shape == wanted, f"{boxes}: shape {regions.shape}; expected {wanted}")
    weights = pairs.attention(image, caption)
    found = figures.attention_figure(weights, words, np.array(regions[image]), picture)
    figures.save(found, out / "words.png")


def main() -> None:
    options = parse(Options, None, __doc__)
    check_clustering(options, options.count * CAPTIONS_PER_IMAGE)
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from error
    pairs, vocabulary = opened(options)
    if options.pair:
        draw_pair(pairs, vocabulary, options)
    paths = pairs.paths(min(options.count, pairs.split.images))
    check_clustering(options, len(paths))
    places, clusters = clustered(paths, options.clusters)
    write_tables(pairs, paths, places, clusters, out)
    draw(pairs, paths, places, clusters, options)
    say(f"{len(paths)} pairs of {pairs.split.path}: see {out}\n")


if __name__ == "__main__":
    run(main)
