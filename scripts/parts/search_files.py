"""search_files.py — the folder of a search index: its record, and arrays with a row for each item.

    index.json             what the rows depend on, where that is, how many rows are done
    images/names.json      files, relative to the folder of the images, in the order of the rows
    images/tokens_0.npy    regions as the first model encodes them (rows, regions, embed_size)
    images/pooled_0.npy    whole images (rows, embed_size); tokens_1 and pooled_1: a second model
    images/boxes.npy       boxes of the regions (rows, regions, 4), in pixels of the upright image
    images/vectors.npy     vectors of the first stage (rows, embed_size)
    images/vectors.faiss   the same as a FAISS index
    sentences/             the same of sentences, with mask_0.npy, and without boxes and FAISS

Imports no torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

import numpy as np

from common.config import Precision
from common.errors import InputError, require, summarise
from common.files import explain_os_errors, map_array, read_json, read_text, write_json
from common.layout import check_backbone
from scripts.parts.growing import GrowingArray, Shape

FORMAT = "dime-search-1"
WANTED = "a search index, as `scripts.search index` writes it"
RECORD, NAMES, FAISS = "index.json", "names.json", "vectors.faiss"
FILES = ("tokens_*.npy", "pooled_*.npy", "mask_*.npy", "boxes.npy", "vectors.npy", NAMES, FAISS)
REPAIR = "`index` with --overwrite makes it anew"

Kind = Literal["images", "sentences"]
Specs = Mapping[str, tuple[Shape, np.dtype]]  # shape of a row, and type, of each array


def digest_of(content: Any) -> str:
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


DONE = {"done": int, "left_out": [int]}
MODELS = {"model_path": [str], "first_stage": (str, NoneType), "bert_path": str}
SHAPE = {  # of a record, by the names of its fields
    "about": {
        **MODELS,
        **{"backbone": dict, "images": str, "captions": str},
        **{"precision": (str, NoneType), "dtype": str, "batch_size": int},
    },
    "places": {**MODELS, "images": str, "weights": str},
    "command": str,
    "images": (DONE, NoneType),
    "sentences": (DONE, NoneType),
    "faiss": ({"factory": str, "sha256": str}, NoneType),
    "complete": bool,
}


def _has_shape(value: Any, shape: Any) -> bool:
    """Whether JSON is of a type, of one of a tuple, a list of it, or has these names."""
    if isinstance(shape, tuple):
        return any(_has_shape(value, each) for each in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_has_shape(each, shape[0]) for each in value)
    if isinstance(shape, dict):
        has_names = isinstance(value, dict) and value.keys() == shape.keys()
        return has_names and all(_has_shape(value[name], shape[name]) for name in shape)
    return type(value) is shape


def _is_record(content: dict[str, Any]) -> bool:
    """Whether the content of a file is that of a record."""
    if not _has_shape(content, SHAPE):
        return False
    about, places = content["about"], content["places"]
    both = [(each["model_path"], each["first_stage"]) for each in (about, places)]
    counts = [(len(paths), first is None) for paths, first in both]
    done = [each for each in (content["images"], content["sentences"]) if each]
    return (
        counts[0] == counts[1]
        and counts[0][0] > 0
        and about["precision"] in (None, *get_args(Precision))
        and about["dtype"] in ("float16", "float32")
        and all(0 <= len(each["left_out"]) <= each["done"] for each in done)
        and (content["images"] is not None or not content["complete"])
    )


@dataclass(frozen=True)
class Record:
    """What `index.json` holds."""

    about: dict[str, Any]  # what the rows depend on, by the option that chooses it
    places: dict[str, Any]  # absolute paths of models, BERT, weights and images, which may change
    command: str  # that finishes the index
    images: dict[str, Any] | None = None  # how many are done, and which of them are left out
    sentences: dict[str, Any] | None = None
    faiss: dict[str, str] | None = None  # factory string, and SHA-256 of the file
    complete: bool = False

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Read the record of an index. Raises InputError if there is none, or it was changed."""
        path = folder / RECORD
        content = read_json(path, WANTED)
        require(content.pop("format", None) == FORMAT, f"{path}: expected {WANTED} ({FORMAT})")
        is_whole = content.pop("sha256", None) == digest_of(content)
        require(is_whole, f"{path}: is damaged: its SHA-256 is another one; {REPAIR}")
        require(_is_record(content), f"{path}: expected {WANTED}")
        check_backbone(content["about"]["backbone"], path)
        return cls(**content)

    def write(self, folder: Path) -> None:
        """Write the record, with the SHA-256 of its content."""
        content = asdict(self)
        write_json(folder / RECORD, {"format": FORMAT, "sha256": digest_of(content)} | content)

    def rows(self, kind: Kind) -> int:
        """Return the number of rows of a part, none if it is not there."""
        done = getattr(self, kind)
        return done["done"] - len(done["left_out"]) if done else 0

    def check_same(self, about: Mapping[str, Any], folder: Path) -> None:
        """Raise InputError if the index was begun with other options, models or files."""
        changed = [f"--{name}" for name in about if self.about.get(name) != about[name]]
        problem = f"{folder}: was begun with another {summarise(changed)}"
        require(not changed, f"{problem}; --overwrite begins again")


@dataclass(frozen=True)
class Part:
    """The images, or the sentences, of an index: names, and arrays with a row for each."""

    folder: Path
    specs: Specs

    @property
    def arrays(self) -> dict[str, GrowingArray]:
        """Each array by its name, to be written."""
        return {
            name: GrowingArray(self.folder / f"{name}.npy", shape, dtype)
            for name, (shape, dtype) in self.specs.items()
        }

    def clear(self) -> None:
        """Remove the files of an index, of any models; other files stay."""
        with explain_os_errors(self.folder, "a folder to write"):
            for pattern in FILES:
                for path in self.folder.glob(pattern):
                    path.unlink()

    def begin(self, names: Sequence[str]) -> None:
        """Write the names of all items, and arrays without rows."""
        with explain_os_errors(self.folder, "a folder to write"):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / NAMES, list(names))
        for array in self.arrays.values():
            array.begin()

    def resume(self, rows: int, record: Path) -> None:
        """Cut the arrays to `rows` rows, as `record` says. Raises InputError if one has fewer."""
        for array in self.arrays.values():
            array.resume(rows, record)

    def append(self, values: Mapping[str, np.ndarray]) -> None:
        """Append rows to each array."""
        for name, array in self.arrays.items():
            array.append(values[name])

    def finish(self, rows: int) -> None:
        """Make the files complete arrays of `rows` rows."""
        for array in self.arrays.values():
            array.finish(rows)

    def open(self, rows: int) -> dict[str, np.memmap]:
        """Open the arrays by memory map. Raises InputError if one is damaged, or not as long."""
        opened = {}
        for name, (shape, dtype) in self.specs.items():
            path = self.folder / f"{name}.npy"
            opened[name] = array = map_array(path, f"a part of a search index; {REPAIR}")
            is_same = (array.shape, array.dtype) == ((rows, *shape), dtype)
            problem = f"{path}: {array.dtype}, shape {array.shape}"
            require(is_same, f"{problem}; expected {dtype}, {(rows, *shape)}; {REPAIR}")
        return opened

    def names(self, digest: str, done: Mapping[str, Any]) -> list[str]:
        """Return the names of the rows. Raises InputError unless the file has this digest."""
        path = self.folder / NAMES
        try:
            names = json.loads(read_text(path, f"a part of a search index; {REPAIR}"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: is damaged: {error}; {REPAIR}") from error
        is_whole = digest_of(names) == digest and _has_shape(names, [str])
        require(is_whole, f"{path}: is damaged: its SHA-256 is another one; {REPAIR}")
        count, without = len(names), set(done["left_out"])
        require(count == done["done"], f"{path}: {count} names; expected {done['done']}; {REPAIR}")
        return [name for row, name in enumerate(names) if row not in without]
