"""score_parts.py — files of some rows of a score matrix, for jobs that know nothing of each other.

A part is a safetensors file: no reader takes it for a whole matrix, a `.npy` file. Its metadata say
what it is a part of. Imports no torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.errors import InputError, require
from common.files import explain_os_errors, require_regular_file, write_bytes
from common.world import World

FORMAT = "dime-scores-1"
SUFFIX = ".safetensors"
WANTED = "a part of a score matrix, as evaluate_models.py --part writes it"
ROW_BLOCK = 256  # rows in memory at a time
# What all parts of a matrix share: SHA-256 of each model, its BERT and the data, and more.
COMMON = ("models", "berts", "data", "directions", "precisions", "count", "images", "captions")


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
