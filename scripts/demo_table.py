"""demo_table.py — what the demonstration measured, beside chance.

    python -m scripts.demo_table runs/demo --least 320
    python -m scripts.demo_table runs/demo --json results/demo.json

Reads what `bash scripts/demo.sh` left. Exit status 2 where the ensemble's rsum is below --least.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from common import provenance
from common.cli import parse, print_line, run
from common.errors import InputError, require
from common.files import check_writable, read_json, read_text, write_json
from common.layout import CAPTIONS_PER_IMAGE, count_images, files_of, read_captions, split_files
from scripts.parts.tables import demo_rows, origin
from training import log as runlog

MODELS = ("i2t", "t2i", "ensemble")
CUTS = (1, 5, 10)


@dataclass(frozen=True)
class Options:
    folder: Annotated[str, "what demo.sh left", "FOLDER"]
    least: Annotated[float, "rsum that the ensemble must reach"] = 0.0
    json: Annotated[str | None, "write the figures here, with how they came about"] = None


def chance(images: int) -> list[float]:
    """R@1 R@5 R@10 of both ways, in per cent, of an order at random."""
    captions = images * CAPTIONS_PER_IMAGE
    others = captions - CAPTIONS_PER_IMAGE
    i2t = [100 * (1 - math.comb(others, k) / math.comb(captions, k)) for k in CUTS]
    return i2t + [100 * min(1, k / images) for k in CUTS]


def recalls(path: Path) -> list[float]:
    """R@1 R@5 R@10 of both ways, as evaluate_models.py --json wrote them."""
    content = read_json(path, "what evaluate_models.py --json wrote")
    try:
        return [float(content["metrics"][s][f"r{k}"]) for s in ("i2t", "t2i") for k in CUTS]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: holds no recalls: {error!r}") from error


def collected(folder: Path) -> dict[str, Any]:
    """All figures of a demonstration."""
    trained = read_json(folder / "i2t" / runlog.RUN, "the run of demo.sh")
    _, captions = split_files(folder / "data", "test")
    images = count_images(captions, read_captions(captions))
    seconds = {
        name: read_json(folder / name / runlog.RUN, "the run of demo.sh")["seconds"]
        for name in ("i2t", "t2i")
    }
    return provenance.of("bash scripts/demo.sh") | {
        "settings": read_text(folder / "settings", "the demonstration's settings").strip(),
        "width": trained["options"]["embed_size"],
        "images": images,
        "seconds": seconds,
        "rows": {"chance": chance(images)}
        | {name: recalls(folder / f"{name}.json") for name in MODELS},
    }


def main() -> None:
    chosen = parse(Options, None, __doc__)
    folder = Path(chosen.folder)
    if chosen.json:
        taken = [*(folder / f"{name}.json" for name in MODELS), *files_of(folder / "data", "test")]
        runs = [folder / name / runlog.RUN for name in ("i2t", "t2i")]
        check_writable(Path(chosen.json), [*taken, folder / "settings", *runs])
    found = collected(folder)
    if chosen.json:
        write_json(Path(chosen.json), found)
    print_line(f"{origin(found)}\n\n{demo_rows(found)}")
    rsum = sum(found["rows"]["ensemble"])
    require(rsum >= chosen.least, f"rsum {rsum:.1f}; expected {chosen.least:.0f} or more")


if __name__ == "__main__":
    run(main)
