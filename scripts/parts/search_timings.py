"""search_timings.py — how fast images are indexed and found, and how many bytes an image takes.

Models and BERT have random weights, since the time of a query does not depend on them. An index of
many images is a real one with random vectors of the first stage. Its tokens are holes in their
files: they take no space, and are read as zeros without a disk.
"""

import io
import logging
import shutil
import statistics
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from PIL import Image
from transformers import BertModel

from checkpoint.bert import Bert, load_bert, write_bert
from checkpoint.checkpoint import write_checkpoint
from common.config import ModelConfig
from common.errors import InputError
from model import DIME
from scripts.parts.feeding import ENTRIES
from scripts.parts.images import list_images
from scripts.parts.regions import Backbone, open_backbone
from scripts.parts.search_build import Building, Inputs
from scripts.parts.search_files import FAISS, Part, Record, digest_of
from scripts.parts.search_first_stage import write_faiss
from scripts.parts.search_index import Index
from scripts.parts.search_models import SearchModels
from scripts.parts.search_options import IndexOptions
from scripts.parts.workload import SIZES, Size, bert_config
from vocab import Vocabulary

log = logging.getLogger(__name__)

BACKBONE, WIDTH = "efficientnet_lite2", 1280  # width of its features
SIDES = (500, 375)  # of the images that are indexed, in pixels
WARM_UP, QUERIES = 3, 15  # not timed, and timed
WORDS, QUERY_WORDS = ENTRIES[4:], 10  # of the vocabulary without [CLS] and the like; of a query
DRAWN = 2**16  # vectors at a time


@dataclass(frozen=True)
class SearchSizes:
    """How much is measured."""

    images: int  # that are indexed
    items: Sequence[int]  # of the collections
    candidates: Sequence[int]  # that are scored
    all_pairs: int  # up to so many items, all of them are scored, too
    faiss: dict[int, str]  # factory string by items


TINY = SearchSizes(3, (20, 40), (5, 10), all_pairs=20, faiss={40: "IVF2,PQ4x2"})
FULL = SearchSizes(
    256,
    (10**3, 10**4, 10**5, 10**6),
    (20, 100, 500),
    all_pairs=10**3,
    faiss={10**5: "IVF1024,PQ32", 10**6: "IVF4096,PQ32"},
)


def search_timings(size: Size, device: str) -> dict[str, Any]:
    """Return how fast search is with a BERT of that size, and how many bytes an image takes."""
    sizes = TINY if size == "tiny" else FULL
    report: dict[str, Any] = {"indexing": None, "bytes": {}, "queries": [], "not_run": []}
    with TemporaryDirectory() as name:
        folder = Path(name)
        paths, first_stage = write_models(folder, size)
        models = SearchModels.open(paths, first_stage, None, device)
        try:
            backbone = open_backbone(BACKBONE, Path(), models.matcher.device)
        except InputError as error:  # is not installed
            report["not_run"].append(f"images indexed a second: {error}")
        else:
            report |= time_indexing(folder, models, backbone, sizes.images)
        for items in sizes.items:
            out = folder / str(items)
            write_index(out, models, items)
            counts = [*sizes.candidates, *[items] * (items <= sizes.all_pairs)]
            report["queries"] += time_queries(out, device, counts)
            if factory := sizes.faiss.get(items):
                try:
                    report["bytes"][f"{FAISS}, {factory}"] = round(add_faiss(out, factory) / items)
                    report["queries"] += time_queries(out, device, sizes.candidates, factory)
                except InputError as error:  # FAISS is not installed
                    report["not_run"].append(str(error))
            shutil.rmtree(out)
    return report


def write_models(folder: Path, size: Size) -> tuple[list[Path], Path]:
    """Write a BERT and checkpoints: of both directions, and of the encoders alone."""
    bert_path = folder / "bert"
    network = BertModel(bert_config(SIZES[size]), add_pooling_layer=False)
    write_bert(bert_path, Bert(network, Vocabulary(bert_path, ENTRIES), ""))
    bert = load_bert(bert_path)  # with its fingerprint
    paths = []
    for direction, layers in (("i2t", 3), ("t2i", 3), ("i2t", 0)):
        config = ModelConfig(direction=direction, img_dim=WIDTH, num_layer_routing=layers)  # type: ignore[arg-type]  # of a literal
        paths.append(folder / f"{direction}_{layers}.pth.tar")
        options = asdict(config) | {"bert_path": str(bert_path)}
        write_checkpoint(paths[-1], DIME(config, bert.model), options, bert)
    return paths[:2], paths[2]


def time_indexing(
    folder: Path, models: SearchModels, backbone: Backbone, images: int
) -> dict[str, Any]:
    """Index drawn images; return the rate, and how many bytes an image takes in each file."""
    photos, out = folder / "photos", folder / "index"
    for path in (photos, out):
        path.mkdir()
    rng = np.random.default_rng(0)
    for i in range(images):
        cells = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        cells.resize(SIDES, Image.Resampling.BICUBIC).save(photos / f"{i}.jpg", quality=90)
    options = IndexOptions([], str(photos), str(out))
    building = Building(options, models, backbone, Inputs(photos, list_images(photos), ()))
    since = time.perf_counter()
    with redirect_stdout(io.StringIO()):
        building.run("")
    rate = images / (time.perf_counter() - since)
    arrays = sorted((out / "images").glob("*.npy"))
    return {
        "indexing": {"images": images, "batch": options.batch_size, "images_per_s": round(rate, 2)},
        "bytes": {path.name: np.load(path, mmap_mode="r")[0].nbytes for path in arrays},
    }


def write_index(folder: Path, models: SearchModels, items: int) -> None:
    """Write an index of so many images that nobody has; all arrays but the vectors are holes."""
    names = [f"{i}.jpg" for i in range(items)]
    about = models.about | {"images": digest_of(names), "captions": digest_of(())}
    about |= {"backbone": {"model": "none"}, "precision": None}
    about |= {"dtype": "float16", "batch_size": 1}
    places = models.places | {"images": str(folder), "weights": ""}
    part = Part(folder / "images", models.specs("images", np.dtype("float16")))
    part.begin(names)
    for name, (shape, dtype) in part.specs.items():
        array = open_memmap(part.folder / f"{name}.npy", "w+", dtype, (items, *shape))
        if name == "vectors":
            draw_vectors(array)
        array.flush()
    Record(about, places, "", images={"done": items, "left_out": []}, complete=True).write(folder)


def draw_vectors(vectors: np.ndarray) -> None:
    """Fill an array `[n, D]` with random vectors of unit length."""
    rng = np.random.default_rng(len(vectors))
    for first in range(0, len(vectors), DRAWN):
        block = vectors[first : first + DRAWN]
        rng.standard_normal(out=block, dtype=np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)


def add_faiss(folder: Path, factory: str) -> int:
    """Add a FAISS index and return its bytes. Raises InputError if FAISS is not installed."""
    record, path = Record.read(folder), folder / "images" / FAISS
    vectors = np.load(folder / "images/vectors.npy", mmap_mode="r")
    digest = write_faiss(path, factory, vectors)
    replace(record, faiss={"factory": factory, "sha256": digest}).write(folder)
    return path.stat().st_size


def time_queries(
    folder: Path, device: str, counts: Sequence[int], first_stage: str = "numpy"
) -> list[dict[str, Any]]:
    """Return a row for each number of candidates: medians, in milliseconds, of a query's parts."""
    index = Index.open(folder, device=device)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, QUERY_WORDS)) for _ in range(WARM_UP + QUERIES)]
    rows = []
    for count in counts:
        answers = [index.images(text, rerank=count) for text in texts][WARM_UP:]
        median = {
            f"{part}_ms": round(1000 * statistics.median(a.seconds[part] for a in answers), 2)
            for part in answers[0].seconds
        }
        about = {"items": answers[0].total, "first_stage": first_stage}
        rows.append(about | {"candidates": answers[0].candidates} | median)
        log.info("%s", rows[-1])
    return rows
