"""Softmax attention that keeps no N×M tensor, forward or backward.

Two forms beside the explicit one: torch's fused attention, and chunks of queries whose softmax is
computed again in backward (only q, k and v are saved). Logits of half inputs are formed in float32 in
both: rounded to bfloat16, one of 20 is off by 0.06.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nlsurgery.blocks.affinity import (
    accumulator,
    apply_map,
    differentiable_gradients,
    softmax_map,
    without_autocast,
)
from nlsurgery.blocks.geometry import is_recorded
from nlsurgery.blocks.memory_format import transposed

_softmax_backward = torch.ops.aten._softmax_backward_data.out
_fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
#: Bytes of logits that one chunk may take: they should stay in the last-level cache.
CHUNK_BYTES = 16 << 20
#: Values of a lower precision that are added to a sum at a time.
ADDED_VALUES = 1 << 20
#: Queries of a single map up to which torch's own backward is faster in bfloat16.
ONE_SMALL_MAP = 256
#: What rows of fused attention begin on a multiple of, by device; on others 8, 16 bytes of half precision.
ALIGNED = {"cpu": 1, "meta": 1}


def softmax_attend(q: Tensor, k: Tensor, v: Tensor, scale: float, form: str) -> Tensor:
    """Σ_j softmax_j(scale · q_i · k_j) v_j.

    Args:
        q: (B, N, C') queries.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        scale: The factor on the logits.
        form: ``explicit``, ``fused`` or ``chunked``; the last is traced as ``fused``.

    Returns:
        (B, N, V) in the dtype of ``v``.
    """
    if form == "explicit" or is_recorded():
        return apply_map(softmax_map(q, k, scale), v)
    with without_autocast(q):
        if form == "fused" or torch.compiler.is_compiling():
            query, key, value = (tokens.unsqueeze(1) for tokens in (q, k, v))
            return fused_attend(query, key, value, scale).squeeze(1)
        return _Chunked.apply(q, k, v, scale)  # type: ignore[no-any-return]


def _widened(tokens: Tensor, size: int) -> Tensor:
    """(..., C) with zeros for channels C to ``size``."""
    missing = size - tokens.shape[-1]
    return F.pad(tokens, (0, missing)) if missing else tokens


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
    if _takes_own_operator(q):
        return _operator(q, k, v, scale)[0]  # type: ignore[no-any-return]
    query, key, value = _fusable(q), _fusable(k), _fusable(v)
    y = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return y if value.shape[3] == v.shape[3] else y[..., : v.shape[3]]


def _takes_own_function(q: Tensor, k: Tensor) -> bool:
    if torch.compiler.is_compiling() or is_recorded():
        return False
    # torch's kernel divides by zero where there is nothing.
    return q.device.type == "cpu" and q.numel() > 0 and k.numel() > 0


def _takes_own_operator(q: Tensor) -> bool:
    """Whether a compiled graph gets the backward of :class:`_Fused`, as one operator."""
    exporting = is_recorded() or getattr(torch.compiler, "is_exporting", bool)()
    low = q.dtype == torch.bfloat16 and q.device.type == "cpu"
    return low and torch.compiler.is_compiling() and torch.is_grad_enabled() and not exporting


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


def fits(num_keys: int, value_size: int) -> bool:
    """Whether an N×M tensor may be kept: no larger than the four projections, and in the cache."""
    return num_keys <= min(1024, 4 * value_size)


def chunks(
    batch: int, num_queries: int, num_keys: int, itemsize: int = 4
) -> Iterator[tuple[slice, slice]]:
    """Cut (B, N) into pieces whose logits, of ``itemsize`` bytes, take at most :data:`CHUNK_BYTES`."""
    rows = max(1, CHUNK_BYTES // (itemsize * max(1, num_keys)))
    together = max(1, rows // max(1, num_queries))
    # Equal pieces of at least 64 rows: fewer make the products slow.
    pieces = -(-num_queries // max(64, min(rows, num_queries)))
    step = max(1, -(-num_queries // max(1, pieces)))
    for first in range(0, batch, together):
        for row in range(0, num_queries, step):
            yield slice(first, first + together), slice(row, min(row + step, num_queries))


_kept = threading.local()


class _Workspace:
    """One piece of memory for the chunks of a call, one after the other.

    On a CPU a thread keeps up to :data:`CHUNK_BYTES` of each name: to get new pages from the system
    for every call takes as long as a chunk's softmax.
    """

    def __init__(self, like: Tensor, dtype: torch.dtype, name: str) -> None:
        self.buffer = like.new_empty(0, dtype=dtype)
        self.name = name

    def converted(self, values: Tensor) -> Tensor:
        """``values`` in the dtype of this memory: themselves, or a copy in it."""
        if values.dtype == self.buffer.dtype:
            return values
        return self.take(*values.shape).copy_(values)

    def take(self, *shape: int) -> Tensor:
        """An uninitialised tensor over it."""
        size = math.prod(shape)
        if self.buffer.numel() < size:
            self.buffer = self._memory(size)
        return self.buffer[:size].view(shape)

    def _memory(self, size: int) -> Tensor:
        num_bytes = size * self.buffer.itemsize
        plain = type(self.buffer) is Tensor and self.buffer.device.type == "cpu"
        if not plain or num_bytes > CHUNK_BYTES:
            return self.buffer.new_empty(size)
        kept: Tensor | None = getattr(_kept, self.name, None)
        if kept is None or kept.numel() < num_bytes:
            with torch.inference_mode(False):
                kept = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
            setattr(_kept, self.name, kept)
        return kept[:num_bytes].view(self.buffer.dtype)


class _Chunked(torch.autograd.Function):
    """Attention over chunks of queries; backward forms each chunk's softmax again.

    Where all the rows together are no larger than the projections, they are kept instead.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keep = any(ctx.needs_input_grad[:3]) and fits(k.shape[1], v.shape[2])
        dtype = accumulator(q.dtype)
        queries, keys = q.to(dtype), k.to(dtype)
        y = empty_as(v, q.shape[1])
        logits, weights = _Workspace(q, dtype, "logits"), _Workspace(q, v.dtype, "weights")
        kept: list[Tensor] = []
        for b, i in chunks(q.shape[0], q.shape[1], k.shape[1], dtype.itemsize):
            p = _softmax(queries[b, i], keys[b], scale, None if keep else logits)
            p = p.to(v.dtype) if keep else weights.converted(p)
            if keep:
                kept.append(p)
            y[b, i] = apply_map(p, v[b])
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        q, k, v, *kept = ctx.saved_tensors
        scale = ctx.scale
        if torch.is_grad_enabled():
            return *_plain_gradients(q, k, v, scale, dy), None
        dtype = accumulator(q.dtype)
        queries, keys, values = (t.to(dtype) for t in (q, k, v))
        logits = _Workspace(q, dtype, "logits")

        def weights(index: int, b: slice, i: slice) -> Tensor:
            if kept:
                p: Tensor = kept[index]
                return p.to(dtype)
            return _softmax(queries[b, i], keys[b], scale, logits)

        gradients = _gradients(queries, keys, values, scale, dy.to(dtype), weights)
        return *(g.to(t.dtype) for g, t in zip(gradients, (q, k, v), strict=True)), None


class _Fused(torch.autograd.Function):
    """torch's fused attention on a CPU, with a gradient that can be differentiated again.

    In bfloat16 backward goes over chunks of queries. It forms the logits again by a bfloat16 product,
    which is as exact as a float32 one where they are near 0: a value near those that weigh in a row
    is subtracted in the accumulator. The logarithm of the row's sum of exponentials, which the
    forward gives, tells it. Elsewhere, and for one small map, backward is torch's own.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        y, total = _fused_forward(*_fusable_together(q, k, v), scale=scale)
        ctx.chunked = q.dtype == torch.bfloat16 and (
            q.shape[:2].numel() > 1 or q.shape[2] > ONE_SMALL_MAP
        )
        ctx.save_for_backward(q, k, v, total, *([] if ctx.chunked else [y]))
        ctx.scale = scale
        return y if y.shape[3] == v.shape[3] else y[..., : v.shape[3]]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        q, k, v, total, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_plain_gradients(q, k, v, ctx.scale, dy), None
        if ctx.chunked:
            parts = [t.flatten(0, 1) for t in (q, k, v, total.unsqueeze(3), dy)]
            found = _fused_gradients(parts[0], parts[1], parts[2], parts[3], parts[4], ctx.scale)
            return *(g.view(t.shape) for g, t in zip(found, (q, k, v), strict=True)), None
        operands = _fusable_together(q, k, v)
        grad = _fusable(_widened(dy, kept[0].shape[3]))
        found = _fused_backward(grad, *operands, kept[0], total, 0.0, False, scale=ctx.scale)
        return *(g[..., : t.shape[3]] for g, t in zip(found, (q, k, v), strict=True)), None


@torch.library.custom_op("nlsurgery::fused_attention", mutates_args=())
def _operator(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The forward of :class:`_Fused` as one operator of a compiled graph: (B, heads, N, V), (B, heads, N)."""
    y, total = _fused_forward(*_fusable_together(q, k, v), scale=scale)
    return y[..., : v.shape[3]].contiguous(), total.contiguous()


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    shape = q.shape[:3]
    return v.new_empty(*shape, v.shape[3]), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("nlsurgery::fused_attention_backward", mutates_args=())
def _operator_backward(
    q: Tensor, k: Tensor, v: Tensor, total: Tensor, dy: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of :class:`_Fused` likewise."""
    parts = [t.flatten(0, 1) for t in (q, k, v, total.unsqueeze(3), dy)]
    found = _fused_gradients(parts[0], parts[1], parts[2], parts[3], parts[4], scale)
    dq, dk, dv = (g.contiguous().view(t.shape) for g, t in zip(found, (q, k, v), strict=True))
    return dq, dk, dv


@_operator_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, total: Tensor, dy: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, output[1])


def _operator_gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    return *_operator_backward(*ctx.saved_tensors, dy, ctx.scale), None


_operator.register_autograd(_operator_gradients, setup_context=_keep)


def _fusable_together(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    size = max(k.shape[3], v.shape[3])
    return [_fusable(_widened(t, size)) for t in (q, k, v)]


def _fused_gradients(
    q: Tensor, k: Tensor, v: Tensor, total: Tensor, dy: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """The gradients of bfloat16 queries, keys and values over chunks of queries.

    Args:
        q: (B, N, C') queries.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        total: (B, N, 1) logarithm of each row's sum of exponentials, float32.
        dy: (B, N, V) gradient.
        scale: The factor on the logits.
    """
    shift = _weighty_logit(q, k, scale, total).neg_()
    operands = q, k, v, dy
    if _adds_up(q, k):
        operands = _along(q), _across(k), _across(v), _along(dy)
    found = list(_gradients_about(shift, *operands, scale))
    del operands
    # Sums are freed one by one: on a large map they are as large as all else together.
    return tuple(_like(found.pop(0), t) for t in (q, k, v))


def _gradients_about(
    shift: Tensor, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, scale: float
) -> tuple[Tensor, ...]:
    logits = _Workspace(q, q.dtype, "logits")

    def weights(index: int, b: slice, i: slice) -> Tensor:
        out = logits.take(*shift[b, i].shape[:2], k.shape[1])
        torch.baddbmm(shift[b, i], q[b, i], k[b].transpose(1, 2), alpha=scale, out=out)
        return torch.softmax(out, dim=-1, out=out)

    return _gradients(q, k, v, scale, dy, weights)


def _weighty_logit(q: Tensor, k: Tensor, scale: float, total: Tensor) -> Tensor:
    """For each row a logit near those that weigh in its softmax, (B, N, 1).

    Logits with mean m and variance s² have, where they are spread normally, the logarithm
    ``total`` = m + s²/2 + log M of the sum of their exponentials, and m + s² as their mean by weight.
    Whatever the spread, m is at most total - log M, and no logit is larger than total.
    """
    mean = torch.bmm(q, k.mean(1, keepdim=True).transpose(1, 2)).float() * scale
    centre = 2 * (total - math.log(k.shape[1])) - mean
    return torch.minimum(centre, total).to(q.dtype)


def _softmax(q: Tensor, k: Tensor, scale: float, workspace: _Workspace | None) -> Tensor:
    """Softmax rows; they hold until the workspace's next use."""
    out = workspace.take(*q.shape[:2], k.shape[1]) if workspace else None
    logits = torch.bmm(q, k.transpose(1, 2), out=out)
    if scale != 1.0:
        logits.mul_(scale)
    return torch.softmax(logits, dim=-1, out=logits)


def _plain_gradients(q: Tensor, k: Tensor, v: Tensor, scale: float, dy: Tensor) -> tuple[Any, ...]:
    queries, keys, values = (t.flatten(0, -3) for t in (q, k, v))
    y = apply_map(softmax_map(queries, keys, scale), values).view(dy.shape)
    return differentiable_gradients(y, (q, k, v), dy)


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dy: Tensor,
    weights: Callable[[int, slice, slice], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, over chunks of queries.

    Args:
        q: (B, N, C') queries.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        scale: The factor on the logits.
        dy: (B, N, V) gradient.
        weights: Gives the softmax rows of a chunk by its number, batch items and queries.

    Returns:
        The three; sums over chunks in the accumulator's dtype.
    """
    dq = empty_as(q, q.shape[1])
    gathered: Callable[[Tensor], Tensor] = _itself
    if _adds_up(q, k):
        if q.dtype != accumulator(q.dtype):
            gathered = _across
        dk, dv = (torch.zeros_like(t, dtype=accumulator(t.dtype)) for t in (k, v))
        gather = _add_product
    else:
        dk, dv = (empty_as(t, t.shape[1]) for t in (k, v))
        gather = _set_product
    workspace = _Workspace(q, q.dtype, "gradients")
    pieces = chunks(q.shape[0], q.shape[1], k.shape[1], q.itemsize)
    for index, (b, i) in enumerate(pieces):
        p = weights(index, b, i)
        gather(dv[b], p.transpose(1, 2), gathered(dy[b, i]), 1.0)
        dp = workspace.take(*p.shape)
        torch.bmm(dy[b, i], v[b].transpose(1, 2), out=dp)
        ds = _softmax_backward(dp, p, -1, q.dtype, grad_input=dp)
        _set_product(dq[b, i], ds, k[b], scale)
        gather(dk[b], ds.transpose(1, 2), gathered(q[b, i]), scale)
    return dq, dk, dv


def _adds_up(q: Tensor, k: Tensor) -> bool:
    """Whether the gradients of keys and values are sums over chunks."""
    pieces = chunks(q.shape[0], q.shape[1], k.shape[1], q.itemsize)
    return any(i.stop < q.shape[1] for _, i in pieces)


def _itself(tokens: Tensor) -> Tensor:
    return tokens


def _along(tokens: Tensor) -> Tensor:
    """(B, N, C) with the channels of a token side by side."""
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()


def _across(tokens: Tensor) -> Tensor:
    """(B, N, C) in memory as (B, C, N).

    So torch's CPU products of bfloat16 take half the time where N is large and they sum over it, or
    C is 512 and they sum over that.
    """
    if tokens.stride(1) == 1:
        return tokens.transpose(1, 2).contiguous().transpose(1, 2)
    return transposed(tokens.contiguous()).transpose(1, 2)


def empty_as(tokens: Tensor, count: int) -> Tensor:
    """(B, count, C) uninitialised, in memory as ``tokens`` lies: tokens or channels first."""
    batch, channels = tokens.shape[0], tokens.shape[2]
    if tokens.stride(1) == 1:
        return tokens.new_empty(batch, channels, count).transpose(1, 2)
    return tokens.new_empty(batch, count, channels)


def _like(values: Tensor, tokens: Tensor) -> Tensor:
    """(B, N, C) values in the dtype of ``tokens`` and in memory as they lie."""
    values = values.to(tokens.dtype)
    if values.stride(1) == 1 and tokens.stride(1) != 1:
        return transposed(values.transpose(1, 2))
    return values


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """Add factor · a b to ``total``, in the precision and memory order of ``total``."""
    total, first, second = _in_order(total, a, b)
    if total.dtype == a.dtype:
        total.baddbmm_(first, second, alpha=factor)
        return
    summand = torch.bmm(first, second)
    # torch casts a whole summand first: here a few rows.
    rows = max(1, ADDED_VALUES * summand.shape[1] // max(1, summand.numel()))
    for part, added in zip(*(torch.split(t, rows, 1) for t in (total, summand)), strict=True):
        part.add_(added, alpha=factor)


def _set_product(total: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """Set ``total`` to factor · a b."""
    total, first, second = _in_order(total, a, b)
    torch.bmm(first, second, out=total)
    if factor != 1.0:
        total.mul_(factor)


def _in_order(total: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``total``, a and b, or ``total``ᵀ, bᵀ and aᵀ: as ``total`` lies in memory."""
    if total.stride(1) == 1:
        return total.transpose(1, 2), b.transpose(1, 2), a.transpose(1, 2)
    return total, a, b
