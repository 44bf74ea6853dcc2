"""reports.py — what the benchmark, a comparison and the demonstration found, as tables.

Each program prints them, and scripts/results_table.py puts the same ones into the README.
"""

from typing import Any

from scripts.parts.tables import COLUMNS, markdown


def speed_tables(found: dict[str, Any]) -> str:
    """The benchmark's report: its rows, what was not run, where the time goes."""
    missing = [f"Not run: {'; '.join(found['not_run'])}.\n"] if found["not_run"] else []
    tables = [speed_rows(found["rows"]), *missing, operator_rows(found["profiles"])]
    return f"{about(found)}, {found['minutes']} minutes:\n\n" + "\n".join(tables)


def speed_rows(rows: list[dict[str, Any]]) -> str:
    """The benchmark's rows as a table."""
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


def scoring_tables(found: dict[str, Any]) -> str:
    """A comparison of ways of scoring: its rows, and which gates are closed."""
    split = "dev, which selects models," if found["split"] == "dev" else found["split"]
    size = f"{found['images']} images of {split} with their captions"
    layers = [
        [f"layer {number}", *(f"{100 * share:.1f} %" for share in shares)]
        for number, shares in enumerate(found["closed"], 1)
    ]
    return (
        f"{about(found)}; {found['direction']}, {size}:\n\n{scoring_rows(found['rows'])}\n"
        f"{markdown(['pairs with closed gates', *map(str.upper, found['cells'])], layers)}"
    )


def scoring_rows(rows: list[dict[str, Any]]) -> str:
    """Ways of scoring as a table."""
    lines = []
    for r in rows:
        difference, ceiling, metrics = r["difference"], r["ceiling"], r["metrics"]
        length = f"best {r['shortlist']}, approximate" if r["shortlist"] else "all"
        work = ["", "", ""]  # of scores that were saved
        if r["seconds"] is not None:
            work = [f"{r['pairs']:,}", f"{r['seconds']:.1f}", f"{r['pairs_per_s']:.0f}"]
        lines.append(
            [
                *(r["way"], length, *work),
                " ".join(f"{difference[k]:.1e}" for k in ("mean", "largest")) if difference else "",
                f"{metrics['rsum']:.1f}",
                " · ".join(f"{ceiling[way]:.1f}" for way in ("i2t", "t2i")) if ceiling else "",
            ]
        )
    head = ["way", "scored", "pairs", "seconds", "pairs/s", "score differs, mean and largest"]
    return markdown([*head, "rsum", "recall ceiling, i2t · t2i"], lines)


def operator_rows(profiles: list[dict[str, Any]]) -> str:
    """Where the time of the benchmark's work goes, as a table."""
    if not profiles:
        return "Where the time goes: not run.\n"
    kinds = profiles[0]["shares"]
    head = ["time in", *(f"{p['what']}, {p['direction']}, {p['precision']}" for p in profiles)]
    shares = {kind: [f"{100 * p['shares'][kind]:.0f} %" for p in profiles] for kind in kinds}
    return markdown(head, [[kind, *cells] for kind, cells in shares.items()])


def demo_rows(found: dict[str, Any]) -> str:
    """The demonstration's recalls beside chance, as a table."""
    rows = [
        [name, *(f"{recall:.1f}" for recall in recalls), f"{sum(recalls):.1f}"]
        for name, recalls in found["rows"].items()
    ]
    return markdown([f"{found['images']} unseen scenes", *COLUMNS], rows)


def about(found: dict[str, Any]) -> str:
    """How a report came about."""
    where = f"{found['machine']}, torch {found['torch']}, commit {commit_of(found)}"
    return f"`{found['command']}` ({where})"


def commit_of(found: dict[str, Any]) -> str:
    """The commit of a report or of a run, as long as one is shown; + where files differed."""
    commit = found.get("commit") or "unknown"
    return commit[:12] + "+" * commit.endswith("+")
