"""tables.py — a table in Markdown, for every program that prints one.

By itself, so that a program that prints one has not to load what training takes.
"""

from collections.abc import Sequence

COLUMNS = ("i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10", "rsum")  # of a table of recalls


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    every = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every) + "\n"
