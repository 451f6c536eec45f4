"""Softmax attention by torch's fused attention, with gradients that can be differentiated again.

Logits of half inputs are formed in float32: rounded to bfloat16, one of 20 is off by 0.06.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nlsurgery.blocks.affinity import plain_attend, softmax_gradients, takes_plain_gradients
from nlsurgery.blocks.affinity_chunks import (
    Workspace,
    across,
    adds_up,
    along,
    balanced,
    centred,
    gradients_over_chunks,
    like,
)
from nlsurgery.blocks.affinity_tiles import FLOOR, tiled_gradients
from nlsurgery.blocks.geometry import is_eager, is_transformed

_fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
#: Queries of a single map up to which torch's own backward is faster in bfloat16.
ONE_SMALL_MAP = 256
#: Not where what keys have in common is more than this share of their squares: it multiplies the rounding of
#: the logits' gradients in that of the queries.
IN_COMMON = 0.6
#: Where a row's sum of exponentials lies so far above those of mean logits, others lie as far below: their
#: weights are denormal numbers, which slow a product many times.
SPREAD = 40.0
#: The share of such rows from which on the gradients are computed without denormal weights.
SPREAD_ROWS = 0.01
#: What rows of fused attention begin on a multiple of, by device; on others 8, 16 bytes of half precision.
ALIGNED = {"cpu": 1, "meta": 1}


def fused_attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Σ_j softmax_j(scale · q_i · k_j) v_j by torch's fused attention, without autocast.

    Args:
        q: (B, heads, N, C') queries.
        k: (B, heads, M, C') keys.
        v: (B, heads, M, V) values.
        scale: The factor on the logits.

    Returns:
        (B, heads, N, V).
    """
    if _takes_own_function(q, k):
        return _Fused.apply(q, k, v, scale)  # type: ignore[no-any-return]
    if is_transformed() and q.device.type == "cpu":
        # torch's operator cannot be differentiated forwards, and is looped over by vmap.
        return plain_attend(q, k, v, scale)
    query, key, value = _fusable(q), _fusable(k), _fusable(v)
    y = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return y if value.shape[3] == v.shape[3] else y[..., : v.shape[3]]


def _takes_own_function(q: Tensor, k: Tensor) -> bool:
    # torch's kernel divides by zero where there is nothing.
    return is_eager() and q.device.type == "cpu" and q.numel() > 0 and k.numel() > 0


def _fusable(tokens: Tensor) -> Tensor:
    """(B, heads, N, C') as torch's fused attention takes it: of others it silently forms the N×M tensor.

    Channels have to be contiguous, and off the CPU each row has to begin on a multiple of 16 bytes:
    channels are padded with zeros to a multiple of :data:`ALIGNED`, which adds nothing to a logit and
    channels of zeros to the result (torch, ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``).
    """
    multiple = ALIGNED.get(tokens.device.type, 8)
    missing = -tokens.shape[3] % multiple
    if missing:
        return _widened(tokens, tokens.shape[3] + missing).contiguous()
    if torch.compiler.is_compiling():
        return tokens
    rows = zip(tokens.stride()[:3], tokens.shape[:3], strict=True)
    places = (tokens.storage_offset(), *(step for step, size in rows if size > 1))
    if tokens.stride(3) == 1 and not any(place % multiple for place in places):
        return tokens
    return tokens.clone(memory_format=torch.contiguous_format)


def _widened(tokens: Tensor, size: int) -> Tensor:
    """(..., C) with zeros for channels C to ``size``."""
    missing = size - tokens.shape[-1]
    return F.pad(tokens, (0, missing)) if missing else tokens


class _Fused(torch.autograd.Function):
    """torch's fused attention on a CPU, with a gradient that can be differentiated again.

    In bfloat16 backward goes over chunks of queries. It forms the logits again by a bfloat16 product,
    which is as exact as a float32 one where they are near 0: a value near those that weigh in a row
    is subtracted in the accumulator. The logarithm of the row's sum of exponentials, which the
    forward gives, tells it. Where float32 logits are spread widely backward goes over tiles, which
    keep denormal weights out. Elsewhere, and for one small map, backward is torch's own.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        y, total = fused_values(q, k, v, scale)
        ctx.save_for_backward(q, k, v, total, *([y] if needs_values(q) else []))
        ctx.scale = scale
        return y if y.shape[3] == v.shape[3] else y[..., : v.shape[3]]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        q, k, v, total, *kept = ctx.saved_tensors
        if takes_plain_gradients(dy):
            return *softmax_gradients(q, k, v, ctx.scale, dy), None
        y = kept[0] if kept else None
        return *fused_gradients(q, k, v, y, total, dy, ctx.scale), None


def fused_values(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend to values by torch's operator for a CPU.

    Args:
        q: (B, heads, N, C') queries.
        k: (B, heads, M, C') keys.
        v: (B, heads, M, V) values.
        scale: The factor on the logits.

    Returns:
        (B, heads, N, at least V), with zeros after V channels, and (B, heads, N), the logarithm of each
        row's sum of exponentials.
    """
    return _fused_forward(*_fusable_together(q, k, v), scale=scale)  # type: ignore[no-any-return]


def needs_values(q: Tensor) -> bool:
    """Whether :func:`fused_gradients` wants the attended values."""
    is_small = q.shape[:2].numel() == 1 and q.shape[2] <= ONE_SMALL_MAP
    return q.dtype != torch.bfloat16 or is_small


def fused_gradients(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor | None, total: Tensor, dy: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v.

    Args:
        q: (B, heads, N, C') queries.
        k: (B, heads, M, C') keys.
        v: (B, heads, M, V) values.
        y: (B, heads, N, at least V) result; ``None`` where it is not needed.
        total: (B, heads, N) as :func:`fused_values` gives it.
        dy: (B, heads, N, V) gradient.
        scale: The factor on the logits.
    """
    if q.dtype == torch.bfloat16 and y is not None and _are_alike(k):
        y = None
    if y is not None and not (q.dtype == torch.float32 and is_spread(q, k, total, scale)):
        operands = _fusable_together(q, k, v)
        size = operands[2].shape[3]
        grad, y = (_fusable(_widened(t, size)) for t in (dy, y))
        found = _fused_backward(grad, *operands, y, total, 0.0, False, scale=scale)
        dq, dk, dv = (g[..., : t.shape[3]] for g, t in zip(found, (q, k, v), strict=True))
        return dq, balanced(dk), dv
    shapes = q.shape, k.shape, v.shape
    q, k, v, total, dy = (t.flatten(0, 1) for t in (q, k, v, total, dy))
    if y is None:
        found = bfloat16_gradients(q, k, v, total, dy, scale)
    else:
        y = y[..., : v.shape[2]].flatten(0, 1)
        found = tiled_gradients(q, k, v, y, dy, total.unsqueeze(2), scale)
    return tuple(g.view(shape) for g, shape in zip(found, shapes, strict=True))


def _are_alike(k: Tensor) -> bool:
    """Whether most of keys (…, M, C') is what they have in common."""
    return bool(k.mean(-2).square().sum() > IN_COMMON * k.square().mean(-2).sum())


def _fusable_together(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    size = max(k.shape[3], v.shape[3])
    return [_fusable(_widened(t, size)) for t in (q, k, v)]


def bfloat16_gradients(
    q: Tensor, k: Tensor, v: Tensor, total: Tensor, dy: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """The gradients of bfloat16 queries, keys and values over chunks of queries.

    Args:
        q: (B, N, C') queries.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        total: (B, N) logarithm of each row's sum of exponentials, float32.
        dy: (B, N, V) gradient.
        scale: The factor on the logits.
    """
    total = total.unsqueeze(2)
    mean = _mean_logit(q, k, scale)
    floor = FLOOR if _lies_apart(total, mean) else None
    shift = _weighty_logit(k.shape[1], total, mean).to(q.dtype).neg_()
    del mean
    operands = q, k, v, dy
    if adds_up(q, k):
        operands = along(q), across(k), across(v), along(dy)
    found = list(_gradients_about(shift, *operands, scale, floor))
    del operands
    # Sums are freed one by one: on a large map they are as large as all else together.
    dq, dk, dv = (like(found.pop(0), t) for t in (q, k, v))
    return dq, balanced(dk), dv


def _gradients_about(
    shift: Tensor, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, scale: float, floor: float | None
) -> tuple[Tensor, ...]:
    logits = Workspace(q, q.dtype, "logits")

    def weights(b: slice, i: slice) -> Tensor:
        out = logits.take(*shift[b, i].shape[:2], k.shape[1])
        torch.baddbmm(shift[b, i], q[b, i], k[b].transpose(1, 2), alpha=scale, out=out)
        if floor is not None:
            out.clamp_(min=floor)
        return torch.softmax(out, dim=-1, out=out)

    return gradients_over_chunks(q, centred(k), v, scale, dy, weights)


def _mean_logit(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The mean of each row's logits, (…, N, 1) float32, of q (…, N, C') and k (…, M, C')."""
    return torch.matmul(q, k.mean(-2, keepdim=True).transpose(-2, -1)).float() * scale


def is_spread(q: Tensor, k: Tensor, total: Tensor, scale: float) -> bool:
    """Whether logits of q (…, N, C') and k (…, M, C'), of sums ``total`` (…, N), make denormal weights."""
    return _lies_apart(total.unsqueeze(-1), _mean_logit(q, k, scale))


def _lies_apart(total: Tensor, mean: Tensor) -> bool:
    """Whether many rows' weights reach from 1 down to denormal numbers."""
    return bool((total - mean > SPREAD).float().mean() > SPREAD_ROWS)


def _weighty_logit(num_keys: int, total: Tensor, mean: Tensor) -> Tensor:
    """For each row a logit near those that weigh in its softmax, (B, N, 1).

    Logits with mean m and variance s² have, where they are spread normally, the logarithm
    ``total`` = m + s²/2 + log M of the sum of their exponentials, and m + s² as their mean by weight.
    Whatever the spread, m is at most total - log M, and no logit is larger than total.
    """
    return torch.minimum(2 * (total - math.log(num_keys)) - mean, total)
