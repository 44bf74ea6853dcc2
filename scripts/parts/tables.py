"""tables.py — Markdown tables, and the tables that several programs print."""

from collections.abc import Sequence
from typing import Any

COLUMNS = ("i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10", "rsum")  # of a table of recalls


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    every = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in every) + "\n"


def origin(report: dict[str, Any]) -> str:
    """Return the command of a report, and the machine, torch and commit that ran it."""
    where = f"{report['machine']}, torch {report['torch']}, commit {short_commit(report)}"
    return f"`{report['command']}` ({where})"


def short_commit(report: dict[str, Any]) -> str:
    """Return twelve digits of the commit, and a + if tracked files differed from it."""
    commit = report.get("commit") or "unknown"
    return commit[:12] + "+" * commit.endswith("+")


def demo_rows(report: dict[str, Any]) -> str:
    """Return the table of the demonstration: recalls beside chance."""
    rows = [
        [name, *(f"{recall:.1f}" for recall in recalls), f"{sum(recalls):.1f}"]
        for name, recalls in report["rows"].items()
    ]
    return markdown([f"{report['images']} unseen scenes", *COLUMNS], rows)


def speed_tables(report: dict[str, Any]) -> str:
    """Return the tables of the benchmark: rates, what was not run, where the time goes."""
    missing = [f"Not run: {'; '.join(report['not_run'])}.\n"] if report["not_run"] else []
    tables = [speed_rows(report["rows"]), *missing, operator_rows(report["profiles"])]
    return f"{origin(report)}, {report['minutes']} minutes:\n\n" + "\n".join(tables)


def speed_rows(rows: list[dict[str, Any]]) -> str:
    """Return the table of the benchmark's rates."""
    head = ["", "precision", "", "BERT", "what", "pairs/s", "seconds", "share", "GB", "GFLOP/s"]
    return markdown(
        head,
        [
            [
                *(r["direction"], r["precision"], "compiled" if r["compiled"] else "eager"),
                *("with" if r["bert"] else "", r["what"], f"{r['pairs_per_s']:.0f}"),
                *(f"{r['seconds']:.2f}", f"{100 * r['share']:.0f} %", f"{r['peak_gb']:.2f}"),
                f"{r['product_gflops']:.0f}",
            ]
            for r in rows
        ],
    )


def operator_rows(profiles: list[dict[str, Any]]) -> str:
    """Return the table of the time that each kind of operator takes."""
    if not profiles:
        return "Where the time goes: not run.\n"
    head = ["time in", *(f"{p['what']}, {p['direction']}, {p['precision']}" for p in profiles)]
    kinds = profiles[0]["shares"]
    shares = {kind: [f"{100 * p['shares'][kind]:.0f} %" for p in profiles] for kind in kinds}
    return markdown(head, [[kind, *cells] for kind, cells in shares.items()])
