"""Channel attention: SE, ECA and CBAM, each blended in by γ: z = x + γ(A(x) − x).

As published A(x) = x · s(x) with s a sigmoid, which is ½ and not 1 at init: dropped into a
pretrained network it would change what the network computes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nlsurgery.blocks.base import GammaBlock
from nlsurgery.blocks.geometry import CONVS, pointwise, reduced
from nlsurgery.blocks.registration import register
from nlsurgery.errors import BlockError


class SqueezeExcitation(GammaBlock):
    """s = σ(fc2(ReLU(fc1(mean over space of x)))) (Hu et al., CVPR 2018, Eqs. 2 to 4)."""

    def __init__(self, in_channels: int, *, dims: int = 2, reduction: float = 16) -> None:
        super().__init__(in_channels, dims)
        inner = reduced(in_channels, reduction)
        self.fc1 = pointwise(in_channels, inner, dims)
        self.fc2 = pointwise(inner, in_channels, dims)

    def branch(self, x: Tensor) -> Tensor:
        """Compute x · (s − 1)."""
        mean = x.mean(self.axes, keepdim=True)
        logits: Tensor = self.fc2(torch.relu(self.fc1(mean)))
        return x * (logits.sigmoid() - 1)


class EfficientChannelAttention(GammaBlock):
    """s = σ(conv over neighbouring channels of the mean of x) (Wang et al., CVPR 2020, Eq. 7)."""

    def __init__(self, in_channels: int, *, dims: int = 2, kernel_size: int | None = None) -> None:
        super().__init__(in_channels, dims)
        if kernel_size is None:
            # Eq. 12 with γ = 2, b = 1: the odd number nearest below or at |log2(C)/2 + 1/2|.
            size = int(abs(math.log2(in_channels) / 2 + 0.5))
            kernel_size = max(1, size if size % 2 else size + 1)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise BlockError(f"eca: kernel_size must be odd and positive, got {kernel_size}")
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def branch(self, x: Tensor) -> Tensor:
        """Compute x · (s − 1)."""
        mean = x.mean(self.axes, keepdim=True)
        logits: Tensor = self.conv(mean.flatten(2).transpose(1, 2)).transpose(1, 2)
        return x * (logits.view_as(mean).sigmoid() - 1)


class ConvolutionalAttention(GammaBlock):
    """CBAM: channel, then spatial attention (Woo et al., ECCV 2018, Eqs. 1 to 3)."""

    def __init__(
        self, in_channels: int, *, dims: int = 2, reduction: float = 16, kernel_size: int = 7
    ) -> None:
        super().__init__(in_channels, dims)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise BlockError(f"cbam: kernel_size must be odd and positive, got {kernel_size}")
        inner = reduced(in_channels, reduction)
        self.fc1 = pointwise(in_channels, inner, dims)
        self.fc2 = pointwise(inner, in_channels, dims)
        self.spatial = CONVS[dims](2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def branch(self, x: Tensor) -> Tensor:
        """A(x) − x."""
        mean, top = x.mean(self.axes, keepdim=True), x.amax(self.axes, keepdim=True)
        shared = [self.fc2(torch.relu(self.fc1(pooled))) for pooled in (mean, top)]
        y: Tensor = x * (shared[0] + shared[1]).sigmoid()
        pair = torch.cat((y.mean(1, keepdim=True), y.amax(1, keepdim=True)), dim=1)
        logits: Tensor = self.spatial(pair)
        return y * logits.sigmoid() - x


@register("se", source="Hu et al., Squeeze-and-Excitation Networks, CVPR 2018")
def build_se(in_channels: int, *, dims: int, reduction: float = 16) -> SqueezeExcitation:
    """Build squeeze-and-excitation.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions.
        reduction: Hidden channels are C // reduction.
    """
    return SqueezeExcitation(in_channels, dims=dims, reduction=reduction)


@register("eca", source="Wang et al., ECA-Net, CVPR 2020")
def build_eca(
    in_channels: int, *, dims: int, kernel_size: int | None = None
) -> EfficientChannelAttention:
    """Build efficient channel attention.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions.
        kernel_size: Neighbouring channels seen, odd; from C as published by default.
    """
    return EfficientChannelAttention(in_channels, dims=dims, kernel_size=kernel_size)


@register("cbam", source="Woo et al., CBAM, ECCV 2018")
def build_cbam(
    in_channels: int, *, dims: int, reduction: float = 16, kernel_size: int = 7
) -> ConvolutionalAttention:
    """Build CBAM.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions.
        reduction: Hidden channels are C // reduction.
        kernel_size: Of the spatial attention, odd.
    """
    return ConvolutionalAttention(
        in_channels, dims=dims, reduction=reduction, kernel_size=kernel_size
    )
