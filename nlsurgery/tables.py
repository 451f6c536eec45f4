"""Plain-text tables and short numbers, for everything that prints."""

from __future__ import annotations

from collections.abc import Sequence


def size_text(size: Sequence[int]) -> str:
    """``(14, 14)`` as ``14x14``."""
    return "x".join(map(str, size))


def count_text(value: float, unit: str = "") -> str:
    """A count with a metric prefix: ``1234567`` as ``1.23 M``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.2f} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out under a head in aligned columns of plain text."""
    cells = [tuple(head), *map(tuple, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
