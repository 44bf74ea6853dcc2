"""benchmark.py — how fast pairs are scored and trained on, compared with matrix products alone.

    python -m scripts.benchmark                              # a table
    python -m scripts.benchmark --only i2t fp32 score        # some rows
    python -m scripts.benchmark --json results/speed.json    # also write the rows
    python -m scripts.benchmark --processes 2                # training by processes and by threads
    python -m scripts.benchmark --search --json results/search.json \
        --model_path I2T T2I --first_stage ENCODERS          # indexing and queries of search

A row's share of the product is the time that the floating-point operations of its pairs would take
at the rate of one large product in the same precision, divided by the row's time. Its share of the
copy is the same for the bytes that eager code moves, at the rate of one large copy. Both are timed
between the row's runs, because a machine may be faster now and slower a minute later. Run it on an
idle machine: any other program makes the figures worthless.
256 channels, 36 regions, 32 words, captions of 9 to 21 tokens, batches of 32 with 32 extra
negatives. `train_checkpointing` is a step with --activation_checkpointing. A row of `train` also
has the rate of train.py's loop, whose batches are read by workers or gathered on a GPU, and its
share of the rate of as many bare steps, one after the other; `--no-loop` leaves these out.
`--search` times models of random weights, in the published size. If models are given, it also
measures what their first stage finds on a split, by scoring all pairs of images and one caption of
each.
"""

import gc
import logging
import math
import multiprocessing
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

from common.cli import parse, pick_device, print_line, run
from common.config import Direction, Precision
from common.errors import check_range, require
from common.files import check_writable, read_json, write_json
from common.layout import SplitName
from common.memory import peak_memory, tune_malloc
from common.precision import has_fast_bf16, has_tf32, product_precision
from scripts.parts.feeding import loops, write_data
from scripts.parts.scaling import scaling_rows
from scripts.parts.search_tables import search_tables
from scripts.parts.tables import scaling_table, speed_rows, speed_tables
from scripts.parts.workload import (
    FLOPS,
    SIZES,
    TRAINING,
    Case,
    Size,
    Sizes,
    Way,
    What,
    Work,
    new_train_step,
    scoring,
    training,
)

if TYPE_CHECKING:
    import torch

    from scripts.parts.search_models import SearchModels

log = logging.getLogger(__name__)

COUNTS = (
    Path(__file__).resolve().parent.parent / "results/counts.json"
)  # bytes, by tests/counting.py
Word = Literal[Direction, Precision, Way, What]


@dataclass(frozen=True)
class Options:
    only: Annotated[list[Word] | None, "only these rows"] = None
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps, ..."] = "auto"
    sizes: Annotated[
        Size | None, "BERT, and the work of a row (default: minilm on a CPU, else bert_base)"
    ] = None
    json: Annotated[str | None, "write the rows here"] = None
    loop: Annotated[bool, "also time train.py's loop"] = True
    processes: Annotated[
        int, "instead compare so many CPU processes of one thread with one of so many threads"
    ] = 0
    search: Annotated[bool, "instead measure search"] = False
    model_path: Annotated[list[str] | None, "checkpoints that score the first stage's best"] = None
    first_stage: Annotated[str | None, "checkpoint of the encoders alone"] = None
    bert_path: Annotated[str | None, "folder of BERT (default: the checkpoints')"] = None
    data_path: Annotated[str | None, "folder of data sets (default: the checkpoints')"] = None
    data_name: Annotated[str | None, "data set (default: the checkpoints')"] = None
    split: Annotated[SplitName, "of the data set"] = "dev"

    def __post_init__(self) -> None:
        check_range(self, ("processes",), 0)
        both = "--model_path and --first_stage: expected both or none of them"
        require((self.model_path is None) == (self.first_stage is None), both)
        require(self.search or self.model_path is None, "--model_path: expected --search, too")
        if self.processes:
            problem = f"--processes {self.processes}: cannot be given with --only"
            require(self.only is None, problem)
            cpu = "expected --device cpu or auto; on GPUs, torchrun train.py logs pairs/s"
            require(self.device in ("auto", "cpu"), f"--device {self.device}: {cpu}")


def cases(only: Sequence[str] = ()) -> Iterator[Case]:
    """Yield the rows that match all words of `only`."""
    axes = [get_args(axis) for axis in (Direction, Precision, Way, What)]
    chosen = [[word for word in axis if word in only] or axis for axis in axes]
    for direction, precision, way, what in product(*chosen):
        yield Case(direction, precision, way == "compiled", what)


def measure(
    case: Case, sizes: Sizes, device: "torch.device", data: Path | None
) -> dict[str, Any] | None:
    """Return the row of a case; None if it does not compile.

    `data` is a folder of a data set for train.py's loop; without it, the loop is not timed.
    """
    import torch

    from common.recorded import Recorded

    tune_malloc()
    torch.manual_seed(0)
    if case.compiled:
        torch.compiler.reset()
    gc.collect()  # the model of a former row
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    train_step = new_train_step(case, sizes, device)
    pairs, work = (scoring if case.what == "score" else training)(train_step, sizes)
    for _ in range(sizes.warm_up):
        work()
    if train_step.model.is_compiled != case.compiled:
        return None
    row = asdict(case) | {"peak_gb": round(peak_memory(device) / 1e9, 3)}
    row |= rates(case, pairs, work, sizes, device)
    if case.what != "score" and isinstance(train_step.step, Recorded):
        row["recorded"] = train_step.step.replay is not None
    if case.what == "train" and data is not None:
        for name, steps in loops(train_step, work, sizes, data):
            row[f"{name}_pairs_per_s"] = round(sizes.steps * pairs / seconds_of(steps, device), 1)
    return row


def rates(
    case: Case, pairs: int, work: Work, sizes: Sizes, device: "torch.device"
) -> dict[str, float]:
    """Time `work` on so many pairs, and beside it a large product and a large copy."""
    every = (work, large_product(case, sizes, device), large_copy(sizes, device))
    times = [[seconds_of(each, device) for each in every] for _ in range(sizes.runs)]
    work_times, product_times, copy_times = zip(*times, strict=True)
    seconds = statistics.median(work_times)
    flop_rate = 2 * math.prod(sizes.product) / min(product_times)
    byte_rate = 2 * sizes.copied / min(copy_times)  # read and written
    flops = FLOPS[case.direction] * pairs * (1 if case.what == "score" else TRAINING)
    return {
        "pairs_per_s": round(pairs / seconds, 1),
        "seconds": round(seconds, 5),
        "share": round(flops / flop_rate / seconds, 4),
        "copy_share": round(bytes_moved(case, pairs) / byte_rate / seconds, 4),
        "product_gflops": round(flop_rate / 1e9, 1),
        "copy_gb_per_s": round(byte_rate / 1e9, 1),
    }


def bytes_moved(case: Case, pairs: int) -> float:
    """Return how many bytes eager code reads and writes, whatever the row's own code does."""
    wanted = {
        "direction": case.direction,
        "precision": "bf16" if case.precision == "bf16" else "fp32",
        "what": "chunk" if case.what == "score" else "step",  # with a BERT of bert-base's size
    }
    rows = read_json(COUNTS, "the counts of tests/counting.py")["rows"]
    (megabytes,) = (row["mb_a_pair"] for row in rows if wanted.items() <= row.items())
    return megabytes * 1e6 * pairs


def large_product(case: Case, sizes: Sizes, device: "torch.device") -> Work:
    import torch

    m, k, n = sizes.product
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    a, b = (torch.randn(*size, device=device, dtype=dtype) for size in ((m, k), (k, n)))

    def multiply() -> None:
        with product_precision(case.precision):
            a @ b

    return multiply


def large_copy(sizes: Sizes, device: "torch.device") -> Work:
    import torch

    source = torch.randint(256, (sizes.copied,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def seconds_of(work: Work, device: "torch.device") -> float:
    """Return how long `work` takes; on a CUDA GPU, by the GPU's own clock."""
    import torch

    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    since = time.perf_counter()
    work()
    if device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - since


class Rows:
    """Measures rows, each in a process of its own on a CPU, for its peak memory.

    A GPU counts its own memory: there, one process measures rows until one of them fails.
    """

    def __init__(self, sizes: Sizes, device: "torch.device", data: Path | None) -> None:
        self.sizes, self.device, self.data = sizes, device, data
        self.pool: ProcessPoolExecutor | None = None

    def measure(self, case: Case) -> dict[str, Any] | str:
        """Return the row of a case, or why there is none."""
        if self.pool is None:
            self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        row: dict[str, Any] | str | None
        try:
            row = self.pool.submit(measure, case, self.sizes, self.device, self.data).result()
        except Exception as error:  # out of memory, a fault of the GPU: other rows may work
            row = (str(error) or type(error).__name__).splitlines()[0]
        own_process = self.device.type == "cpu" and not self.sizes.one_process
        if own_process or not isinstance(row, dict):
            self.close()
        return row or "the compiler fails"

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
        self.pool = None


def main() -> None:
    options = parse(Options, None, __doc__)
    path = Path(options.json) if options.json is not None else None
    if path is not None:
        check_writable(path)
    if options.processes:
        compare_processes(options, path)
        return
    if options.search:
        measure_search(options, path)
        return
    device = pick_device(options.device, "tf32" if "tf32" in (options.only or ()) else None)
    default: Size = "minilm" if device.type == "cpu" else "bert_base"
    sizes, report = SIZES[options.sizes or default], new_report(device)
    with TemporaryDirectory() as folder:
        data = write_data(Path(folder), sizes.images) if options.loop else None
        rows = Rows(sizes, device, data)
        fill(report, rows, cases(options.only or ()), path)
        rows.close()
    print_line(speed_tables(report))


def compare_processes(options: Options, path: Path | None) -> None:
    """Measure training by processes and by threads of a CPU."""
    report = new_report(pick_device("cpu"))
    report["rows"] = scaling_rows(SIZES[options.sizes or "minilm"], options.processes)
    if path is not None:
        write_json(path, report)
    print_line(scaling_table(report))


def measure_search(options: Options, path: Path | None) -> None:
    """Measure what the first stage of given models finds, then indexing and queries.

    The report is written after each of both.
    """
    from scripts.parts.search_recall import recall_rows
    from scripts.parts.search_timings import search_timings

    report, since = new_report(pick_device(options.device)), time.monotonic()
    report["first_stage"] = None
    if options.model_path is not None:
        report["first_stage"] = recall_rows(*open_search_models(options), options.split)
        write_report(report, since, path)
    report |= search_timings(options.sizes or "minilm", options.device)
    write_report(report, since, path)
    print_line(search_tables(report))


def open_search_models(options: Options) -> tuple["SearchModels", Path]:
    """Return the models that the options name, and the folder of the data set."""
    from checkpoint.checkpoint import common_option
    from scripts.parts.search_models import SearchModels

    assert options.model_path is not None
    models = SearchModels.open(
        options.model_path, options.first_stage, options.bert_path, options.device
    )
    of_models = partial(common_option, models.matcher.checkpoints)
    data_path = options.data_path or of_models("data_path")
    return models, Path(data_path, options.data_name or of_models("data_name"))


def write_report(report: dict[str, Any], since: float, path: Path | None) -> None:
    """Write a report if there is a path, with the minutes since `since`."""
    report["minutes"] = round((time.monotonic() - since) / 60, 1)
    if path is not None:
        write_json(path, report)


def fill(report: dict[str, Any], rows: Rows, every_case: Iterable[Case], path: Path | None) -> None:
    """Measure rows and add them to a report, which is written after each of them.

    So a benchmark that is cut off leaves some.
    """
    since = time.monotonic()
    for case in every_case:
        if case.precision == "tf32" and not has_tf32(rows.device):
            continue
        row: dict[str, Any] | str = "this processor emulates bfloat16"
        if case.precision != "bf16" or has_fast_bf16(rows.device):
            row = rows.measure(case)
        if isinstance(row, dict):
            report["rows"].append(row)
            log.info("%s", speed_rows([row]).splitlines()[-1])
        else:
            report["not_run"].append(f"{case.name}: {row}")
            log.info("%s", report["not_run"][-1])
        write_report(report, since, path)


def new_report(device: "torch.device") -> dict[str, Any]:
    from common import provenance

    command = shlex.join(["python", "-m", "scripts.benchmark", *sys.argv[1:]])
    return provenance.of(command, device) | {"minutes": 0.0, "not_run": [], "rows": []}


if __name__ == "__main__":
    run(main)
