"""array_files.py — a folder with one .npz or .npy file an image as a source of region features."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.errors import InputError, require
from common.files import explain_os_errors, map_array, require_regular_file, sha256_of
from common.memory import is_oom
from scripts.parts.images import find_images
from scripts.parts.regions import Arrays, is_feature

FEATURES, BOXES, COUNT = ("x", "features"), ("bbox", "boxes"), "num_bbox"  # names in a .npz file
LARGEST_ARRAY = 2**28  # bytes; 100 regions of 2048 numbers are 1 MB


class ArrayFiles:
    """One file an image, called like its key: `keys` are these names by id, without ending.

    A .npz file holds features and boxes, a .npy file features alone. All have the shape of the
    first; `encode` raises InputError otherwise. Raises InputError if none can be read.
    """

    def __init__(self, folder: Path, keys: Mapping[str, str]) -> None:
        of_kind = [
            find_images(folder, {key: name + ending for key, name in keys.items()})
            for ending in (".npz", ".npy")
        ]
        self.files = {
            key: next((f[key] for f in of_kind if f[key].exists()), of_kind[0][key]) for key in keys
        }
        there = {key: path for key, path in self.files.items() if path.exists()}
        problem = f"{folder}: no {next(iter(self.files.values())).name}, nor files of other images"
        require(bool(there), f"{problem}; expected .npz or .npy files, called as --key says")
        digest = hashlib.sha256()
        for key, path in there.items():
            digest.update(f"{key} {sha256_of(path)}\n".encode())
        self.about = {"model": "npz", "weights": digest.hexdigest()}
        self.first, arrays = self._read_first(there)
        self.shapes = [array.shape for array in arrays]

    def _read_first(self, there: Mapping[str, Path]) -> tuple[Path, Arrays]:
        """Return the first file that can be read. Raises the first error if none can."""
        errors = []
        for key in there:
            try:
                return self.read(key)
            except InputError as error:
                errors.append(error)
        raise errors[0]

    def read(self, key: str) -> tuple[Path, Arrays]:
        """Return an image's file and its features, and boxes if it has any. Raises InputError."""
        path = self.files[key]
        arrays = read_arrays(path)
        count = arrays[0].shape[0]
        for values, expected in zip(arrays, ("(regions, width)", f"({count}, 4)"), strict=False):
            is_right = values.ndim == 2 and values.size and values.dtype.kind == "f"
            is_right = is_right and (values is arrays[0] or values.shape == (count, 4))
            problem = f"{path}: {values.dtype} of shape {values.shape}"
            require(bool(is_right), f"{problem}; expected floats {expected}")
            require(is_feature(values), f"{path}: holds numbers that are no features or boxes")
        return path, tuple(values.astype(np.float32) for values in arrays)

    def encode(self, items: Sequence[tuple[Path, Arrays]]) -> Arrays:
        """Return features, and boxes if there are any, as the files have them, float32."""
        for path, arrays in items:
            shapes = [array.shape for array in arrays]
            problem = f"{path}: arrays of {shapes}, but {self.shapes} in {self.first}"
            require(
                shapes == self.shapes, f"{problem}; expected one number of regions in all files"
            )
        return tuple(map(np.stack, zip(*(arrays for _, arrays in items), strict=True)))


def read_arrays(path: Path) -> list[np.ndarray]:
    """Return the features of a file, and the boxes if it holds any. Raises InputError."""
    expected = f"one of {', '.join(FEATURES)}, and {' or '.join(BOXES)}, in a .npz file"
    if path.suffix == ".npy":
        return [np.array(map_array(path, "features, a .npy file"))]
    require_regular_file(path, expected)
    try:
        with explain_os_errors(path, expected), np.load(path, allow_pickle=False) as arrays:
            sizes = {info.filename: info.file_size for info in arrays.zip.infolist()}
            named = {}
            for name in (*FEATURES, *BOXES, COUNT):
                if name in arrays.files:
                    if sizes[f"{name}.npy"] > LARGEST_ARRAY:
                        raise ValueError(f"{name} has {sizes[name + '.npy']} bytes")
                    named[name] = arrays[name]
            features = next(named[name] for name in FEATURES if name in named)
            boxes = [named[name] for name in BOXES if name in named][:1]
            count = int(named.get(COUNT, len(features)))  # rows behind it are padding
            return [array[:count] for array in (features, *boxes)]
    except InputError:
        raise
    except StopIteration:
        raise InputError(
            f"{path}: holds neither {' nor '.join(FEATURES)}; expected {expected}"
        ) from None
    except Exception as error:  # numpy and zipfile raise errors of many types
        if is_oom(error):
            raise
        raise InputError(f"{path}: damaged: {error}; expected {expected}") from error
