"""docs/coverage.md from the rows of the sweep."""

from __future__ import annotations

import math
import platform
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.coverage_checks import RUN_COLUMNS, TOOL_COLUMNS
from benchmarks.coverage_weights import HUGE, LARGE

#: Bounds between the sizes that the page counts by, in millions of parameters.
SIZES = (20, 40, 60, 90, 300)
COLUMNS = ("plan", *RUN_COLUMNS, *TOOL_COLUMNS)


def failures(row: dict[str, Any]) -> list[str]:
    """The columns of a row that do not hold, with their reasons."""
    if "error" in row:
        return [f"plan: {row['error']}"]
    return [f"{c}: {row[c]}" for c in COLUMNS if str(row.get(c, "")).startswith("no")]


def versions() -> str:
    """What the sweep ran with."""
    import timm
    import torch
    import torchvision

    import nlsurgery

    return (
        f"nlsurgery {nlsurgery.__version__}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    )


def table(rows: Sequence[dict[str, Any]], totals: dict[str, int]) -> str:
    """The page as Markdown.

    Args:
        rows: One a model that was tried.
        totals: Models in each library.
    """
    rows = sorted(rows, key=lambda row: row["spec"])
    lines = [
        "# Coverage",
        "",
        f"Made by `benchmarks/coverage.py`; do not edit. Ran with {_ran_with(rows)}.",
        "",
        *_summary(rows, totals),
        "",
        "By size (an *n/a* is no failure" + _not_run(rows) + "):",
        "",
        *_by_size(rows),
        "",
        "A column is *yes*, the reason why not, *n/a* where the original model does not pass either (or "
        "has no such form), or empty where it was not run. What each column tries:",
        "",
        "- **plan**: `inspect`, then `plan` of the five-block recipe (or its form by depth) on a model "
        "built on the meta device, rehearsal included: every block runs once, shapes stay.",
        "- **identity**, **keys**, **backward**, **deepcopy**: `apply` on real weights, zero parameters "
        "made random first; output equal to the last bit, keys and values kept, a gradient at every "
        "block, copies that run blocks of their own. Two inputs of the model's own size; of "
        f"more than {LARGE // 1_000_000} million parameters, one input of half the size (above "
        f"{HUGE // 1_000_000} million a quarter) where the model can be built for it, and parameters of one "
        "kind of module, name and shape are one tensor.",
        "- **compile** (`fullgraph=True`), **export**, **fx**: on the operated model.",
        "- **features_only**: timm's own form of the model, operated on; of torchvision's, the stages by "
        "`create_feature_extractor`, before and after the surgery.",
        "",
        "The letters of **recipes that fit** are explained below the table; *by depth*: a model of one "
        "stage, for recipes with `after: {depth: …}`.",
        "",
        "To run what is empty, or a model anew after taking out its row: `python benchmarks/coverage.py "
        "--level tools --rows benchmarks/results/coverage.jsonl --table docs/coverage.md`.",
        "",
        "| model | layout | stages (blocks) | recipes that fit | " + " | ".join(COLUMNS) + " |",
        "|---|---|---|---|" + "---|" * len(COLUMNS),
    ]
    sets = _recipe_sets(rows)
    lines += [_line(row, sets) for row in rows]
    lines += ["", "## Recipes that fit", "", *_legend(sets)]
    lines += ["", "## Where timm's `feature_info` says something else", ""]
    lines += [
        f"- `{row['spec']}` {row['hints'].removeprefix('differs: ')}"
        for row in rows
        if str(row.get("hints", "")).startswith("differs")
    ] or ["Nowhere."]
    return "\n".join(lines) + "\n"


def _ran_with(rows: Sequence[dict[str, Any]]) -> str:
    """The versions that the rows name, the most frequent first."""
    counts = Counter(row["with"] for row in rows if "with" in row)
    if len(counts) < 2:
        return next(iter(counts), versions())
    return "; ".join(f"{name} ({count} models)" for name, count in counts.most_common())


def _not_run(rows: Sequence[dict[str, Any]]) -> str:
    whole, _ = _whole_and_held(rows)
    if whole == len(rows):
        return ""
    return "; models are run from the smallest up, and what is empty below has not had its turn"


def _summary(rows: Sequence[dict[str, Any]], totals: dict[str, int]) -> list[str]:
    lines = ["| | tried | of | hold |", "|---|---|---|---|"]
    for library, total in totals.items():
        mine = [row for row in rows if row["spec"].startswith(library + "/")]
        for column in COLUMNS:
            tried = [r for r in mine if _cell(r, column) and not _cell(r, column).startswith("n/a")]
            good = sum(_cell(row, column) == "yes" for row in tried)
            share = f"{good} ({good / len(tried):.1%})" if tried else "not run"
            lines.append(f"| {library}, {column} | {len(tried)} | {total} | {share} |")
        whole, held = _whole_and_held(mine)
        share = f"{held} ({held / whole:.1%})" if whole else "not run"
        lines.append(f"| **{library}, every column** | {whole} | {total} | {share} |")
    times = [row["plan_s"] for row in rows if "plan_s" in row]
    if times:
        middle, most = statistics.median(times), max(times)
        line = f"CPU seconds of `plan` ({len(times)} models): median {middle:.2f}, most {most:.1f}."
        lines += ["", line]
    return lines


def _by_size(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How many models of each size had every column tried, and hold them all."""
    lines = ["| million parameters | models | every column tried | hold |", "|---|---|---|---|"]
    for low, high in zip((0, *SIZES), (*SIZES, math.inf), strict=True):
        mine = [row for row in rows if "params" in row and low <= row["params"] / 1e6 < high]
        whole, held = _whole_and_held(mine)
        name = f"{low} to {high}" if high < math.inf else f"from {low}"
        lines.append(f"| {name} | {len(mine)} | {whole} | {held} |")
    return lines


def _whole_and_held(rows: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """How many rows have an answer in every column, and how many of these hold them all."""
    whole = [row for row in rows if all(_cell(row, column) for column in COLUMNS)]
    return len(whole), sum(not failures(row) for row in whole)


def _cell(row: dict[str, Any], column: str) -> str:
    if column == "plan" and "error" in row:
        return "no: " + str(row["error"])
    return str(row.get(column, ""))


def _recipe_sets(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], str]:
    """A letter for every set of packaged recipes that fits some model, the largest set first."""
    found = {tuple(row["recipes"]) for row in rows if row.get("recipes")}
    order = sorted(found, key=lambda names: (-len(names), names))
    return {names: _letters(index) for index, names in enumerate(order)}


def _letters(index: int) -> str:
    return ("" if index < 26 else chr(64 + index // 26)) + chr(65 + index % 26)


def _legend(sets: dict[tuple[str, ...], str]) -> list[str]:
    packaged = sorted({name for names in sets for name in names})
    lines = []
    for names, letter in sets.items():
        missing = [name for name in packaged if name not in names]
        text = (
            ", ".join(names)
            if len(names) <= len(missing)
            else "all" + (f" but {', '.join(missing)}" if missing else "")
        )
        lines.append(f"- **{letter}** ({len(names)} of {len(packaged)}): {text}")
    return lines


def _line(row: dict[str, Any], sets: dict[tuple[str, ...], str]) -> str:
    stages = " ".join(
        f"{fqn or name} ({count})" for name, fqn, _, _, _, count in row.get("stages", ())
    )
    cells = [
        row["spec"],
        row.get("layout", ""),
        stages,
        sets.get(tuple(row.get("recipes", ())), "by depth"),
        *(_cell(row, column) for column in COLUMNS),
    ]
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"
