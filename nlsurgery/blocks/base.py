"""The two kinds of block: a branch behind a zero γ, and one that ends in a zero projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from nlsurgery.blocks.geometry import CONVS, checked_input, pointwise
from nlsurgery.blocks.norms import build_norm
from nlsurgery.blocks.residual import add_gated, add_projected
from nlsurgery.errors import BlockError

for _name in ("add_gated", "add_projected", "checked_input"):
    torch.fx.wrap(_name)


def checked_dims(dims: int, allowed: Sequence[int] = (1, 2, 3), *, block: str = "block") -> int:
    """Return ``dims`` if the block exists for it.

    Raises:
        BlockError: It does not.
    """
    if dims not in allowed:
        names = " or ".join(map(str, allowed))
        raise BlockError(f"{block}: dims must be {names}, got {dims!r}; choose another type there")
    return dims


def reset_children(block: nn.Module) -> None:
    """Give every descendant that can reset itself its library's default init."""
    for child in block.modules():
        if child is not block and hasattr(child, "reset_parameters"):
            cast(nn.Conv2d, child).reset_parameters()


class GammaBlock(nn.Module):
    """z = x + γ · branch(x), γ one learned scalar, 0 at init."""

    def __init__(self, in_channels: int, dims: int) -> None:
        super().__init__()
        self.in_channels, self.dims = in_channels, checked_dims(dims)
        self.axes = tuple(range(2, 2 + dims))
        self.gamma = nn.Parameter(torch.zeros(1))

    @property
    def gate(self) -> nn.Parameter:
        """γ, (1,)."""
        return self.gamma

    def branch(self, x: Tensor) -> Tensor:
        """What γ multiplies, of the shape of ``x``."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Restore the init: torch's defaults, γ = 0."""
        reset_children(self)
        nn.init.zeros_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        """Add γ times the branch to (B, C, *spatial).

        Raises:
            BlockError: ``x`` has another number of channels or dimensions.
        """
        x = checked_input(x, self.in_channels, self.dims)
        return add_gated(x, self.branch(x), self.gamma)


class ProjectedBlock(nn.Module):
    """z = x + norm(out(y(x))): the norm, or without one the 1×1 ``out``, starts at 0."""

    def __init__(
        self, in_channels: int, inter_channels: int, dims: int, norm: str, *, groups: int = 1
    ) -> None:
        super().__init__()
        self.in_channels, self.inter_channels = in_channels, inter_channels
        self.dims, self.norm_kind = checked_dims(dims), norm
        if groups == 1:
            self.out = pointwise(inter_channels, in_channels, dims)
        else:
            self.out = CONVS[dims](inter_channels, in_channels, kernel_size=1, groups=groups)
        if (module := build_norm(norm, in_channels)) is not None:
            self.add_module(norm, module)
        self.zero_gate()

    @property
    def norm(self) -> nn.Module | None:
        """The normalisation after ``out``, ``None`` where there is none."""
        return None if self.norm_kind == "none" else cast(nn.Module, getattr(self, self.norm_kind))

    @property
    def gate(self) -> nn.Parameter:
        """What is zero at init: the norm's weight (C,), or ``out.weight`` without a norm."""
        return cast(nn.Parameter, (self.norm or self.out).weight)

    def zero_gate(self) -> None:
        """Make the block the identity."""
        for parameter in (self.norm or self.out).parameters(recurse=False):
            nn.init.zeros_(parameter)

    def attended(self, x: Tensor) -> Tensor:
        """The map before ``out``: (B, C', *spatial)."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Restore the init: torch's defaults, the gate 0."""
        reset_children(self)
        self.zero_gate()

    def forward(self, x: Tensor) -> Tensor:
        """Add the projected branch to (B, C, *spatial).

        Raises:
            BlockError: ``x`` has another number of channels or dimensions.
        """
        x = checked_input(x, self.in_channels, self.dims)
        return add_projected(x, self.attended(x), self.out, self.norm)
