"""Generalized (empirical) attention with four terms (Zhu et al., ICCV 2019, arXiv 1904.05873)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nlsurgery.blocks.affinity import accumulator, without_autocast
from nlsurgery.blocks.base import GammaBlock
from nlsurgery.blocks.geometry import checked_input, pointwise, to_tokens
from nlsurgery.blocks.linear_attention import checked_heads
from nlsurgery.blocks.multi_head import split_heads
from nlsurgery.blocks.registration import register
from nlsurgery.blocks.residual import matrix_of
from nlsurgery.errors import BlockError

for _name in ("checked_input", "matrix_of"):
    torch.fx.wrap(_name)


@torch.fx.wrap
def strided(x: Tensor, stride: int) -> Tensor:
    """Every ``stride``-th position in every spatial dimension, a copy."""
    every = [slice(None), slice(None), *[slice(None, None, stride)] * (x.dim() - 2)]
    return x[tuple(every)].contiguous() if stride > 1 else x


def offset_codes(queries: int, keys: int, stride: int, size: int, like: Tensor) -> Tensor:
    """Sine and cosine codes of the offsets i − j·stride along one axis: (queries, keys, size)."""
    i = torch.arange(queries, device=like.device, dtype=like.dtype)
    j = torch.arange(keys, device=like.device, dtype=like.dtype) * stride
    offset = (i[:, None] - j[None, :]).unsqueeze(2)
    half = torch.arange(size // 2, device=like.device, dtype=like.dtype)
    angle = offset * torch.exp(half * (-math.log(1000.0) / max(1, size // 2)))
    return torch.cat((angle.sin(), angle.cos()), dim=2)


class GeneralizedAttention(GammaBlock):
    """softmax_j of the sum of four terms, in heads; γ = 0 at init (Eqs. 2 to 4).

    E1 = q_i·k_j, E2 = q_i·R(i−j), E3 = u·k_j, E4 = v·R(i−j); ``terms="1111"`` switches each.
    R is a learned map of sine codes, one per axis and summed over the axes. Keys are every
    ``kv_stride``-th position. Forms the N×M map of every head.

    Children: ``query`` (E1 or E2), ``key`` (E1 or E3), ``value``, ``offset`` (R, one per axis),
    ``proj``; parameters ``content_bias`` (u) and ``position_bias`` (v).
    Differs from the public code: logits are divided by √(head size) in all terms.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        dims: int = 2,
        heads: int = 8,
        kv_stride: int = 2,
        terms: str = "1111",
    ) -> None:
        super().__init__(in_channels, dims)
        checked_heads(in_channels, heads, block="generalized")
        if re.fullmatch("[01]{4}", terms) is None or "1" not in terms:
            raise BlockError(
                f"generalized: terms must be four of 0 and 1, not all 0, got {terms!r}"
            )
        if kv_stride < 1:
            raise BlockError(f"generalized: kv_stride must be at least 1, got {kv_stride}")
        self.heads, self.kv_stride, self.terms = heads, kv_stride, terms
        on = [term == "1" for term in terms]
        head_size = in_channels // heads
        self.code_size = 2 * max(1, head_size // 2)
        if on[0] or on[1]:
            self.query = pointwise(in_channels, in_channels, dims, bias=False)
        if on[0] or on[2]:
            self.key = pointwise(in_channels, in_channels, dims, bias=False)
        self.value = pointwise(in_channels, in_channels, dims, bias=False)
        if on[1] or on[3]:
            layers = [nn.Linear(self.code_size, in_channels, bias=False) for _ in range(dims)]
            self.offset = nn.ModuleList(layers)
        if on[2]:
            self.content_bias = nn.Parameter(torch.empty(heads, head_size))
        if on[3]:
            self.position_bias = nn.Parameter(torch.empty(heads, head_size))
        self.proj = pointwise(in_channels, in_channels, dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Restore the init: torch's defaults, u and v uniform in ±1/√head size, γ = 0."""
        super().reset_parameters()
        for name in ("content_bias", "position_bias"):
            if hasattr(self, name):
                parameter = getattr(self, name)
                bound = parameter.shape[1] ** -0.5
                nn.init.uniform_(parameter, -bound, bound)

    def branch(self, x: Tensor) -> Tensor:
        """The attended values, projected."""
        keys = strided(x, self.kv_stride)
        y: Tensor = self.proj(_attended(self._maps(x, keys), self.value(keys), x))
        return y

    def attention(self, x: Tensor) -> Tensor:
        """The mean of the heads' maps of (B, C, *spatial): (B, N, M), rows sum to 1."""
        x = checked_input(x, self.in_channels, self.dims)
        return self._maps(x, strided(x, self.kv_stride)).mean(1)

    def _maps(self, x: Tensor, keys: Tensor) -> Tensor:
        content = self.terms[0] == "1"
        relative = self.terms[1] == "1"
        query = self.query(x) if content or relative else None
        key = self.key(keys) if content or self.terms[2] == "1" else None
        layers: Iterable[nn.Module] = self.offset if hasattr(self, "offset") else ()
        offsets = [matrix_of(layer, x, self.code_size) for layer in layers]
        biases = getattr(self, "content_bias", None), getattr(self, "position_bias", None)
        switches = content, relative
        return four_terms(
            x, keys, query, key, offsets, biases, self.heads, self.kv_stride, switches
        )


@torch.fx.wrap
def four_terms(
    x: Tensor,
    keys: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    offsets: list[Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    heads: int,
    stride: int,
    switches: tuple[bool, bool],
) -> Tensor:
    """The softmax over keys of the sum of the terms.

    Args:
        x: (B, C, *spatial), for its sizes.
        keys: The strided positions of ``x``, for theirs.
        query: (B, C, *spatial).
        key: (B, C, *key sizes).
        offsets: R of each axis, (C, code size) each; empty without E2 and E4.
        biases: u and v, (heads, C/heads) each, ``None`` without E3 and E4.
        heads: How many.
        stride: Of the keys.
        switches: Whether E1 and E2 take part.

    Returns:
        (B, heads, N, M), float32 for half inputs.
    """
    with without_autocast(x):
        dtype = accumulator(x.dtype)
        sizes, key_sizes = x.shape[2:], keys.shape[2:]
        logits = x.new_zeros((x.shape[0], heads, *sizes, *key_sizes), dtype=dtype)
        pairs = (x.shape[0], heads, math.prod(sizes), math.prod(key_sizes))
        q = None if query is None else split_heads(to_tokens(query).to(dtype), heads)
        k = None if key is None else split_heads(to_tokens(key).to(dtype), heads)
        if switches[0] and q is not None and k is not None:
            logits = logits + (q @ k.mT).view(logits.shape)
        if biases[0] is not None and k is not None:
            content = (k @ biases[0].to(dtype).unsqueeze(-1)).mT
            logits = logits + content.expand(pairs).reshape(logits.shape)
        side = q if switches[1] else None
        if offsets and biases[1] is not None:
            position = biases[1].to(dtype).unsqueeze(1).unsqueeze(0)
            side = position if side is None else side + position
        for axis, weight in enumerate(offsets):
            assert side is not None
            logits = logits + _along(side, axis, weight, sizes, key_sizes, stride)
        scale: float = (x.shape[1] // heads) ** -0.5
        return (logits.reshape(pairs) * scale).softmax(-1)


def _along(
    side: Tensor,
    axis: int,
    weight: Tensor,
    sizes: tuple[int, ...],
    key_sizes: tuple[int, ...],
    stride: int,
) -> Tensor:
    """(q + v)·R along one axis, of a shape that broadcasts to (B, heads, *sizes, *key_sizes)."""
    codes = offset_codes(sizes[axis], key_sizes[axis], stride, weight.shape[1], side)
    batch, heads, _, width = side.shape
    relative = (codes @ weight.to(side.dtype).T).view(*codes.shape[:2], heads, width)
    side = side.expand(-1, -1, math.prod(sizes), -1).reshape(batch, heads, *sizes, width)
    side = side.movedim(2 + axis, 2)
    rest = math.prod(sizes) // max(1, sizes[axis])
    flat = side.reshape(batch, heads, sizes[axis], rest, width)
    term = torch.einsum("bhard,akhd->bhark", flat, relative)
    term = term.reshape(*side.shape[:-1], key_sizes[axis]).movedim(2, 2 + axis)
    others = [size if i == axis else 1 for i, size in enumerate(key_sizes)]
    return term.reshape(batch, heads, *sizes, *others)


@torch.fx.wrap
def _attended(attention: Tensor, value: Tensor, x: Tensor) -> Tensor:
    with without_autocast(value):
        v = split_heads(to_tokens(value).to(attention.dtype), attention.shape[1])
        y = (attention @ v).to(value.dtype)
        return y.transpose(1, 2).flatten(2).mT.reshape(x.shape)


@register("generalized", source="Zhu et al., An Empirical Study of Spatial Attention, ICCV 2019")
def build_generalized(
    in_channels: int, *, dims: int, heads: int = 8, kv_stride: int = 2, terms: str = "1111"
) -> GeneralizedAttention:
    """Build generalized attention.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions.
        heads: A divisor of C.
        kv_stride: Keys are every so many positions.
        terms: Which of the four terms take part: ``"1111"``, ``"0010"`` as the paper's best trade.
    """
    return GeneralizedAttention(
        in_channels, dims=dims, heads=heads, kv_stride=kv_stride, terms=terms
    )
