"""Compact generalized non-local: every channel of every position (Yue et al., NeurIPS 2018)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from nlsurgery.blocks.affinity import accumulator, without_autocast
from nlsurgery.blocks.base import ProjectedBlock
from nlsurgery.blocks.geometry import pointwise, reduced
from nlsurgery.blocks.linear_attention import checked_heads
from nlsurgery.blocks.registration import register
from nlsurgery.blocks.residual import project_together

torch.fx.wrap("project_together")

Norm = Literal["bn", "ln", "gn", "none"]


@torch.fx.wrap
def compact_product(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """θ_g · mean(φ_g ⊙ g_g) per group: the dot-product kernel between all (channel, position).

    Args:
        q: (B, C', *spatial).
        k: (B, C', *spatial).
        v: (B, C', *spatial).
        groups: Channels are cut into this many.

    Returns:
        (B, C', *spatial) in the dtype of ``v``.
    """
    with without_autocast(v):
        dtype = accumulator(v.dtype)
        size = v.shape[1] // groups * math.prod(v.shape[2:])
        queries, keys, values = (t.to(dtype).reshape(-1, groups, size) for t in (q, k, v))
        factor = (keys * values).mean(2, keepdim=True)
        return (queries * factor).to(v.dtype).reshape(v.shape)


class CompactGeneralizedNonLocal(ProjectedBlock):
    """y = θ · (φᵀ g) over vectorised groups (Eq. 8 with the dot-product kernel).

    Children: ``theta``, ``phi``, ``g``, a grouped ``out`` and the norm (``gn`` as published).
    Differs from the paper: the product is a mean over its terms and not a sum, which the norm
    after ``out`` cancels and half precisions need.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        dims: int = 2,
        reduction: float = 2,
        groups: int = 1,
        norm: str = "gn",
    ) -> None:
        inner = reduced(in_channels, reduction)
        checked_heads(inner, groups, block="compact_generalized")
        checked_heads(in_channels, groups, block="compact_generalized")
        super().__init__(in_channels, inner, dims, norm, groups=groups)
        self.groups = groups
        self.theta = pointwise(in_channels, inner, dims, bias=False)
        self.phi = pointwise(in_channels, inner, dims, bias=False)
        self.g = pointwise(in_channels, inner, dims, bias=False)

    def attended(self, x: Tensor) -> Tensor:
        """Queries times their group's factor."""
        q, k, v = project_together(x, self.theta, self.phi, self.g)
        return compact_product(q, k, v, self.groups)


@register("compact_generalized", source="Yue et al., Compact Generalized Non-local, NeurIPS 2018")
def build_compact_generalized(
    in_channels: int, *, dims: int, reduction: float = 2, groups: int = 1, norm: Norm = "gn"
) -> CompactGeneralizedNonLocal:
    """Build a compact generalized non-local block.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions.
        reduction: C' = C // reduction.
        groups: Groups of channels, a divisor of C and C'; 8 is published for video.
        norm: The normalisation after ``out``.
    """
    return CompactGeneralizedNonLocal(
        in_channels, dims=dims, reduction=reduction, groups=groups, norm=norm
    )
