"""Dual attention: position and channel attention side by side (DANet, Fu et al., CVPR 2019)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from nlsurgery.blocks.affinity import accumulator, without_autocast
from nlsurgery.blocks.base import GammaBlock
from nlsurgery.blocks.geometry import choice
from nlsurgery.blocks.registration import register
from nlsurgery.blocks.residual import add_gated
from nlsurgery.blocks.self_attention import SelfAttention

torch.fx.wrap("add_gated")

Part = Literal["position", "channel", "both"]
PARTS = ("position", "channel", "both")


@torch.fx.wrap
def channel_map(x: Tensor) -> Tensor:
    """softmax_d(max_d E − E) with E = X Xᵀ, as the published code has it.

    Args:
        x: (B, C, *spatial).

    Returns:
        (B, C, C), rows sum to 1; float32 for half inputs.
    """
    with without_autocast(x):
        rows = x.flatten(2).to(accumulator(x.dtype))
        energy = rows @ rows.transpose(1, 2)
        return (energy.amax(-1, keepdim=True) - energy).softmax(-1)


@torch.fx.wrap
def apply_channel_map(attention: Tensor, x: Tensor) -> Tensor:
    """Σ_d attention_cd x_d: (B, C, *spatial) in the dtype of ``x``."""
    with without_autocast(x):
        return (attention @ x.flatten(2).to(attention.dtype)).to(x.dtype).view(x.shape)


class ChannelAttention(GammaBlock):
    """x + γ · softmax(max − XXᵀ) X, no convolutions."""

    def __init__(self, in_channels: int, *, dims: int = 2) -> None:
        super().__init__(in_channels, dims)

    def branch(self, x: Tensor) -> Tensor:
        """The attended channels."""
        return apply_channel_map(channel_map(x), x)


class DualAttention(nn.Module):
    """x + γ_p · position(x) + γ_c · channel(x), each γ 0 at init.

    Children: ``position`` (a :class:`SelfAttention`) and ``channel``.
    Differs from the paper: the 3×3 convolutions that DANet's head wraps around the two modules
    are left out, since they would replace the host's features.
    """

    def __init__(self, in_channels: int, *, dims: int = 2, reduction: float = 8) -> None:
        super().__init__()
        self.position = SelfAttention(in_channels, reduction, dims=dims)
        self.channel = ChannelAttention(in_channels, dims=dims)

    @property
    def gate(self) -> nn.Parameter:
        """γ of the position module; that of the other is ``channel.gate``."""
        return self.position.gamma

    def reset_parameters(self) -> None:
        """Restore the init of both modules."""
        self.position.reset_parameters()
        self.channel.reset_parameters()

    def attention(self, x: Tensor) -> Tensor:
        """The position module's map (B, N, N)."""
        return self.position.attention(x)

    def forward(self, x: Tensor) -> Tensor:
        """Add both modules' branches to (B, C, *spatial)."""
        return add_gated(self.position(x), self.channel.branch(x), self.channel.gamma)


@register("danet", source="Fu et al., Dual Attention Network, CVPR 2019")
def build_danet(
    in_channels: int, *, dims: int, part: Part = "both", reduction: float = 8
) -> nn.Module:
    """Build one or both modules of DANet.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions.
        part: ``position``, ``channel`` or ``both``.
        reduction: Queries and keys of the position module have C // reduction channels.
    """
    choice(part, PARTS, name="part")
    if part == "position":
        return SelfAttention(in_channels, reduction, dims=dims)
    if part == "channel":
        return ChannelAttention(in_channels, dims=dims)
    return DualAttention(in_channels, dims=dims, reduction=reduction)
