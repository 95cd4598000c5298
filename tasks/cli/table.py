"""table: rows of text, a head first, as aligned columns for a terminal, or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

GAP = 2  # spaces between two columns
LEAST = 3  # characters that are left of the first column

Rows = Sequence[Sequence[str]]


def width(rows: Rows) -> int:
    """Return how many characters the aligned rows are wide."""
    return sum(_widths(rows)) + GAP * (len(rows[0]) - 1)


def aligned(rows: Rows, columns: int | None = None) -> list[str]:
    """Return rows as lines: the first column to the left, all others to the right.

    Args:
        rows: the cells.
        columns: how many characters a line may have; the first column is cut to fit.
    """
    first, *others = _widths(rows)
    if columns is not None:
        first = min(first, max(columns - sum(others) - GAP * len(others), LEAST))
    return [
        cut(name, first).ljust(first)
        + "".join(" " * GAP + cell.rjust(w) for cell, w in zip(cells, others, strict=True))
        for name, *cells in rows
    ]


def markdown(rows: Rows) -> str:
    """Return rows as a Markdown table."""
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def cut(text: str, columns: int) -> str:
    """Return a text of at most so many characters, with … for the end that is left out."""
    return text if len(text) <= columns else f"{text[: columns - 1]}…"


def _widths(rows: Rows) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]
