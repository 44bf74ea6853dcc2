"""score_files.py — saved score matrices, whole and in parts (SPEC §10). Imports no torch.

A matrix is a `.npy` file. A part has some of its rows, from a job that knows nothing of the others:
a safetensors file, which no reader takes for a matrix and whose metadata say what it is a part of.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.errors import InputError, require
from common.files import explain_os_errors, map_array, require_regular_file, write_bytes
from common.world import World

FORMAT = "dime-scores-1"
SUFFIX = ".safetensors"
NOT_FINITE = "the scores hold NaN or inf; expected finite numbers"
WANTED = "a part of a score matrix, as evaluate_models.py --part writes it"
ROW_BLOCK = 256  # rows in memory at a time
# What all parts of a matrix share: SHA-256 of each model, its BERT and the data, and more.
COMMON = ("models", "berts", "data", "directions", "precisions", "count", "images", "captions")


def map_scores(path: Path) -> np.ndarray:
    """Return a score matrix `[I, T]` by memory map. Raises InputError if it is not one."""
    if path.suffix == SUFFIX:
        raise InputError(f"{path}: expected a matrix; scripts/merge_scores.py makes one of parts")
    matrix = map_array(path, "a score matrix, a .npy file")
    if (
        matrix.ndim != 2
        or not matrix.shape[1] >= len(matrix) > 0
        or matrix.dtype not in (np.float16, np.float32, np.float64)  # in native byte order
    ):
        raise InputError(
            f"{path}: {matrix.dtype}, shape {matrix.shape}; expected floats in native byte order, "
            "shape (images, captions)"
        )
    for first in range(0, len(matrix), ROW_BLOCK):
        block = matrix[first : first + ROW_BLOCK]
        require(bool(np.isfinite(block).all()), f"{path}: {NOT_FINITE}")
    return matrix


def parse_part(text: str) -> World:
    """Return which part of how many `i/n` is. Raises InputError."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise InputError(f"--part {text}: expected i/n with i from 1 to n, like 2/8")
    return World(int(number) - 1, int(count))


def write_part(path: Path, rows: np.ndarray, about: Mapping[str, object]) -> None:
    """Write rows of scores and what they are of. Raises InputError if that fails."""
    metadata = {"format": FORMAT} | {name: str(value) for name, value in about.items()}
    write_bytes(path, save({"scores": np.ascontiguousarray(rows)}, metadata))


@dataclass(frozen=True)
class ScorePart:
    """A part in a file: consecutive rows of a matrix, from row `first` on."""

    path: Path
    common: dict[str, str]  # the values of COMMON
    number: int  # from 1 to `count`
    count: int
    shape: tuple[int, int]  # of the matrix: images, captions
    first: int
    stop: int

    @classmethod
    def open(cls, path: Path) -> "ScorePart":
        """Read what a part is of. Raises InputError if the file is damaged or no part."""
        require_regular_file(path, WANTED)
        try:
            with explain_os_errors(path, WANTED), safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                require(metadata.get("format") == FORMAT, f"{path}: expected {WANTED}")
                common = {name: metadata[name] for name in COMMON}
                sizes = ("number", "count", "images", "captions", "first")
                number, count, images, captions, first = (int(metadata[name]) for name in sizes)
                scores = file.get_slice("scores")
                rows, columns = scores.get_shape()
                is_right = (columns, scores.get_dtype()) == (captions, "F32")
                problem = f"{path}: {columns} columns of {scores.get_dtype()}"
                require(is_right, f"{problem}; expected {captions} of F32")
        except (SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path}: damaged ({error}); expected {WANTED}") from error
        return cls(path, common, number, count, (images, captions), first, first + rows)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the rows `[at most ROW_BLOCK, captions]`, by memory map."""
        count = self.stop - self.first
        with safe_open(self.path, "numpy") as file:
            rows = file.get_slice("scores")
            for first in range(0, count, ROW_BLOCK):
                yield rows[first : min(first + ROW_BLOCK, count)]


def check_whole(parts: Sequence[ScorePart]) -> list[ScorePart]:
    """Return the parts in order. Raises InputError unless they are one matrix, each row once."""
    by_number: dict[int, ScorePart] = {}
    reference = parts[0]
    for part in parts:
        for name, value in reference.common.items():
            if part.common[name] != value:
                problem = f"{part.path}: {name} {part.common[name][:12]}; expected {value[:12]}"
                raise InputError(f"{problem}, as in {reference.path}")
        other = by_number.setdefault(part.number, part)
        problem = f"{part.path}: part {part.number}, like {other.path}; expected each part once"
        require(other is part, problem)
    count, images = reference.count, reference.shape[0]
    missing = (number for number in range(1, count + 1) if number not in by_number)
    names = [f"{number}/{count}" for number in islice(missing, 3)]
    require(not names, f"{count - len(by_number)} parts are missing: {', '.join(names)}")
    ordered = [by_number[number] for number in sorted(by_number)]
    stop = 0
    for part in ordered:
        require(part.first == stop, f"{part.path}: first row {part.first}; expected {stop}")
        stop = part.stop
    require(stop == images, f"{ordered[-1].path}: last row {stop - 1}; expected {images - 1}")
    return ordered
