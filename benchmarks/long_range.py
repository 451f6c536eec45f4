"""Does attention help where far-apart places must be compared? Fine-tune a pretrained backbone and see.

    python benchmarks/long_range.py --rows rows.jsonl
    python benchmarks/long_range.py --rows rows.jsonl --tasks --table benchmarks/results/long_range.md \
        --plot benchmarks/results/long_range.png

``digits``: two real digits in opposite corners, of the same class or not. ``moves``: a clip whose digit is
seen in the first and the last frame only: did it jump to the left or to the right? The backbone is
EfficientNet-Lite0 with its ImageNet weights up to stride 16, frozen or not (its stem, up to stride 4, is
frozen in both, as detectors do); into it go five non-local blocks, or plain convolutions with as many
parameters, or SE blocks at the same places, or nothing. A seed draws the training images, the new
parameters and the order; the learning rate and the number of steps are the same for all. Rows are appended
as they are made, and runs that have one are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.long_range_data import Split, corners, moves, normalised
from benchmarks.long_range_models import (
    VARIANTS,
    Backbone,
    build,
    inserted,
    register_plain_conv,
    train_mode,
)
from benchmarks.long_range_table import draw, page
from benchmarks.rows import append_row, read_rows

TASKS = ("digits", "moves")
BATCH, FRAMES = 32, 4


@dataclass(frozen=True)
class Size:
    """How large a run is: pixels of a side, examples, epochs, classes of digits."""

    side: int
    train: int
    val: int
    epochs: int
    classes: int


#: ``cpu``: half a minute a run on one core. ``gpu``: the same question at size.
SIZES = {
    "cpu": {"digits": Size(128, 1536, 400, 3, 3), "moves": Size(56, 768, 400, 2, 0)},
    "gpu": {
        "digits": Size(224, 20_000, 2_000, 10, 10),
        "moves": Size(112, 8_000, 2_000, 10, 0),
    },
}


def data(task: str, split: str, size: Size, seed: int) -> Split:
    """The examples of one run; the validation examples are the same for all seeds."""
    count, seed = (size.train, seed) if split == "train" else (size.val, 0)
    if task == "digits":
        return corners(split, count, seed, side=size.side, classes=size.classes)
    return moves(split, count, seed, side=size.side, frames=FRAMES)


@lru_cache(maxsize=4)
def stem_features(
    task: str, split: str, size: Size, seed: int, device: str
) -> tuple[Tensor, Tensor]:
    """The output of the stem, which no variant changes, and the labels."""
    examples = data(task, split, size, seed)
    stem = Backbone(2).eval().to(device).stem
    with torch.no_grad():
        parts = [stem(normalised(part.to(device))) for part in examples.inputs.split(64)]
    return torch.cat(parts), examples.labels.to(device)


def accuracy(model: Backbone, inputs: Tensor, labels: Tensor) -> float:
    """Top-1 over a split, 0 to 1, from the stem's output."""
    model.eval()
    with torch.no_grad():
        found = [model.head(part).argmax(1) for part in inputs.split(64)]
    return torch.cat(found).eq(labels).float().mean().item()


def run(
    task: str, variant: str, frozen: bool, seed: int, lr: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Train once and score."""
    size, device = SIZES[options.size][task], options.device
    inputs, labels = stem_features(task, "train", size, seed, device)
    started = time.process_time()
    torch.manual_seed(seed)
    model = build(variant, frozen, normalised(data(task, "val", size, 0).inputs[:1])).to(device)
    optimizer = torch.optim.AdamW(model.groups(lr, backbone_lr=lr / 10), weight_decay=1e-4)
    steps = size.epochs * (size.train // BATCH)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=steps, pct_start=0.2
    )
    train_mode(model, frozen)
    for _ in range(size.epochs):
        for batch in torch.randperm(size.train).split(BATCH)[: size.train // BATCH]:
            loss = F.cross_entropy(model.head(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    score = accuracy(model, *stem_features(task, "val", size, 0, device))
    added = sum(p.numel() for block in inserted(model) for p in block.parameters())
    return {
        "task": task,
        "variant": variant,
        "frozen": frozen,
        "seed": seed,
        "lr": lr,
        "accuracy": score,
        "added": added,
        "seconds": round(time.process_time() - started, 1),
        "size": {"name": options.size, **asdict(size)},
        "device": device,
        "threads": torch.get_num_threads(),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--tasks", nargs="*", default=list(TASKS), help="digits, moves; none to draw"
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--backbone", nargs="+", default=["frozen", "unfrozen"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--lr", type=float, default=4e-3, help="of what is new; the backbone's is a tenth"
    )
    parser.add_argument("--size", default="cpu", choices=SIZES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="sums depend on it")
    parser.add_argument("--rows", type=Path, help="JSON lines to append to and resume from")
    parser.add_argument("--table", type=Path, help="a Markdown file to write")
    parser.add_argument("--plot", type=Path, help="a PNG to write")
    options = parser.parse_args()
    if unknown := set(options.tasks) - set(TASKS):
        parser.error(f"--tasks: no task {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    return options


def main() -> None:
    """Run what is missing; with ``--table`` and ``--plot`` write the results."""
    options = arguments()
    torch.set_num_threads(options.threads)
    register_plain_conv()
    rows = read_rows(options.rows)

    def once(cell: tuple[str, str, bool], seed: int, lr: float) -> None:
        if any(
            (r["task"], r["variant"], r["frozen"], r["seed"], r["lr"]) == (*cell, seed, lr)
            for r in rows
        ):
            return
        row = run(*cell, seed, lr, options)
        rows.append(row)
        print(json.dumps(row), flush=True)
        append_row(options.rows, row)

    kinds = [name == "frozen" for name in options.backbone]
    for task, seed, frozen, variant in product(
        options.tasks, options.seeds, kinds, options.variants
    ):
        once((task, variant, frozen), seed, options.lr)
    if options.table:
        options.table.write_text(page(rows))
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
