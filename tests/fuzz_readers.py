"""The readers that fuzz.py tries: each changes a file of its own and reads it."""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from checkpoint.bert import load_bert
from checkpoint.checkpoint import build_model, json_beside, load_model, read_checkpoint
from common import cli
from common.files import write_array
from common.layout import images_digest, read_ids, read_names
from common.score_files import COMMON, ScorePart, check_whole, map_scores, write_part
from common.torch_files import read_torch
from data import Split, TrainingBatches
from model import DIME
from scripts import convert_checkpoint
from scripts.parts import caption_files
from scripts.parts.array_files import ArrayFiles
from scripts.parts.extraction import Extraction
from scripts.parts.images import read_image
from scripts.parts.search_files import RECORD, Part, Record, digest_of
from scripts.parts.tsv import Tsv
from tests import conftest
from tests.changes import change_bytes, change_value
from training.config import TrainConfig
from training.log import _earlier_sessions
from training.loop import Trainer
from training.resume import NEWEST, _newest_whole
from vocab import Vocabulary

GOLDEN = conftest.GOLDEN / "i2t"
DATA = GOLDEN / "data/f30k_precomp"
BERT = GOLDEN / "bert"
WIDTH = 20  # of the golden features
NAMES = {"a": "a.png", "b": "x/b.png"}  # of images
Reader = Callable[[Path, list, list], Any]  # writes a changed file to a folder and reads it


def by_bytes(name: str, seeds: list[bytes], read: Callable[[Path], Any]) -> Reader:
    """Return a reader of a file of that name, whose bytes are changed."""

    def reader(folder: Path, changes: list, values: list) -> Any:
        data = change_bytes(seeds[len(values) % len(seeds)], changes)
        (folder / name).write_bytes(data)
        return read(folder / name)

    return reader


def by_values(name: str, seed: Path, read: Callable[[Path], Any]) -> Reader:
    """Return a reader of a torch file whose values or bytes are changed, in either format."""
    content = read_torch(seed)

    def reader(folder: Path, changes: list, values: list) -> Any:
        path = folder / name
        new = reduce(lambda whole, change: change_value(whole, *change), values, content)
        zipped = (len(values) + len(changes)) % 2 == 0
        torch.save(new, path, _use_new_zipfile_serialization=zipped)
        if not values or len(changes) % 3 == 1:
            path.write_bytes(change_bytes(path.read_bytes(), changes))
        return read(path)

    return reader


def trained(folder: Path) -> tuple[Path, Trainer]:
    """Train on tiny data; return the checkpoint in the middle of an epoch and the trainer."""
    conftest.write_tiny(folder)
    config = cli.parse(TrainConfig, conftest.tiny_train(folder), "")
    bert = load_bert(folder / "bert")
    split = Split.open(folder / "data/tiny", "train", config.img_dim, training=True)
    config = replace(config, img_dim=split.img_dim)
    batches = TrainingBatches(split, bert.vocabulary, config, config.max_words, False)
    trainer = Trainer(config, DIME(config, bert.model), bert, batches, split, torch.device("cpu"))
    for position in range(2):
        trainer.train_step.step(batches[0, position])
    trainer.state = replace(trainer.state, step=2)
    config.folder.mkdir(parents=True)
    trainer._save(NEWEST)
    return config.folder / NEWEST, trainer


def native_checkpoint(folder: Path) -> Reader:
    path, trainer = trained(folder)
    torch.save(read_torch(path) | {"optimizer": {}}, path)
    return by_values("x", path, lambda path: build_model(read_checkpoint(path), trainer.bert))


def resume(folder: Path) -> Reader:
    path, trainer = trained(folder)

    def read(path: Path) -> None:
        try:
            trainer.restore(read_checkpoint(path))
            trainer.train_step.step(trainer.batches[0, 0])
        finally:  # a refused checkpoint may leave half of the state behind
            trainer.train_step.optimizer.state.clear()

    return by_values("x", path, read)


def arrays_checkpoint(folder: Path) -> Reader:
    """Read safetensors with JSON beside it, whose checksum fits: else no more would be read."""
    path, (_, bert, checkpoint) = folder / "x.safetensors", conftest.Case(GOLDEN).load()
    convert_checkpoint.write_arrays(path, checkpoint, bert)
    about = json.loads(json_beside(path).read_text())

    def read(path: Path) -> None:
        about["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        json_beside(path).write_text(json.dumps(about))
        build_model(read_checkpoint(path), bert)

    return by_bytes(path.name, [path.read_bytes()], read)


def into(source: Path) -> Callable[[Path], None]:
    """Return a reader of a folder of BERT into which the changed file is copied."""

    def read(path: Path) -> None:
        shutil.copy(path, source)
        load_bert(source)

    return read


def bert_file(folder: Path, name: str) -> Reader:
    """Return a reader of one file in a BERT folder."""
    source = Path(shutil.copytree(BERT, folder / "bert"))
    weights, read = source / "pytorch_model.bin", into(source)
    if name == weights.name:
        return by_values(name, weights, read)
    save_file(read_torch(weights), source / "model.safetensors")
    weights.unlink()
    return by_bytes(name, [(source / name).read_bytes()], read)


def bert_index(folder: Path) -> Reader:
    """Return a reader of the index of weights in two shards."""
    source = Path(shutil.copytree(BERT, folder / "bert"))
    weights, shards = read_torch(source / "pytorch_model.bin"), ["a.safetensors", "b.safetensors"]
    (source / "pytorch_model.bin").unlink()
    weight_map = {name: shards[i % 2] for i, name in enumerate(weights)}
    for shard in shards:
        save_file({k: v for k, v in weights.items() if weight_map[k] == shard}, source / shard)
    seed = json.dumps({"weight_map": weight_map}).encode()
    return by_bytes("model.safetensors.index.json", [seed], into(source))


def read_split(path: Path) -> None:
    shutil.copy(DATA / ("dev_ims.npy" if path.suffix == ".txt" else "dev_caps.txt"), path.parent)
    split = Split.open(path.parent, "dev", WIDTH)
    Vocabulary.load(BERT).encode(split.captions, 12)
    split.regions(np.arange(min(3, split.images)))


def read_words(path: Path) -> None:
    """Read a vocabulary, or the flags of one."""
    if path.name == "tokenizer_config.json":
        shutil.copy(BERT / "vocab.txt", path.parent)
    Vocabulary.load(path.parent).encode(["a man [UNK] 犬 runs!", ""], 9)


def scores(folder: Path) -> Reader:
    np.save(folder / "s.npy", np.ones((2, 10), np.float32))
    return by_bytes("s.npy", [(folder / "s.npy").read_bytes()], map_scores)


def score_part(folder: Path) -> Reader:
    """Read a part that is the whole matrix, as a merge does."""
    about = dict.fromkeys(COMMON, "x") | {"count": 1, "images": 2, "captions": 10}
    write_part(folder / "p", np.ones((2, 10), np.float32), about | {"number": 1, "first": 0})

    def merge(path: Path) -> None:
        for block in check_whole([ScorePart.open(path)])[0].blocks():
            assert block.dtype == np.float32 and block.shape[1] == 10

    return by_bytes("p", [(folder / "p").read_bytes()], merge)


def annotations(folder: Path) -> Reader:
    sentences = [{"raw": "a man", "tokens": ["a", "man"]}] * 5
    karpathy = {"imgid": 3, "filename": "a.jpg", "split": "val", "sentences": sentences}
    coco = {"images": [{"id": 7, "file_name": "COCO_val2014_000000000007.jpg"}]}
    coco |= {"annotations": [{"image_id": 7, "id": n, "caption": "a man"} for n in range(5)]}
    seeds = [json.dumps(content).encode() for content in ({"images": [karpathy] * 2}, coco)]
    return by_bytes("captions_val.json", seeds, caption_files.read)


def captions_of_lines(folder: Path) -> Reader:
    """Read a token file, a bar-separated file, a CSV table and JSON lines."""
    record = {"file_name": "train/a.jpg", "text": "a man", "split": "dev"}
    seeds = [
        "a.jpg#0\ta man\nb.jpg#0\ta dog\na.jpg#1\ta boy\n",
        "image_name| comment_number| comment\na.jpg| 0| a man\na.jpg| 1   a boy\n",
        'file_name,text,split\na.jpg,"a ""man"", in red",test\nb.jpg,a dog,train\n',
        f"{json.dumps(record)}\n{json.dumps(record | {'text': 'a dog'})}\n",
    ]
    return by_bytes("metadata.csv", [seed.encode() for seed in seeds], caption_files.read)


def read_tsv(path: Path) -> None:
    source = Tsv([path], {"a": "a", "b": "b"})
    for key in source.image_ids:
        source.read(key)


def tsv(folder: Path) -> Reader:
    """Read rows of bottom-up attention, of its ports to Python 3 and of LXMERT."""
    rows = [conftest.tsv_row("a", 0), conftest.tsv_row("b", 1)]
    ports, lxmert = [], []
    for row in rows:
        *head, count, boxes, features = row.rstrip().split(b"\t")
        coded = [str(field).encode() for field in (boxes, features)]
        ports.append(b"\t".join([*head, count, *coded]) + b"\n")
        lxmert.append(b"\t".join([*head, *[b""] * 4, count, boxes, features]) + b"\n")
    return by_bytes("x.tsv", [b"".join(kind) for kind in (rows, ports, lxmert)], read_tsv)


def array_files(folder: Path) -> Reader:
    """Read features of .npz files, stored and compressed."""
    arrays = {"x": np.ones((3, 5), np.float32), "bbox": np.ones((3, 4), np.float32)}
    np.savez(folder / "plain.npz", **arrays, num_bbox=3)
    np.savez_compressed(folder / "small.npz", **arrays)
    seeds = [(folder / name).read_bytes() for name in ("plain.npz", "small.npz")]
    return by_bytes("a.npz", seeds, lambda path: ArrayFiles(path.parent, {"a": "a"}).read("a"))


def extraction(folder: Path) -> Reader:
    """Resume from a record, without the files of the input before."""
    about = {"model": "tsv"}
    known = about | {"ids": images_digest(list(NAMES), NAMES), "files": 2}
    record = {"about": known, "rows": 1, "complete": False}
    seeds = [json.dumps(record | {"left_out": rows}).encode() for rows in ([], [0])]

    def read(path: Path) -> None:
        for old in path.parent.glob("dev_*.npy"):
            old.unlink()
        for name, width in (("ims", 3), ("boxes", 4)):
            write_array(path.parent / f"dev_{name}.npy.new", np.zeros((1, 36, width), np.float32))
        (path.parent / "dev_caps.txt").write_text("a man\n" * 10)
        (path.parent / "dev_ids.txt").write_text("a\nb\n")
        resumed = Extraction(path.parent, "dev", NAMES)
        resumed.begin(about, [(36, 3), (36, 4)], overwrite=False)
        if not resumed.complete:
            left = 2 - resumed.done
            resumed.put(left, [np.zeros((left, 36, 3)), np.zeros((left, 36, 4))], [])
            resumed.finish()

    return by_bytes("dev_regions.json", seeds, read)


def image(folder: Path) -> Reader:
    pixels = Image.fromarray(np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3))
    kinds = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
    for kind in kinds:
        pixels.save(folder / kind, format=kind)
    return by_bytes("image", [(folder / kind).read_bytes() for kind in kinds], read_image)


def search_index(folder: Path) -> Reader:
    """Read a record and names whose checksums fit: else no more would be read."""
    about = {"model_path": ["a", "b"], "first_stage": None, "bert_path": "c"}
    places = about | {"images": "d", "weights": ""}
    about |= {"backbone": {"model": "hf"}, "precision": None, "dtype": "float16", "batch_size": 2}
    about |= {"images": digest_of(list(NAMES)), "captions": digest_of([])}
    done, faiss = {"done": 2, "left_out": [1]}, {"factory": "Flat", "sha256": "e"}
    Record(about, places, "index", done, None, faiss, True).write(folder)
    (folder / "names.json").write_text(json.dumps(list(NAMES)))

    def read(path: Path) -> None:
        with suppress(ValueError, TypeError, AttributeError):
            content = json.loads(path.read_text())
            rest = {k: v for k, v in content.items() if k not in ("format", "sha256")}
            path.write_text(json.dumps(content | {"sha256": digest_of(rest)}))
        record = Record.read(path.parent)
        if record.images:
            Part(folder, {}).names(record.about["images"], record.images)

    return by_bytes(RECORD, [(folder / RECORD).read_bytes()], read)


def simple(name: str, seed: bytes, read: Callable[[Path], Any]) -> Callable[[Path], Reader]:
    return lambda folder: by_bytes(name, [seed], read)


WORD_IDS = {word: i for i, word in enumerate((BERT / "vocab.txt").read_text().split())}
TOKENIZER = {"version": "1.0", "model": {"type": "WordPiece", "vocab": WORD_IDS}}
FLAGS = {"do_lower_case": False, "strip_accents": None, "tokenize_chinese_chars": True}
SESSION = {"resumed_at": [1, 2], "earlier": [{"commit": "a"}], "seconds": 3.5, "options": {"a": 1}}
READERS: dict[str, Callable[[Path], Reader]] = {
    "official_checkpoint": lambda folder: by_values(
        "x", GOLDEN / "checkpoint.pth.tar", lambda path: load_model(path, BERT)
    ),
    "native_checkpoint": native_checkpoint,
    "resume": resume,
    "newest": lambda folder: by_bytes(
        NEWEST, [trained(folder)[0].read_bytes()], lambda path: _newest_whole(path.parent)
    ),
    "arrays_checkpoint": arrays_checkpoint,
    "bert_weights": lambda folder: bert_file(folder, "pytorch_model.bin"),
    "bert_arrays": lambda folder: bert_file(folder, "model.safetensors"),
    "bert_sizes": lambda folder: bert_file(folder, "bert_config.json"),
    "bert_words": simple("vocab.txt", (BERT / "vocab.txt").read_bytes(), read_words),
    "bert_tokenizer": simple("tokenizer.json", json.dumps(TOKENIZER).encode(), read_words),
    "bert_flags": simple("tokenizer_config.json", json.dumps(FLAGS).encode(), read_words),
    "bert_index": bert_index,
    "captions": simple("dev_caps.txt", (DATA / "dev_caps.txt").read_bytes(), read_split),
    "features": simple("dev_ims.npy", (DATA / "dev_ims.npy").read_bytes(), read_split),
    "scores": scores,
    "score_part": score_part,
    "ids": simple("dev_ids.txt", b"a\nb\n3\n", lambda path: read_ids(path, images=3)),
    "names": simple(
        "id_mapping.json", json.dumps(NAMES).encode(), lambda path: read_names(path.parent)
    ),
    "annotations": annotations,
    "caption_files": captions_of_lines,
    "tsv": tsv,
    "array_files": array_files,
    "extraction": extraction,
    "image": image,
    "search_index": search_index,
    "run_json": simple("run.json", json.dumps(SESSION).encode(), _earlier_sessions),
}
