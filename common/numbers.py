"""numbers.py — which numbers region features can be, and of which type the bytes of numbers are.

Files of features do not always say the type of their numbers, or say the wrong one, and almost all
bytes can be read as almost any type. Knows nothing of files.
"""

from pathlib import Path

import numpy as np

from common.errors import require

LARGEST_FEATURE = 1e6
SUBNORMAL_LEAST = 10  # subnormal numbers that are no proof of anything
SUBNORMAL_SHARE = {2: 0.5, 4: 0.001}  # of the numbers that are not 0, by bytes a number
LOOKED_AT = 2**18  # numbers of a block whose type is looked at
MANY = 64  # different numbers
LARGEST_FLOAT16 = 1024  # of features that fit float16; noise read as float16 has larger numbers


def is_feature(values: np.ndarray) -> bool:
    """Whether all numbers can be features or pixels: finite, not huge, hardly any subnormal."""
    if values.dtype.kind not in "fiu":
        return False
    sizes = np.abs(values[values != 0])
    if not float(sizes.max(initial=0)) <= LARGEST_FEATURE:  # NaN is not, and makes the maximum NaN
        return False
    if values.dtype.kind != "f" or values.itemsize == 2:  # small float16 are common
        return True
    return bool((sizes < np.finfo(values.dtype).tiny).sum() <= SUBNORMAL_SHARE[4] * sizes.size)


def is_whole(values: np.ndarray) -> bool:
    """Whether `values`, which can be features, are certainly not halves of wider numbers.

    Every second one would be a lower half: noise, a part of which is NaN or huge, or nearly zeros
    if the number was rounded, at most 32 different ones as float16. False for few numbers.
    """
    lower = values.ravel()[::2]
    is_varied = len(np.unique(lower[lower != 0][:1024])) > MANY
    return is_varied and (values.itemsize > 2 or bool(np.abs(values).max() < LARGEST_FLOAT16))


def check_numbers(path: Path, values: np.ndarray, rows: np.ndarray, dtype: np.dtype) -> None:
    """Raise InputError if `values` `[rows, L, n]` float32, read from `dtype`, can be no features.

    They are larger than LARGEST_FEATURE, or many are subnormal, or their bytes look like float16:
    then numbers of another type were read as `dtype`. A few are subnormal by chance, in float16
    more: there it begins at 6e-5.
    """
    size = np.abs(values)
    zeros = np.count_nonzero(size == 0)
    subnormal = np.count_nonzero(size < np.finfo(dtype).tiny) - zeros
    allowed = SUBNORMAL_LEAST + SUBNORMAL_SHARE[dtype.itemsize] * (size.size - zeros)
    problem = f"{path}: rows {rows[0]} to {rows[-1]} hold"
    advice = f"no features; usually numbers of another type were read as {dtype}"
    largest = float(size.max())
    require(largest <= LARGEST_FEATURE, f"{problem} {largest:.3g}: {advice}")
    require(subnormal <= allowed, f"{problem} {subnormal} subnormal numbers: {advice}")
    if dtype.itemsize == 4:
        halves = values.reshape(-1)[:LOOKED_AT].view(np.float16)
        require(not is_whole(halves), f"{problem} float16 numbers read as {dtype}")
