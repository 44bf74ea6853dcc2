"""Fuzzing of the readers: whatever a file holds, only the project's own error comes out.

    python -m tests.fuzz --inputs 100000 --json results/reliability.json    # hours; by hand
    python -m tests.fuzz --inputs 1000 --only captions       # one reader; others' reports stay

Each input is a golden file, or one made from it, with bytes or values changed. A reader that lets
another error out, takes longer than SLOWEST or more memory than MEMORY has a fault. Each reader is
fuzzed in a process of its own, so that a crash of a library is found, too.
"""

import hashlib
import io
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from checkpoint.bert import Bert, load_bert
from checkpoint.checkpoint import build_model, json_beside, load_model, read_checkpoint
from common import cli as options
from common import provenance
from common.errors import InputError
from common.layout import images_digest, read_ids, read_names
from common.torch_files import write_torch
from data import Split, TrainingBatches
from evaluation import map_scores
from model import DIME
from scripts import convert_checkpoint, prepare_captions
from scripts.extract_regions import Extraction
from scripts.parts.images import read_image
from scripts.parts.regions import Tsv
from tests import conftest
from tests.conftest import tsv_row
from training import log as runlog
from training.config import TrainConfig
from training.loop import Trainer
from training.resume import NEWEST, _newest_whole
from vocab import Vocabulary

log = logging.getLogger("fuzz")

SLOWEST = 5.0  # seconds that one input may take
MEMORY = 2**30  # bytes that a reader may take beyond what its process has
GOLDEN = conftest.GOLDEN / "i2t"
DATA = GOLDEN / "data/f30k_precomp"
BERT = GOLDEN / "bert"
WIDTH = 20  # of the golden features
NAMES = {"a": "a.png", "b": "x/b.png"}  # of pictures


@dataclass(frozen=True)
class Options:
    inputs: Annotated[int, "inputs for each reader"] = 1000
    only: Annotated[list[str] | None, "readers, by name"] = None
    json: Annotated[str | None, "file whose part 'fuzz' is to hold the report"] = None


# What fuzzing has found so far, each with a test of its own since.
MENDED = {
    "features": ["tokenize.TokenError from numpy's reader of headers"],
    "picture": ["4 GB asked for where a part of a PNG claimed them"],
    "published_checkpoint": ["4 GB taken where a text of the pickle claimed them"],
    "resume": [
        "RuntimeError where an option or a count was a tensor",
        "the text of a list that holds itself many times over, in an error's line",
    ],
}


# Changing bytes

NUMBERS = [0, 1, -1, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64]
WORDS = [b"", b"\0", b"\n", b"\r", b"\xff", b"\xe2\x80\xa8", b"[", b"{", b'"', b"-1", b"1e999"]
WORDS += [b"\xed\xa0\x80", b"\x85" * 50, b"q\x00h\x00\x86" * 40, b"u", b"b", b"R", b"Q", b"t."]
WORDS += [b"NaN", b"null", b"9" * 30, b"PK\x05\x06", b"PK\x03\x04", b"cos\nsystem\n", b"(F4)", b"O"]
CHANGES = ("bit", "bytes", "number", "word", "insert", "delete", "double", "cut", "swap")
change = st.tuples(
    st.sampled_from(CHANGES),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=12),
)


def changed(data: bytes, changes: list[tuple[str, int, int, bytes]]) -> bytes:
    """`data` with some bytes changed."""
    for kind, where, what, extra in changes:
        at = where % (len(data) + 1)
        stop = min(len(data), at + 1 + what % 40)
        if kind == "bit" and at < len(data):
            extra, stop = bytes([data[at] ^ 1 << what % 8]), at + 1
        elif kind == "number":
            number, size = NUMBERS[what % len(NUMBERS)], (1, 2, 4, 8)[where % 4]
            extra = (number % 256**size).to_bytes(size, "little")
            stop = min(len(data), at + size)
        elif kind == "word":
            extra = WORDS[what % len(WORDS)]
            stop = min(len(data), at + len(extra) * (where % 2))
        elif kind == "insert":
            stop = at
        elif kind == "delete":
            extra = b""
        elif kind == "double":
            extra = data[at:stop] * 2
        elif kind == "swap":
            extra = data[at:stop][::-1]
        elif kind == "cut":
            extra, stop = b"", len(data)
        data = data[:at] + extra + data[stop:]
    return data


# Changing values


def laughs() -> list[Any]:
    """A list whose text would fill any memory."""
    found: list[Any] = ["ha"]
    for _ in range(40):
        found = [found, found]
    return found


def dressed() -> OrderedDict[str, Any]:
    """A dictionary with attributes in place of its functions."""
    found: OrderedDict[str, Any] = OrderedDict(a=1)
    vars(found).update(get=3, pop=None, values="x")
    return found


ODD: list[Callable[[], Any]] = [
    *(lambda v=v: v for v in (None, True, -1, 0, 3, 2**63, 10**30, 0.5, 1e308, "", "x" * 50)),
    *(lambda v=v: v for v in (float("nan"), float("inf"), b"x", 1j, [], {}, (), [[]], {"a": {}})),
    *(lambda v=v: v for v in ("a\0b", "a\ud800", "\x1b[2J", -(10**400), ("a", ("b",)))),
    laughs,
    dressed,
    lambda: torch.zeros(0),
    lambda: torch.zeros(3),
    lambda: torch.tensor(3.0),
    lambda: torch.full((2, 2), torch.nan),
    lambda: torch.zeros(3, dtype=torch.int64),
    lambda: torch.zeros(5, dtype=torch.uint8),
    lambda: torch.zeros(2, dtype=torch.complex64),
    lambda: torch.zeros(1).expand(2**40),
    lambda: torch.zeros(2, device="meta"),
    lambda: torch.nn.Parameter(torch.zeros(4)),
]
value_change = st.tuples(
    st.lists(st.integers(0, 2**16), max_size=6),
    st.integers(0, len(ODD) - 1),
    st.sampled_from(("set", "remove", "rename", "reshape", "type")),
)


def replaced(content: Any, path: list[int], odd: int, kind: str) -> Any:
    """Plain data with a value somewhere in it replaced; `path` says where."""
    if path and isinstance(content, dict) and content:
        key = list(content)[path[0] % len(content)]
        if len(path) == 1 and kind in ("remove", "rename"):
            rest = {k: v for k, v in content.items() if k != key}
            return rest if kind == "remove" else rest | {f"{key}x": content[key]}
        return content | {key: replaced(content[key], path[1:], odd, kind)}
    if path and isinstance(content, list) and content:
        at = path[0] % len(content)
        inner = replaced(content[at], path[1:], odd, kind)
        return [*content[:at], inner, *content[at + 1 :]]
    if kind == "reshape" and isinstance(content, torch.Tensor) and content.numel() < 10**6:
        return content.unsqueeze(0) if odd % 2 else content.double()
    if kind == "type" and isinstance(content, torch.Tensor) and content.numel() < 10**6:
        kinds = (torch.bool, torch.int64, torch.complex64, torch.float16, torch.uint16)
        parameter = odd % 6 == 0 and content.is_floating_point()
        return torch.nn.Parameter(content) if parameter else content.to(kinds[odd % len(kinds)])
    return ODD[odd]()


# Readers. Each takes a folder that is its own, and the changes, and gives what it read.

Reader = Callable[[Path, list, list], Any]


def by_bytes(name: str, seeds: list[bytes], read: Callable[[Path], Any]) -> Reader:
    """A reader of a file of that name, whose bytes are changed."""

    def reader(folder: Path, changes: list, values: list) -> Any:
        data = changed(seeds[len(values) % len(seeds)], changes)
        (folder / name).write_bytes(data)
        return read(folder / name)

    return reader


def by_values(name: str, seed: Path, read: Callable[[Path], Any]) -> Reader:
    """A reader of a torch file of that name, whose values are changed, or its bytes, or both.

    It is written with a checksum, or without one, in the new format or the old.
    """
    content, data = torch_content(seed), seed.read_bytes()

    def reader(folder: Path, changes: list, values: list) -> Any:
        path, new = folder / name, content
        for place, odd, kind in values:
            new = replaced(new, place, odd, kind)
        if values and len(changes) % 3 == 0:
            write_torch(path, new)
        elif values:
            torch.save(new, path, _use_new_zipfile_serialization=len(values) % 2 == 0)
        if not values or len(changes) % 3 == 1:
            path.write_bytes(changed(path.read_bytes() if values else data, changes))
        return read(path)

    return reader


def torch_content(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def own_checkpoint(folder: Path) -> Path:
    """A checkpoint of a training on tiny data, as it is written in the middle of an epoch."""
    trainer = tiny_trainer(folder)
    for position in range(2):
        trainer.train_step.step(trainer.batches[0, position])
    trainer.state = replace(trainer.state, position=2, step=2)
    trainer.config.folder.mkdir(parents=True, exist_ok=True)
    trainer._save(NEWEST)
    return trainer.config.folder / NEWEST


def tiny_trainer(folder: Path) -> Trainer:
    if not (folder / "data").exists():
        conftest.write_tiny(folder)
    config = options.parse(TrainConfig, conftest.tiny_train(folder), "")
    bert = load_bert(folder / "bert")
    split = Split.open(folder / "data/tiny", "train", config.img_dim, training=True)
    config = replace(config, img_dim=split.img_dim)
    batches = TrainingBatches(split, bert.vocabulary, config, config.max_words, False)
    model = DIME(config, bert.model)
    return Trainer(config, model, bert, batches, split, torch.device("cpu"))


def resumed(trainer: Trainer, path: Path) -> None:
    try:
        trainer.restore(read_checkpoint(path))
        trainer.train_step.step(trainer.batches[0, 0])
    finally:  # what a refused checkpoint left half done goes with its program
        trainer.train_step.optimizer.state.clear()


def captions_of(path: Path, vocabulary: Vocabulary) -> None:
    split = Split.open(path.parent, "dev", WIDTH)
    vocabulary.encode(split.captions, 12)


def features_of(path: Path) -> None:
    split = Split.open(path.parent, "dev", WIDTH)
    split.regions(split.image_rows(np.arange(min(3, split.images))))


def rows_of_tsv(path: Path) -> None:
    source = Tsv([path], False)
    for key in source.reader.rows:
        source.reader(key)


def extraction_of(path: Path) -> None:
    """Goes on from a record; what that made of its folder is gone before the next one."""
    folder, about = path.parent, {"dtype": "float16", "model": "tsv"}
    (folder / "dev_caps.txt").write_text("a man\n" * 10)
    (folder / "dev_ids.txt").write_text("a\nb\n")
    for name in ("dev_ims.npy", "dev_boxes.npy"):
        for ending in ("", ".extracting", ".new"):
            (folder / f"{name}{ending}").unlink(missing_ok=True)
    extraction = Extraction(folder, "dev", NAMES, False)
    extraction.begin(about, 3)
    if not extraction.complete:
        extraction.put([0, 1], np.zeros((2, 36, 3)), np.zeros((2, 36, 4)))
        extraction.finish()


def pictures_of(kind: str) -> bytes:
    """A small picture."""
    buffer = io.BytesIO()
    levels = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)
    Image.fromarray(levels).save(buffer, format=kind)
    return buffer.getvalue()


def cut_metrics(path: Path) -> None:
    runlog._keep_lines(path, lambda line: runlog._is_event_until(line, 3, False))
    for line in path.read_bytes().split(b"\n")[:-1]:
        assert json.loads(line)["step"] <= 3


def cut_log(path: Path) -> None:
    runlog._keep_lines(path, lambda line: runlog._is_log_until(line, 3))


def command_line(folder: Path, changes: list, values: list) -> None:
    known = " ".join(conftest.tiny_train(folder)).encode()
    argv = changed(known, changes).decode("utf-8", "replace").split(" ")
    if not {"-h", "--help"} & set(argv):
        options.parse(TrainConfig, argv, "")


def readers(folder: Path) -> dict[str, Callable[[], Reader]]:
    """Every reader, made when it is needed."""
    tiny = folder / "tiny"
    tiny.mkdir()
    for name in ("bert_weights", "bert_arrays", "bert_sizes", "bert_words"):
        shutil.copytree(BERT, folder / name)
    for name in ("captions", "features"):
        shutil.copytree(DATA, folder / name)
    weights = torch_content(BERT / "pytorch_model.bin")
    arrays = folder / "bert_arrays"
    save_file({k: v.contiguous() for k, v in weights.items()}, arrays / "model.safetensors")
    (arrays / "pytorch_model.bin").unlink()
    shutil.rmtree(folder / "bert_sizes")
    shutil.copytree(arrays, folder / "bert_sizes")  # read in a quarter of the time
    vocabulary = Vocabulary.load(BERT)

    def own() -> Reader:
        path, bert = own_checkpoint(tiny), load_bert(tiny / "bert")
        content = torch_content(path)
        write_torch(path, content | {"optimizer": {}})
        return by_values("x", path, lambda path: build_model(read_checkpoint(path), bert))

    def resume() -> Reader:
        path, trainer = own_checkpoint(tiny), tiny_trainer(tiny)
        return by_values("x", path, lambda path: resumed(trainer, path))

    def newest() -> Reader:
        path = own_checkpoint(tiny)
        return by_bytes(NEWEST, [path.read_bytes()], lambda path: _newest_whole(path.parent))

    def converted() -> Path:
        """The golden checkpoint as convert_checkpoint writes it: x.safetensors and x.json."""
        path, (_, bert, checkpoint) = folder / "x.safetensors", conftest.Case(GOLDEN).load()
        convert_checkpoint.write_arrays(path, checkpoint, bert)
        return path

    def arrays_checkpoint() -> Reader:
        path, bert = converted(), load_bert(BERT)
        about = json.loads(json_beside(path).read_text())

        def read(path: Path) -> None:  # a checksum that fits, or none of the rest were reached
            about["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            json_beside(path).write_text(json.dumps(about))
            build_model(read_checkpoint(path), bert)

        return by_bytes(path.name, [path.read_bytes()], read)

    def arrays_json() -> Reader:
        path, bert = converted(), load_bert(BERT)

        def read(beside: Path) -> None:
            build_model(read_checkpoint(shutil.copy(path, beside.parent)), bert)

        return by_bytes(json_beside(path).name, [json_beside(path).read_bytes()], read)

    def of_bert(path: Path) -> Bert:
        return load_bert(path.parent)

    said_of = [{"raw": "a man", "tokens": ["a", "man"]}] * 5
    karpathy = {"imgid": 3, "filename": "a.jpg", "split": "val", "sentences": said_of}
    coco = {"images": [{"id": 7, "file_name": "COCO_val2014_000000000007.jpg"}]}
    coco |= {"annotations": [{"image_id": 7, "id": n, "caption": "a man"} for n in range(5)]}
    annotations = [json.dumps(x).encode() for x in ({"images": [karpathy] * 2}, coco)]
    about = {"dtype": "float16", "model": "tsv", "ids": images_digest(list(NAMES), NAMES)}
    records = [
        json.dumps({"about": about, "rows": 0, "left_out": out, "complete": False}).encode()
        for out in ([], [1])
    ]
    run = json.dumps(
        {
            "resumed_at": [1, 2],
            "earlier": [{"commit": "a"}],
            "seconds": 3.5,
            "options": {"a": [None]},
        }
    ).encode()
    lines = b"".join(b'{"step": %d, "Le": 0.5, "rsum": 3}\n' % step for step in range(1, 6))
    said = b"".join(b"2026-01-01 10:00:00,000 [%d] epoch 0\n" % step for step in range(1, 6))
    return {
        "published_checkpoint": lambda: by_values(
            "x", GOLDEN / "checkpoint.pth.tar", lambda path: load_model(path, BERT)
        ),
        "own_checkpoint": own,
        "resume": resume,
        "newest": newest,
        "arrays_checkpoint": arrays_checkpoint,
        "arrays_json": arrays_json,
        "bert_weights": lambda: by_values("pytorch_model.bin", BERT / "pytorch_model.bin", of_bert),
        "bert_arrays": lambda: by_bytes(
            "model.safetensors",
            [(arrays / "model.safetensors").read_bytes()],
            of_bert,
        ),
        "bert_sizes": lambda: by_bytes(
            "bert_config.json", [(BERT / "bert_config.json").read_bytes()], of_bert
        ),
        "bert_words": lambda: by_bytes(
            "vocab.txt",
            [(BERT / "vocab.txt").read_bytes()],
            lambda path: Vocabulary.load(path.parent).encode(["a man [UNK] 犬 runs!", ""], 9),
        ),
        "captions": lambda: by_bytes(
            "dev_caps.txt",
            [(DATA / "dev_caps.txt").read_bytes()],
            lambda path: captions_of(path, vocabulary),
        ),
        "features": lambda: by_bytes(
            "dev_ims.npy", [(DATA / "dev_ims.npy").read_bytes(), small_array()], features_of
        ),
        "scores": lambda: by_bytes("s.npy", [saved(np.ones((2, 10), np.float32))], map_scores),
        "ids": lambda: by_bytes(
            "dev_ids.txt", [b"a\nb\n3\n"], lambda path: read_ids(path, images=3)
        ),
        "names": lambda: by_bytes(
            "id_mapping.json", [json.dumps(NAMES).encode()], lambda path: read_names(path.parent)
        ),
        "annotations": lambda: by_bytes("captions_val.json", annotations, prepare_captions.read),
        "tsv": lambda: by_bytes("x.tsv", [tsv_row("a", 0) + tsv_row("b", 1)], rows_of_tsv),
        "extraction": lambda: by_bytes("dev_regions.json", records, extraction_of),
        "picture": lambda: by_bytes(
            "picture",
            [pictures_of(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")],
            read_image,
        ),
        "run_json": lambda: by_bytes("run.json", [run], runlog._earlier_sessions),
        "metrics": lambda: by_bytes("metrics.jsonl", [lines], cut_metrics),
        "train_log": lambda: by_bytes("train.log", [said], cut_log),
        "command_line": lambda: command_line,
    }


def small_array() -> bytes:
    """An array whose header is most of the file."""
    rows = len((DATA / "dev_caps.txt").read_text().splitlines()) // 5
    return saved(np.zeros((rows, 1, WIDTH), np.float16))


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def fuzz(name: str, inputs: int, folder: Path, memory: int = 0) -> dict[str, Any]:
    """Try one reader; what came of it, with `faults` for what must not come of it."""
    commit = provenance.commit()  # of what is loaded; the tree may go on meanwhile
    reader, room = readers(folder)[name](), folder / name
    room.mkdir(exist_ok=True)
    logging.disable(logging.WARNING)
    found: dict[str, Any] = {"inputs": 0, "read": 0, "refused": 0, "slowest_seconds": 0.0}
    faults: dict[str, str] = {}
    if memory:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(change, max_size=6), st.lists(value_change, max_size=4))
    def one(changes: list, values: list) -> None:
        found["inputs"] += 1
        since = time.monotonic()
        try:
            reader(room, changes, values)
            found["read"] += 1
        except InputError:
            found["refused"] += 1
        except Exception as error:  # the faults that are sought
            where = traceback.extract_tb(error.__traceback__)[-1]
            key = f"{type(error).__name__}: {str(error)[:200]}"
            faults.setdefault(f"{where.filename.rpartition('/')[2]}:{where.lineno}", key)
        seconds = time.monotonic() - since
        found["slowest_seconds"] = round(max(seconds, found["slowest_seconds"]), 3)
        if seconds > SLOWEST:
            faults.setdefault(f"{seconds:.0f} seconds", f"{changes} {values}")

    since = time.monotonic()
    try:
        one()
    finally:
        logging.disable(logging.NOTSET)
    found["seconds"] = round(time.monotonic() - since, 1)
    found["peak_memory_bytes"] = runlog.peak_memory(torch.device("cpu"))
    faults_found = [f"{where}: {what}" for where, what in faults.items()]
    more = {"mended": MENDED.get(name, []), "commit": commit, "torch": torch.__version__}
    return found | {"faults": faults_found} | more


def apart(name: str, inputs: int) -> dict[str, Any]:
    """The same in a process of its own, whose crash is a fault like others."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, "-m", "tests.fuzz", "--inputs", str(inputs)]
        done = subprocess.run([*command, "--only", name, "--json", str(path)], check=False)
        if not path.exists():
            none = {"read": 0, "refused": 0, "slowest_seconds": 0.0, "seconds": 0.0, "mended": []}
            fault = f"a library ended the process with status {done.returncode}"
            return {"inputs": inputs, **none, "faults": [fault]}
        return json.loads(path.read_text())["fuzz"]["readers"][name]


def main() -> None:
    chosen = options.parse(Options, None, __doc__)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        names = chosen.only or list(readers(Path(folder)))
    if len(names) == 1:
        with tempfile.TemporaryDirectory() as folder:
            found = {names[0]: fuzz(names[0], chosen.inputs, Path(folder), MEMORY)}
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            tried = pool.map(lambda name: apart(name, chosen.inputs), names)
            found = dict(zip(names, tried, strict=True))
    for name, result in found.items():
        log.info("%s: %s", name, result)
    if chosen.json:
        path = Path(chosen.json)
        before = json.loads(path.read_text()).get("fuzz", {}) if path.exists() else {}
        conftest.report("fuzz", {"readers": before.get("readers", {}) | found}, path)
    sys.exit(any(result["faults"] for result in found.values()))


if __name__ == "__main__":
    options.run(main)
