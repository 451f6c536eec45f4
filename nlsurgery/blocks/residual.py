"""The residual side of a block: with a zero gate the branch changes no bit of the host's output.

``0 · inf`` is NaN, so a zero γ (or a zero BatchNorm) alone does not keep an overflowing branch out.
:func:`finite` therefore puts 0 in place of every non-finite value *before* the gate: a branch that
overflows adds nothing there. Its gradient passes unchanged, so a loss scaler still sees overflow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Finite(torch.autograd.Function):
    """``nan_to_num`` to 0 that saves nothing for backward."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return torch.nan_to_num(z, nan=0.0, posinf=0.0, neginf=0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@torch.fx.wrap
def finite(z: Tensor) -> Tensor:
    """Put 0 in place of NaN and ±inf; the gradient passes unchanged.

    Args:
        z: A branch's values, any shape.

    Returns:
        The same shape, dtype and memory format, all values finite.
    """
    if z.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Finite.apply(z)  # type: ignore[no-any-return]
    return torch.nan_to_num(z, nan=0.0, posinf=0.0, neginf=0.0)


@torch.fx.wrap
def add_branch(x: Tensor, z: Tensor) -> Tensor:
    """``x + z`` in the dtype and memory format of ``x``.

    Args:
        x: (B, C, *spatial), the host's output.
        z: The same shape in any floating dtype and memory format, finite.

    Returns:
        A new tensor like ``x``; equal to ``x`` to the last bit where ``z`` is 0.
    """
    y = torch.add(x, z.to(x.dtype))
    like = torch.empty_like(x)
    # Strides along sizes of 1 are ambiguous: torch then follows z, and what comes next in the
    # host might pick another kernel.
    return y if y.stride() == like.stride() else like.copy_(y)
