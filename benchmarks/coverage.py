"""Try the surgery on every model of timm and torchvision, and write docs/coverage.md.

    python benchmarks/coverage.py --sample family --level tools --rows rows.jsonl
    python benchmarks/coverage.py --sample tenth --seed $(git rev-parse HEAD)
    python benchmarks/coverage.py --level tools --rows rows.jsonl --table docs/coverage.md

Rows are appended as they are made, one JSON object a line, and models that have one are left out: a sweep
can be stopped and taken up again. Those of docs/coverage.md are benchmarks/results/coverage.jsonl. Exits
with 1 when a model does not hold a column.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.coverage_checks import RUN_COLUMNS, TOOL_COLUMNS, check_weights
from benchmarks.coverage_graph import check_graph
from benchmarks.coverage_models import Entry, all_models, build, select
from benchmarks.coverage_table import failures, table, versions
from benchmarks.rows import Row, append_row, read_rows

LEVELS = ("graph", "run", "tools")
#: In a drawn sample, models of at most so many parameters are also run with weights.
SMALL = 30_000_000


class TooSlow(BaseException):
    """A model that outlasts its limit; no ``except Exception`` on the way may swallow it."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TooSlow after some seconds."""

    def stop(*_: object) -> None:
        raise TooSlow(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def try_model(
    entry: Entry, level: str, limit: int, most_params: int | None, known: Row | None = None
) -> Row:
    """Fill one row of the table, beginning with what an earlier row knows of the graph."""
    columns = {"graph": (), "run": RUN_COLUMNS, "tools": RUN_COLUMNS + TOOL_COLUMNS}[level]
    row = {k: v for k, v in (known or {}).items() if k not in RUN_COLUMNS + TOOL_COLUMNS}
    row |= {"spec": entry.spec, "family": entry.family, "level": level}
    try:
        with time_limit(limit):
            if "plan" not in row:
                row |= check_graph(entry)
            row["with"] = versions()
            if most_params is not None and row["params"] > most_params:
                row["level"] = "graph"
            elif level != "graph":
                row.update(check_weights(entry, row, tools=level == "tools"))
    except (Exception, TooSlow) as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if "plan" not in row:
            row["error"] = text
        row |= {column: f"no: {text}" for column in columns if column not in row}
    return row


def rows_by_model(path: Path | None) -> dict[str, Row]:
    """Rows by model; of several for one model, the one of the highest level."""
    rows: dict[str, Row] = {}
    for row in read_rows(path):
        old = rows.get(row["spec"])
        if old is None or LEVELS.index(row["level"]) >= LEVELS.index(old["level"]):
            rows[row["spec"]] = row
    return rows


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--sample", default="all", choices=["all", "family", "tenth", "none"])
    parser.add_argument(
        "--seed", default="", help="draws the tenth: any text, such as a commit's hash"
    )
    parser.add_argument("--pattern", default="*", help="only models whose library/name matches")
    parser.add_argument("--part", default="1/1", help="K/N: one of N equal parts, for N processes")
    parser.add_argument("--level", default=None, choices=LEVELS)
    parser.add_argument("--limit", type=int, default=240, help="seconds a model may take")
    parser.add_argument(
        "--most-params",
        type=float,
        help=f"millions; larger models stay at the level 'graph' (a drawn sample: {SMALL / 1e6:g})",
    )
    parser.add_argument("--minutes", type=float, help="start no further model after so long")
    parser.add_argument("--rows", type=Path, help="JSON lines to append to and resume from")
    parser.add_argument("--table", type=Path, help="write the Markdown page here")
    return parser.parse_args()


def main() -> int:
    """Run the sweep. Returns the exit code."""
    options = _arguments()
    started = time.monotonic()
    gc.disable()  # collected after each model: compilers make millions of objects, and few cycles
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    entries = all_models()
    gc.freeze()
    rows = rows_by_model(options.rows)
    drawn = options.sample == "tenth"
    level = options.level or ("run" if drawn else "graph")
    params = {spec: row["params"] for spec, row in rows.items() if "params" in row}
    if options.sample == "family":
        for entry in select(entries, "all", pattern=options.pattern):
            if entry.spec not in params:
                params[entry.spec] = sum(p.numel() for p in build(entry).parameters())
    most = int(1e6 * options.most_params) if options.most_params else SMALL if drawn else None
    chosen = []
    if options.sample != "none":
        chosen = select(entries, options.sample, options.seed, options.pattern, params)
    chosen.sort(key=lambda e: (params.get(e.spec, 0), hashlib.sha256(e.spec.encode()).digest()))
    part, parts = map(int, options.part.split("/"))
    chosen = chosen[part - 1 :: parts]
    tried = []
    for entry in chosen:
        old = rows.get(entry.spec)
        if old is not None and LEVELS.index(old["level"]) >= LEVELS.index(level):
            tried.append(old)
            continue
        if options.minutes and time.monotonic() - started > 60 * options.minutes:
            print(
                f"{options.minutes:g} minutes are over: {len(chosen) - len(tried)} models not tried"
            )
            break
        deeper = drawn and hashlib.sha256(entry.spec.encode()).digest()[0] < 26
        row = try_model(entry, "tools" if deeper else level, options.limit, most, old)
        rows[entry.spec] = row
        tried.append(row)
        for problem in failures(row):
            print(f"FAILED {entry.spec} - {problem}", flush=True)
        append_row(options.rows, row)
        gc.collect()
    gc.unfreeze()
    gc.enable()
    if options.table is not None:
        totals = {lib: sum(e.library == lib for e in entries) for lib in ("timm", "torchvision")}
        options.table.write_text(table(list(rows.values()), totals))
    failed = sum(bool(failures(row)) for row in tried)
    passed = f"{len(tried) - failed} passed"
    counts = f"{failed} failed, {passed}" if failed else passed
    print(f"==== {counts} in {time.monotonic() - started:.2f}s ====")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
