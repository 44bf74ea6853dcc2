"""benchmark.py — how fast pairs are scored and trained on, compared with matrix products alone.

    python -m scripts.benchmark                              # a table
    python -m scripts.benchmark --only i2t fp32 score        # some rows
    python -m scripts.benchmark --json results/speed.json    # also write the rows

A row's share is the time that the floating-point operations of its pairs would take at the rate of
one large product in the same precision, divided by the row's time. The product is timed between the
row's runs, because a machine may be faster now and slower a minute later. Run it on an idle
machine: any other program makes the figures worthless.
Sizes: 256 channels, 36 regions, 32 words, captions of 9 to 21 tokens, batches of 32 with 32 extra
negatives, a BERT of MiniLM's size. `train_checkpointing` is a step with --activation_checkpointing.
"""

import logging
import math
import multiprocessing
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

from common.cli import has_fast_bf16, parse, pick_device, print_line, run
from common.config import Direction, Precision
from common.files import check_writable, write_json
from common.memory import peak_memory, tune_malloc
from scripts.parts.tables import speed_rows, speed_tables

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from training.step import TrainStep

log = logging.getLogger(__name__)

# Operations of a pair, fixed so that rows can be compared. A training step counts three times as
# many, whatever it recomputes.
FLOPS = {"i2t": 111e6, "t2i": 102e6}
TRAINING = 3
RUNS = 5  # a row is their median
PRODUCT = (36 * 1024, 256, 256)
BATCH, WORDS, REGIONS, WIDTH = 32, 32, 36, 2048
LENGTHS = (9, 21)  # tokens of the shortest and the longest caption
HIDDEN, ENTRIES = 384, 30522  # BERT's width and vocabulary
QUERIES, CONTEXTS = 16, 96  # scored at a time: one chunk of a large set

What = Literal["score", "train", "train_checkpointing"]
Way = Literal["eager", "compiled"]
Word = Literal[Direction, Precision, Way, What]
Work = Callable[[], Any]


@dataclass(frozen=True)
class Options:
    only: Annotated[list[Word] | None, "only these rows"] = None
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps, ..."] = "auto"
    json: Annotated[str | None, "write the rows here"] = None


@dataclass(frozen=True)
class Case:
    """One row of the table; each is measured in a process of its own."""

    direction: Direction
    precision: Precision
    compiled: bool
    what: What


def cases(only: Sequence[str] = ()) -> Iterator[Case]:
    """Yield the rows that match all words of `only`."""
    axes = [get_args(axis) for axis in (Direction, Precision, Way, What)]
    chosen = [[word for word in axis if word in only] or axis for axis in axes]
    for direction, precision, way, what in product(*chosen):
        yield Case(direction, precision, way == "compiled", what)


def measure(case: Case, device: "torch.device") -> dict[str, Any] | None:
    """Return the row of a case; None if it does not compile. To be called in a new process."""
    import torch

    tune_malloc()
    torch.manual_seed(0)
    train_step = new_train_step(case, device)
    pairs, work = (scoring if case.what == "score" else training)(train_step)
    if case.compiled:
        work()  # compiles
        if not train_step.model.space.is_compiled:
            return None
    m, k, n = PRODUCT
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.precision]
    a, b = (torch.randn(*size, dtype=dtype).to(device) for size in ((m, k), (k, n)))
    times, product_times = [], []
    for _ in range(RUNS):
        times.append(seconds_of(work, device))
        product_times.append(seconds_of(lambda: a @ b, device))
    seconds, rate = statistics.median(times), 2 * m * k * n / min(product_times)
    flops = FLOPS[case.direction] * pairs * (1 if case.what == "score" else TRAINING)
    return asdict(case) | {
        "pairs_per_s": round(pairs / seconds, 1),
        "seconds": round(seconds, 4),
        "share": round(flops / rate / seconds, 4),
        "peak_gb": round(peak_memory(device) / 1e9, 3),
        "product_gflops": round(rate / 1e9, 1),
    }


def seconds_of(work: Work, device: "torch.device") -> float:
    """Return how long `work` takes."""
    import torch

    since = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - since


def new_train_step(case: Case, device: "torch.device") -> "TrainStep":
    """Return a new model with random weights and a BERT of MiniLM's size, and its optimiser."""
    from transformers import BertConfig, BertModel

    from model import DIME
    from training.config import TrainConfig
    from training.step import TrainStep

    i2t = case.direction == "i2t"
    config = TrainConfig(
        direction=case.direction,
        img_dim=WIDTH,
        precision=case.precision,
        compile=case.compiled,
        extra_stc=int(i2t),
        extra_img=int(not i2t),
        batch_size=BATCH,
        activation_checkpointing=case.what == "train_checkpointing",
    )
    bert_config = BertConfig(
        hidden_size=HIDDEN, num_hidden_layers=6, intermediate_size=1536, num_attention_heads=12
    )
    bert = BertModel(bert_config, add_pooling_layer=False)
    train_step = TrainStep(config, DIME(config, bert).to(device), device)
    train_step.prepare(steps=1)
    return train_step


def random_inputs(images: int, captions: int) -> tuple["Tensor", "Tensor", "Tensor"]:
    """Return regions `[images, REGIONS, WIDTH]`, ids and mask `[captions, WORDS]`."""
    import torch

    lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (captions, 1))
    mask = torch.arange(WORDS) < lengths
    ids = torch.where(mask, torch.randint(1, ENTRIES, mask.shape), 0)
    return torch.rand(images, REGIONS, WIDTH), ids, mask


def scoring(train_step: "TrainStep") -> tuple[int, Work]:
    """Return a number of pairs, and a function that scores them."""
    import torch

    model = train_step.model.eval()
    sizes = (QUERIES, CONTEXTS) if model.direction == "i2t" else (CONTEXTS, QUERIES)
    regions, ids, mask = (tensor.to(train_step.device) for tensor in random_inputs(*sizes))
    with torch.no_grad():
        images, captions = model.encode_images(regions), model.encode_captions(ids, mask)
    return math.prod(sizes), torch.no_grad()(lambda: model.score(images, captions))


def training(train_step: "TrainStep") -> tuple[int, Work]:
    """Return the number of pairs of a training step, and the step, BERT included."""
    import torch

    from data import Batch

    i2t = train_step.model.direction == "i2t"
    sizes = (BATCH, 2 * BATCH) if i2t else (2 * BATCH, BATCH)
    batch = Batch(*random_inputs(*sizes), torch.arange(sizes[1]), BATCH).to(train_step.device)
    return math.prod(sizes), lambda: train_step.step(batch)


def in_new_process(function: Callable[..., Any], *inputs: Any) -> Any:
    """Return `function(*inputs)`, computed in a new process to measure its peak memory alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *inputs).result()


def main() -> None:
    options = parse(Options, None, __doc__)
    device = pick_device(options.device)
    if options.json is not None:
        check_writable(Path(options.json))
    since = time.monotonic()
    rows, not_run = [], []
    for case in cases(options.only or ()):
        name = f"{case.direction} {case.precision} {case.what}"
        if case.precision == "bf16" and not has_fast_bf16(device):
            not_run.append(f"{name}: this processor emulates bfloat16")
        elif row := in_new_process(measure, case, device):
            rows.append(row)
            log.info("%s", speed_rows([row]).splitlines()[-1])
        else:
            not_run.append(f"{name} compiled: the compiler fails")
    from common import provenance

    command = shlex.join(["python", "-m", "scripts.benchmark", *sys.argv[1:]])
    minutes = round((time.monotonic() - since) / 60, 1)
    results = {"minutes": minutes, "not_run": not_run, "rows": rows}
    report = provenance.of(command, device) | results
    if options.json is not None:
        write_json(Path(options.json), report)
    print_line(speed_tables(report))


if __name__ == "__main__":
    run(main)
