"""The ways to compute softmax attention, by head size: which wins on this device, and what it keeps.

    python benchmarks/attention_paths.py --device cuda --rows paths.jsonl
    python benchmarks/attention_paths.py --rows paths.jsonl --heads --out benchmarks/results/paths_gpu.md

Against each other: the forms of ``nlsurgery.blocks`` and every backend of torch's
``scaled_dot_product_attention`` by itself (math forms the N×N tensor; flash takes head sizes up to
256, cuDNN up to 128 or 256, mem-efficient any). A backend that refuses a size is a dash. Medians of
interleaved rounds: wall time on a GPU, process time on a CPU. On a GPU also the peak memory above
the inputs. The thresholds of ``nlsurgery/blocks/choose.py`` for a device are to be read off its table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.operators import interleaved
from benchmarks.operators_table import versions
from benchmarks.rows import Row, append_row, read_rows
from nlsurgery.blocks.affinity_softmax import softmax_attend

BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
FORMS = ("explicit", "fused", "chunked")
PATHS = (*FORMS, *BACKENDS)
#: What identifies a row.
CASE = ("head", "positions", "batch", "dtype", "pass")


def attend(path: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Unscaled softmax attention over tokens (B, N, C') by one path."""
    if path in FORMS:
        return softmax_attend(q, k, v, 1.0, path)
    with sdpa_kernel(BACKENDS[path]):
        heads = (tokens.unsqueeze(1) for tokens in (q, k, v))
        return F.scaled_dot_product_attention(*heads, scale=1.0).squeeze(1)


def step(path: str, tokens: Sequence[Tensor], train: bool) -> None:
    """One forward, or one forward and backward."""
    if not train:
        with torch.no_grad():
            attend(path, *tokens)
        return
    torch.autograd.grad(attend(path, *tokens), tokens, tokens[2].detach())


def peak(run: Callable[[], None], device: str) -> float | None:
    """Peak MB of a step above what is allocated before it; unknown off the GPU."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(case: Row, options: argparse.Namespace) -> Row:
    """One row: median seconds, and MB on a GPU, of every path that takes the case."""
    torch.manual_seed(0)
    shape = case["batch"], case["positions"], case["head"]
    kind, train = getattr(torch, case["dtype"]), case["pass"] == "training"
    # Logits of the spread that projections of torch's default init give.
    tokens = [
        torch.randn(shape, device=options.device).mul(scale).to(kind).requires_grad_(train)
        for scale in (1 / 3, 1 / 3, 1)
    ]
    ready: dict[str, Callable[[], None]] = {}
    for path in PATHS:
        run = partial(step, path, tokens, train)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says at length why a backend refuses
                run()
        except RuntimeError:
            continue
        ready[path] = run
    seconds = interleaved(ready, options)
    megabytes = {path: peak(run, options.device) for path, run in ready.items()}
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    return case | {"device": name, "seconds": seconds, "megabytes": megabytes}


def page(rows: Sequence[Row]) -> str:
    """The results in Markdown."""
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows))
    lines = [
        f"# Ways to compute softmax attention on: {devices}",
        "",
        f"{versions()}. Medians of interleaved rounds, in milliseconds; on a GPU with peak MB above the "
        "inputs. A dash: the path does not take this size. Bold: the fastest.",
        "",
        "`python benchmarks/attention_paths.py --rows rows.jsonl`, then the same with `--heads --out …`",
        "",
        "| " + " | ".join([*CASE, *PATHS]) + " |",
        "|---" * (len(CASE) + len(PATHS)) + "|",
    ]
    for row in rows:
        best = min(row["seconds"].values(), default=None)
        cells = [str(row[key]) for key in CASE]
        for path in PATHS:
            value, memory = row["seconds"].get(path), row["megabytes"].get(path)
            text = "–" if value is None else f"{1e3 * value:.3g}"
            text = f"**{text}**" if value is not None and value == best else text
            cells.append(text if memory is None else f"{text} ({memory:.0f} MB)")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"])
    parser.add_argument("--heads", type=int, nargs="*", default=[64, 128, 256, 512])
    parser.add_argument("--positions", type=int, nargs="+", default=[196, 784, 4096, 16700])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--passes", nargs="+", default=["forward", "training"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=Path, help="JSON lines to append to and resume from")
    parser.add_argument("--out", type=Path, help="a Markdown file to write")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Measure and print; with ``--out`` write the results."""
    options = arguments(given)
    rows = read_rows(options.rows)
    cases = itertools.product(
        options.heads, options.positions, [options.batch], options.dtypes, options.passes
    )
    done = {tuple(row[key] for key in CASE) for row in rows}
    for values in cases:
        if values in done:
            continue
        case: dict[str, Any] = dict(zip(CASE, values, strict=True))
        row = measure(case, options)
        rows.append(row)
        append_row(options.rows, row)
        print(json.dumps(row), flush=True)
    if options.out:
        options.out.write_text(page(rows))


if __name__ == "__main__":
    main()
