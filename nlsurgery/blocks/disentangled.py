"""Disentangled non-local: a whitened pairwise term and a unary one (DNL, Yin et al., ECCV 2020)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nlsurgery.blocks.affinity import logit_scale, softmax_map
from nlsurgery.blocks.attend import attend
from nlsurgery.blocks.base import ProjectedBlock
from nlsurgery.blocks.geometry import checked_input, pointwise, reduced, to_tokens
from nlsurgery.blocks.global_context import pooled_context
from nlsurgery.blocks.registration import register
from nlsurgery.blocks.residual import project_scaled
from nlsurgery.errors import BlockError

for _name in ("attend", "checked_input", "pooled_context", "project_scaled", "softmax_map"):
    torch.fx.wrap(_name)
torch.fx.wrap("to_tokens")

Norm = Literal["bn", "ln", "gn", "none"]


class DisentangledNonLocal(ProjectedBlock):
    """y_i = Σ_j (softmax_j((θ_i − μ_θ)·(φ_j − μ_φ) / τ) + softmax_j(m_j)) g_j  (Eq. 7).

    Children: ``theta``, ``phi``, ``g``, ``conv_mask`` (m), ``out`` and the norm.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        dims: int = 2,
        reduction: float = 2,
        temperature: float = 0.05,
        use_scale: bool = True,
        norm: str = "bn",
    ) -> None:
        inner = reduced(in_channels, reduction)
        super().__init__(in_channels, inner, dims, norm)
        if not temperature > 0:
            raise BlockError(f"disentangled: temperature must be positive, got {temperature}")
        self.scale = logit_scale(inner, use_scale) / temperature
        self.axes = tuple(range(2, 2 + dims))
        self.theta = pointwise(in_channels, inner, dims)
        self.phi = pointwise(in_channels, inner, dims)
        self.g = pointwise(in_channels, inner, dims)
        self.conv_mask = pointwise(in_channels, 1, dims)

    def attended(self, x: Tensor) -> Tensor:
        """The pairwise and the unary term."""
        (q, k, v), scale = project_scaled(x, self.scale, self.theta, self.phi, self.g)
        q, k = self._whitened(q), self._whitened(k)
        pairwise = attend(q, k, v, "embedded_gaussian", scale, "auto")
        return pairwise + pooled_context(v, self.conv_mask(x))

    def attention(self, x: Tensor) -> Tensor:
        """The pairwise term's map of (B, C, *spatial): (B, N, N), rows sum to 1."""
        x = checked_input(x, self.in_channels, self.dims)
        q, k = self._whitened(self.theta(x)), self._whitened(self.phi(x))
        return softmax_map(to_tokens(q), to_tokens(k), self.scale)

    def _whitened(self, x: Tensor) -> Tensor:
        return x - x.mean(self.axes, keepdim=True)


@register("disentangled", source="Yin et al., Disentangled Non-Local Networks, ECCV 2020")
def build_disentangled(
    in_channels: int,
    *,
    dims: int,
    reduction: float = 2,
    temperature: float = 0.05,
    use_scale: bool = True,
    norm: Norm = "bn",
) -> DisentangledNonLocal:
    """Build a disentangled non-local block.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions.
        reduction: C' = C // reduction.
        temperature: τ of the pairwise softmax.
        use_scale: Divide its logits by √C' as well.
        norm: The normalisation after ``out``.
    """
    return DisentangledNonLocal(
        in_channels,
        dims=dims,
        reduction=reduction,
        temperature=temperature,
        use_scale=use_scale,
        norm=norm,
    )
