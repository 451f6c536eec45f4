"""The global context block (GCNet, Cao et al., ICCV Workshops 2019, arXiv 1904.11492)."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from nlsurgery.blocks.base import GammaBlock, reset_children
from nlsurgery.blocks.geometry import checked_input, choice, pointwise, reduced
from nlsurgery.blocks.registration import register
from nlsurgery.blocks.residual import add_branch, finite

for _name in ("add_branch", "checked_input", "finite"):
    torch.fx.wrap(_name)

Fusion = Literal["channel_add", "channel_mul"]
FUSIONS = ("channel_add", "channel_mul")


@torch.fx.wrap
def pooled_context(x: Tensor, logits: Tensor) -> Tensor:
    """Σ_j softmax_j(logits_j) x_j of (B, C, *spatial) and (B, 1, *spatial): (B, C, 1, …, 1)."""
    weights = logits.flatten(2).softmax(-1).to(x.dtype)
    context = torch.bmm(x.flatten(2), weights.transpose(1, 2)).to(x.dtype)
    return context.view(x.shape[0], x.shape[1], *[1] * (x.dim() - 2))


def transform(in_channels: int, inner: int, dims: int) -> nn.Sequential:
    """The bottleneck of GCNet: 1×1 to ``inner``, layer norm, ReLU, 1×1 back (Eq. 5)."""
    return nn.Sequential(
        pointwise(in_channels, inner, dims),
        nn.LayerNorm([inner, *[1] * dims]),
        nn.ReLU(),
        pointwise(inner, in_channels, dims),
    )


class GlobalContextAdd(nn.Module):
    """z = x + t(Σ_j softmax_j(w·x_j) x_j), the last convolution of t starts at 0 (Eq. 5)."""

    def __init__(self, in_channels: int, *, dims: int = 2, reduction: float = 16) -> None:
        super().__init__()
        self.in_channels, self.dims = in_channels, dims
        self.conv_mask = pointwise(in_channels, 1, dims)
        self.channel_add_conv = transform(in_channels, reduced(in_channels, reduction), dims)
        self.reset_parameters()

    @property
    def gate(self) -> nn.Parameter:
        """The weight of the last convolution, zero at init."""
        return cast(nn.Parameter, self.channel_add_conv[3].weight)

    def reset_parameters(self) -> None:
        """Restore the init: torch's defaults, the last convolution 0."""
        reset_children(self)
        for parameter in self.channel_add_conv[3].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Add the context to every position of (B, C, *spatial)."""
        x = checked_input(x, self.in_channels, self.dims)
        context = self.channel_add_conv(pooled_context(x, self.conv_mask(x)))
        return add_branch(x, finite(context))


class GlobalContextMul(GammaBlock):
    """z = x + γ(x · σ(t(context)) − x).

    Differs from the paper: the γ-blend, because σ(0) = ½ would not be the identity.
    """

    def __init__(self, in_channels: int, *, dims: int = 2, reduction: float = 16) -> None:
        super().__init__(in_channels, dims)
        self.conv_mask = pointwise(in_channels, 1, dims)
        self.channel_mul_conv = transform(in_channels, reduced(in_channels, reduction), dims)

    def branch(self, x: Tensor) -> Tensor:
        """Compute x · (σ(t) − 1)."""
        context = self.channel_mul_conv(pooled_context(x, self.conv_mask(x)))
        scale: Tensor = context.sigmoid() - 1
        return x * scale


@register("global_context", source="Cao et al., GCNet, ICCV Workshops 2019")
def build_global_context(
    in_channels: int, *, dims: int, reduction: float = 16, fusion: Fusion = "channel_add"
) -> GlobalContextAdd | GlobalContextMul:
    """Build a global context block.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions.
        reduction: Hidden channels are C // reduction; 4 and 16 are published.
        fusion: ``channel_add`` or ``channel_mul``.
    """
    choice(fusion, FUSIONS, name="fusion")
    kind = GlobalContextAdd if fusion == "channel_add" else GlobalContextMul
    return kind(in_channels, dims=dims, reduction=reduction)
