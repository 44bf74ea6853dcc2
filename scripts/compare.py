"""compare.py — how far two models differ on one split, from their saved scores.

    python -m scripts.compare A.npy B.npy --data_path data --data_name f30k_precomp --split test
    python -m scripts.compare A0.npy A1.npy A2.npy B0.npy B1.npy B2.npy ...   # three seeds of each

`evaluate_models.py --save_scores` writes the scores; with `--scores`, those of an ensemble. Of more
than two files the first half is of model A, the second of model B, in the same order of seeds.

Prints recalls and rsum of A and B (means over seeds), and for each difference A - B
  an interval   of 95 %, by the paired bootstrap: images are drawn with replacement together with
                their captions, the same for A and B; so are the pairs of seeds
  p             by approximate randomisation: were A and B equally good, their ranks of an image and
                its captions might as well be exchanged. p is the share of random exchanges that
                make a difference at least as large.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

from common.bootstrap import LEVEL
from common.cli import parse, print_line, run
from common.errors import check_range, require
from common.files import check_writable, write_json
from common.layout import CaptionGroups, SplitName, files_of, read_groups_of_scores
from scripts.parts.tables import COLUMNS, markdown

CUTOFFS = (1, 5, 10)
LEAST_SAMPLES = 100  # with fewer, a single sample would be a bound of the interval
ROUNDING = 1e-9  # differences of rsum that are equal may differ by it


@dataclass(frozen=True)
class Options:
    scores: Annotated[list[str], "saved score matrices of A, then as many of B", "SCORES.npy"]
    data_path: Annotated[str | None, "folder of the data sets' folders"] = None
    data_name: Annotated[str | None, "data set's folder, like f30k_precomp"] = None
    split: Annotated[SplitName | None, "split of the scores"] = None
    samples: Annotated[int, "samples of the bootstrap, and of the randomisation"] = 10_000
    seed: Annotated[int, "seed of the samples"] = 0
    json: Annotated[str | None, "write the comparison, unrounded"] = None

    def __post_init__(self) -> None:
        check_range(self, ("samples",), LEAST_SAMPLES)
        check_range(self, ("seed",), 0)
        count = len(self.scores)
        require(count % 2 == 0, f"SCORES.npy: {count} files; expected as many of A as of B")
        given = [self.data_path, self.data_name, self.split]
        whole = all(given) or not any(given)
        require(whole, "--data_path, --data_name, --split: expected all three or none of them")

    @property
    def folder(self) -> Path | None:
        """The data set's folder, if it is given."""
        return Path(self.data_path, self.data_name or "") if self.data_path else None


def read_hits(options: Options) -> tuple[np.ndarray, CaptionGroups]:
    """Return the hits of all files `[files, I, 6]`, and which captions an image has.

    Raises InputError if a file holds no scores of the split.
    """
    from common.score_files import map_scores

    hits: list[np.ndarray] = []
    for path in map(Path, options.scores):
        matrix = map_scores(path)
        groups = read_groups_of_scores(path, matrix.shape, options.folder, options.split)
        shape = (len(hits[0]) if hits else len(matrix), len(groups.image_of_caption))
        require(matrix.shape == shape, f"{path}: shape {matrix.shape}; expected {shape}")
        hits.append(count_hits(matrix, groups))
    return np.stack(hits), groups


def count_hits(scores: np.ndarray, groups: CaptionGroups) -> np.ndarray:
    """Return for each image `[I, 6]`: found at 1, 5, 10 or not; captions found at 1, 5, 10."""
    from evaluation import ranks

    of_images, of_captions = ranks(scores, groups.image_of_caption)
    i2t = [of_images < k for k in CUTOFFS]
    t2i = [np.add.reduceat(of_captions < k, groups.first, dtype=np.int64) for k in CUTOFFS]
    return np.stack([*i2t, *t2i], axis=1).astype(np.int64)


def figures(totals: np.ndarray, images: int, captions: np.ndarray | int) -> np.ndarray:
    """Return recalls and rsum `[..., 7]` in percent, from hits of all images together `[..., 6]`.

    `captions` is the number of captions, or `[..., 1]`.
    """
    recalls = 100 * np.concatenate([totals[..., :3] / images, totals[..., 3:] / captions], -1)
    return np.concatenate([recalls, recalls.sum(-1, keepdims=True)], -1)


def bootstrap(
    differences: np.ndarray, groups: CaptionGroups, samples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return samples `[samples, 7]` of the differences of recalls and rsum.

    `differences` are those of the hits `[seeds, I, 6]`.
    """
    seeds, images = differences.shape[:2]
    totals, captions = np.empty((samples, 6)), np.empty((samples, 1))
    for sample in range(samples):
        chosen = rng.integers(images, size=images)
        pairs = rng.integers(seeds, size=seeds)
        totals[sample] = differences[pairs].mean(0)[chosen].sum(0)
        captions[sample] = groups.counts[chosen].sum()
    return figures(totals, images, captions)


def exchange(
    differences: np.ndarray, groups: CaptionGroups, samples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return samples `[samples, 7]` of the differences if A and B are exchanged at random.

    An image and its captions are exchanged together, in all seeds.
    """
    each = differences.mean(0)  # [I, 6]
    totals = np.empty((samples, 6))
    for sample in range(samples):
        signs = rng.choice((-1.0, 1.0), size=len(each))
        totals[sample] = signs @ each
    return figures(totals, len(each), len(groups.image_of_caption))


def compare(
    hits: np.ndarray, groups: CaptionGroups, samples: int, seed: int
) -> dict[str, np.ndarray]:
    """Return figures of A and B, their difference, its interval and p, by name.

    `hits` are those of A, then of B: `[2 * seeds, I, 6]`. A value is `[7]`, below COLUMNS; "low"
    and "high" are the interval.
    """
    rng = np.random.default_rng(seed)
    a, b = np.split(hits, 2)  # [seeds, I, 6] each
    sizes = hits.shape[1], len(groups.image_of_caption)
    of_a, of_b, difference = (figures(x.mean(0).sum(0), *sizes) for x in (a, b, a - b))
    tail = (100 - LEVEL) / 2
    drawn = bootstrap(a - b, groups, samples, rng)
    low, high = np.percentile(drawn, (tail, 100 - tail), axis=0)
    exchanged = exchange(a - b, groups, samples, rng)
    as_large = (abs(exchanged) >= abs(difference) - ROUNDING).sum(0)
    p = (as_large + 1) / (samples + 1)  # what was observed is one of the exchanges
    return {"a": of_a, "b": of_b, "difference": difference, "low": low, "high": high, "p": p}


def by_name(values: Sequence[Any]) -> dict[str, Any]:
    """Return values below COLUMNS as the JSON of metrics has them."""
    names = [f"r{k}" for k in CUTOFFS]
    sides = (values[:3], values[3:6])
    i2t, t2i = (dict(zip(names, side, strict=True)) for side in sides)
    return {"i2t": i2t, "t2i": t2i, "rsum": values[6]}


def as_text(result: dict[str, np.ndarray]) -> str:
    """Return the table of a comparison."""
    rows = [[name.upper(), *(f"{x:.1f}" for x in result[name])] for name in ("a", "b")]
    rows.append(["A - B", *(f"{x:+.1f}" for x in result["difference"])])
    bounds = zip(result["low"], result["high"], strict=True)
    rows.append(["95 % interval", *(f"[{low:+.1f}, {high:+.1f}]" for low, high in bounds)])
    rows.append(["p", *(f"{x:.4f}" for x in result["p"])])
    return markdown(["", *COLUMNS], rows)


def main() -> None:
    options = parse(Options, None, __doc__)
    folder, split = options.folder, options.split
    if options.json is not None:
        inputs = files_of(folder, split) if folder and split else []
        check_writable(Path(options.json), [*options.scores, *inputs])
    hits, groups = read_hits(options)
    result = compare(hits, groups, options.samples, options.seed)
    if options.json is not None:
        from common import provenance

        half = len(options.scores) // 2
        bounds = zip(result["low"].tolist(), result["high"].tolist(), strict=True)
        content = {
            "scores": {"a": options.scores[:half], "b": options.scores[half:]},
            "images": groups.images,
            "captions": len(groups.image_of_caption),
            "samples": options.samples,
            "seed": options.seed,
            **{name: by_name(result[name].tolist()) for name in ("a", "b", "difference", "p")},
            "intervals": by_name([list(pair) for pair in bounds]),
        }
        command = shlex.join(["python", "-m", "scripts.compare", *sys.argv[1:]])
        write_json(Path(options.json), provenance.of(command) | content)
    print_line(as_text(result))


if __name__ == "__main__":
    run(main)
