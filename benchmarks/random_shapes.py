"""Non-local blocks against their peers at random shapes, which no threshold was chosen for.

    python benchmarks/random_shapes.py --count 50 --threads 1 --rows random.jsonl
    python benchmarks/random_shapes.py --threads 1 --rows random.jsonl --again
    python benchmarks/random_shapes.py --rows random.jsonl --count 0 --out benchmarks/results/random_shapes.md

A seed names the shapes: dimensions, batch, channels, positions, mode, sub_sample, use_scale and memory
format are all drawn, those too large left out. Against the eager blocks of ``benchmarks/operators.py``, in
interleaved rounds, medians, forward and training step; on a CPU in process time. ``--again`` measures those
below 0.85 once more, which the table shows beside the first figure and does not count. Rows are
appended as they are made, and cases that are there are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.operators import PASSES, interleaved, step
from benchmarks.operators_table import OURS, processor, versions
from benchmarks.peers import prepared
from benchmarks.rows import Row, append_row, read_rows
from nlsurgery.blocks.geometry import CHANNELS_LAST

PEERS = ("article", "mmcv-lite", "timm")
#: Shares in which modes are drawn: most of what is used is embedded Gaussian.
MODES = {"embedded_gaussian": 4, "gaussian": 2, "dot_product": 2, "concatenation": 2}
#: How often there are so many dimensions.
DIMS = {1: 2, 2: 5, 3: 3}
#: Multiplications of a forward, and values of the map, beyond which a shape takes too long for many rounds.
MOST_PRODUCTS, MOST_WEIGHTS = 1 << 34, 1 << 26
#: mmcv's concatenation forms (B, C, N, N): float32 bytes beyond which it is left out.
PAIR_LIMIT = 1 << 29
#: Below this share of the fastest peer's speed a block is slower beyond noise.
NOISE = 0.85
#: Seconds that the rounds of one case take at most, and how many there are at least and at most.
SECONDS, FEWEST, MOST = 3.0, 5, 41
#: What tells a case.
CASE = ("shape", "mode", "sub_sample", "use_scale", "channels_last", "dtype", "pass", "threads")


def cases(seed: int, count: int, modes: Sequence[str], positions: tuple[int, int]) -> Iterator[Row]:
    """Draw ``count`` shapes with their options; the same seed gives the same ones."""
    chance = random.Random(seed)
    while count:
        (dims,) = chance.choices(list(DIMS), list(DIMS.values()))
        (mode,) = chance.choices(modes, [MODES[name] for name in modes])
        drawn = math.exp(chance.uniform(*map(math.log, positions)))
        frames = chance.choice((2, 4, 8)) if dims == 3 else 1
        height = math.sqrt(drawn / frames) * math.exp(chance.uniform(-0.35, 0.35))
        sides = [max(2, round(side)) for side in (height, drawn / frames / height)]
        spatial = {1: [round(drawn)], 2: sides, 3: [frames, *sides]}[dims]
        channels = 16 * round(math.exp(chance.uniform(math.log(2), math.log(128))))
        batch = round(math.exp(chance.uniform(0, math.log(16))))
        case: Row = {
            "shape": [batch, channels, *spatial],
            "mode": mode,
            "sub_sample": chance.random() < 0.25,
            "use_scale": mode == "embedded_gaussian" and chance.random() < 0.5,
            "channels_last": dims > 1 and chance.random() < 0.4,
        }
        numbers = math.prod(spatial)
        products = batch * numbers * channels * (2 * channels + numbers)
        if products <= MOST_PRODUCTS and batch * numbers**2 <= MOST_WEIGHTS:
            yield case
            count -= 1


def measure(case: Row, rounds: int | None = None) -> Row:
    """Median seconds of a step of every block that has the case."""
    shape, train = tuple(case["shape"]), case["pass"] == "training"
    ready = {}
    for name in (OURS, *PEERS):
        try:
            options = case["sub_sample"], case["use_scale"], PAIR_LIMIT
            block, x = prepared(name, shape, case["mode"], case["dtype"], train, "cpu", *options)
            if case["channels_last"]:
                kind = CHANNELS_LAST[len(shape)]
                if len(shape) == 4:  # torch lays out no module that has weights of both ranks
                    block = block.to(memory_format=kind)
                x = x.detach().to(memory_format=kind).requires_grad_(train)
            run = partial(step, block, x, train)
            run()
            ready[name] = run
        except (ImportError, NotImplementedError, RuntimeError):
            # Not installed, not its form, or it fails in bfloat16 or in backward.
            if name == OURS:
                raise
    start = time.perf_counter()
    for run in ready.values():
        run()
    fitting = int(SECONDS / (time.perf_counter() - start))
    rounds = rounds or min(MOST, max(FEWEST, fitting))
    return case | {
        "rounds": rounds,
        "seconds": interleaved(ready, argparse.Namespace(rounds=rounds, device="cpu")),
    }


def ratio(row: Row) -> float | None:
    """The fastest peer's time over ours, if any ran."""
    others = [value for name, value in row["seconds"].items() if name != OURS]
    return min(others) / row["seconds"][OURS] if others else None


def key(row: Row) -> str:
    """What tells a row's case, ``--again`` or not."""
    return json.dumps([row[name] for name in CASE])


def page(rows: Sequence[Row]) -> str:
    """The results in Markdown: how ratios are spread, and the lowest ones."""
    first = [row for row in rows if not row.get("again") and ratio(row)]
    seeds = ", ".join(sorted({str(row["seed"]) for row in first}))
    again = {key(row): ratio(row) for row in rows if row.get("again")}
    lines = [
        "# Random shapes on a CPU",
        "",
        f"{versions()}; {processor()}. Each number is the fastest eager peer's time over ours (above 1: "
        "ours is faster), medians of interleaved rounds.",
        "",
        f"`python benchmarks/random_shapes.py --rows rows.jsonl --seed {seeds}`, with `--threads` and",
        "`--count` as the table says, and `--again`, then `… --rows rows.jsonl --count 0 --out …`",
        "",
        "| dtype | pass | modes | threads | shapes | lowest | twentieth | tenth | median | below 0.85 |",
        "|" + "---|" * 10,
    ]
    for group in sorted({kind(row) for row in first}):
        values = sorted(ratio(row) or 0.0 for row in first if kind(row) == group)
        spread = [
            values[0],
            *(values[len(values) // n] for n in (20, 10)),
            statistics.median(values),
        ]
        low = sum(value < NOISE for value in values)
        cells = [*map(str, group), str(len(values)), *(f"{value:.2f}" for value in spread)]
        lines.append("| " + " | ".join([*cells, str(low)]) + " |")
    lowest = sorted(first, key=lambda row: ratio(row) or 0.0)
    lowest = [row for row in lowest if (ratio(row) or 0.0) < NOISE][:40]
    if lowest:
        lines += ["", f"## Below {NOISE}", ""]
        lines += [
            "| " + " | ".join(CASE) + " | ms | ratio | again |",
            "|" + "---|" * (len(CASE) + 3),
        ]
    for row in lowest:
        cells = [say(row[name]) for name in CASE]
        second = again.get(key(row))
        cells += [f"{1e3 * row['seconds'][OURS]:.3g}", f"{ratio(row):.2f}"]
        cells += [f"{second:.2f}" if second else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def kind(row: Row) -> tuple[str, str, str, int]:
    """The line of the table that a row counts in."""
    modes = "softmax" if "gaussian" in row["mode"] else "other"
    return row["dtype"], row["pass"], modes, row["threads"]


def say(value: object) -> str:
    """A cell of the table."""
    if isinstance(value, bool):
        return "yes" if value else ""
    return "×".join(map(str, value)) if isinstance(value, list) else str(value)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="names the shapes")
    parser.add_argument("--count", type=int, default=50, help="how many shapes")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--positions", type=int, nargs=2, default=[30, 2500], help="from, to")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure those below 0.85 once more")
    parser.add_argument("--rows", type=Path, help="JSON lines to append to and resume from")
    parser.add_argument("--out", type=Path, help="a Markdown file to write")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Measure and print; with ``--out`` write the results."""
    options = arguments(given)
    torch.set_num_threads(options.threads)
    rows = read_rows(options.rows)

    def keep(row: Row) -> None:
        rows.append(row)
        print(f"{ratio(row) or math.nan:.2f} {json.dumps(row)}", flush=True)
        append_row(options.rows, row)

    if options.again:
        seen = {key(row) for row in rows if row.get("again")}
        for row in list(rows):
            low = (ratio(row) or 1.0) < NOISE and row["threads"] == options.threads
            if low and key(row) not in seen:
                keep(measure({name: row[name] for name in CASE} | {"again": True}, MOST))
    else:
        seen = {key(row) for row in rows}
        for shape in cases(options.seed, options.count, options.modes, options.positions):
            for dtype in options.dtypes:
                for name in options.passes:
                    case = shape | {
                        "dtype": dtype,
                        "pass": PASSES[name],
                        "threads": options.threads,
                    }
                    if key(case) not in seen:
                        keep(measure(case | {"seed": options.seed}))
    if options.out:
        options.out.write_text(page(rows))


if __name__ == "__main__":
    main()
