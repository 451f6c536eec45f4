"""From projected maps to the attended map, by the chosen form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nlsurgery.blocks.affinity import SOFTMAX_MODES
from nlsurgery.blocks.affinity_concat import concatenation_attend
from nlsurgery.blocks.affinity_dot import dot_product_attend
from nlsurgery.blocks.affinity_operator import takes_operator
from nlsurgery.blocks.affinity_softmax import (
    has_denormal_weights,
    may_have_denormal_weights,
    softmax_attend,
)
from nlsurgery.blocks.choose import choose_implementation, without_denormals
from nlsurgery.blocks.geometry import to_map, to_tokens, working_dtype
from nlsurgery.blocks.memory_format import to_channels_last
from nlsurgery.blocks.residual import convolve, is_plain


def num_keys(spatial: Sequence[int], sub_sample: bool) -> int:
    """M for a map's spatial sizes: their product, after pooling where ``sub_sample`` says so."""
    if not sub_sample:
        return math.prod(spatial)
    first_pooled = 1 if len(spatial) == 3 else 0
    return math.prod([s // 2 if i >= first_pooled and s > 1 else s for i, s in enumerate(spatial)])


@torch.fx.wrap
def laid_out(
    x: Tensor, mode: str, sizes: tuple[int, int], keys: bool, implementation: str
) -> Tensor:
    """``x`` in the memory format that the chosen form reads fastest.

    Args:
        x: (B, C, *spatial).
        mode: The pairwise function.
        sizes: Channels of keys and of values.
        keys: Whether keys are pooled.
        implementation: The block's option.

    Returns:
        ``x`` itself, or a channels-last copy where tokens must be contiguous.
    """
    form = implementation
    if form == "auto":
        form = choose_implementation(
            mode,
            num_queries=math.prod(x.shape[2:]),
            num_keys=num_keys(x.shape[2:], keys),
            head_size=sizes[0],
            value_size=sizes[1],
            batch=x.shape[0],
            dtype=working_dtype(x),
            device_type=x.device.type,
        )
    return to_channels_last(x) if form in ("fused", "sorted") else x


@torch.fx.wrap
def attend(q: Tensor, k: Tensor, v: Tensor, mode: str, scale: float, implementation: str) -> Tensor:
    """1/C(x) · Σ_j f(q_i, k_j) v_j over maps.

    Args:
        q: (B, C', *spatial) queries; in ``concatenation`` their part of the logits, C' = 1.
        k: (B, C', *key sizes), likewise.
        v: (B, V, *key sizes).
        mode: The pairwise function.
        scale: The factor on the logits of the softmax modes.
        implementation: The form, ``auto`` to choose it here.

    Returns:
        (B, V, *spatial), in the dtype of ``v``.
    """
    queries, keys, values = to_tokens(q), to_tokens(k), to_tokens(v)
    form = implementation
    if form == "auto":
        form = choose_implementation(
            mode,
            num_queries=queries.shape[1],
            num_keys=keys.shape[1],
            head_size=queries.shape[2],
            value_size=values.shape[2],
            batch=values.shape[0],
            dtype=v.dtype,
            device_type=v.device.type,
        )
        if mode in SOFTMAX_MODES:
            form = _without_denormals(form, queries, keys, v.dtype, scale)
    if mode == "dot_product":
        y = dot_product_attend(queries, keys, values, form)
    elif mode == "concatenation":
        y = concatenation_attend(queries.squeeze(2), keys.squeeze(2), values, form)
    else:
        # A position is most like itself, or what it was pooled into.
        grids = (q.shape[2:], k.shape[2:]) if mode == "gaussian" else None
        y = softmax_attend(queries, keys, values, scale, form, grids)
    return to_map(y, q.shape[2:])


def _without_denormals(
    form: str, queries: Tensor, keys: Tensor, dtype: torch.dtype, scale: float
) -> str:
    """The chosen form of softmax attention, or where its weights are denormal numbers another."""
    if takes_operator(queries):
        # In a graph no logits can be looked at, but by an operator.
        is_safe = form == "explicit" and not may_have_denormal_weights(queries, keys)
        return form if is_safe else "auto"
    if form == "explicit" and has_denormal_weights(queries, keys, scale):
        return without_denormals(dtype)
    return form


@torch.fx.wrap
def logit_parts(
    x: Tensor, theta: nn.Module, phi: nn.Module, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute w · [θ(x); φ(x)] by its two parts, of queries and of keys, as one convolution where it can be.

    Args:
        x: (B, C, *spatial).
        theta: θ.
        phi: φ.
        weight: The 2C' values of ``concat_project``, queries first.

    Returns:
        Two of (B, 1, *spatial).
    """
    if not (is_plain(theta) and is_plain(phi)):
        return logit_part(x, theta, weight, True), logit_part(x, phi, weight, False)
    folded = [_folded(p, weight, first) for p, first in ((theta, True), (phi, False))]
    bias = None
    if any(bias is not None for _, bias in folded):
        parts = [side.new_zeros(1) if bias is None else bias for side, bias in folded]
        bias = torch.cat(parts)
    side = torch.cat([side for side, _ in folded])
    both = convolve(x, side.view(2, -1, *[1] * (x.dim() - 2)), bias)
    return both[:, :1], both[:, 1:]


@torch.fx.wrap
def logit_part(x: Tensor, projection: nn.Module | None, weight: Tensor, first: bool) -> Tensor:
    """Compute w · projection(x), the part of a concatenation's logits that comes from one side.

    Args:
        x: (B, C, *spatial).
        projection: θ or φ; ``None`` where ``x`` is projected already.
        weight: The 2C' values of ``concat_project``, queries first.
        first: Whether this is the queries' side.

    Returns:
        (B, 1, *spatial).
    """
    if projection is not None and is_plain(projection):
        side, bias = _folded(projection, weight, first)
    else:
        x = x if projection is None else projection(x)
        side, bias = _side(weight, first), None
    return convolve(x, side.view(1, -1, *[1] * (x.dim() - 2)), bias)


def _side(weight: Tensor, first: bool) -> Tensor:
    return weight.flatten().chunk(2)[0 if first else 1].unsqueeze(0)


def _folded(projection: nn.Module, weight: Tensor, first: bool) -> tuple[Tensor, Tensor | None]:
    """The two linear maps as one, so that the C' channels are never formed: (1, C), and (1,) or ``None``."""
    side = _side(weight, first)
    bias = None if projection.bias is None else side @ projection.bias  # type: ignore[operator]
    return side @ projection.weight.flatten(1), bias  # type: ignore[operator]
