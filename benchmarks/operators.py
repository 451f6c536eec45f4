"""Non-local blocks against their peers: time of forward and training step, and peak memory.

    python benchmarks/operators.py --rows rows.jsonl     # all shapes, CPU
    python benchmarks/operators.py --shapes res3@512 --modes dot_product --threads 2
    python benchmarks/operators.py --shapes c128@28 c256@56 --modes embedded_gaussian --rounds 25
    python benchmarks/operators.py --device cuda --dtypes float32 float16
    python benchmarks/operators.py --rows rows.jsonl --shapes --out benchmarks/results/operators_cpu.md \
        --picture benchmarks/results/operators_cpu.png

Every block has the same channels, the same input and projections of torch's default init (so that
softmax rows are as peaked as after training). Times are medians of interleaved rounds, so that a
slow minute of the machine meets all alike, and are process CPU time on a CPU (wall time on an
accelerator): only their ratios mean something. Peak memory is measured in a process of its own,
above that of the built block and its input. A peer that is not installed, or cannot run, is named
as such in the table. Rows are appended as they are made, and lines of the same shape, mode, dtype
and pass are left out: a run can be stopped and taken up again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.operators_table import draw, key, page
from benchmarks.peers import BLOCKS, prepared
from benchmarks.rows import append_row, read_rows
from nlsurgery.blocks import NonLocal

#: Batch, channels and spatial sizes. res… are ResNet-50's at the named input sizes.
SHAPES: dict[str, tuple[int, ...]] = {
    "res4@224": (8, 1024, 14, 14),
    "res3@224": (8, 512, 28, 28),
    "res3@224x1": (1, 512, 28, 28),
    "res3@512": (1, 512, 64, 64),
    "res4@800": (1, 1024, 50, 84),
    "vid3": (1, 512, 8, 28, 28),
    "res3@800": (1, 512, 100, 167),
    "vid4x32": (1, 1024, 16, 14, 14),
}
#: Few channels or few positions, where Python and the passes over the map weigh most. Measured when named.
SLIM: dict[str, tuple[int, ...]] = {
    "c64@8": (16, 64, 8, 8),
    "c256@14": (8, 256, 14, 14),
    "c128@28": (1, 128, 28, 28),
    "c256@28": (1, 256, 28, 28),
    "c128@56": (1, 128, 56, 56),
    "c256@56": (1, 256, 56, 56),
}
MODES = ("embedded_gaussian", "dot_product", "concatenation")
SCALING = (24, 48, 96)
#: Batch and spatial sizes of small inputs, by the number of dimensions.
SMALL = {4: ((4, 12, 12), (1, 27, 27)), 5: ((4, 4, 6, 6), (1, 4, 14, 14))}
PASSES = {"forward": "forward", "train": "training"}


def step(block: nn.Module, x: Tensor, train: bool) -> None:
    """One forward, or one forward and backward with all gradients."""
    if not train:
        with torch.no_grad():
            block(x)
        return
    block.zero_grad(set_to_none=True)
    x.grad = None
    block(x).backward(x.detach())  # a dense gradient, as a network gives


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak(
    name: str,
    shape: tuple[int, ...],
    mode: str,
    options: argparse.Namespace,
    dtype: str,
    train: bool,
) -> float:
    """Peak memory of one step in MB, above the built block and its input, in this process."""
    block, x = prepared(name, shape, mode, dtype, train, options.device)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(block, x, train)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # What the libraries allocate once: small inputs that take the forms that large maps take.
    for batch, *spatial in SMALL[len(shape)]:
        small = torch.randn((batch, shape[1], *spatial), dtype=x.dtype, requires_grad=train)
        step(block, small, train)
        del small
    block.zero_grad(set_to_none=True)
    before = resident("VmRSS")
    # Only a process's own high-water mark: getrusage's outlives exec and shows the parent's.
    Path("/proc/self/clear_refs").write_text("5")
    step(block, x, train)
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """Resident memory of this process in MB (Linux): ``VmRSS`` now, ``VmHWM`` at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def peak_elsewhere(
    name: str, shape_name: str, mode: str, options: argparse.Namespace, dtype: str, train: bool
) -> float | None:
    """:func:`peak` in a process of its own; ``None`` where that fails, out of memory included."""
    command = [sys.executable, __file__, "--peak", name, "--shapes", shape_name, "--modes", mode]
    command += ["--dtypes", dtype, "--device", options.device, "--threads", str(options.threads)]
    done = subprocess.run(
        [*command, *(["--train"] if train else [])], capture_output=True, text=True, check=False
    )
    return float(json.loads(done.stdout)) if done.returncode == 0 else None


def times(
    shape: tuple[int, ...], mode: str, options: argparse.Namespace, dtype: str, train: bool
) -> dict[str, float | str]:
    """Median seconds per step of every block, or why it did not run."""
    # Else what is compiled for other sizes counts, and from the ninth on torch compiles no more.
    torch.compiler.reset()
    result: dict[str, float | str] = {}
    ready: dict[str, Callable[[], None]] = {}
    for name in options.blocks:
        try:
            block, x = prepared(name, shape, mode, dtype, train, options.device)
            ready[name] = partial(step, block, x, train)
            ready[name]()
        except ImportError:
            result[name] = "absent"
            ready.pop(name, None)
        except (NotImplementedError, RuntimeError) as error:
            result[name] = "–" if isinstance(error, NotImplementedError) else "fails"
            ready.pop(name, None)
    return result | interleaved(ready, options)


def interleaved(
    ready: dict[str, Callable[[], None]], options: argparse.Namespace
) -> dict[str, float]:
    """Median seconds of each of several runs, taken in turns, in a new order each round.

    What ran before leaves caches and memory as it needed them: always the same would favour one.
    """
    taken: dict[str, list[float]] = {name: [] for name in ready}
    order, chance = list(ready), random.Random(0)
    for _ in range(options.rounds):
        chance.shuffle(order)
        for name in order:
            start = clock(options.device)
            ready[name]()
            taken[name].append(clock(options.device) - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def product_flops(shape: tuple[int, ...], mode: str, form: str) -> float:
    """FLOPs of the matrix products in one forward of our block; multiply and add count as two."""
    batch, channels, positions = shape[0], shape[1], math.prod(shape[2:])
    inner = channels // 2
    projections = 2 if mode == "concatenation" else 4
    flops = 2.0 * batch * positions * channels * inner * projections
    if form == "reassociated":
        return flops + 4.0 * batch * positions * inner**2
    if form == "sorted":
        return flops
    products = 1 if mode == "concatenation" else 2
    return flops + 2.0 * products * batch * positions**2 * inner


def gemm_peak(dtype: str, device: str, rounds: int = 7) -> float:
    """The machine's measured FLOP/s of one square matrix product."""
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    torch.mm(a, b)
    taken = []
    for _ in range(rounds):
        start = clock(device)
        torch.mm(a, b)
        taken.append(clock(device) - start)
    return float(2 * size**3 / statistics.median(taken))


def measure(
    shape_name: str, mode: str, dtype: str, train: bool, options: argparse.Namespace
) -> dict[str, Any]:
    """One line: seconds, and with ``--memory`` MB, of every block."""
    shape = (SHAPES | SLIM)[shape_name]
    taken = times(shape, mode, options, dtype, train)
    block = NonLocal(shape[1], dims=len(shape) - 2, mode=mode)
    form = block.chosen_implementation(shape, dtype=getattr(torch, dtype), device=options.device)
    row: dict[str, Any] = {
        "shape": shape_name,
        "mode": mode,
        "dtype": dtype,
        "pass": "training" if train else "forward",
        "threads": options.threads,
        "device": options.device,
        "form": form,
        "seconds": taken,
    }
    if not train:
        flops = product_flops(shape, mode, form)
        row["bound"] = flops / gemm_peak(dtype, options.device)
    if options.memory:
        # What compiling itself takes could not be told from what a compiled block takes.
        eager = [name for name in options.blocks if "compiled" not in name]
        runs = [name for name in eager if isinstance(taken.get(name), float)]
        used = {n: peak_elsewhere(n, shape_name, mode, options, dtype, train) for n in runs}
        row["megabytes"] = {name: value for name, value in used.items() if value}
    return row


def growth(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Growth of our forward time with N: the slope of log time over log N."""
    taken = []
    for side in SCALING:
        size = (1, 256, side, side)
        block, x = prepared("nlsurgery", size, mode, "float32", False, options.device)
        values = []
        for _ in range(options.rounds + 1):
            start = clock(options.device)
            step(block, x, False)
            values.append(clock(options.device) - start)
        taken.append(statistics.median(values[1:]))
    slope = math.log(taken[-1] / taken[0]) / math.log((SCALING[-1] / SCALING[0]) ** 2)
    sizes = [side**2 for side in SCALING]
    return {
        "growth": mode,
        "threads": options.threads,
        "N": sizes,
        "seconds": taken,
        "slope": slope,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES | SLIM)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--passes", nargs="+", default=["forward", "train"])
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS), choices=BLOCKS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="measure peak memory as well")
    parser.add_argument("--scaling", action="store_true", help="measure growth with N as well")
    parser.add_argument("--rows", type=Path, help="JSON lines to append to and resume from")
    parser.add_argument("--out", type=Path, help="a Markdown file to write")
    parser.add_argument("--picture", type=Path, help="a PNG to write")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print; with ``--out`` and ``--picture`` write the results."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.peak:
        shape, mode = (SHAPES | SLIM)[options.shapes[0]], options.modes[0]
        dtype = options.dtypes[0]
        print(json.dumps(peak(options.peak, shape, mode, options, dtype, options.train)))
        return
    rows = read_rows(options.rows)

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        append_row(options.rows, row)

    for case in product(options.shapes, options.modes, options.dtypes, options.passes):
        if not any(key(row) == (*case[:3], PASSES[case[3]]) for row in rows):
            keep(measure(*case[:3], case[3] == "train", options))
    if options.scaling:
        for mode in options.modes:
            keep(growth(mode, options))
    if options.out:
        named, modes = (
            list(dict.fromkeys(row[key] for row in rows if "shape" in row))
            for key in ("shape", "mode")
        )
        flags = f" --shapes {' '.join(named)} --modes {' '.join(modes)}"
        flags = "" if set(named) & set(SHAPES) else flags
        options.out.write_text(page(rows, options.device, flags))
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
