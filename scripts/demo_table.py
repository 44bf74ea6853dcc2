"""demo_table.py — the results of the demonstration, compared with chance.

    python -m scripts.demo_table runs/demo --least 320

Reads the files of `bash scripts/demo.sh` and writes demo.json beside them. Exits with 2 if the
ensemble's rsum is below --least.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

from common import provenance
from common.cli import parse, print_line, run
from common.errors import require
from common.files import read_json, read_text, write_json
from common.results import EvaluationResult
from scripts.parts.tables import chance, demo_table, recalls_and_rsum


@dataclass(frozen=True)
class Options:
    folder: Annotated[str, "folder that demo.sh wrote", "FOLDER"]
    least: Annotated[float, "rsum that the ensemble must reach"] = 0.0


def main() -> None:
    options = parse(Options, None, __doc__)
    folder = Path(options.folder)
    report = read_report(folder)
    write_json(folder / "demo.json", report)
    print_line(demo_table(report))
    rsum = sum(report["rows"]["ensemble"])
    require(rsum >= options.least, f"rsum {rsum:.1f}; expected {options.least:.0f} or more")


def read_report(folder: Path) -> dict[str, Any]:
    """Return all figures of a demonstration. Raises InputError if a file of it is missing."""
    recalls = {}
    for name in ("i2t", "t2i", "ensemble"):
        path = folder / f"{name}.json"
        result = EvaluationResult.from_json(read_json(path, "a result of demo.sh"), path)
        recalls[name] = recalls_and_rsum(result.metrics.to_json())[:-1]
    i2t, t2i = (read_json(folder / way / "run.json", "a run of demo.sh") for way in ("i2t", "t2i"))
    return provenance.of("bash scripts/demo.sh") | {
        "settings": read_text(folder / "settings", "the settings of demo.sh").strip(),
        "width": i2t["options"]["embed_size"],
        "images": result.images,
        "seconds": {"i2t": i2t["seconds"], "t2i": t2i["seconds"]},
        "rows": {"chance": chance(result.images)} | recalls,
    }


if __name__ == "__main__":
    run(main)
