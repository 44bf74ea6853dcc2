"""gpu_checks.py — what check_gpu.py checks on a device: golden arrays, resuming, memory.

A check returns its figures. Under "failed" it lists what is wrong; a check that raises fails, too.
"""

import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from checkpoint.checkpoint import read_checkpoint
from common import provenance, recorded
from common.config import Direction, Precision
from common.files import read_json, write_json
from scripts.parts.golden import CASES, GOLDEN, Case, Deviation, score_deviations, step_deviations
from scripts.parts.workload import Way

log = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent.parent
STEPS = 40  # of the training that is resumed in its middle
TINY_STEPS = 4
# Kernels that add in any order give each run other roundings, which training magnifies.
MOST_TIMES = 10
MOST_GB = {"train": 8.0, "train_checkpointing": 3.0}  # of a step at the published sizes
SLOW = ("not compiled, using eager code", "no CUDA graph")  # lines of a training's log
Report = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where and how much a part works."""

    device: torch.device
    tiny: bool  # to rehearse it
    compiled: bool  # False leaves out what is compiled
    result: Path  # the part's result; what is there when the part is cut off counts

    @property
    def ways(self) -> list[Way]:
        return ["eager", "compiled"] if self.compiled else ["eager"]


def run_program(program: str, *words: object, **options: object) -> None:
    """Run a program of the project. Raises CalledProcessError if it fails."""
    command = [sys.executable, ROOT / program, *words]
    for name, value in options.items():
        command += [f"--{name}", value]
    subprocess.run([str(word) for word in command], check=True)


def machine(setting: Setting) -> Report:
    """Return the device, what drives it, versions and commit."""
    report: Report = provenance.surroundings(setting.device)
    report |= {"torch": torch.__version__, "python": platform.python_version()}
    report |= {"transformers": version("transformers"), "cores": os.cpu_count()}
    if setting.device.type == "cuda":
        about = torch.cuda.get_device_properties(setting.device)
        report |= {
            "driver": driver(),
            "cuda": torch.version.cuda,
            "triton": version("triton") if importlib.util.find_spec("triton") else None,
            "memory_gb": round(about.total_memory / 1e9, 1),
            "multiprocessors": about.multi_processor_count,
            "capability": f"{about.major}.{about.minor}",
        }
    return report


def driver() -> str | None:
    """Return the version of NVIDIA's driver, None if its tool is not there or fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else None


def golden(precision: Precision, setting: Setting) -> Report:
    """Return how far scores and three training steps are from the published model's."""
    return _golden(precision, "eager", CASES[:2] if setting.tiny else CASES, setting)


def compiled(precision: Precision, direction: Direction, setting: Setting) -> Report:
    """Return the same of compiled code, and on a GPU of a step replayed from a CUDA graph."""
    # The third step is replayed. In the first one the compiler waits for the GPU.
    recorded.WARM_UP = 2
    return _golden(precision, "compiled", [direction], setting)


def _golden(precision: Precision, way: Way, names: Sequence[str], setting: Setting) -> Report:
    checks: dict[str, Callable[..., list[Deviation]]] = {
        "scores": score_deviations,
        "steps": step_deviations,
    }
    report: Report = {"rows": [], "failed": []}
    for name, what in product(names, checks):
        row = f"{name} {precision} {way} {what}"
        is_compiled = way == "compiled"
        if is_compiled:
            torch.compiler.reset()
        try:
            found = checks[what](Case(GOLDEN / name), setting.device, precision, is_compiled)
        except Exception as error:  # the next case may work
            traceback.print_exc()
            report["failed"].append(f"{row}: {type(error).__name__}")
            continue
        report["rows"] += [{"case": name, "way": way} | asdict(each) for each in found]
        report["failed"] += [f"{row}: {each.what}" for each in found if not each.is_within]
        write_json(setting.result, report)  # a late part leaves what it has found
    return report


def resume(setting: Setting) -> Report:
    """Train in one go, again, and with a break in the middle; compare the final weights."""
    steps = TINY_STEPS if setting.tiny else STEPS
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Path(folder) / name for name in ("whole", "again", "resumed")}
        runs_steps = {"whole": [steps], "again": [steps], "resumed": [steps // 2, steps]}
        # The first run fills the compiler's cache: compiling side by side may give other code.
        _train(runs["whole"], runs_steps["whole"], setting)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda n: _train(runs[n], runs_steps[n], setting), ["again", "resumed"]))
        weights = {name: _final_weights(path) for name, path in runs.items()}
        logs = "".join((path / "i2t/train.log").read_text() for path in runs.values())
    gaps = {
        name: max(float((weights["whole"][k] - v).abs().max()) for k, v in weights[name].items())
        for name in ("again", "resumed")
    }
    failed = []
    if gaps["resumed"] > MOST_TIMES * gaps["again"]:
        failed.append(f"the resumed run differs over {MOST_TIMES} times as much as two whole runs")
    if not max(gaps.values()) < float("inf"):
        failed.append("weights that are not finite")
    failed += [line for line in logs.splitlines() if any(text in line for text in SLOW)][:1]
    return {"steps": steps, "gaps": gaps, "failed": failed}


def _train(folder: Path, ends: list[int], setting: Setting) -> None:
    """Train in i2t on the golden data, to each of these steps in turn."""
    case, compiles = Case(GOLDEN / "i2t"), "--compile" if setting.compiled else "--no-compile"
    sizes = "--embed_size 16 --max_words 14 --num_head_IMRC 4 --hid_IMRC 24 --hid_router 20"
    for end in ends:
        run_program(
            "train.py",
            *sizes.split(),
            compiles,
            data_path=case.data_path,
            data_name="f30k_precomp",
            bert_path=case.bert_path,
            logger_name=folder,
            batch_size=8,
            extra_stc=1,
            device=setting.device,
            log_step=5,
            max_steps=end,
            resume="auto",
        )


def _final_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights = read_checkpoint(folder / "i2t/checkpoint.pth.tar").weights
    return {name: value.double() for name, value in weights.items()}


def benchmark(words: Sequence[str], setting: Setting, loop: bool = True) -> Report:
    """Return the report of the benchmark's rows that match all `words`.

    `loop` also times train.py's loop.
    """
    sizes = {"sizes": "tiny"} if setting.tiny else {}
    where = {"device": setting.device, "json": setting.result}
    loops = "--loop" if loop else "--no-loop"
    run_program("scripts/benchmark.py", loops, "--only", *words, **where, **sizes)
    report = read_json(setting.result, "a report of the benchmark")
    unrecorded = [row for row in report["rows"] if row.get("recorded") is False]
    launched = [f"{row['direction']} {row['precision']}: no CUDA graph" for row in unrecorded]
    return report | {"failed": report["not_run"] + launched}


def memory(setting: Setting) -> Report:
    """Return the peak memory of a step with and without --activation_checkpointing."""
    report = benchmark(["eager", "fp32", "bf16", *MOST_GB], setting, False)
    for row in report["rows"]:
        most = MOST_GB[row["what"]]
        if row["peak_gb"] > most:
            name = f"{row['direction']} {row['precision']} {row['what']}"
            report["failed"].append(f"{name}: {row['peak_gb']} GB; expected at most {most}")
    return report
