"""The page and the plot of ``benchmarks/long_range.py``, from its rows."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.rows import Row

NAMES = {
    "none": "nothing",
    "non_local": "5 non-local",
    "conv": "5 convolutions",
    "se": "5 SE",
}
QUESTIONS = {
    "digits": "two digits in opposite corners: the same class?",
    "moves": "first and last frame: which way did it move?",
}


def cells(rows: Sequence[Row]) -> dict[tuple[str, bool, str], list[Row]]:
    """Runs by task, frozen and variant."""
    found: dict[tuple[str, bool, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["task"], row["frozen"], row["variant"]), []).append(row)
    return found


def deviation(values: Sequence[float]) -> float:
    """The sample's standard deviation, 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def page(rows: Sequence[Row]) -> str:
    """The results in Markdown."""
    import timm

    from nlsurgery import __version__

    found = cells(rows)
    sizes = {row["task"]: row["size"] for row in rows}
    lines = [
        "# Where far-apart places must be compared",
        "",
        "`python benchmarks/long_range.py --rows rows.jsonl`, then "
        "`python benchmarks/long_range.py --rows rows.jsonl --tasks --table … --plot …`",
        "",
        f"nlsurgery {__version__}, Python {platform.python_version()}, torch {torch.__version__}, timm "
        f"{timm.__version__}; {platform.machine()}, {rows[0]['device']}, {rows[0]['threads']} thread(s). "
        "Validation accuracy in %, mean ± standard deviation over seeds; chance is 50. Learning "
        f"rate {rows[0]['lr']:g} for what is new, a tenth of it for an unfrozen backbone.",
        "",
    ]
    for task, size in sizes.items():
        lines.append(
            f"- **{task}** ({QUESTIONS[task]}): {size['train']} training and {size['val']} validation "
            f"examples of {size['side']}×{size['side']}, {size['epochs']} epochs."
        )
    lines += [
        "",
        "| task | backbone | inserted | accuracy | seeds | parameters added | CPU s a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for (task, frozen, variant), runs in found.items():
        scores = [100 * row["accuracy"] for row in runs]
        lines.append(
            f"| {task} | {'frozen' if frozen else 'unfrozen'} | {NAMES[variant]} | "
            f"{statistics.mean(scores):.1f} ± {deviation(scores):.1f} | {len(runs)} | "
            f"{runs[0]['added']:,} | "
            f"{statistics.median(row['seconds'] for row in runs):.0f} |"
        )
    return "\n".join([*lines, ""])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars with deviations and one dot a seed, a panel per task and backbone, to a PNG."""
    from matplotlib.figure import Figure

    found = cells(rows)
    panels = list(dict.fromkeys((task, frozen) for task, frozen, _ in found))
    figure = Figure(figsize=(2.6 * len(panels), 3.2), layout="constrained")
    for axes, (task, frozen) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        names = [variant for t, f, variant in found if (t, f) == (task, frozen)]
        for place, name in enumerate(names):
            scores = [100 * row["accuracy"] for row in found[(task, frozen, name)]]
            axes.bar(place, statistics.mean(scores), yerr=deviation(scores), capsize=3, width=0.7)
            axes.plot([place] * len(scores), scores, "k.", markersize=4)
        axes.axhline(50, color="black", linewidth=0.8, linestyle=":")
        axes.set_ylim(40, 100)
        axes.set_xticks(
            range(len(names)), [NAMES[n] for n in names], rotation=30, fontsize=8, ha="right"
        )
        axes.set_title(f"{task}, {'frozen' if frozen else 'unfrozen'}", fontsize=9)
    figure.supylabel("validation accuracy, %", fontsize=9)
    figure.savefig(path, dpi=110)
