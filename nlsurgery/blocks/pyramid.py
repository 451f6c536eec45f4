"""Asymmetric non-local: keys and values from pyramid pooling (ANN, Zhu et al., ICCV 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nlsurgery.blocks.affinity import logit_scale, softmax_map
from nlsurgery.blocks.attend import attend
from nlsurgery.blocks.base import ProjectedBlock
from nlsurgery.blocks.geometry import (
    checked_input,
    pointwise,
    reduced,
    to_dtype_of,
    to_tokens,
)
from nlsurgery.blocks.registration import register
from nlsurgery.blocks.residual import project_together
from nlsurgery.errors import BlockError

for _name in ("attend", "checked_input", "project_together", "softmax_map", "to_tokens"):
    torch.fx.wrap(_name)

Norm = Literal["bn", "ln", "gn", "none"]
_POOLS: dict[int, Callable[..., Tensor]] = {
    3: F.adaptive_avg_pool1d,
    4: F.adaptive_avg_pool2d,
    5: F.adaptive_avg_pool3d,
}


@torch.fx.wrap
def pyramid(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Average-pool to each size in every spatial dimension and join: (B, C, S).

    Args:
        x: (B, C, *spatial).
        sizes: Cells per dimension, of each level.
    """
    pool = _POOLS[x.dim()]
    levels = [to_dtype_of(pool(x, [size] * (x.dim() - 2)), x) for size in sizes]
    return torch.cat([level.flatten(2) for level in levels], dim=2)


class AsymmetricNonLocal(ProjectedBlock):
    """y_i = Σ_s softmax_s(θ_i · φ_s) g_s over the S anchors of a pyramid (Eqs. 4 to 8).

    Children: ``theta``, ``phi``, ``g``, ``out`` and the norm. ``attention`` gives (B, N, S).
    """

    def __init__(
        self,
        in_channels: int,
        *,
        dims: int = 2,
        reduction: float = 2,
        sizes: Sequence[int] = (1, 3, 6, 8),
        use_scale: bool = True,
        norm: str = "bn",
    ) -> None:
        inner = reduced(in_channels, reduction)
        super().__init__(in_channels, inner, dims, norm)
        if not sizes or min(sizes) < 1:
            raise BlockError(f"asymmetric: sizes must be positive ints, got {tuple(sizes)}")
        self.sizes = tuple(sizes)
        self.scale = logit_scale(inner, use_scale)
        self.theta = pointwise(in_channels, inner, dims)
        self.phi = pointwise(in_channels, inner, dims)
        self.g = pointwise(in_channels, inner, dims)

    def attended(self, x: Tensor) -> Tensor:
        """The anchors' values, attended."""
        q, k, v = project_together(x, self.theta, self.phi, self.g)
        k, v = pyramid(k, self.sizes), pyramid(v, self.sizes)
        return attend(q, k, v, "embedded_gaussian", self.scale, "auto")

    def attention(self, x: Tensor) -> Tensor:
        """The map over anchors of (B, C, *spatial): (B, N, S), rows sum to 1."""
        x = checked_input(x, self.in_channels, self.dims)
        keys = to_tokens(pyramid(self.phi(x), self.sizes))
        return softmax_map(to_tokens(self.theta(x)), keys, self.scale)


@register("asymmetric", source="Zhu et al., Asymmetric Non-local Neural Networks, ICCV 2019")
def build_asymmetric(
    in_channels: int,
    *,
    dims: int,
    reduction: float = 2,
    sizes: Sequence[int] = (1, 3, 6, 8),
    use_scale: bool = True,
    norm: Norm = "bn",
) -> AsymmetricNonLocal:
    """Build an asymmetric non-local block.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions.
        reduction: C' = C // reduction.
        sizes: Cells per dimension of each pyramid level; 110 anchors in 2-D as published.
        use_scale: Divide the logits by √C'.
        norm: The normalisation after ``out``.
    """
    return AsymmetricNonLocal(
        in_channels, dims=dims, reduction=reduction, sizes=sizes, use_scale=use_scale, norm=norm
    )
