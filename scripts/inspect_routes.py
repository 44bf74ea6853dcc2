"""inspect_routes.py — which paths a model takes: tables and drawings of its routing space.

    python -m scripts.inspect_routes --model_path runs/f30k/i2t/model_best.pth.tar --out routes
    python -m scripts.inspect_routes --model_path ... --out routes --images pictures --pair 3 17

For matching pairs of a split it writes
  gates.csv       each layer's, path's and cell's mean gate, and the shares of pairs where it is
                  closed, and where the cell's input goes on in place of closed gates
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from torch import Tensor

from checkpoint.checkpoint import build_model
from common.cli import parse, pick_device, print_line, run
from common.errors import check_range, require
from common.files import check_writable, explain_os_errors, map_array, write_text
from common.layout import CAPTIONS_PER_IMAGE, boxes_file
from data import Split
from evaluation import encode_split
from scripts.parts import route_figures as figures
from scripts.parts.figures import SIDE, picture_files, shown, write_figure
from scripts.parts.images import read_image
from scripts.parts.opened import ModelOnSplit
from scripts.parts.regions import REGIONS, grid_boxes
from scripts.parts.routes import DIGITS, Clusters, Pairs, clustered, entropies, most_different
from training.log import remove

log = logging.getLogger(__name__)

TABLES = ("gates.csv", "entropy.csv", "routes.csv")
DRAWINGS = ("space", "different", "clusters")
ROUTE, WORDS = "pair_{}_{}", "words_{}_{}"  # names of drawings, by image and caption
EXAMPLES = 4  # routes that are drawn as the most different ones
# What is refined, and what a weight of cross-modal attention is.
QUERIES = {"i2t": "regions", "t2i": "words"}
WEIGHTS = {
    "i2t": "share of a region's attention that is on this word, %",
    "t2i": "share of this word's attention that is on a region, %",
}


@dataclass(frozen=True, kw_only=True)
class Options(ModelOnSplit):
    out: Annotated[str, "folder to write to"]
    count: Annotated[int, "first images of the split, each with its five captions"] = 200
    clusters: Annotated[int, "spectral clusters, 8 at most; 0: none, and no t-SNE"] = 5
    images: Annotated[str | None, "folder of the pictures that id_mapping.json names"] = None
    grid: Annotated[bool, "regions are an even 6x6 grid; else they are in {split}_boxes.npy"] = (
        False
    )
    pair: Annotated[list[int] | None, "an image and a caption, by number in the split"] = None

    def __post_init__(self) -> None:
        check_range(self, ("count",), 1)
        check_range(self, ("clusters",), 0, len(figures.MARKERS))
        require(self.pair is None or len(self.pair) == 2, "--pair: expected an image and a caption")
        require(self.pair is not None or not self.grid, "--grid goes with --pair")

    @property
    def outputs(self) -> list[Path]:
        """What may be written, or deleted because it is of an earlier run."""
        names = [*TABLES, *(f"{name}.png" for name in DRAWINGS)]
        if self.pair:
            names += [f"{name.format(*self.pair)}.png" for name in (ROUTE, WORDS)]
        return [Path(self.out) / name for name in names]

    def pictures(self, split: Split) -> Sequence[Path]:
        """The split's pictures, in its order; none without --images. Raises InputError."""
        if not self.images:
            return ()
        return picture_files(split.path.parent, self.split, split.images, Path(self.images))


def opened(options: Options) -> tuple[Pairs, Sequence[Path]]:
    """The model, the images and captions that are asked for, and the pictures' files.

    Raises InputError, also where something could not be written, or in place of what is read.
    """
    device = pick_device(options.device)
    checkpoint, bert, split = options.open()
    pictures = options.pictures(split)
    for path in options.outputs:
        check_writable(path, [*options.files(checkpoint, split), *pictures])
    model = build_model(checkpoint, bert, device)
    count = min(options.count, split.images)
    if options.pair:
        image, caption = options.pair
        known = 0 <= image < split.images and 0 <= caption < len(split.captions)
        sizes = f"{split.images} images and {len(split.captions)} captions"
        require(known, f"--pair {image} {caption}: {split.path} has {sizes}")
        count = max(count, image + 1, caption // CAPTIONS_PER_IMAGE + 1)
    encoded = encode_split(model, split, bert.vocabulary, device=device, images=count)
    return Pairs(model, split, bert.vocabulary, encoded), pictures


def write_tables(pairs: Pairs, paths: Tensor, clusters: Clusters | None, out: Path) -> None:
    """The three CSV files."""
    means, shared, columns = [], [], []
    layers = pairs.model.space.gates(paths)
    for layer, (gates, passed) in enumerate(zip(layers, pairs.passed_on(paths), strict=True), 1):
        closed, bits = (gates == 0).float(), entropies(gates + passed)
        for o, path in enumerate(pairs.cells if layer < len(layers) else ["score"]):
            of_path = [bits[:, o].mean(), closed[:, o].amin(-1).mean()]
            shared.append([layer, path, *rounded(of_path)])
            for n, cell in enumerate(pairs.cells):
                of_cell = [part[:, o, n].mean() for part in (gates, closed, passed)]
                means.append([layer, path, cell, *rounded(of_cell)])
                columns.append(f"{layer} {cell}>{path}")
    head = ["layer", "path", "cell", "mean gate", "share closed", "share passed on"]
    write_csv(out / "gates.csv", head, means)
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


def seen_pair(pairs: Pairs, files: Sequence[Path], options: Options) -> figures.Seen | None:
    """The picture of --pair, small, with its regions' boxes; None, and a line, where words are not.

    Raises InputError where picture and boxes do not fit the split.
    """
    image, caption = options.pair
    split = pairs.split
    path = boxes_file(split.path.parent, options.split)
    needed = {
        "--images": files,
        f"{path} or --grid": options.grid or path.exists(),
        "a model with CMRC": "CMRC" in pairs.cells,
        "a caption with words": pairs.words(caption),
    }
    absent = [what for what, there in needed.items() if not there]
    if absent:
        log.info("no words_%d_%d.png, which needs %s", image, caption, ", ".join(absent))
        return None
    picture = read_image(files[image])
    size = np.array(picture.size)
    if options.grid:
        fits = split.regions_per_image == REGIONS
        require(fits, f"--grid: {split.path} has {split.regions_per_image} regions an image")
        boxes = grid_boxes(*picture.size)
    else:
        every = map_array(path, "boxes of the regions, a .npy file")
        wanted = (split.images, split.regions_per_image, 4)
        require(every.shape == wanted, f"{path}: shape {every.shape}; expected {wanted}")
        boxes = every[image]
        require(bool(np.isfinite(boxes).all()), f"{path}: row {image} holds NaN; expected pixels")
    picture.thumbnail((SIDE, SIDE))
    return figures.Seen(picture, boxes * np.tile(picture.size / size, 2))


class Drawings:
    """Writes the drawings into the folder --out."""

    def __init__(
        self, pairs: Pairs, paths: Tensor, files: Sequence[Path], options: Options
    ) -> None:
        self.pairs, self.paths, self.files, self.options = pairs, paths, files, options
        config = pairs.model.config
        hard, query = config.routing == "hard", QUERIES[config.direction]
        self.space = figures.Space(config.cell_names, query, hard)
        self.gates = pairs.model.space.gates(paths)
        self.means = [layer.mean(0).numpy() for layer in self.gates]

    def mean_gates(self) -> None:
        """The routing space."""
        closed = [(layer == 0).float().mean(0).numpy() for layer in self.gates]
        passed = [layer.mean(0).numpy() for layer in self.pairs.passed_on(self.paths)]
        drawn = figures.space_figure(
            self.means, closed, passed, self.space, self._title("mean gates")
        )
        self._write("space", drawn)

    def _title(self, what: str) -> str:
        options, direction = self.options, self.pairs.model.direction
        pairs = f"{len(self.paths)} matching pairs of {options.split}"
        return f"{options.model_path} ({direction}): {what} of {pairs}"

    def different(self) -> None:
        """The most different routes."""
        chosen = most_different(self.paths, EXAMPLES)
        numbers = [(k // CAPTIONS_PER_IMAGE, k) for k in chosen]
        self._routes("different", self.paths[chosen], numbers)

    def clusters(self, found: Clusters) -> None:
        """Path vectors in a plane."""
        examples = [self.pairs.split.captions[k] for k in found.middle(self.paths)]
        title = f"{self._title('path vectors')}, {found.about}"
        drawn = figures.clusters_figure(found.places, found.numbers, examples, title)
        self._write("clusters", drawn)

    def _routes(self, name: str, paths: Tensor, numbers: Sequence[tuple[int, int]]) -> None:
        """Routes by path vectors `[pairs, K]` and the numbers of images and captions."""
        layers = self.pairs.model.space.gates(paths)
        passed = self.pairs.passed_on(paths)
        routes, skips = (
            [[layer[k].numpy() for layer in part] for k in range(len(paths))]
            for part in (layers, passed)
        )
        titles = [self.pairs.title(*pair) for pair in numbers]
        pictures = [shown(self.files[image]) for image, _ in numbers] if self.files else []
        drawn = figures.routes_figure(routes, skips, self.means, titles, pictures, self.space)
        self._write(name, drawn)

    def pair(self, image: int, caption: int, seen: figures.Seen | None) -> None:
        """One pair's route, and where its words are seen."""
        pairs = self.pairs
        self._routes(ROUTE.format(image, caption), pairs.of(image, [caption]), [(image, caption)])
        if seen:
            drawn = figures.words_figure(
                pairs.attention(image, caption),
                pairs.words(caption),
                seen,
                pairs.title(image, caption),
                WEIGHTS[pairs.model.direction],
            )
            self._write(WORDS.format(image, caption), drawn)

    def _write(self, name: str, figure: figures.Figure) -> None:
        write_figure(figure, Path(self.options.out) / f"{name}.png")


def main() -> None:
    options = parse(Options, None, __doc__)
    present = not options.clusters or importlib.util.find_spec("sklearn") is not None
    require(present, "--clusters: a package is missing: pip install scikit-learn (or --clusters 0)")
    out = Path(options.out)
    with explain_os_errors(out, "a folder to write to"):
        out.mkdir(parents=True, exist_ok=True)
    pairs, files = opened(options)
    seen = seen_pair(pairs, files, options) if options.pair else None
    paths = pairs.paths(min(options.count, pairs.split.images))
    clusters = clustered(paths, options.clusters) if options.clusters else None
    stale = [] if clusters else ["clusters"]
    if options.pair and not seen:
        stale.append(WORDS.format(*options.pair))
    for name in stale:
        remove(out / f"{name}.png")
    write_tables(pairs, paths, clusters, out)
    drawings = Drawings(pairs, paths, files, options)
    drawings.mean_gates()
    drawings.different()
    if options.pair:
        drawings.pair(*options.pair, seen)
    if clusters:
        drawings.clusters(clusters)
    print_line(f"{len(paths)} pairs of {pairs.split.path}: see {out}\n")


if __name__ == "__main__":
    run(main)
