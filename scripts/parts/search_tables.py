"""search_tables.py — the tables of the benchmark of search."""

from typing import Any

from scripts.parts.tables import markdown, origin


def search_tables(report: dict[str, Any] | None) -> str:
    """Return the tables of a report of the benchmark of search; `not run` for what it lacks."""
    if report is None:
        return "not run\n"
    missing = f"\nNot run: {'; '.join(report['not_run'])}.\n" if report["not_run"] else ""
    parts = (_indexing(report), _queries(report["queries"]), _recall(report["first_stage"]))
    return f"{origin(report)}, {report['minutes']} minutes:\n\n" + "\n".join(parts) + missing


def _indexing(report: dict[str, Any]) -> str:
    """Return the rate of indexing, and the table of the bytes of an image."""
    indexing = report["indexing"]
    if indexing is None:
        return "Images indexed a second: not run\n"
    rate = f"{indexing['images_per_s']:.1f} images indexed a second"
    sizes = [[name, f"{size:,}"] for name, size in report["bytes"].items()]
    arrays = sum(size for name, size in report["bytes"].items() if name.endswith(".npy"))
    total = ["together, without FAISS", f"{arrays:,}"]
    return (
        f"{rate}, {indexing['images']} of them in batches of {indexing['batch']}.\n\n"
        f"{markdown(['file', 'bytes an image'], [*sizes, total])}"
    )


def _queries(rows: list[dict[str, Any]]) -> str:
    """Return the table of milliseconds a query."""
    parts = [name for name in rows[0] if name.endswith("_ms")]
    head = ["images", "first stage", "scored", *(f"{p[:-3].replace('_', ' ')}, ms" for p in parts)]
    lines = []
    for row in rows:
        about = [f"{row['items']:,}", row["first_stage"], f"{row['candidates']:,}"]
        times = [row[part] for part in parts]
        lines.append([*about, *(f"{time:.3g}" for time in times), f"{sum(times):.3g}"])
    return markdown([*head, "together, ms"], lines)


def _recall(rows: list[dict[str, Any]] | None) -> str:
    """Return the table of what each first stage finds."""
    if rows is None:
        return "What the first stage finds: not run\n"
    head = ["first stage", "query", "best of it", "right answer among them", "top 10 kept"]
    lines = [
        [
            *(row["first_stage"], row["query"], f"{row['candidates']} of {row['items']:,}"),
            *(f"{row[name]:.1f} %" for name in ("found", "top_10")),
        ]
        for row in rows
    ]
    return markdown(head, lines)
