"""The normalisations a block may end in: batch, layer and group norm over (B, C, *spatial).

They differ from torch's own in one thing: none refuses an input of one value per channel (batch 1,
a 1×1 map) in train mode, because the host they are inserted into does not refuse it either.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nlsurgery.blocks.geometry import choice
from nlsurgery.errors import BlockError

#: Names of the ``norm`` option; each is also the name of the child that holds it.
NORMS = ("bn", "ln", "gn", "none")


class BatchNorm(_BatchNorm):
    """Batch normalisation in 1, 2 or 3 spatial dimensions that takes one value per channel.

    With fewer than two values per channel there is no variance to estimate: in train mode such a
    batch is normalised by the running statistics, which it leaves as they are.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 3:
            raise BlockError(f"expected (B, C, *spatial), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, *spatial)."""
        return _batch_norm(self, input)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any
    ) -> None:
        # A checkpoint without this layer has no version for it, which torch takes for one from
        # before `num_batches_tracked` and fills that in; then the missing key would go unreported.
        versioned = {"version": self._version, **local_metadata}
        super()._load_from_state_dict(state_dict, prefix, versioned, *rest)


class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each position of (B, C, *spatial)."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, *spatial)."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class GroupNorm(nn.GroupNorm):
    """Group normalisation of (B, C, *spatial) that takes groups of one value."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, *spatial)."""
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


@torch.fx.wrap
def _batch_norm(norm: BatchNorm, x: Tensor) -> Tensor:
    if norm.training and x.numel() <= x.shape[1]:
        args = norm.running_mean, norm.running_var, norm.weight, norm.bias
        return F.batch_norm(x, *args, training=False, eps=norm.eps)
    return _BatchNorm.forward(norm, x)


def build_norm(kind: str, num_channels: int) -> nn.Module | None:
    """Build the normalisation after a block's output projection.

    Args:
        kind: ``"bn"``, ``"ln"`` (per position, over channels), ``"gn"`` (at most 32 groups, the
            largest power of two that divides the channels) or ``"none"``.
        num_channels: C.

    Returns:
        The module, ``None`` for ``"none"``.

    Raises:
        BlockError: ``kind`` is none of them.
    """
    choice(kind, NORMS, name="norm")
    if kind == "bn":
        return BatchNorm(num_channels)
    if kind == "ln":
        return ChannelLayerNorm(num_channels, eps=1e-5)
    if kind == "gn":
        return GroupNorm(math.gcd(32, num_channels), num_channels)
    return None
