"""Attention whose cost is linear in N: A²-Net's double attention and efficient attention."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from nlsurgery.blocks.affinity import accumulator, without_autocast
from nlsurgery.blocks.base import ProjectedBlock
from nlsurgery.blocks.geometry import pointwise, reduced
from nlsurgery.blocks.registration import register
from nlsurgery.blocks.residual import project_together
from nlsurgery.errors import BlockError

torch.fx.wrap("project_together")

Norm = Literal["bn", "ln", "gn", "none"]


@torch.fx.wrap
def summarise(v: Tensor, k: Tensor, q: Tensor, heads: int) -> Tensor:
    """Gather values by softmax_positions(k), hand them out by softmax_channels(q), per head.

    Args:
        v: (B, V, *spatial).
        k: (B, K, *spatial).
        q: (B, K, *spatial).
        heads: Both V and K are cut into this many.

    Returns:
        (B, V, *spatial) in the dtype of ``v``.
    """
    with without_autocast(v):
        dtype = accumulator(v.dtype)
        values, keys, queries = (
            t.reshape(t.shape[0], heads, t.shape[1] // heads, math.prod(t.shape[2:]))
            for t in (v, k, q)
        )
        weights = keys.to(dtype).softmax(-1)
        summary = values.to(dtype) @ weights.transpose(2, 3)
        y = summary @ queries.to(dtype).softmax(2)
        return y.to(v.dtype).reshape(v.shape)


class DoubleAttention(ProjectedBlock):
    """Gather with softmax over positions, distribute with softmax over channels (Eqs. 3 to 6).

    Children: ``features`` (φ, to C'), ``gather`` (θ) and ``distribute`` (ρ), both to as many
    descriptors, ``out`` and the norm.
    """

    def __init__(
        self, in_channels: int, *, dims: int = 2, reduction: float = 4, norm: str = "bn"
    ) -> None:
        inner = reduced(in_channels, reduction)
        super().__init__(in_channels, inner, dims, norm)
        self.features = pointwise(in_channels, inner, dims)
        self.gather = pointwise(in_channels, inner, dims)
        self.distribute = pointwise(in_channels, inner, dims)

    def attended(self, x: Tensor) -> Tensor:
        """The gathered and distributed features."""
        return summarise(self.features(x), self.gather(x), self.distribute(x), 1)


class EfficientAttention(ProjectedBlock):
    """y = ρ_q(Q) (ρ_k(K)ᵀ V), ρ_q a softmax over channels, ρ_k over positions (Shen et al. 2021).

    Children: ``theta``, ``phi``, ``g``, ``out`` and the norm.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        dims: int = 2,
        reduction: float = 2,
        heads: int = 1,
        norm: str = "bn",
    ) -> None:
        inner = reduced(in_channels, reduction)
        checked_heads(inner, heads, block="efficient_attention")
        super().__init__(in_channels, inner, dims, norm)
        self.heads = heads
        self.theta = pointwise(in_channels, inner, dims)
        self.phi = pointwise(in_channels, inner, dims)
        self.g = pointwise(in_channels, inner, dims)

    def attended(self, x: Tensor) -> Tensor:
        """Values summarised by keys and read by queries."""
        q, k, v = project_together(x, self.theta, self.phi, self.g)
        return summarise(v, k, q, self.heads)


def checked_heads(channels: int, heads: int, *, block: str) -> int:
    """Return ``heads`` if it divides ``channels``.

    Raises:
        BlockError: It does not.
    """
    if heads < 1 or channels % heads:
        raise BlockError(
            f"{block}: heads must divide the {channels} inner channels, got {heads}; "
            "change heads or reduction"
        )
    return heads


@register("double_attention", source="Chen et al., A2-Nets, NeurIPS 2018")
def build_double_attention(
    in_channels: int, *, dims: int, reduction: float = 4, norm: Norm = "bn"
) -> DoubleAttention:
    """Build A²-Net's double attention.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions.
        reduction: Features and descriptors have C // reduction channels.
        norm: The normalisation after ``out``.
    """
    return DoubleAttention(in_channels, dims=dims, reduction=reduction, norm=norm)


@register("efficient_attention", source="Shen et al., Efficient Attention, WACV 2021")
def build_efficient_attention(
    in_channels: int, *, dims: int, reduction: float = 2, heads: int = 1, norm: Norm = "bn"
) -> EfficientAttention:
    """Build efficient (linear) attention.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions.
        reduction: C' = C // reduction.
        heads: Number of heads, a divisor of C'.
        norm: The normalisation after ``out``.
    """
    return EfficientAttention(in_channels, dims=dims, reduction=reduction, heads=heads, norm=norm)
