"""Multi-head non-local blocks, and hard attention over the top-k keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from nlsurgery.blocks.affinity import logit_scale, softmax_map, without_autocast
from nlsurgery.blocks.affinity_softmax import heads_attend
from nlsurgery.blocks.base import ProjectedBlock
from nlsurgery.blocks.geometry import (
    checked_input,
    pointwise,
    pool_keys,
    pool_sizes,
    reduced,
    to_map,
    to_tokens,
)
from nlsurgery.blocks.linear_attention import checked_heads
from nlsurgery.blocks.registration import register
from nlsurgery.blocks.residual import project_scaled
from nlsurgery.errors import BlockError

for _name in ("checked_input", "pool_keys", "project_scaled", "softmax_map"):
    torch.fx.wrap(_name)
for _name in ("to_map", "to_tokens"):
    torch.fx.wrap(_name)

Norm = Literal["bn", "ln", "gn", "none"]


@torch.fx.wrap
def multi_head(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """Fused softmax attention per head, over maps.

    Args:
        q: (B, C', *spatial).
        k: (B, C', *key sizes).
        v: (B, C', *key sizes).
        heads: A divisor of C'.
        scale: The factor on the logits.

    Returns:
        (B, C', *spatial) in the dtype of ``v``.
    """
    with without_autocast(v):
        split = [split_heads(to_tokens(t).contiguous(), heads) for t in (q, k, v)]
        y = heads_attend(split[0], split[1], split[2], scale)
        return to_map(y.transpose(1, 2).flatten(2), q.shape[2:])


@torch.fx.wrap
def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(B, N, C') to (B, heads, N, C'/heads)."""
    batch, length, channels = tokens.shape
    return tokens.reshape(batch, length, heads, channels // heads).transpose(1, 2)


class MultiHeadNonLocal(ProjectedBlock):
    """Embedded Gaussian attention in ``heads`` heads of C'/heads channels (Vaswani et al. 2017).

    Children: ``theta``, ``phi``, ``g``, ``out`` and the norm. ``attention`` is the heads' mean.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        dims: int = 2,
        reduction: float = 2,
        heads: int = 8,
        sub_sample: bool | Sequence[int] = False,
        use_scale: bool = True,
        norm: str = "bn",
    ) -> None:
        inner = reduced(in_channels, reduction)
        checked_heads(inner, heads, block="multi_head")
        super().__init__(in_channels, inner, dims, norm)
        self.heads, self.pool = heads, pool_sizes(sub_sample, dims)
        self.scale = logit_scale(inner // heads, use_scale)
        self.theta = pointwise(in_channels, inner, dims)
        self.phi = pointwise(in_channels, inner, dims)
        self.g = pointwise(in_channels, inner, dims)

    def _pooled(self, x: Tensor) -> Tensor:
        return x if self.pool is None else pool_keys(x, self.pool)

    def attended(self, x: Tensor) -> Tensor:
        """All heads' values, side by side."""
        (q, k, v), scale = project_scaled(
            x, self.scale, self.theta, self.phi, self.g, pool=self.pool, heads=self.heads
        )
        return multi_head(q, self._pooled(k), self._pooled(v), self.heads, scale)

    def attention(self, x: Tensor) -> Tensor:
        """The mean of the heads' maps of (B, C, *spatial): (B, N, M), rows sum to 1."""
        x = checked_input(x, self.in_channels, self.dims)
        q = split_heads(to_tokens(self.theta(x)), self.heads).flatten(0, 1)
        k = split_heads(to_tokens(self._pooled(self.phi(x))), self.heads).flatten(0, 1)
        maps = softmax_map(q, k, self.scale)
        return maps.view(-1, self.heads, *maps.shape[1:]).mean(1)


@torch.fx.wrap
def top_k_map(soft: Tensor, top_k: int) -> Tensor:
    """1/k on the k largest entries of each row, with the gradient of ``soft``.

    Args:
        soft: (B, N, M), rows sum to 1.
        top_k: k, at most M counts.
    """
    k = min(top_k, soft.shape[-1])
    index = soft.topk(k, dim=-1).indices
    # Divided last: a compiler knows no constant that depends on a size.
    hard = torch.zeros_like(soft).scatter(-1, index, 1.0) / max(1, k)
    return hard + (soft - soft.detach())


class HardNonLocal(ProjectedBlock):
    """Each position takes the mean of its k nearest keys; straight-through for the gradient.

    Forward 1/k on the k keys of the largest logit, backward as if it were their softmax (Bengio
    et al. 2013, arXiv 1308.3432). Forms the N×M map. Children: ``theta``, ``phi``, ``g``, ``out``
    and the norm.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        dims: int = 2,
        reduction: float = 2,
        top_k: int = 4,
        use_scale: bool = True,
        norm: str = "bn",
    ) -> None:
        inner = reduced(in_channels, reduction)
        super().__init__(in_channels, inner, dims, norm)
        if top_k < 1:
            raise BlockError(f"hard: top_k must be at least 1, got {top_k}")
        self.top_k = top_k
        self.scale = logit_scale(inner, use_scale)
        self.theta = pointwise(in_channels, inner, dims)
        self.phi = pointwise(in_channels, inner, dims)
        self.g = pointwise(in_channels, inner, dims)

    def attended(self, x: Tensor) -> Tensor:
        """The mean of the chosen keys' values."""
        return to_map(_weighted(self._map(x), to_tokens(self.g(x))), x.shape[2:])

    def attention(self, x: Tensor) -> Tensor:
        """The hard map of (B, C, *spatial): (B, N, N), 1/k on k keys a row."""
        return self._map(checked_input(x, self.in_channels, self.dims))

    def _map(self, x: Tensor) -> Tensor:
        soft = softmax_map(to_tokens(self.theta(x)), to_tokens(self.phi(x)), self.scale)
        return top_k_map(soft, self.top_k)


@torch.fx.wrap
def _weighted(attention: Tensor, v: Tensor) -> Tensor:
    with without_autocast(v):
        return (attention @ v.to(attention.dtype)).to(v.dtype)


@register("multi_head", source="Vaswani et al., NeurIPS 2017; Wang et al., CVPR 2018")
def build_multi_head(
    in_channels: int,
    *,
    dims: int,
    reduction: float = 2,
    heads: int = 8,
    sub_sample: bool | list[int] = False,
    use_scale: bool = True,
    norm: Norm = "bn",
) -> MultiHeadNonLocal:
    """Build a multi-head non-local block.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions.
        reduction: C' = C // reduction.
        heads: A divisor of C'.
        sub_sample: Max-pool keys and values over space, or by so many along each axis.
        use_scale: Divide the logits by √(C'/heads).
        norm: The normalisation after ``out``.
    """
    return MultiHeadNonLocal(
        in_channels,
        dims=dims,
        reduction=reduction,
        heads=heads,
        sub_sample=sub_sample,
        use_scale=use_scale,
        norm=norm,
    )


@register("hard", source="Bengio et al., 2013 (straight-through); Xu et al., ICML 2015 (hard)")
def build_hard(
    in_channels: int,
    *,
    dims: int,
    reduction: float = 2,
    top_k: int = 4,
    use_scale: bool = True,
    norm: Norm = "bn",
) -> HardNonLocal:
    """Build hard attention over the top-k keys.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions.
        reduction: C' = C // reduction.
        top_k: Keys each position takes.
        use_scale: Divide the logits by √C'.
        norm: The normalisation after ``out``.
    """
    return HardNonLocal(
        in_channels, dims=dims, reduction=reduction, top_k=top_k, use_scale=use_scale, norm=norm
    )
