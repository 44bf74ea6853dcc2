"""array_files.py — a folder with one .npz or .npy file an image as a source of region features."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError, require
from common.files import map_array, require_regular_file, sha256_of
from common.memory import is_oom
from common.numbers import is_feature
from scripts.parts.images import find_images
from scripts.parts.regions import Arrays

FEATURES, BOXES, COUNT = ("x", "features"), ("bbox", "boxes"), ("num_bbox",)  # in a .npz file
LARGEST_ARRAY = 2**28  # bytes; 100 regions of 2048 numbers are 1 MB
MOST_REGIONS = 1000  # where there are more, columns are the regions


class ArrayFiles:
    """One file an image, called like its key: `keys` are these names by id, without ending.

    A .npz file holds features and perhaps boxes, a .npy file features. All have the shapes of the
    first; `encode` raises InputError otherwise. Raises InputError if none can be read.
    """

    def __init__(self, folder: Path, keys: Mapping[str, str]) -> None:
        npz, npy = (
            find_images(folder, {key: name + ending for key, name in keys.items()})
            for ending in (".npz", ".npy")
        )
        self.files = {key: npy[key] if npy[key].exists() else npz[key] for key in keys}
        there = [key for key, path in self.files.items() if path.exists()]
        problem = f"{folder}: no {next(iter(npz.values())).name}, nor files of other images"
        require(bool(there), f"{problem}; expected .npz or .npy files, called as --key says")
        digest, errors = hashlib.sha256(), []
        for key in there:
            is_one = self.files[key] == npz[key] or not npz[key].exists()
            require(is_one, f"{npy[key]}: {npz[key].name} is there too; expected one of them")
            digest.update(f"{key} {sha256_of(self.files[key])}\n".encode())
        self.about = {"model": "npz", "weights": digest.hexdigest()}
        for key in there:
            try:
                self.first, arrays = self.read(key)
            except InputError as error:
                errors.append(error)
            else:
                self.shapes = [array.shape for array in arrays]
                return
        raise errors[0]

    def read(self, key: str) -> tuple[Path, Arrays]:
        """Return an image's file and its features, and boxes if it has any. Raises InputError."""
        path = self.files[key]
        features, *boxes = arrays = read_arrays(path)
        is_table = features.ndim == 2 and features.size > 0 and len(features) <= MOST_REGIONS
        is_table = is_table and all(array.shape == (len(features), 4) for array in boxes)
        problem = f"{path}: arrays of {[array.shape for array in arrays]}"
        require(is_table, f"{problem}; expected features (regions, width), boxes (regions, 4)")
        is_right = features.dtype.kind == "f" and all(map(is_feature, arrays))
        problem = f"{path}: {features.dtype} numbers that are no features, or no boxes"
        require(is_right, f"{problem}; expected floats, up to 1e6")
        return path, tuple(array.astype(np.float32) for array in arrays)

    def encode(self, items: Sequence[tuple[Path, Arrays]]) -> Arrays:
        """Return features, and boxes if there are any, as the files have them, float32."""
        for path, arrays in items:
            shapes = [array.shape for array in arrays]
            problem = f"{path}: arrays of {shapes}, but {self.shapes} in {self.first}"
            require(shapes == self.shapes, f"{problem}; expected one number of regions")
        return tuple(map(np.stack, zip(*(arrays for _, arrays in items), strict=True)))


def read_arrays(path: Path) -> list[np.ndarray]:
    """Return the features of a file, and the boxes if it holds any. Raises InputError."""
    if path.suffix == ".npy":
        return [np.array(map_array(path, "features, a .npy file"))]
    expected = f"a .npz file with {' or '.join(FEATURES)}, and {' or '.join(BOXES)}"
    require_regular_file(path, expected)
    try:
        # The file is opened here, since numpy forgets to close a damaged one.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return _read_npz(arrays)
    except Exception as error:  # numpy and zipfile raise errors of many types
        if is_oom(error):
            raise
        reason = str(error) or type(error).__name__
        raise InputError(f"{path}: {reason}; expected {expected}") from error


def _read_npz(arrays: Any) -> list[np.ndarray]:
    features, boxes, count = [_read_one(arrays, names) for names in (FEATURES, BOXES, COUNT)]
    if features is None:
        raise ValueError(f"holds {', '.join(arrays.files)}")
    found = [array for array in (features, boxes) if array is not None]
    if count is None:
        return found
    end = int(count.item())
    if features.shape[1:] == (end,) != features.shape[:1]:
        found[0] = features.T  # as the files of openvqa have it
    if not 0 < end <= min(map(len, found)):
        raise ValueError(f"{COUNT[0]} is {end}, but arrays are of {[x.shape for x in found]}")
    return [array[:end] for array in found]  # rows behind it are padding


def _read_one(arrays: Any, names: Sequence[str]) -> Any:
    """Return the first of the named arrays that a .npz file holds, or None."""
    name = next((name for name in names if name in arrays.files), None)
    if name is None:
        return None
    size = arrays.zip.getinfo(f"{name}.npy").file_size  # known before memory is taken
    if size > LARGEST_ARRAY:
        raise ValueError(f"{name} has {size} bytes")
    return arrays[name]
