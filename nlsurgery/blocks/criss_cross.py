"""Criss-cross attention: each position attends to its row and column (CCNet, Huang et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from nlsurgery.blocks.affinity import accumulator, without_autocast
from nlsurgery.blocks.base import GammaBlock, checked_dims
from nlsurgery.blocks.geometry import pointwise, reduced
from nlsurgery.blocks.registration import register
from nlsurgery.blocks.residual import add_gated
from nlsurgery.errors import BlockError

torch.fx.wrap("add_gated")


@torch.fx.wrap
def criss_cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of each position over its H + W − 1 neighbours, itself counted once.

    Args:
        q: (B, C', H, W).
        k: (B, C', H, W).
        v: (B, V, H, W).

    Returns:
        (B, V, H, W) in the dtype of ``v``.
    """
    with without_autocast(q):
        dtype = accumulator(q.dtype)
        queries, keys, values = (t.to(dtype) for t in (q, k, v))
        height = q.shape[2]
        column = torch.einsum("bchw,bcgw->bhwg", queries, keys)
        itself = torch.eye(height, dtype=torch.bool, device=q.device).unsqueeze(1)
        column = column.masked_fill(itself, float("-inf"))
        row = torch.einsum("bchw,bchg->bhwg", queries, keys)
        weights = torch.cat((column, row), dim=-1).softmax(-1)
        y = torch.einsum("bhwg,bcgw->bchw", weights[..., :height], values)
        return (y + torch.einsum("bhwg,bchg->bchw", weights[..., height:], values)).to(v.dtype)


class CrissCross(GammaBlock):
    """x ← x + γ · criss_cross(x), ``recurrence`` times with the same weights (Eqs. 1 to 3).

    Children as published: ``query_conv``, ``key_conv``, ``value_conv``, ``gamma``.
    """

    def __init__(
        self, in_channels: int, *, dims: int = 2, reduction: float = 8, recurrence: int = 2
    ) -> None:
        super().__init__(in_channels, checked_dims(dims, (2,), block="criss_cross"))
        if recurrence < 1:
            raise BlockError(f"criss_cross: recurrence must be at least 1, got {recurrence}")
        self.recurrence = recurrence
        inner = reduced(in_channels, reduction)
        self.query_conv = pointwise(in_channels, inner, dims)
        self.key_conv = pointwise(in_channels, inner, dims)
        self.value_conv = pointwise(in_channels, in_channels, dims)

    def branch(self, x: Tensor) -> Tensor:
        """One pass."""
        return criss_cross(self.query_conv(x), self.key_conv(x), self.value_conv(x))

    def forward(self, x: Tensor) -> Tensor:
        """Run all passes over (B, C, H, W)."""
        x = super().forward(x)
        for _ in range(self.recurrence - 1):
            x = add_gated(x, self.branch(x), self.gamma)
        return x


@register("criss_cross", source="Huang et al., CCNet, ICCV 2019")
def build_criss_cross(
    in_channels: int, *, dims: int, reduction: float = 8, recurrence: int = 2
) -> CrissCross:
    """Build criss-cross attention, for images only.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions, 2.
        reduction: Queries and keys have C // reduction channels.
        recurrence: Passes with shared weights; 2 reach every position.
    """
    return CrissCross(in_channels, dims=dims, reduction=reduction, recurrence=recurrence)
