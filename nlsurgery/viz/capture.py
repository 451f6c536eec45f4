"""What the inserted blocks attend to: read off during one forward, for a few query points."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nlsurgery.errors import DataError

#: Largest attention map (bytes) computed as a whole for a block that has no per-query form.
MAX_MAP_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """Where a few positions of one block attend.

    Attributes:
        fqn: The block's name in the model.
        type: Its class.
        query_size: (H, W) of the feature map; its positions are the queries.
        key_size: (H', W') of the keys, coarser after sub-sampling.
        key_stride: Query positions per key, along each axis.
        queries: (row, column) of each query on the feature map.
        weights: (Q, H', W'), float32 on the CPU: each query's weight at each key.
    """

    fqn: str
    type: str
    query_size: tuple[int, int]
    key_size: tuple[int, int]
    key_stride: tuple[int, int]
    queries: tuple[tuple[int, int], ...]
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Skipped:
    """A block that shows nothing, and why."""

    fqn: str
    reason: str


@dataclass(frozen=True, slots=True)
class Capture:
    """What one forward showed: the blocks with attention, and those without."""

    rows: tuple[AttentionRows, ...]
    skipped: tuple[Skipped, ...]


def capture_attention(
    model: nn.Module, image: Tensor, points: Sequence[tuple[float, float]]
) -> Capture:
    """Run a model once and record where each inserted block attends from some points.

    Only the rows asked for are kept, and computed where the block can do so.

    Args:
        model: An operated model. Its mode, parameters and buffers stay as they are.
        image: (1, 3, H, W), normalised.
        points: (x, y) of each query, relative to the image, in [0, 1].

    Raises:
        DataError: ``image`` is no single image, the model takes video, or nothing is inserted.
    """
    import nlsurgery

    if image.ndim != 4 or image.shape[0] != 1:
        raise DataError(
            f"attention is drawn for one image (1, 3, H, W), but got {tuple(image.shape)}"
        )
    blocks = nlsurgery.inserted_blocks(model)
    if not blocks:
        raise DataError("the model has no inserted block to look at; apply a recipe first")
    _refuse_video(model)
    found: dict[str, AttentionRows | Skipped] = {}

    def hook_for(fqn: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def record(block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            found[fqn] = read_rows(fqn, block, inputs[0], points)

        return record

    handles = [block.register_forward_hook(hook_for(fqn)) for fqn, block in blocks.items()]
    try:
        parameter = next(model.parameters())
        with _evaluating(model), torch.no_grad():
            model(image.to(parameter.device, parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()
    results = [found.get(fqn, Skipped(fqn, "it did not run")) for fqn in blocks]
    return Capture(
        tuple(item for item in results if isinstance(item, AttentionRows)),
        tuple(item for item in results if isinstance(item, Skipped)),
    )


def grid_points(side: int) -> tuple[tuple[float, float], ...]:
    """Points spread evenly over an image.

    Args:
        side: How many along each axis; ``side`` squared in all.

    Returns:
        (x, y) of each, relative, row by row.
    """
    middles = [(index + 0.5) / side for index in range(side)]
    return tuple((x, y) for y in middles for x in middles)


def read_rows(
    fqn: str, block: nn.Module, x: Tensor, points: Sequence[tuple[float, float]]
) -> AttentionRows | Skipped:
    """Compute where a block attends from some points of its input.

    Args:
        fqn: How the result names the block.
        block: A block, with or without an attention map.
        x: (B, C, H, W), what it was called with; the first of the batch is read.
        points: (x, y) of each query, relative, in [0, 1].

    Returns:
        The rows, or why there are none.
    """
    if not callable(getattr(block, "attention", None)):
        return Skipped(fqn, f"{type(block).__name__} has no attention map")
    if x.ndim != 4:
        return Skipped(fqn, f"its {math.prod(x.shape[2:])} positions do not lie on an image grid")
    size = height, width = x.shape[2], x.shape[3]
    queries = tuple(
        (min(int(down * height), height - 1), min(int(across * width), width - 1))
        for across, down in points
    )
    index = torch.tensor([row * width + column for row, column in queries], device=x.device)
    rows = _attention_rows(block, x, index)
    if rows is None:
        needed = math.prod(size) ** 2 * x.element_size() / 2**30
        return Skipped(
            fqn, f"its whole map would take {needed:.1f} GiB; give a smaller --input-size"
        )
    stride = _key_stride(rows.shape[-1], size)
    if stride is None:
        return Skipped(fqn, f"its {rows.shape[-1]} keys do not lie on the {height}×{width} grid")
    keys = (height // stride[0], width // stride[1])
    weights = rows.detach().float().cpu().reshape(len(queries), *keys)
    return AttentionRows(fqn, type(block).__name__, size, keys, stride, queries, weights)


def _attention_rows(block: Any, x: Tensor, index: Tensor) -> Tensor | None:
    """The rows (Q, M) of a block's attention, None where the whole map would be too large."""
    if "queries" in inspect.signature(block.attention).parameters:
        rows: Tensor = block.attention(x, queries=index)[0]
        return rows
    num_positions = math.prod(x.shape[2:])
    if num_positions**2 * x.element_size() > MAX_MAP_BYTES:
        return None
    whole: Tensor = block.attention(x)[0]
    return whole[index]


def _key_stride(num_keys: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """How many positions one key stands for along each axis: 1, or the sub-sampling's factor.

    An axis of size 1 is never sub-sampled.
    """
    height, width = size
    for factor in range(1, max(size) + 1):
        down, across = (factor if axis > 1 else 1 for axis in size)
        if (height // down) * (width // across) == num_keys:
            return down, across
    return None


def _refuse_video(model: nn.Module) -> None:
    import nlsurgery

    for row in nlsurgery.report(model).insertions:
        if len(row.feature_size) == 3:
            raise DataError(
                f"{row.fqn} looks at video clips; attention is drawn for image models only, so far"
            )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode and back, module by module."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
