"""search_first_stage.py — the best vectors for a query: of a matrix, or of a FAISS index.

A score is the product of two vectors of unit length.
"""

import logging
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.errors import InputError, require
from common.files import sha256_of, write_bytes
from common.memory import is_oom

BLOCK = 2**16  # rows of a matrix in memory at a time
# Of an inverted file's lists, those near the query are searched: with FAISS's default of 1 most
# answers would be missed.
LEAST_LISTS, SHARE_OF_LISTS = 8, 32
INSTALL = "pip install -r requirements-search.txt"

Found = tuple[np.ndarray, np.ndarray]  # rows [k] int64 and scores [k] float32, best first


class FirstStage(Protocol):
    """Vectors that can be searched."""

    def search(self, query: np.ndarray, count: int) -> Found:
        """Return the `count` best rows for a query `[D]` and their scores, best first."""


class Matrix:
    """Vectors `[n, D]`, all of which are compared with a query; also a memory map.

    `name` is their file, for messages.
    """

    def __init__(self, vectors: np.ndarray, name: str | Path = "the vectors") -> None:
        self.vectors, self.name = vectors, name

    def search(self, query: np.ndarray, count: int) -> Found:
        """Return the `count` best rows for a query `[D]` and their scores; of equals the first.

        Raises InputError if a vector holds NaN or infinity.
        """
        starts = range(0, len(self.vectors), BLOCK)
        scores = np.concatenate([self.vectors[first : first + BLOCK] @ query for first in starts])
        require(bool(np.isfinite(scores).all()), f"{self.name}: holds NaN or infinite numbers")
        rows = best_rows(scores, count)
        return rows, scores[rows]


def best_rows(scores: np.ndarray, count: int) -> np.ndarray:
    """Return where the `count` largest of scores `[n]` are, largest first; of equals the first."""
    rows = np.arange(len(scores))
    if count < len(scores):
        least = np.partition(scores, len(scores) - count)[len(scores) - count]
        above, equal = np.flatnonzero(scores > least), np.flatnonzero(scores == least)
        rows = np.concatenate([above, equal[: count - len(above)]])
    return rows[np.lexsort((rows, -scores[rows]))]


class Faiss:
    """A FAISS index in a file."""

    def __init__(self, path: Path, digest: str, rows: int, width: int) -> None:
        # A damaged file could end the process: FAISS reads it without checks.
        problem = f"{path}: is damaged: its SHA-256 is another one"
        require(sha256_of(path) == digest, f"{problem}; `index` makes it anew")
        self.index = import_faiss().read_index(str(path))
        shape, wanted = (self.index.ntotal, self.index.d), (rows, width)
        require(shape == wanted, f"{path}: {shape} rows and width; expected {wanted}")

    def search(self, query: np.ndarray, count: int) -> Found:
        """Return about the `count` best rows for a query `[D]`, and their approximate scores."""
        scores, rows = self.index.search(np.ascontiguousarray(query[None], np.float32), count)
        found = rows[0] >= 0  # the lists that were searched may hold fewer
        return rows[0][found], scores[0][found]


def import_faiss() -> Any:
    """Return the module. Raises InputError that names the package if it is missing."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it logs each try
    try:
        import faiss
    except ImportError as error:
        raise InputError(f"--faiss: {error}; {INSTALL}") from error
    return faiss


def new_faiss(factory: str, width: int) -> Any:
    """Return an empty FAISS index. Raises InputError if FAISS does not know the factory string."""
    faiss = import_faiss()
    try:
        return faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except Exception as error:
        raise InputError(
            f"--faiss {factory}: {_reason(error)}; expected a factory string"
        ) from error


def write_faiss(path: Path, factory: str, vectors: np.ndarray) -> str:
    """Write a FAISS index of vectors `[n, D]`; returns the SHA-256 of the file.

    Raises InputError if it cannot be trained with them, for they are too few say.
    """
    faiss, index = import_faiss(), new_faiss(factory, vectors.shape[1])
    try:
        index.train(np.ascontiguousarray(vectors, np.float32))
        for first in range(0, len(vectors), BLOCK):
            index.add(np.ascontiguousarray(vectors[first : first + BLOCK], np.float32))
    except Exception as error:
        if is_oom(error):
            raise
        problem = f"--faiss {factory}: {_reason(error)}"
        raise InputError(f"{problem}; expected another one for {len(vectors)} images") from error
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        inverted.nprobe = min(inverted.nlist, max(LEAST_LISTS, inverted.nlist // SHARE_OF_LISTS))
    write_bytes(path, faiss.serialize_index(index).data)
    return sha256_of(path)


def _reason(error: Exception) -> str:
    """Return what FAISS says: the last part of `Error in FUNCTION at FILE:LINE: REASON`."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[-1].split(": ", 2)[-1].strip()
