"""Fuzzing of the readers: whatever a file holds, a reader reads it or raises InputError.

    python -m tests.fuzz --inputs 20000 --json results/reliability.json    # hours; by hand
    python -m tests.fuzz --inputs 1000 --only captions                     # one reader

Each input is a golden file, or one made from it, with bytes or values changed. Another exception
or more than SLOWEST seconds of processor time is a fault. Lack of memory is not: programs report it
in one line. The report of each reader is written when it ends, so that a crash loses none before.
"""

import json
import logging
import os
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from hypothesis import HealthCheck, Phase, given, settings

from common import cli, provenance
from common.errors import InputError, require
from common.memory import is_oom
from tests import conftest
from tests.changes import byte_changes, value_changes
from tests.fuzz_readers import READERS

log = logging.getLogger("fuzz")

SLOWEST = 5.0  # seconds that one input may take
MEMORY = 2**30  # bytes that the readers may take
# Faults that fuzzing found and that were corrected.
MENDED = {
    "features": ["tokenize.TokenError from numpy's reader of headers"],
    "image": ["4 GB asked for by a part of a PNG"],
    "resume": [
        "RuntimeError for an option or a count that was a tensor",
        "RuntimeError in Adam, whose step was a complex number",
    ],
}


@dataclass(frozen=True)
class Options:
    inputs: Annotated[int, "inputs for each reader"] = 1000
    only: Annotated[list[str] | None, "readers, by name"] = None
    json: Annotated[str | None, "file whose part 'fuzz' is to hold the report"] = None


SETTINGS = settings(database=None, deadline=None, derandomize=True, phases=[Phase.generate])
SETTINGS = settings(SETTINGS, suppress_health_check=list(HealthCheck))


def fuzz(name: str, inputs: int) -> dict[str, Any]:
    """Try one reader on `inputs` inputs; return counts, the slowest one and the faults."""
    commit, since = provenance.commit(), time.monotonic()
    report: dict[str, Any] = {"inputs": 0, "read": 0, "refused": 0, "slowest_seconds": 0.0}
    faults: dict[str, str] = {}
    logging.disable(logging.WARNING)
    with TemporaryDirectory() as made, TemporaryDirectory() as room:
        reader = READERS[name](Path(made))

        @settings(SETTINGS, max_examples=inputs)
        @given(byte_changes, value_changes)
        def try_one(changes: list, values: list) -> None:
            begun = time.process_time()  # not wall time: another program may be running
            report["inputs"] += 1
            try:
                reader(Path(room), changes, values)
                report["read"] += 1
            except Exception as error:
                if isinstance(error, InputError) or is_oom(error):
                    report["refused"] += 1
                else:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    text = f"{type(error).__name__}: {str(error)[:200]}"
                    faults.setdefault(f"{Path(where.filename).name}:{where.lineno}", text)
            seconds = time.process_time() - begun
            report["slowest_seconds"] = round(max(seconds, report["slowest_seconds"]), 3)
            if seconds > SLOWEST:
                faults.setdefault(f"{seconds:.0f} seconds", f"{changes} {values}")

        try:
            try_one()
        finally:
            logging.disable(logging.NOTSET)
    report |= {"seconds": round(time.monotonic() - since, 1), "mended": MENDED.get(name, [])}
    report["faults"] = [f"{where}: {what}" for where, what in faults.items()]
    return report | {"commit": commit, "torch": torch.__version__}


def main() -> None:
    chosen = cli.parse(Options, None, __doc__)
    names = chosen.only or list(READERS)
    require(set(names) <= set(READERS), f"--only {' '.join(names)}: expected {', '.join(READERS)}")
    if len(names) > 1:  # each in a process of its own: libraries keep memory, and that is limited
        rest = ["--inputs", str(chosen.inputs), *(["--json", chosen.json] if chosen.json else [])]
        commands = [[sys.executable, "-m", "tests.fuzz", "--only", name, *rest] for name in names]
        sys.exit(max(subprocess.run(command, check=False).returncode for command in commands))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    conftest.limit_memory(os.getpid(), MEMORY)
    report = fuzz(names[0], chosen.inputs)
    log.info("%s: %s", names[0], report)
    if chosen.json:
        path = Path(chosen.json)
        before = json.loads(path.read_text()).get("fuzz", {}) if path.exists() else {}
        known = {k: v for k, v in before.get("readers", {}).items() if k in READERS}
        conftest.report("fuzz", {"readers": known | {names[0]: report}}, path)
    sys.exit(bool(report["faults"]))


if __name__ == "__main__":
    cli.run(main)
