"""The page and the picture of ``benchmarks/operators.py``, from its rows."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.rows import Row

OURS = "nlsurgery"


def key(row: Row) -> tuple[str, ...] | None:
    """What a line of the table is told by; ``None`` for a line on growth."""
    return None if "growth" in row else (row["shape"], row["mode"], row["dtype"], row["pass"])


def page(rows: Sequence[Row], device: str, flags: str = "") -> str:
    """The results in Markdown.

    Args:
        rows: What was measured.
        device: On what.
        flags: What the command was told besides.
    """
    lines = [row for row in rows if key(row)]
    peers = list(dict.fromkeys(n for row in lines for n in row["seconds"] if n != OURS))
    threads = ", ".join(sorted({str(row["threads"]) for row in rows}))
    own = any(name.startswith(OURS) for name in peers)
    compiled = "; ours compiled is named besides, over ours as it is" if own else ""
    parts = [
        f"# Operators on a {device.upper().replace('CUDA', 'GPU')}",
        "",
        f"{versions()}; {processor()}, {threads} thread(s). Medians of interleaved rounds. "
        "Each number is a peer's cost over ours (above 1: ours is faster or leaner); within 0.15 of "
        f"1 is a tie. The article is the plain rewrite in `benchmarks/operators.py`{compiled}. A dash: the "
        "peer has no such form, or would need more than 4 GB in one tensor; fails: it raises. GEMM: "
        "the share of our forward time that its matrix products would take at the speed of one "
        "large product measured beside it.",
        "",
        f"`python benchmarks/operators.py --rows rows.jsonl{flags or ' --memory --scaling'}`, then",
        "`python benchmarks/operators.py --rows rows.jsonl --shapes --out …`",
        "",
        "## Time",
        "",
        *time_table(lines, peers),
    ]
    if any("megabytes" in row for row in lines):
        parts += ["", "## Peak memory above the block and its input", ""]
        measured = [row for row in lines if row.get("megabytes")]
        named = [name for name in peers if any(name in row["megabytes"] for row in measured)]
        parts += memory_table(measured, named)
    if grown := [row for row in rows if "growth" in row]:
        parts += ["", "## Growth with N", "", "Slope of log time over log N, forward, C = 256.", ""]
        parts += ["| mode | N | slope | time for 4× N |", "|---|---|---|---|"]
        for row in grown:
            sizes = f"{row['N'][0]:,} to {row['N'][-1]:,}"
            factor = 4 ** row["slope"]
            parts.append(f"| {row['growth']} | {sizes} | {row['slope']:.2f} | {factor:.1f}× |")
    return "\n".join([*parts, ""])


def time_table(rows: Sequence[Row], peers: Sequence[str]) -> list[str]:
    """Peers' time over ours."""
    head = ["shape", "mode", "dtype", "pass", "form", *[f"{name} ×" for name in peers], "GEMM"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        ours = row["seconds"][OURS]
        bound = f"{row['bound'] / ours:.0%}" if "bound" in row else ""
        cells = [row["shape"], row["mode"], row["dtype"], row["pass"], row["form"]]
        cells += [ratio(row["seconds"].get(name), ours) for name in peers]
        lines.append("| " + " | ".join([*cells, bound]) + " |")
    return lines


def memory_table(rows: Sequence[Row], peers: Sequence[str]) -> list[str]:
    """Our megabytes, and peers' over ours."""
    head = ["shape", "mode", "dtype", "pass", "our MB", *[f"{name} ×" for name in peers]]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        ours = row["megabytes"][OURS]
        cells = [row["shape"], row["mode"], row["dtype"], row["pass"], f"{ours:.0f}"]
        cells += [ratio(row["megabytes"].get(name), ours) for name in peers]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def ratio(value: float | str | None, ours: float) -> str:
    """A cell: a ratio, or what kept the peer from running."""
    return f"{value / ours:.2f}" if isinstance(value, float) else str(value or "–")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars of the best peer's time over ours, one panel per mode, to a PNG."""
    from matplotlib.figure import Figure

    lines = [row for row in rows if key(row)]
    modes = list(dict.fromkeys(row["mode"] for row in lines))
    kinds = list(dict.fromkeys((row["dtype"], row["pass"]) for row in lines))
    shapes = list(dict.fromkeys(row["shape"] for row in lines))
    figure = Figure(figsize=(9, 2.4 * len(modes)), layout="constrained")
    for axes, mode in zip(figure.subplots(len(modes), squeeze=False)[:, 0], modes, strict=True):
        for offset, kind in enumerate(kinds):
            places, values = [], []
            for row in lines:
                others = [
                    seconds
                    for name, seconds in row["seconds"].items()
                    if not name.startswith(OURS) and isinstance(seconds, float)
                ]
                if row["mode"] == mode and (row["dtype"], row["pass"]) == kind and others:
                    places.append(shapes.index(row["shape"]) + offset / (len(kinds) + 1))
                    values.append(min(others) / row["seconds"][OURS])
            axes.bar(
                places, values, width=0.9 / (len(kinds) + 1), align="edge", label=", ".join(kind)
            )
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_yscale("log", base=2)
        axes.set_ylim(0.5, max(2.0, axes.get_ylim()[1]))
        axes.yaxis.set_major_formatter("{x:g}×")
        axes.set_xticks([i + 0.4 for i in range(len(shapes))], shapes, fontsize=8)
        axes.set_title(f"{mode}: the fastest peer's time over ours", fontsize=9)
        axes.legend(fontsize=7, ncols=len(kinds))
    figure.savefig(path, dpi=110)


def processor() -> str:
    """The machine's processor, as Linux calls it, its family, and its widest instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name, family = (
        next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")
        for field in ("model name", "cpu family")
    )
    family = f"family {family}" if family else ""
    wide = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} ({', '.join(filter(None, [name, family, wide]))})"


def versions() -> str:
    """Python, torch and the peers."""
    found = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in ("timm", "mmcv"):
        try:
            found.append(f"{name} {__import__(name).__version__}")
        except ImportError:
            found.append(f"{name} absent")
    return ", ".join(found)
