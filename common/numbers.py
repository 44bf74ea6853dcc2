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
FEW = 50  # words; fewer look like any type, and so do words of few columns
NARROW = 64  # bytes a region
DIFFERENT = 0.3  # distance of two distributions, 0 to 1


def is_feature(values: np.ndarray) -> bool:
    """Whether all numbers can be features: finite, not huge, hardly any subnormal."""
    sizes = np.abs(values[values != 0])
    if not float(sizes.max(initial=0)) <= LARGEST_FEATURE:  # NaN is not, and makes the maximum NaN
        return False
    if values.dtype == np.float16:  # whose smallest numbers are common
        return True
    return bool((sizes < np.finfo(values.dtype).tiny).sum() <= SUBNORMAL_SHARE[4] * sizes.size)


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
        width = values.shape[2]
        some = values.reshape(-1, width)[: LOOKED_AT // width]
        likely = look_like(some.tobytes(), len(some))
        require("float32" in (likely or {"float32"}), f"{problem} float16 numbers read as {dtype}")


def look_like(data: bytes, regions: int) -> set[str]:
    """Return which types the bytes of these `regions` look like; an empty set for few numbers.

    The upper half of a float32 holds its exponent, and the exponents of features are much alike.
    The lower half is noise, or zeros if the numbers were rounded. If both halves are alike, they
    are two float16. In the same way one float64 differs from two float32.
    """
    if len(data) < NARROW * regions:
        return set()
    halves = np.frombuffer(data[: len(data) // 8 * 8], "<u2")
    words, pairs = halves.reshape(-1, 2), halves.reshape(-1, 4)
    words, pairs = words[words.any(1)], pairs[pairs.any(1)]
    if len(words) < FEW or len(pairs) < FEW:
        return set()
    is_double = _distance(pairs[:, 1], pairs[:, 3]) > DIFFERENT
    is_single = _distance(words[:, 0], words[:, 1]) > DIFFERENT
    return {"float32" if is_single else "float16"} | ({"float64"} if is_double else set())


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Total variation between the five bits behind the sign, of 16, in `a` and in `b` `[N]`."""
    counts = [np.bincount(x >> 10 & 31, minlength=32) for x in (a, b)]
    return float(np.abs(counts[0] - counts[1]).sum() / (2 * len(a)))
