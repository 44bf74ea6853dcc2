"""search_build.py — encodes a folder of images, and sentences, into a search index."""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.checkpoint import Checkpoint
from common.cli import print_line, progress
from common.errors import require, summarise
from common.files import explain_os_errors, partial_path, sha256_of
from common.layout import extraction_file, read_backbone, read_captions
from common.lock import LOCK, only_writer
from scripts.parts.images import list_images
from scripts.parts.regions import (
    BACKBONES,
    Backbone,
    ImageFiles,
    check_same_backbone,
    open_backbone,
    read_batches,
    require_backbone,
)
from scripts.parts.search_files import FAISS, RECORD, Part, Record, digest_of
from scripts.parts.search_first_stage import new_faiss, write_faiss
from scripts.parts.search_models import SearchModels
from scripts.parts.search_options import IndexOptions

log = logging.getLogger(__name__)

SENTENCES = 256  # encoded at a time


@dataclass(frozen=True)
class Inputs:
    """What is indexed."""

    images: Path  # folder
    names: list[str]  # of its images
    sentences: tuple[str, ...]


def build(options: IndexOptions, command: str) -> None:
    """Write an index, or resume one with the same options; `command` is what a user types.

    Raises InputError.
    """
    folder, captions = Path(options.images).absolute(), options.captions
    sentences = read_captions(Path(captions), allow_empty=False) if captions is not None else ()
    inputs = Inputs(folder, list_images(folder), sentences)
    paths = options.model_path, options.first_stage, options.bert_path
    models = SearchModels.open(*paths, options.device, options.precision)
    if options.faiss is not None and models.first is not None:
        new_faiss(options.faiss, models.first.models[0].config.embed_size)  # refused at once
    backbone = choose_backbone(options, models)
    if models.first is None:
        log.info("no --first_stage: each query scores all %d images", len(inputs.names))
    with only_writer(Path(options.out) / LOCK):
        Building(options, models, backbone, inputs).run(command)


class Building:
    """An index that is being written."""

    def __init__(
        self, options: IndexOptions, models: SearchModels, backbone: Backbone, inputs: Inputs
    ) -> None:
        self.options, self.models, self.backbone, self.inputs = options, models, backbone, inputs
        self.folder = Path(options.out)
        dtype = np.dtype(options.dtype)
        self.images = Part(self.folder / "images", models.specs("images", dtype))
        self.sentences = Part(self.folder / "sentences", models.specs("sentences", dtype))
        self.record = Record({}, {}, "")

    def run(self, command: str) -> None:
        """Begin the index, or resume it, and finish it. Raises InputError."""
        self._begin(command)
        if not self.record.complete:
            self._add_images()
            self._add_sentences()
            self._write(complete=True)
        images, sentences = self.record.rows("images"), self.record.rows("sentences")
        arrays = self.images.open(images)
        if sentences:
            self.sentences.open(sentences)
        self._write_faiss(arrays.get("vectors"))
        missing = len(self.inputs.names) - images
        note = f", {missing} left out" if missing else ""
        print_line(f"{self.folder}: {images} images{note}, {sentences} sentences\n")

    def _write(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
        self.record.write(self.folder)

    def _begin(self, command: str) -> None:
        """Write a new record, or check the one that is there."""
        about = {
            **self.models.about,
            "backbone": self.backbone.about,
            "images": digest_of(self.inputs.names),
            "captions": digest_of(self.inputs.sentences),
            "precision": self.options.precision,
            "dtype": self.options.dtype,
            "batch_size": self.options.batch_size,  # the last bits of features depend on it
        }
        weights = str(Path(self.options.weights).absolute()) if self.options.weights else ""
        places = {**self.models.places, "images": str(self.inputs.images), "weights": weights}
        if (self.folder / RECORD).exists() and not self.options.overwrite:
            self.record = Record.read(self.folder)
            self.record.check_same(about, self.folder)
            self._write(places=places, command=command)
            return
        if not (self.folder / RECORD).exists():
            with explain_os_errors(self.folder, "a new or empty folder"):
                others = set(os.listdir(self.folder)) - {LOCK, partial_path(Path(RECORD)).name}
            problem = f"--out {self.folder}: holds other files, {summarise(sorted(others))}"
            require(not others, f"{problem}; expected a new or empty folder")
        self.record = Record(about, places, command)
        self.record.write(self.folder)
        for part in (self.images, self.sentences):  # of the index that is replaced
            part.clear()

    def _add_images(self) -> None:
        """Encode the images that are missing."""
        names, done = self.inputs.names, self.record.images
        if done is None:
            self.images.begin(names)
            self._write(images=(done := {"done": 0, "left_out": []}))
        self.images.resume(self.record.rows("images"), self.folder / RECORD)
        source = ImageFiles({name: self.inputs.images / name for name in names}, self.backbone)
        size, workers = self.options.batch_size, self.options.workers
        batches = read_batches(source, names, done["done"], size, workers, self.options.skip_broken)
        with progress("indexing images", len(names), "image") as bar:
            bar.update(done["done"])
            for count, items, left_out in batches:
                if items:
                    features, boxes = source.encode(items)
                    self.images.append(
                        self.models.encode_images(features).arrays | {"boxes": boxes}
                    )
                done = {"done": done["done"] + count, "left_out": [*done["left_out"], *left_out]}
                self._write(images=done)
                bar.update(count)
        rows = self.record.rows("images")
        require(rows > 0, f"{self.inputs.images}: none of its {len(names)} images can be read")
        self.images.finish(rows)

    def _add_sentences(self) -> None:
        """Encode the sentences that are missing."""
        sentences = self.inputs.sentences
        if not sentences:
            return
        if self.record.sentences is None:
            self.sentences.begin(sentences)
            self._write(sentences={"done": 0, "left_out": []})
        done = self.record.rows("sentences")
        self.sentences.resume(done, self.folder / RECORD)
        with progress("indexing sentences", len(sentences), "sentence") as bar:
            bar.update(done)
            for first in range(done, len(sentences), SENTENCES):
                texts = sentences[first : first + SENTENCES]
                self.sentences.append(self.models.encode_sentences(texts).arrays)
                self._write(sentences={"done": first + len(texts), "left_out": []})
                bar.update(len(texts))
        self.sentences.finish(len(sentences))

    def _write_faiss(self, vectors: np.ndarray | None) -> None:
        """Write the FAISS index of the images, unless it is there with this factory string."""
        factory, path = self.options.faiss, self.images.folder / FAISS
        known = self.record.faiss
        if known and not (path.exists() and sha256_of(path) == known["sha256"]):
            known = None
        if factory == (known["factory"] if known else None):
            return
        self._write(faiss=None)
        if factory is not None and vectors is not None:
            self._write(faiss={"factory": factory, "sha256": write_faiss(path, factory, vectors)})


def choose_backbone(options: IndexOptions, models: SearchModels) -> Backbone:
    """Open `--backbone`, or else the one that made the models' training data.

    Raises InputError if neither is known, if both are and differ, or if its features do not fit.
    """
    matcher = models.matcher
    made_by = [found for each in matcher.checkpoints if (found := backbone_of(each))]
    name = options.backbone or (made_by[0][1]["model"] if made_by else None)
    path = matcher.checkpoints[0].path
    problem = f"{path}: does not say which backbone made its training data; expected --backbone"
    require(name is not None, f"{problem} {', '.join(BACKBONES)}")
    has_own = name == "efficientnet_lite2"
    require(has_own or bool(options.weights), f"--backbone {name}: expected --weights, too")
    require(not (has_own and options.weights), f"--weights: --backbone {name} does not use it")
    log.info("%s on %s", name, matcher.device)
    backbone = open_backbone(str(name), Path(options.weights), matcher.device)
    for source, about in made_by:
        check_same_backbone(backbone, about, source)
    problem = f"--backbone {name}: features are {backbone.width} wide"
    require(backbone.width == matcher.img_dim, f"{problem}; expected {matcher.img_dim}, as {path}")
    return backbone


def backbone_of(checkpoint: Checkpoint) -> tuple[Path, dict[str, Any]] | None:
    """Return the backbone of a checkpoint's training data, and the file that describes it.

    None if neither the checkpoint nor the folder of its data does. Raises InputError if the
    features were no backbone's.
    """
    about, source = checkpoint.backbone, checkpoint.path
    if about is None:
        names = (checkpoint.options.get(name) for name in ("data_path", "data_name"))
        folder = Path(*map(str, names))
        about, source = read_backbone(folder, "train"), extraction_file(folder, "train")
    return None if about is None else (source, require_backbone(about, source))
