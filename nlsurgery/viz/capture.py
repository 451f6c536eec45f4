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

from nlsurgery.blocks.geometry import num_keys
from nlsurgery.errors import DataError

#: Largest attention map (bytes) computed as a whole for a block that has no per-query form.
MAX_MAP_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """Where a few positions of one block attend.

    Attributes:
        fqn: The block's name in the model.
        type: Its class.
        query_size: (H, W) of the feature map, (T, H, W) of a clip's; its positions are the queries.
        key_size: (H', W') or (T', H', W') of the keys, coarser after sub-sampling.
        key_stride: Query positions per key, along each axis.
        queries: (row, column), or (time, row, column), of each query on the feature map.
        weights: (Q, *key_size), float32 on the CPU: each query's weight at each key.
    """

    fqn: str
    type: str
    query_size: tuple[int, ...]
    key_size: tuple[int, ...]
    key_stride: tuple[int, ...]
    queries: tuple[tuple[int, ...], ...]
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
    model: nn.Module, image: Tensor, points: Sequence[tuple[float, ...]]
) -> Capture:
    """Run a model once and record where each inserted block attends from some points.

    Only the rows asked for are kept, and computed where the block can do so.

    Args:
        model: An operated model. Its mode, parameters and buffers stay as they are.
        image: (1, 3, H, W), or a clip (1, 3, T, H, W), normalised.
        points: (x, y) of each query, relative to the image, in [0, 1]; of a clip (x, y, t), or (x, y)
            for the middle of it.

    Raises:
        DataError: ``image`` is no single image or clip, or not what the model takes, or nothing is
            inserted.
    """
    import nlsurgery

    if image.ndim not in (4, 5) or image.shape[0] != 1:
        raise DataError(
            f"attention is drawn for one image (1, 3, H, W) or one clip (1, 3, T, H, W), but got "
            f"{tuple(image.shape)}"
        )
    blocks = nlsurgery.inserted_blocks(model)
    if not blocks:
        raise DataError("the model has no inserted block to look at; apply a recipe first")
    if takes_clips(model) != (image.ndim == 5):
        kinds = ("clips (1, 3, T, H, W)", "images (1, 3, H, W)")
        taken, given = kinds if takes_clips(model) else reversed(kinds)
        raise DataError(f"the model takes {taken}, but got one of the {given}")
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
    fqn: str, block: nn.Module, x: Tensor, points: Sequence[tuple[float, ...]]
) -> AttentionRows | Skipped:
    """Compute where a block attends from some points of its input.

    Args:
        fqn: How the result names the block.
        block: A block, with or without an attention map.
        x: (B, C, H, W) or (B, C, T, H, W), what it was called with; the first of the batch is read.
        points: (x, y) or (x, y, t) of each query, relative, in [0, 1].

    Returns:
        The rows, or why there are none.
    """
    if not callable(getattr(block, "attention", None)):
        return Skipped(fqn, f"{type(block).__name__} has no attention map")
    if x.ndim not in (4, 5):
        return Skipped(fqn, f"its {math.prod(x.shape[2:])} positions do not lie on an image grid")
    size = tuple(x.shape[2:])
    queries = tuple(_position(point, size) for point in points)
    places = torch.tensor(queries, device=x.device)
    index = sum(places[:, axis] * math.prod(size[axis + 1 :]) for axis in range(len(size)))
    assert isinstance(index, Tensor)
    rows = _attention_rows(block, x, index)
    if rows is None:
        needed = math.prod(size) ** 2 * x.element_size() / 2**30
        return Skipped(
            fqn, f"its whole map would take {needed:.1f} GiB; give a smaller --input-size"
        )
    stride = _key_stride(rows.shape[-1], size, getattr(block, "pool", None))
    if stride is None:
        grid = "×".join(map(str, size))
        return Skipped(fqn, f"its {rows.shape[-1]} keys do not lie on the {grid} grid")
    keys = tuple(axis // step for axis, step in zip(size, stride, strict=True))
    weights = rows.detach().float().cpu().reshape(len(queries), *keys)
    return AttentionRows(fqn, type(block).__name__, size, keys, stride, queries, weights)


def _position(point: tuple[float, ...], size: tuple[int, ...]) -> tuple[int, ...]:
    """The position of the feature map, (row, column) or (time, row, column), that a point lies in."""
    across, down, *time = point
    shares = (*(time or (0.5,)), down, across)[-len(size) :]
    return tuple(min(int(share * axis), axis - 1) for share, axis in zip(shares, size, strict=True))


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


def _key_stride(
    count: int, size: tuple[int, ...], pool: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """How many positions one key stands for along each axis: 1, or the sub-sampling's factor.

    Args:
        count: M.
        size: Of the feature map.
        pool: What the block says of it; otherwise time and axes of size 1 are taken as not sub-sampled.
    """
    if pool is not None and len(pool) == len(size) and num_keys(size, pool) == count:
        return tuple(min(step, axis) for step, axis in zip(pool, size, strict=True))
    *time, height, width = size
    for factor in range(1, max(height, width) + 1):
        down, across = (factor if axis > 1 else 1 for axis in (height, width))
        if math.prod(time) * (height // down) * (width // across) == count:
            return *[1] * len(time), down, across
    return None


def takes_clips(model: nn.Module) -> bool:
    """Whether a block of an operated model looks at clips: the model then takes (B, 3, T, H, W)."""
    import nlsurgery

    return any(len(row.feature_size) == 3 for row in nlsurgery.report(model).insertions)


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
