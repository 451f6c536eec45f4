"""Between channels first and channels last in memory, forward and backward, by what a CPU copies fast."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nlsurgery.blocks.geometry import CHANNELS_LAST, is_eager, is_transformed, to_map

#: Rows of so many values or fewer share sets of a cache where they have a multiple of 64, longer ones
#: where they have a multiple of 128.
_SHORT_ROW = 512
#: Below so many values, two more autograd functions take longer than they save.
MANY_VALUES = 1 << 16


def transposed(x: Tensor) -> Tensor:
    """(B, R, S) to (B, S, R), both contiguous.

    torch copies one matrix in blocks, a batch of them value by value: that reads a column at a time,
    which takes up to 8 times as long where its step falls on the same sets of the cache.
    """
    batch, rows, columns = x.shape
    aliased = columns % (64 if columns <= _SHORT_ROW else 128) == 0
    if not (aliased and x.device.type == "cpu" and rows * columns >= MANY_VALUES >> 4):
        return x.transpose(1, 2).contiguous()
    out = x.new_empty(batch, columns, rows)
    for made, matrix in zip(out, x, strict=True):
        made.copy_(matrix.t())
    return out


def to_channels_last(x: Tensor) -> Tensor:
    """(B, C, *spatial) with channels last in memory; its gradient comes back channels first.

    Maps of 2 or 3 spatial dimensions; others are returned as they are, and all under ``torch.func``,
    whose ``vmap`` knows no memory formats.
    """
    if x.dim() not in CHANNELS_LAST or is_transformed():
        return x
    if _is_worth_it(x) and x.is_contiguous():
        return _Transposed.apply(x, True)  # type: ignore[no-any-return]
    return x.contiguous(memory_format=CHANNELS_LAST[x.dim()])


def to_rows(x: Tensor) -> Tensor:
    """(B, C, *spatial) with the channels of a position side by side, sequences too."""
    return x.mT.contiguous().mT if x.dim() == 3 else to_channels_last(x)


def to_format_of(z: Tensor, x: Tensor) -> Tensor:
    """``z`` channels first where ``x`` is so and ``z`` has channels last; its gradient the other way.

    torch adds two maps that lie differently value by value, in 5 to 14 times the time.

    Args:
        z: (B, C, *spatial).
        x: The same shape.
    """
    return with_channels_first(z) if _is_worth_it(z) and x.is_contiguous() else z


def with_channels_first(z: Tensor) -> Tensor:
    """(B, C, *spatial) channels first where it has channels last on a CPU; its gradient the other way."""
    if not is_eager() or z.device.type != "cpu" or not _has_channels_last(z):
        return z
    return _Transposed.apply(z, False) if _is_worth_it(z) else z.contiguous()


def with_channels_as(y: Tensor, x: Tensor) -> Tensor:
    """``y`` (B, C', *spatial) on a CPU with channels last where ``x`` has them and ``y`` has them first.

    So does what is projected from it, which else is normalised and added in two formats.
    """
    if x.dim() not in CHANNELS_LAST or x.is_contiguous() or x.device.type != "cpu":
        return y
    last = CHANNELS_LAST[x.dim()]
    if is_eager() and y.is_contiguous() and x.is_contiguous(memory_format=last):
        return to_channels_last(y)
    return y


def _has_channels_last(z: Tensor) -> bool:
    if z.dim() not in CHANNELS_LAST or z.is_contiguous():
        return False
    return z.is_contiguous(memory_format=CHANNELS_LAST[z.dim()])


def _is_worth_it(x: Tensor) -> bool:
    return is_eager() and x.device.type == "cpu" and x.numel() >= MANY_VALUES


def _convert(x: Tensor, last: bool) -> Tensor:
    spatial = x.shape[2:]
    if last:
        return to_map(transposed(x.contiguous().flatten(2)), spatial)
    tokens = x.contiguous(memory_format=CHANNELS_LAST[x.dim()]).movedim(1, -1)
    rows = tokens.reshape(x.shape[0], math.prod(spatial), x.shape[1])
    return transposed(rows).reshape(x.shape)


class _Transposed(torch.autograd.Function):
    """A map in the other of the two formats."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, last: bool) -> Tensor:
        ctx.last = last
        return _convert(x, last)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _Transposed.apply(dy, not ctx.last), None
