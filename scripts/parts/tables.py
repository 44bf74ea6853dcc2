"""tables.py — Markdown tables, and the tables that several programs print."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.layout import CAPTIONS_PER_IMAGE

COLUMNS = ("i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10", "rsum")  # of a table of recalls


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    every = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in every) + "\n"


def recalls_and_rsum(content: dict[str, Any]) -> list[Any]:
    """Return the figures below COLUMNS of the JSON of metrics, or of their intervals."""
    sides = content["i2t"], content["t2i"]
    return [*(side[name] for side in sides for name in ("r1", "r5", "r10")), content["rsum"]]


def origin(report: dict[str, Any]) -> str:
    """Return the command of a report, and the machine, torch and commit that ran it."""
    return f"`{report['command']}` ({surroundings(report)})"


def surroundings(report: dict[str, Any]) -> str:
    """Return the machine, torch and commit of a report."""
    return f"{report['machine']}, torch {report['torch']}, commit {short_commit(report)}"


def short_commit(report: dict[str, Any]) -> str:
    """Return twelve digits of the commit, and a + if tracked files differed from it."""
    commit = report.get("commit") or "unknown"
    return commit[:12] + "+" * commit.endswith("+")


def chance(images: int) -> list[float]:
    """Return R@1 R@5 R@10 of both directions of a random order, in percent."""
    captions, others = images * CAPTIONS_PER_IMAGE, (images - 1) * CAPTIONS_PER_IMAGE
    # An image misses if all of its first k captions are others': one minus that share.
    i2t = [100 * (1 - math.comb(others, k) / math.comb(captions, k)) for k in (1, 5, 10)]
    return i2t + [100 * min(1, k / images) for k in (1, 5, 10)]


def demo_table(report: dict[str, Any]) -> str:
    """Return the table of the demonstration, recalls and those of chance, and its origin."""
    rows = [
        [name, *(f"{recall:.1f}" for recall in recalls), f"{sum(recalls):.1f}"]
        for name, recalls in report["rows"].items()
    ]
    minutes = sum(report["seconds"].values()) / 60
    head = f"{report['images']} unseen scenes"
    return (
        f"{origin(report)}, {minutes:.1f} minutes of training, width {report['width']} instead of "
        f"256; {report['settings']}:\n\n"
        f"{markdown([head, *COLUMNS], rows)}"
    )


def speed_tables(report: dict[str, Any]) -> str:
    """Return the table of the benchmark, and the rows that were not run."""
    missing = f"\nNot run: {'; '.join(report['not_run'])}.\n" if report["not_run"] else ""
    return (
        f"{origin(report)}, {report['minutes']} minutes:\n\n{speed_rows(report['rows'])}{missing}"
    )


def counts_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the table of kernels and bytes, counted by tests/counting.py."""
    head = ["", "precision", "what", "kernels", "synchronisations", "GB", "MB a pair", "peak GB"]
    return markdown(head, [list(map(str, row.values())) for row in rows])


def speed_rows(rows: list[dict[str, Any]]) -> str:
    """Return the table of the benchmark's rates; older reports lack some."""
    head = ["", "precision", "", "what", "pairs/s", "seconds", "GB"]
    head += ["GFLOP/s", "share", "GB/s", "share"]
    fed = {f"{name}_pairs_per_s": name for name in ("workers", "on_device")}
    fed = {key: name for key, name in fed.items() if any(key in row for row in rows)}
    head += [f"train.py, {name}" for name in fed.values()]
    lines = []
    for row in rows:
        way = "compiled" if row["compiled"] else "eager"
        rates = [f"{row['pairs_per_s']:.0f}", f"{row['seconds']:.3g}", f"{row['peak_gb']:.2f}"]
        product = [f"{row['product_gflops']:.0f}", f"{100 * row['share']:.0f} %"]
        copy = ["", ""]
        if "copy_share" in row:
            copy = [f"{row['copy_gb_per_s']:.0f}", f"{100 * row['copy_share']:.0f} %"]
        loops = [
            f"{row[key]:.0f}, {100 * row[key] / row['bare_pairs_per_s']:.0f} %"
            if key in row
            else ""
            for key in fed
        ]
        lines.append(
            [row["direction"], row["precision"], way, row["what"], *rates, *product, *copy, *loops]
        )
    return markdown(head, lines)


def scaling_table(report: dict[str, Any]) -> str:
    """Return the table of training by processes and by threads, and its origin."""
    head = ["", "processes", "threads of each", "pairs/s", "times as fast as one process"]
    rows: list[list[str]] = []
    one: dict[str, float] = {}
    for row in report["rows"]:
        one.setdefault(row["direction"], row["pairs_per_s"])  # the first row of a direction
        shape = [row["direction"], str(row["processes"]), str(row["threads"])]
        rate = row["pairs_per_s"]
        rows.append([*shape, f"{rate:.0f}", f"{rate / one[row['direction']]:.2f}"])
    return f"{origin(report)}:\n\n{markdown(head, rows)}"
