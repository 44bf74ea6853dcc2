"""gpu_tables.py — the tables of a run of check_gpu.py."""

import re
from typing import Any

from scripts.parts.tables import markdown, short_commit, speed_rows

NOT_RUN = "not run on a GPU"
Report = dict[str, Any]


def gpu_status(report: Report | None) -> str:
    """Return the README's line: the GPU that the code was checked on, and how many parts passed."""
    text = f"N{NOT_RUN[1:]}"
    if report is not None:
        states = [part["state"] for part in report["parts"].values()]
        name = machine_of(report).get("machine", "unknown GPU")
        text = f"Checked on {name}: {states.count('passed')} of {len(states)} parts passed"
    return f"[{text}](docs/speed.md#on-a-gpu).\n"


def gpu_tables(report: Report | None) -> str:
    """Return the results of a run of check_gpu.py, or that there was none."""
    if report is None:
        return f"{NOT_RUN}\n"
    parts = {name: part.get("result", {}) for name, part in report["parts"].items()}
    tables = [origin(report), deviations(parts), speed(parts), profile(parts), parts_table(report)]
    return "\n".join(table for table in tables if table)


def machine_of(report: Report) -> dict[str, Any]:
    """Return what the part `machine` found."""
    return report["parts"].get("machine", {}).get("result", {})


def origin(report: Report) -> str:
    """Return the command, the machine, versions and the commit."""
    m = machine_of(report)
    names = ("machine", "driver", "cuda", "torch", "triton", "transformers", "memory_gb")
    about = [f"{name} {m[name]}" if name != "machine" else m[name] for name in names if m.get(name)]
    where = ", ".join([*about, f"commit {short_commit(m)}"])
    return f"`{report['command']}` ({where}), {report['seconds'] / 60:.1f} minutes:\n"


def parts_table(report: Report) -> str:
    """Return the table of the parts."""
    rows = []
    for name, part in report["parts"].items():
        failed = "; ".join(part.get("failed", []))
        rows.append([name, part["state"], f"{part['seconds']:.0f}", f"{part['limit']:.0f}", failed])
    return markdown(["part", "state", "seconds", "limit", "what failed"], rows)


def deviations(parts: dict[str, Report]) -> str:
    """Return the largest deviation from the golden arrays of each kind."""
    largest: dict[tuple[str, str, str], float] = {}
    limits: dict[tuple[str, str, str], float | None] = {}
    for name, result in parts.items():
        if name.startswith(("golden_", "compiled_")):
            for row in result.get("rows", []):
                key = (row["what"], name.split("_")[1], row["way"])
                largest[key] = max(largest.get(key, 0.0), row["gap"])
                limits[key] = row["limit"]
    rows = [
        [*key, f"{gap:.1e}", "" if limits[key] is None else f"{limits[key]:.1e}"]
        for key, gap in sorted(largest.items())
    ]
    if "gaps" in parts.get("resume", {}):
        for name, gap in parts["resume"]["gaps"].items():
            rows.append(
                [f"weights after a run that was {NAMES[name]}", "fp32", "", f"{gap:.1e}", ""]
            )
    head = ["deviation from the golden arrays", "precision", "", "largest", "limit"]
    return markdown(head, rows) if rows else ""


NAMES = {"again": "done again", "resumed": "resumed in its middle"}


def speed(parts: dict[str, Report]) -> str:
    """Return the benchmark's rows, and the rate of train.py beside that of the bare step."""
    results = [part for name, part in parts.items() if name.startswith("benchmark_")]
    rows = [row for result in results for row in result.get("rows", [])]
    text = speed_rows(rows) if rows else ""
    t = parts.get("training", {})
    if "pairs_per_s" in t:
        text += (
            f"\n`train.py` ({t['case']}, {t['steps']} steps): {t['pairs_per_s']:.0f} pairs/s, "
            f"{1000 * t['seconds']:.1f} ms a step, {1000 * t['loading_seconds']:.1f} ms of them "
            f"loading, {t['peak_gb']:.2f} GB"
        )
        for row in rows:
            way = "compiled" if row["compiled"] else "eager"
            if f"{row['direction']} {row['precision']} {way} {row['what']}" == t["case"]:
                share = t["pairs_per_s"] / row["pairs_per_s"]
                text += f"; {100 * share:.0f} % of the rate of the bare step"
        text += ".\n"
    peaks = [
        [row["direction"], row["precision"], row["what"], f"{row['peak_gb']:.2f}"]
        for row in parts.get("memory", {}).get("rows", [])
    ]
    if peaks:
        text += "\n" + markdown(["", "precision", "what", "peak GB of a step"], peaks)
    return text


def profile(parts: dict[str, Report]) -> str:
    """Return what the profiles found."""
    rows = []
    for row in parts.get("profile", {}).get("rows", []):
        if "top" in row:
            figures = [
                str(row["kernels"]),
                f"{row['milliseconds']:.2f}",
                f"{100 * row['idle']:.0f} %",
            ]
            top = ", ".join(
                f"{kernel['name'][:40]} {kernel['ms']:.2f}" for kernel in row["top"][:5]
            )
            rows.append([row["case"], *figures, top])
    head = ["profile", "kernels", "ms", "idle", "kernels that take longest, ms"]
    return markdown(head, rows) if rows else ""


def short_name(kernel: str) -> str:
    """Return a kernel's name without what most of them share."""
    return re.sub(r"^void |at::native::|\(anonymous namespace\)::", "", kernel)[:60]
