"""gpu_timings.py — what check_gpu.py times on a device: a profile of a step, a whole training."""

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from scripts.parts.feeding import ENTRIES, write_data
from scripts.parts.gpu_checks import Report, Setting, run_program
from scripts.parts.workload import (
    SIZES,
    Case,
    bert_config,
    new_train_step,
    scoring,
    training,
)

PROFILED = 3  # runs
TOP = 15  # kernels of a table
STEPS, IMAGES, DEV_IMAGES = 200, 2000, 40  # of the training


def profiles(setting: Setting) -> Report:
    """Return the kernels of a step and of a scored chunk, and how long the device idles."""
    rows = []
    for what in ("train", "score"):
        for way in setting.ways:
            case = Case("i2t", "bf16", way == "compiled", what)  # type: ignore[arg-type]  # both are
            rows.append({"case": case.name} | profile_of(case, setting))
    failed = [f"{row['case']}: {text}" for row in rows for text in row.pop("failed", [])]
    return {"rows": rows, "failed": failed}


def profile_of(case: Case, setting: Setting) -> Report:
    """Return kernels a run, their names and times, and the share of time without a kernel."""
    sizes = SIZES["tiny" if setting.tiny else "bert_base"]
    train_step = new_train_step(case, sizes, setting.device)
    _, work = (scoring if case.what == "score" else training)(train_step, sizes)
    for _ in range(sizes.warm_up):
        work()
    on_gpu = setting.device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=kinds) as profiler:
        for _ in range(PROFILED):
            work()
        if on_gpu:
            torch.cuda.synchronize(setting.device)
    return summary(profiler.events(), DeviceType.CUDA if on_gpu else DeviceType.CPU)


def summary(events: Any, kind: DeviceType) -> Report:
    """Return the profile of PROFILED runs from their events; times are milliseconds a run."""
    # Annotations such as that of an optimiser's step span kernels, and are none.
    kernels = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == kind and not getattr(event, "is_user_annotation", False)
    ]
    if not kernels:
        return {"failed": ["the profiler saw no kernel"]}
    times: dict[str, list[float]] = defaultdict(list)
    for name, start, end in kernels:
        times[name].append(end - start)
    busy = busy_time([(start, end) for _, start, end in kernels])
    span = max(end for *_, end in kernels) - min(start for _, start, _ in kernels)
    top = sorted(times.items(), key=lambda item: -sum(item[1]))[:TOP]
    in_ms = 1 / 1000 / PROFILED
    return {
        "kernels": round(len(kernels) / PROFILED),
        "milliseconds": round(span * in_ms, 3),
        "idle": round(1 - busy / span, 4),
        "top": [
            {"name": name[:120], "calls": len(each) / PROFILED, "ms": round(sum(each) * in_ms, 4)}
            for name, each in top
        ],
    }


def busy_time(ranges: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of time ranges."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def trained(setting: Setting) -> Report:
    """Train with train.py on data of the published sizes; return its rate without warm-up."""
    steps, images = (6, 4) if setting.tiny else (STEPS, IMAGES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _train_on_random_data(folder, steps, images, setting)
        run = json.loads((folder / "runs/i2t/run.json").read_text())
        lines = (folder / "runs/i2t/metrics.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if "batch_time" in event]
    late = [event for event in events if event["step"] > steps / 2]
    figures = {
        name: statistics.median(event[name] for event in late)
        for name in ("pairs_per_s", "batch_time", "data_time")
    }
    return {
        "case": f"i2t bf16 {setting.ways[-1]} train",
        "steps": steps,
        "pairs_per_s": round(figures["pairs_per_s"], 1),
        "seconds": round(figures["batch_time"], 5),
        "loading_seconds": round(figures["data_time"], 5),
        "peak_gb": round(run["peak_memory_bytes"] / 1e9, 3),
        "loss": {"first": events[0]["Le"], "last": events[-1]["Le"]},
    }


def _train_on_random_data(folder: Path, steps: int, images: int, setting: Setting) -> None:
    data = folder / "data/random"
    data.mkdir(parents=True)
    write_data(data, images)
    write_data(data, 2 if setting.tiny else DEV_IMAGES, "dev")
    write_bert(folder / "bert", setting.tiny)
    tiny = {"batch_size": 2, "log_step": 2} if setting.tiny else {}
    run_program(
        "train.py",
        "--compile" if setting.compiled else "--no-compile",
        "--no-features_on_device",  # so that workers read the batches
        data_path=folder / "data",
        data_name="random",
        bert_path=folder / "bert",
        logger_name=folder / "runs",
        direction="i2t",
        extra_stc=1,
        precision="bf16",
        device=setting.device,
        num_epochs=1000,
        max_steps=steps,
        **tiny,
    )


def write_bert(folder: Path, tiny: bool) -> None:
    """Write a BERT with random weights, of bert-base's size, and the vocabulary of `write_data`."""
    from transformers import BertModel

    config = bert_config(SIZES["tiny" if tiny else "bert_base"])
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{entry}\n" for entry in ENTRIES))
