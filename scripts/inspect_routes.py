"""inspect_routes.py — which paths a model takes: tables and drawings of its routing space.

    python -m scripts.inspect_routes --model_path runs/f30k/i2t/model_best.pth.tar --out routes
    python -m scripts.inspect_routes --model_path ... --out routes --images photos --pair 3 17

For matching pairs of a split it writes
  gates.csv       each layer's, path's and cell's mean gate, and the shares of pairs for which it is
                  closed, and for which the cell's input bypasses closed gates
  routes.csv      every pair's path vector, its cluster and its point in the plane
  space.png       the routing space, its paths as wide as their mean gates
  clusters.png    path vectors by t-SNE, in spectral clusters (the paper's Fig. 6)
and with --pair IMAGE CAPTION (numbers in the split, from 0) that pair's route, pair_3_17.png, and
where its words attend, words_3_17.png, if --images is given and {split}_boxes.npy exists.
Clusters need scikit-learn (pip install scikit-learn).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

from common.cli import parse, pick_device, print_line, run
from common.errors import check_range, require
from common.files import check_new_folder, explain_os_errors, map_array
from common.layout import SplitName, boxes_file
from scripts.parts.figures import image_files, write_figure

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from data import Split
    from scripts.parts.routes import Pairs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    model_path: Annotated[str, "a checkpoint, native, official or .safetensors"]
    out: Annotated[str, "new folder to write to"]
    data_path: Annotated[
        str | None, "folder of the data sets' folders (default: the checkpoint's)"
    ] = None
    data_name: Annotated[str | None, "data set's folder (default: the checkpoint's)"] = None
    bert_path: Annotated[str | None, "folder of BERT (default: the checkpoint's)"] = None
    split: Annotated[SplitName, "which images"] = "test"
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps, ..."] = "auto"
    count: Annotated[int, "first images of the split, each with all its captions"] = 200
    clusters: Annotated[int, "spectral clusters, at most 8"] = 5
    images: Annotated[str | None, "folder of the images that id_mapping.json names"] = None
    pair: Annotated[list[int] | None, "an image and a caption, by number in the split"] = None

    def __post_init__(self) -> None:
        check_range(self, ("count",), 1)
        check_range(self, ("clusters",), 1, 8)
        require(self.pair is None or len(self.pair) == 2, "--pair: expected an image and a caption")


def open_pairs(options: Options) -> tuple[Pairs, Split]:
    """Return the model with the encoded images and captions, and their split.

    Raises InputError.
    """
    from checkpoint.checkpoint import (
        bert_of,
        build_model,
        check_space,
        common_option,
        read_checkpoint,
    )
    from data import Split
    from evaluation import encode_split
    from scripts.parts.routes import Pairs

    device = pick_device(options.device)
    checkpoint = read_checkpoint(options.model_path)
    check_space(checkpoint, wanted=True)
    path = options.data_path or common_option([checkpoint], "data_path")
    folder = Path(path) / (options.data_name or common_option([checkpoint], "data_name"))
    split = Split.open(folder, options.split, checkpoint.config.img_dim)
    bert = bert_of(checkpoint, options.bert_path, split.captions)
    count = min(options.count, split.images)
    if options.pair:
        image, caption = options.pair
        known = 0 <= image < split.images and 0 <= caption < len(split.captions)
        sizes = f"{split.images} images and {len(split.captions)} captions"
        require(known, f"--pair {image} {caption}: {split.path} has {sizes}")
        count = max(count, image + 1, int(split.groups.image_of_caption[caption]) + 1)
    model = build_model(checkpoint, bert, device)
    encoded = encode_split(model, split, bert.vocabulary, device=device, images=count)
    owner = split.groups.image_of_caption
    return Pairs(model, split.captions, owner, bert.vocabulary, encoded), split


def map_boxes(split: Split, name: SplitName) -> np.ndarray | None:
    """Return the boxes `[I, regions, 4]` of a split's regions, or None if there are none.

    Raises InputError if they do not fit the split.
    """
    path = boxes_file(split.path.parent, name)
    if not path.exists():
        return None
    boxes = map_array(path, "boxes of the regions, a .npy file")
    wanted = (split.images, split.regions_per_image, 4)
    require(boxes.shape == wanted, f"{path}: shape {boxes.shape}; expected {wanted}")
    return boxes


def draw_pair(
    pairs: Pairs,
    gates: np.ndarray,
    pair: Sequence[int],
    file: Path | None,
    boxes: np.ndarray | None,
) -> dict[str, Figure]:
    """Return the figures of a pair by name: its route, and its words if there are boxes.

    `boxes` are those of all images, `[I, regions, 4]`.
    """
    from scripts.parts.route_figures import draw_route, draw_words

    image, caption = pair
    title = f"image {image}, caption {caption}: {pairs.captions[caption]}"
    figures = {f"pair_{image}_{caption}": draw_route(pairs, gates, pair, file, title)}
    if file and boxes is not None and "CMRC" in pairs.cells and pairs.words(caption):
        words = draw_words(pairs, pair, file, boxes[image], title)
        figures[f"words_{image}_{caption}"] = words
    else:
        log.info("no drawing of words, which needs --images, boxes, CMRC and a caption")
    return figures


def main() -> None:
    options = parse(Options, None, __doc__)
    out = Path(options.out)
    check_new_folder("--out", out)
    from scripts.parts.route_figures import draw_clusters, draw_space
    from scripts.parts.routes import cluster, write_tables

    pairs, split = open_pairs(options)
    file, boxes = None, None
    if options.images and options.pair:
        folder, data = Path(options.images), split.path.parent
        file = image_files(data, options.split, split.images, folder)[options.pair[0]]
        boxes = map_boxes(split, options.split)
    gates = pairs.routes(min(options.count, split.images))
    clusters = cluster(gates, options.clusters)
    which = f"{len(gates)} pairs of {options.split}"
    title = f"{options.model_path} ({pairs.model.direction}), {which}"
    figures = {"space": draw_space(pairs, gates, title)}
    if clusters:
        figures["clusters"] = draw_clusters(pairs, gates, *clusters, title)
    if options.pair:
        figures |= draw_pair(pairs, gates, options.pair, file, boxes)
    with explain_os_errors(out, "a folder to write to"):
        out.mkdir(parents=True, exist_ok=True)
    write_tables(pairs, gates, clusters, out)
    for name, figure in figures.items():
        write_figure(figure, out / f"{name}.png")
    print_line(f"{which}: see {out}\n")


if __name__ == "__main__":
    run(main)
