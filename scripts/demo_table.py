"""demo_table.py — the results of the demonstration beside chance.

    python -m scripts.demo_table runs/demo --least 320
    python -m scripts.demo_table runs/demo --json results/demo.json

Reads the files of `bash scripts/demo.sh`. Exits with 2 if the ensemble's rsum is below --least.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from common import provenance
from common.cli import parse, print_line, run
from common.errors import InputError, require
from common.files import check_writable, read_json, read_text, write_json
from common.layout import CAPTIONS_PER_IMAGE
from common.results import EvaluationResult
from scripts.parts.tables import demo_rows, origin

DIRECTIONS = ("i2t", "t2i")
MODELS = (*DIRECTIONS, "ensemble")
CUTS = (1, 5, 10)


@dataclass(frozen=True)
class Options:
    folder: Annotated[str, "folder that demo.sh wrote", "FOLDER"]
    least: Annotated[float, "rsum that the ensemble must reach"] = 0.0
    json: Annotated[str | None, "write the results here, with command, machine and commit"] = None


def main() -> None:
    options = parse(Options, None, __doc__ or "")
    folder = Path(options.folder)
    results = {name: folder / f"{name}.json" for name in MODELS}
    runs = {name: folder / name / "run.json" for name in DIRECTIONS}
    settings = folder / "settings"
    if options.json:
        check_writable(Path(options.json), [*results.values(), *runs.values(), settings])
    report = read_report(results, runs, settings)
    if options.json:
        write_json(Path(options.json), report)
    print_line(f"{origin(report)}\n\n{demo_rows(report)}")
    rsum = sum(report["rows"]["ensemble"])
    require(rsum >= options.least, f"rsum {rsum:.1f}; expected {options.least:.0f} or more")


def read_report(results: dict[str, Path], runs: dict[str, Path], settings: Path) -> dict[str, Any]:
    """Return all figures of a demonstration. Raises InputError."""
    evaluated = {
        name: EvaluationResult.from_json(read_json(path, "a result of demo.sh"), path)
        for name, path in results.items()
    }
    trained = {name: read_json(path, "a run of demo.sh") for name, path in runs.items()}
    images = evaluated["ensemble"].images
    try:
        return provenance.of("bash scripts/demo.sh") | {
            "settings": read_text(settings, "the settings of demo.sh").strip(),
            "width": trained["i2t"]["options"]["embed_size"],
            "images": images,
            "seconds": {name: float(run["seconds"]) for name, run in trained.items()},
            "rows": {"chance": chance(images)}
            | {name: recalls(result) for name, result in evaluated.items()},
        }
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{runs['i2t']}: not the run.json of demo.sh: {error!r}") from error


def recalls(result: EvaluationResult) -> list[float]:
    """Return R@1 R@5 R@10 of both directions."""
    sides = (result.metrics.i2t, result.metrics.t2i)
    return [recall for side in sides for recall in (side.r1, side.r5, side.r10)]


def chance(images: int) -> list[float]:
    """Return R@1 R@5 R@10 of both directions of a random order, in percent."""
    captions = images * CAPTIONS_PER_IMAGE
    others = captions - CAPTIONS_PER_IMAGE
    # An image misses if all of its first k captions are others': one minus that share.
    i2t = [100 * (1 - math.comb(others, k) / math.comb(captions, k)) for k in CUTS]
    return i2t + [100 * min(1, k / images) for k in CUTS]


if __name__ == "__main__":
    run(main)
