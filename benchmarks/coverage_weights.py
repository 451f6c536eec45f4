"""Models with storage for the coverage sweep: what is built, what it is called with, and operated on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import nlsurgery
from benchmarks.coverage_graph import chosen_recipe
from benchmarks.coverage_models import Entry, build, build_lean
from nlsurgery.probe import first_input

#: Models of more parameters share one tensor among all parameters of one kind, name and shape, and run
#: on one input in place of two, of half their size where they can be built for it, and of yet more
#: parameters of a quarter: neither their memory nor their time would fit. Videos get one input too.
LARGE, HUGE = 40_000_000, 300_000_000


def with_weights(
    entry: Entry, row: dict[str, Any], **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """A model with storage, and its row; with input size and anatomy if the size is not its own."""
    torch.manual_seed(0)
    if row["params"] <= LARGE:
        return randomised(build(entry, meta=False, **options)), row
    known = "run_size" in row
    for size in [row["run_size"]] if known else _smaller_sizes(row["input_size"], row["params"]):
        # What is built for one size is built for the smaller one; a convolutional network takes both.
        for more in ({"img_size": tuple(size[-2:])}, {}):
            try:
                model = randomised(build_lean(entry, **options, **more))
                anatomy = nlsurgery.inspect(model, input_size=size)
                if not anatomy.stages:
                    continue  # of a grid of 4×4, rounded, no layout can be told
                part, inputs = model_inputs(model, row | {"run_size": size})
                with torch.no_grad():
                    part(*inputs)  # on the meta device no index is out of bounds
            except Exception:
                continue
            return model, row | {"run_size": size, "anatomy": anatomy}
    return randomised(build_lean(entry, **options)), row | {"run_size": row["input_size"]}


def _smaller_sizes(size: list[int], params: int) -> Iterator[list[int]]:
    """A quarter or half of an input size, in steps that patches of 14, 16 or 32 pixels divide."""
    for divisor in (4, 2) if params > HUGE else (2,):
        sizes = {
            tuple(max(2 * step, side // divisor // step * step) for side in size[-2:])
            for step in (14, 16, 32)
        }
        for smaller in sorted(sizes, reverse=True):
            yield [*size[:-2], *smaller]


def randomised(model: nn.Module) -> nn.Module:
    """Replace zeros that would hide a block: a zero head makes every model equal to every other."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(0, 0.02, generator=generator)
    return model


def model_inputs(model: nn.Module, row: dict[str, Any]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    part, args, _ = first_input(model, row.get("run_size", row["input_size"]), None)
    return part.run, tuple(t[:1] if t.dim() == 5 or row["params"] > LARGE else t for t in args)


def operate(model: nn.Module, row: dict[str, Any]) -> None:
    size = row.get("run_size")
    anatomy = row.get("anatomy") or nlsurgery.inspect(model, input_size=size)
    nlsurgery.apply(model, chosen_recipe(anatomy)[1], input_size=size)
