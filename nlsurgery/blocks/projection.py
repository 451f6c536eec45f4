"""1×1 convolutions by oneDNN where torch leaves them to MKL although that is slower.

On one thread torch takes MKL for a float32 convolution with a 1×1 kernel and a batch below 16
(``aten/src/ATen/native/Convolution.cpp``), whatever the processor (``products.py``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nlsurgery.blocks import products
from nlsurgery.blocks.affinity import differentiable_gradients
from nlsurgery.blocks.geometry import is_eager, working_dtype
from nlsurgery.blocks.products import product, product_and

#: Batches from which on torch itself takes oneDNN, as with more than one thread.
TORCH_BATCH = 16
#: Below so many multiplications to begin takes longer than to multiply.
MANY_PRODUCTS = 1 << 22


def goes_by_products(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`pointwise_products` is faster than torch's convolution.

    Args:
        x: (B, C, *spatial).
        weight: (C', C, 1, …).
    """
    if not is_eager() or x.device.type != "cpu" or x.shape[0] >= TORCH_BATCH:
        return False
    if {x.dtype, weight.dtype, working_dtype(x)} != {torch.float32} or torch.get_num_threads() > 1:
        return False
    if x.numel() * weight.shape[0] < MANY_PRODUCTS or not _lies_well(x):
        return False
    return products.are_by_onednn(x.dtype, x.device.type)


def pointwise_products(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 1×1 convolution of (B, C, *spatial) with (C', C, 1, …): (B, C', *spatial), lying as ``x`` does."""
    if _is_last(x):
        rows = x.movedim(1, -1)
        y = _Rows.apply(rows.flatten(0, -2), weight.flatten(1), bias)
        return y.unflatten(0, rows.shape[:-1]).movedim(-1, 1)  # type: ignore[no-any-return]
    y = _Columns.apply(x.flatten(2), weight.flatten(1), bias)
    return y.unflatten(2, x.shape[2:])  # type: ignore[no-any-return]


def _lies_well(x: Tensor) -> bool:
    return x.is_contiguous() or _is_last(x)


def _is_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.movedim(1, -1).is_contiguous()


class _Rows(torch.autograd.Function):
    """x Wᵀ + bias of (N, C) and (C', C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_gradients(F.linear(x, weight, bias), (x, weight, bias), dy)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dy = dy.contiguous()
        dx = product(dy, weight.t()) if needs_x else None
        dw = product(dy.t(), x.t()) if needs_weight else None
        return dx, dw, dy.sum(0) if needs_bias else None


class _Columns(torch.autograd.Function):
    """W x + bias of each batch item of (B, C, N), and (C', C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        y = _each(weight, x)
        return y if bias is None else y.add_(bias.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            y = F.conv1d(x, weight.unsqueeze(2), bias)
            return differentiable_gradients(y, (x, weight, bias), dy)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dy = dy.contiguous()
        dx = _each(weight.t(), dy) if needs_x else None
        dw = None
        if needs_weight:
            dw = product(dy[0], x[0])
            for upstream, item in zip(dy[1:], x[1:], strict=True):
                dw = product_and("add", dw, upstream, item)
        return dx, dw, dy.sum((0, 2)) if needs_bias else None


def _each(matrix: Tensor, x: Tensor) -> Tensor:
    """(B, C', N), the product of (C', C) and each (C, N)."""
    if x.shape[0] == 1:
        made = product(matrix, x[0].t())
        # Not a view, which could not be changed in place after a function of ours.
        return torch.ops.aten._unsafe_view(made, (1, *made.shape))  # type: ignore[no-any-return]
    return torch.stack([product(matrix, item.t()) for item in x])
