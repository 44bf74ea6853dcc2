"""benchmark.py — how fast pairs are scored and trained on, and what of the possible that is.

    python -m scripts.benchmark                                # a table
    python -m scripts.benchmark --only i2t fp32 score          # some rows
    python -m scripts.benchmark --json results/speed.json      # the rows, with how they came about

Each row gives its share of the matrix-product bound: the time that the floating-point operations of
its pairs would take at the rate of one large product in the same precision, divided by the time
taken. The product is timed between the row's runs, since a machine may be faster now and slower a
minute later. Where the time goes is then told by kind of operation, for what is not compiled.
Run it on an idle machine: another program beside it makes every figure worthless.
Sizes: 256 channels, 36 regions, 32 words, captions of 9 to 21 tokens, batches of 32 with 32 extra
negatives, a BERT of MiniLM's size. Rows that share a process are run in the order of the memory
that they take, so its peak up to then is a row's own; where time goes is recorded after them all.
"""

import logging
import multiprocessing
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch

from common import provenance
from common.cli import has_fast_bf16, parse, pick_device, print_line, run
from common.compile import gains_by_compiling
from common.config import Direction, Precision
from common.files import check_writable, write_blocks, write_json
from common.memory import peak_memory, tune_malloc
from common.workers import end_with_parent
from evaluation import image_of_caption, retrieval
from scripts.parts.operators import shares
from scripts.parts.tables import speed_rows, speed_tables
from scripts.parts.workloads import KINDS, WORK, Case, Kind, Work, learner_of

log = logging.getLogger(__name__)

# Of a pair, fixed so that rows can be compared; in a training step three times as many, however
# often something is computed again.
FLOPS = {"i2t": 111e6, "t2i": 102e6}
TRAINING = 3
RUNS = 5  # of which a row is the median
PRODUCT = (36 * 1024, 256, 256)
RANKED = (5000, 25000)  # images and captions of MSCOCO
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Word = Literal[Direction, Precision, "eager", "compiled", Kind]
MAIN = ("score", "train")  # of which there are compiled rows, and profiles


@dataclass(frozen=True)
class Options:
    only: Annotated[list[Word] | None, "some of the rows"] = None
    device: Annotated[str, "auto, cpu, cuda, cuda:1, ..."] = "auto"
    json: Annotated[str | None, "write the rows here"] = None


def cases(only: list[str] | None, device: torch.device) -> Iterator[Case]:
    """What shares a process is in the order of the memory that it takes."""
    together = [("score", "plain", "train"), ("train_under_2.5GB",)]
    for kinds, direction, precision, compiled in product(
        together, get_args(Direction), get_args(Precision), (False, True)
    ):
        words = {direction, precision, "compiled" if compiled else "eager"}
        asked = [word for word in only or [] if word not in KINDS]
        groups = [{"i2t", "t2i"}, {"fp32", "bf16"}, {"eager", "compiled"}]
        if any(group & set(asked) and not group & set(asked) & words for group in groups):
            continue
        named = [kind for kind in KINDS if kind in (only or KINDS)] or KINDS
        # these are made in one way, that which training and scoring take by themselves
        usual = {"plain": False, "train_under_2.5GB": gains_by_compiling(device, precision)}
        chosen = tuple(k for k in kinds if k in named and usual.get(k, compiled) == compiled)
        if chosen:
            yield Case(direction, precision, compiled, chosen, device)


def measured(case: Case) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A case's rows, and where their time goes; called in a new process."""
    tune_malloc()
    torch.manual_seed(0)
    learner = learner_of(case)
    rows, recorded = [], {}
    for kind in case.kinds:
        for bert in (False, True) if kind == "train" else (False,):
            pairs, work = WORK[kind](learner, bert)
            seconds, rate = paced(work, case, case.compiled and not bert)
            if case.compiled and not learner.model.space.is_compiled:
                return [], []  # or rows would stand under another's name
            rows.append(row(case, kind, bert, pairs, seconds, rate))
            if kind in MAIN and not (bert or case.compiled or case.device.type == "cuda"):
                recorded[kind] = work
    about_it = {"direction": case.direction, "precision": case.precision}
    profiles = [about_it | {"what": kind, "shares": shares(w)} for kind, w in recorded.items()]
    return rows, profiles


def row(
    case: Case, kind: str, bert: bool, pairs: int, seconds: float, rate: float
) -> dict[str, Any]:
    """What is told of `pairs` in `seconds`, beside a product's `rate` in operations a second."""
    flops = FLOPS[case.direction] * pairs * (TRAINING if kind.startswith("train") else 1)
    return {
        "direction": case.direction,
        "precision": case.precision,
        "compiled": case.compiled,
        "bert": bert,
        "what": kind,
        "pairs_per_s": round(pairs / seconds, 1),
        "seconds": round(seconds, 4),
        "share": round(flops / rate / seconds, 4),
        "peak_gb": round(peak_memory(case.device) / 1e9, 3),
        "product_gflops": round(rate / 1e9, 1),
    }


def paced(work: Work, case: Case, compiles: bool) -> tuple[float, float]:
    """Median seconds of RUNS; operations a second of the best product.

    What is compiled is run once more before, unless it was already.
    """
    m, k, n = PRODUCT
    a, b = (torch.randn(*x, dtype=DTYPES[case.precision]).to(case.device) for x in ((m, k), (k, n)))
    seconds, products = [], []
    if compiles:
        work()
    for _ in range(RUNS):
        seconds.append(timed(work, case.device))
        products.append(timed(lambda: a @ b, case.device))
    return statistics.median(seconds), 2 * m * k * n / min(products)


def timed(work: Work, device: torch.device) -> float:
    """Seconds."""
    since = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - since


def ranking() -> dict[str, float]:
    """Seconds and peak memory of ranks and recalls of MSCOCO's size, from a memory map."""
    tune_malloc()
    images, captions = RANKED
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.npy"
        rows = (rng.random((1, captions), dtype=np.float32) for _ in range(images))
        write_blocks(path, RANKED, np.dtype(np.float32), rows)
        scores = np.load(path, mmap_mode="r")
        seconds = timed(lambda: retrieval(scores, image_of_caption(captions)), torch.device("cpu"))
    peak = peak_memory(torch.device("cpu")) / 1e9
    return {"images": images, "captions": captions, "seconds": seconds, "peak_gb": peak}


def apart(work: Callable[..., Any], *given: Any) -> Any:
    """What a function gives in a new process, whose peak memory is its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=end_with_parent) as pool:
        return pool.submit(work, *given).result()


def all_rows(only: list[str] | None, device: torch.device) -> dict[str, list[Any]]:
    """Rows and profiles of all that was asked for, and what of it could not be run."""
    rows: list[dict[str, Any]] = []
    profiles: list[dict[str, Any]] = []
    missing: list[str] = []
    fast_bf16 = has_fast_bf16(device)
    if not fast_bf16:
        missing.append("bfloat16, which this processor emulates")
    for case in cases(only, device):
        if case.precision == "bf16" and not fast_bf16:
            continue
        new, recorded = apart(measured, case)
        rows, profiles = [*rows, *new], [*profiles, *recorded]
        if not new:
            missing.append(f"{case.direction} {case.precision} compiled, which failed to compile")
        for line in speed_rows(new).splitlines()[2:]:
            log.info("%s", line)
    return {"not_run": missing, "rows": rows, "profiles": profiles}


def main() -> None:
    chosen = parse(Options, None, __doc__)
    device = pick_device(chosen.device)
    if chosen.json is not None:
        check_writable(Path(chosen.json))
    since = time.monotonic()
    figures = {"ranks": apart(ranking)} | all_rows(chosen.only, device)
    command = shlex.join(["python", "-m", "scripts.benchmark", *sys.argv[1:]])
    minutes = round((time.monotonic() - since) / 60, 1)
    found = provenance.of(command, device) | {"minutes": minutes} | figures
    if chosen.json is not None:
        write_json(Path(chosen.json), found)
    print_line(speed_tables(found))


if __name__ == "__main__":
    run(main)
