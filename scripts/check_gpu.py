"""check_gpu.py — checks the code on a GPU and measures its speed there, in at most 8 minutes.

    bash scripts/check_gpu.sh                         # writes gpu_check/gpu.json and gpu.log
    bash scripts/check_gpu.sh --device cpu --tiny     # a rehearsal without a GPU
    bash scripts/check_gpu.sh --only machine resume   # some parts

It needs Python with torch, transformers, tokenizers, safetensors, numpy and tqdm, and no network.
Each part runs in a process of its own and has a limit. A part that fails or is late is recorded
with the end of its output; the others still run. Checks run side by side, what is timed runs alone.
The exit status is 1 if a part did not pass. Without git, DIME_COMMIT names the commit.
"""

import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

from common.cli import parse, pick_device, print_line, run
from common.config import Direction, Precision
from common.errors import check_range, require
from common.files import check_writable, explain_os_errors, read_json, write_json
from common.signals import Stopped, handled
from scripts.parts.gpu_tables import gpu_tables

log = logging.getLogger(__name__)

PROGRAM = Path(__file__).resolve()
OUTPUT_END = 2000  # characters of a part's output that gpu.json keeps
LEAST_SECONDS = 5  # a part is not started with less time
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Options:
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps, ..."] = "cuda"
    out: Annotated[str, "folder of gpu.json and gpu.log (default: $OUT, or gpu_check)"] = ""
    tiny: Annotated[bool, "little work, to rehearse the program"] = False
    compile: Annotated[bool, "--no-compile leaves out what is compiled"] = True
    only: Annotated[list[str] | None, "only these parts"] = None
    minutes: Annotated[float, "time for all parts together"] = 7.8
    limit: Annotated[float | None, "seconds for each part (default: its own limit)"] = None
    part: Annotated[str | None, "run this part here and write its result to OUT/PART.json"] = None

    def __post_init__(self) -> None:
        check_range(self, ("minutes", "limit"), 0)


PRODUCTS = tuple(product(get_args(Precision), get_args(Direction)))
# Seconds that each part may take. The first ones run side by side, the others alone. `prepare`
# fills the compiler's cache, so that what is timed waits for no compiler.
CHECKS = {
    "machine": 60,
    **{f"golden_{precision}": 120 for precision in PRECISIONS},
    **{f"compiled_{precision}_{direction}": 150 for precision, direction in PRODUCTS},
    **{f"prepare_{precision}_{direction}": 150 for precision, direction in PRODUCTS},
    **{"resume": 150, "memory": 120},
}
TIMED = {
    **{"training": 75, "profile": 75},
    **{f"benchmark_{precision}": 120 for precision in sorted(PRECISIONS)},
}
COMPILING = ("compiled_", "prepare_")


@dataclass
class Part:
    """A part that runs in a process of its own."""

    name: str
    limit: float
    folder: Path  # of its output and result
    since: float = field(default_factory=time.monotonic)

    def start(self, options: Options) -> None:
        how = ["--device", options.device, "--out", str(self.folder), "--part", self.name]
        how += ["--tiny"] * options.tiny + ["--no-compile"] * (not options.compile)
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(PROGRAM), *how],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # its own processes end with it
            )

    @property
    def output(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def is_over(self) -> bool:
        late = time.monotonic() - self.since > self.limit
        return late or self.process.poll() is not None

    def end(self) -> dict[str, Any]:
        """End the part and return its report."""
        seconds = round(time.monotonic() - self.since, 1)
        status = self.process.poll()
        kill_group(self.process)
        result, path = {}, self.folder / f"{self.name}.json"
        if path.exists():
            result = read_json(path, "the result of a part")
        failed = result.pop("failed", [])
        state = "late" if status is None else "failed" if status or failed else "passed"
        report = {"state": state, "seconds": seconds, "limit": round(self.limit, 1)}
        report |= {"failed": failed, "result": result}
        if state != "passed":
            text = self.output.read_text(errors="replace")[-OUTPUT_END:]
            text = text.replace(str(PROGRAM.parent.parent), ".").replace(str(Path.home()), "~")
            report["output_end"] = text
            if state == "failed" and not failed:  # as a traceback ends, or an error in one line
                report["failed"] = text.splitlines()[-1:]
        return report


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads a session, and its children that are left."""
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Check:
    """A run of the parts, with its report and log."""

    def __init__(self, options: Options, out: Path) -> None:
        self.options, self.out = options, out
        self.since = time.monotonic()
        self.report: dict[str, Any] = {
            "command": shlex.join(["bash", "scripts/check_gpu.sh", *sys.argv[1:]]),
            "device": options.device,
            "tiny": options.tiny,
            "seconds": 0.0,
            "parts": {},
        }

    def run(self, parts: Iterable[tuple[str, float]], folder: Path) -> None:
        """Run parts, given with their limits, side by side until each is over."""
        left = self.since + 60 * self.options.minutes - time.monotonic()
        running: list[Part] = []
        try:
            for name, limit in parts:
                part = Part(name, min(self.options.limit or limit, left), folder)
                if left < LEAST_SECONDS:
                    self.record(part, {"state": "not run", "seconds": 0.0, "limit": limit})
                else:
                    part.start(self.options)
                    running.append(part)
            while running:
                time.sleep(0.05)
                for part in [part for part in running if part.is_over]:
                    running.remove(part)
                    self.record(part, part.end())
        finally:
            for part in running:
                kill_group(part.process)

    def record(self, part: Part, report: dict[str, Any]) -> None:
        """Add a part to gpu.json and its output to gpu.log."""
        self.report["parts"][part.name] = report
        self.report["seconds"] = round(time.monotonic() - self.since, 1)
        write_json(self.out / "gpu.json", self.report)
        text = part.output.read_text(errors="replace") if part.output.exists() else ""
        summary = f"{part.name}: {report['state']}, {report['seconds']} s"
        with (self.out / "gpu.log").open("a", encoding="utf-8") as file:
            file.write(f"== {summary}\n{text}\n")
        log.info("%s%s", summary, "".join(f"\n  {line}" for line in report.get("failed", [])))


def main() -> None:
    options = parse(Options, None, __doc__)
    out = Path(options.out or os.environ.get("OUT") or "gpu_check")
    if options.part is not None:
        run_part(options.part, options, out)
        return
    names = [*CHECKS, *TIMED]
    if not options.compile:
        names = [name for name in names if not name.startswith(COMPILING)]
    if options.device == "cpu":  # which has no TF32
        names = [name for name in names if "tf32" not in name]
    for name in options.only or ():
        require(name in names, f"--only {name}: expected some of {' '.join(names)}")
    chosen = [name for name in names if name in (options.only or names)]
    with explain_os_errors(out, "a folder to write to"):
        out.mkdir(parents=True, exist_ok=True)
    check_writable(out / "gpu.json")
    (out / "gpu.log").write_text("")
    check = Check(options, out)
    with handled(stop), tempfile.TemporaryDirectory() as folder:
        check.run([(n, CHECKS[n]) for n in chosen if n in CHECKS], Path(folder))
        for name in chosen:
            if name in TIMED:
                check.run([(name, TIMED[name])], Path(folder))
    print_line(gpu_tables(check.report))
    if any(part["state"] != "passed" for part in check.report["parts"].values()):
        sys.exit(1)


def stop(number: int, frame: object) -> None:
    raise Stopped(number)


def run_part(name: str, options: Options, out: Path) -> None:
    """Run a part in this process."""
    import torch

    from scripts.parts import gpu_checks as checks
    from scripts.parts import gpu_timings as timings

    functions = {
        "machine": checks.machine,
        "resume": checks.resume,
        "memory": checks.memory,
        "training": timings.trained,
        "profile": timings.profiles,
    }
    ways = ["eager", "compiled"] if options.compile else ["eager"]
    for p in PRECISIONS:
        functions[f"golden_{p}"] = partial(checks.golden, p)
        functions[f"benchmark_{p}"] = partial(checks.benchmark, [p, *ways, "score", "train"])
    for p, d in PRODUCTS:
        functions[f"compiled_{p}_{d}"] = partial(checks.compiled, p, d)
        rows = [p, d, "compiled", "score", "train"]
        functions[f"prepare_{p}_{d}"] = partial(checks.benchmark, rows, loop=False)
    require(name in functions, f"--part {name}: expected one of {' '.join(functions)}")
    torch.manual_seed(0)
    result = out / f"{name}.json"
    setting = checks.Setting(pick_device(options.device), options.tiny, options.compile, result)
    write_json(result, functions[name](setting))


if __name__ == "__main__":
    run(main)
