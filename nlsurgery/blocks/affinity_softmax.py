"""Softmax attention that keeps no N×M tensor, forward or backward.

Two forms beside the explicit one: torch's fused attention, and chunks of queries whose softmax is
computed again in backward (only q, k and v are saved). Logits are formed in float32 for half
inputs in all of them: unscaled logits in bfloat16 are off by up to 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nlsurgery.blocks.affinity import accumulator, apply_map, softmax_map, without_autocast

_softmax_backward = torch.ops.aten._softmax_backward_data.out
#: Bytes of logits that one chunk may take: they should stay in the last-level cache.
CHUNK_BYTES = 16 << 20
#: Beyond this size (times a share by the row's largest weight), rounding a logit to bfloat16
#: shows in the result.
ROUNDED_LOGIT = 3.0
#: How many rows of a chunk are looked at first, and one key in how many.
FEW_ROWS = 32
SAMPLED = 8


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
    if form == "explicit" or torch.onnx.is_in_onnx_export():
        return apply_map(softmax_map(q, k, scale), v)
    with without_autocast(q):
        if form == "fused" or torch.compiler.is_compiling():
            query, key, value = (_fusable(tokens).unsqueeze(1) for tokens in (q, k, v))
            return F.scaled_dot_product_attention(query, key, value, scale=scale).squeeze(1)
        return _Chunked.apply(q, k, v, scale)  # type: ignore[no-any-return]


def _fusable(tokens: Tensor) -> Tensor:
    """Tokens whose channels are contiguous: on others torch silently forms the N×M tensor."""
    if torch.compiler.is_compiling() or tokens.device.type != "cpu":
        return tokens
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()


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


class _Workspace:
    """One piece of memory for the chunks of a call, one after the other."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.buffer = like.new_empty(0, dtype=dtype)

    def take(self, *shape: int) -> Tensor:
        """An uninitialised tensor over it."""
        size = math.prod(shape)
        if self.buffer.numel() < size:
            self.buffer = self.buffer.new_empty(size)
        return self.buffer[:size].view(shape)


class _Logits:
    """Forms softmax rows for one call: which products, in which precision.

    In bfloat16 on a CPU a float32 product takes more than twice as long, and no product of
    bfloat16 gives float32. There the product runs in bfloat16, and where a row's largest logit
    m is so large that rounding it matters, with -m in the accumulator: the logits that weigh are
    then near 0, where bfloat16 is fine enough. A sample of the keys gives a guess of m; rows that
    it misses are done again.
    """

    def __init__(self, q: Tensor, k: Tensor, scale: float) -> None:
        self.rounded = q.dtype == torch.bfloat16 and q.device.type == "cpu"
        self.dtype = q.dtype if self.rounded else accumulator(q.dtype)
        self.scale = scale
        self.q, self.k = q, k.to(self.dtype)
        self.workspace = _Workspace(self.q, self.dtype)

    def again(self, b: slice, i: slice, shift: Tensor | None) -> Tensor:
        """Probabilities of queries ``i`` of batch items ``b`` by the shift :meth:`rows` gave."""
        queries, keys = self._factors(b, i)
        return self._softmax(self._product(queries, keys, shift))

    def rows(self, b: slice, i: slice) -> tuple[Tensor, Tensor | None]:
        """Probabilities of queries ``i`` of batch items ``b``, and their shift if there is one.

        They lie in the workspace, and hold until the next call.
        """
        queries, keys = self._factors(b, i)
        if self.rounded and (guess := self._guess(queries, keys)) is not None:
            return self._shifted(queries, keys, guess)
        logits = self._product(queries, keys, None)
        if not self.rounded or self._largest(logits) <= ROUNDED_LOGIT:
            return self._softmax(logits), None
        top = logits.amax(-1, keepdim=True)
        p = self._softmax(logits)
        if not self._matters(top, p).any():
            return p, None
        return self._softmax(self._product(queries, keys, top)), top

    def _guess(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """An estimate of each row's largest logit, (B, n, 1), from one key in :data:`SAMPLED`.

        ``None`` for small chunks, and where a few whole rows say that rounding does not show.
        """
        every = queries.shape[1] // FEW_ROWS
        if every < 4 or keys.shape[2] < 16 * SAMPLED:
            return None
        logits = torch.bmm(queries[:, ::every], keys)
        top = logits.amax(-1, keepdim=True)
        if not self._matters(top, torch.softmax(logits * self.scale, -1)).any():
            return None
        guess = torch.bmm(queries, keys[:, :, ::SAMPLED]).amax(-1, keepdim=True)
        return guess + (top - guess[:, ::every]).median()

    def _shifted(self, queries: Tensor, keys: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Rows by a guessed shift; those whose largest logit it misses by too much once more."""
        logits = self._product(queries, keys, shift)
        top = logits.amax(-1, keepdim=True)
        p = self._softmax(logits)
        missed = torch.zeros_like(top, dtype=torch.bool)
        far = top.abs() * abs(self.scale) > ROUNDED_LOGIT
        missed[far] = self._matters(top[far].unsqueeze(1), p[far.squeeze(2)]).squeeze(1)
        shift = torch.where(missed, shift + top, shift)
        if 2 * missed.sum().item() > missed.numel():
            return self._softmax(self._product(queries, keys, shift)), shift
        for item, rows in enumerate(missed.squeeze(2)):
            again = rows.nonzero().squeeze(1)
            if again.numel():
                one = slice(item, item + 1)
                exact = torch.baddbmm(-shift[one, again], queries[one, again], keys[one])
                p[item, again] = self._softmax(exact)[0]
        return p, shift

    def _factors(self, b: slice, i: slice) -> tuple[Tensor, Tensor]:
        return self.q[b, i].to(self.dtype), self.k[b].transpose(1, 2)

    def _product(self, queries: Tensor, keys: Tensor, shift: Tensor | None) -> Tensor:
        out = self.workspace.take(queries.shape[0], queries.shape[1], keys.shape[2])
        if shift is None:
            return torch.bmm(queries, keys, out=out)
        return torch.baddbmm(-shift, queries, keys, out=out)

    def _largest(self, logits: Tensor) -> float:
        if not logits.numel():
            return 0.0
        low, high = logits.aminmax()
        return abs(self.scale) * max(-low.item(), high.item())

    def _matters(self, top: Tensor, p: Tensor) -> Tensor:
        """Where rounding shows: it grows with a logit, and averages out over keys of like weight.

        A row that is nearly one key's alone hardly changes with that key's logit either.

        Args:
            top: (…, 1), the rows' largest logits.
            p: (…, M), their probabilities.

        Returns:
            (…, 1) of bool, False wherever ``top`` is at most :data:`ROUNDED_LOGIT`.
        """
        largest = p.amax(-1, keepdim=True).float()
        share = torch.minimum(largest.sqrt(), 2 * (1 - largest))
        return top.abs() * abs(self.scale) * share > ROUNDED_LOGIT

    def _softmax(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return torch.softmax(logits, dim=-1, out=logits)


class _Chunked(torch.autograd.Function):
    """Attention over chunks of queries; backward forms each chunk's softmax again.

    Where all the rows together are no larger than the projections, they are kept instead.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        logits = _Logits(q, k, scale)
        y = empty_as(v, q.shape[1])
        keep = any(ctx.needs_input_grad[:3]) and fits(k.shape[1], v.shape[2])
        kept: list[Tensor] = []
        ctx.shifts = []
        for b, i in chunks(q.shape[0], q.shape[1], k.shape[1], logits.dtype.itemsize):
            p, shift = logits.rows(b, i)
            weights = p.to(v.dtype)
            ctx.shifts.append(shift)
            if keep:
                kept.append(weights.clone() if weights is p else weights)
            y[b, i] = apply_map(weights, v[b])
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale = scale
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        logits = _Logits(q, k, ctx.scale)
        dtype = logits.dtype
        values = v.to(dtype)
        dq = empty_as(q, q.shape[1])
        dk = torch.zeros(k.shape, dtype=accumulator(dtype), device=k.device)
        dv = torch.zeros(v.shape, dtype=accumulator(dtype), device=v.device)
        workspace = _Workspace(q, dtype)
        pieces = chunks(q.shape[0], q.shape[1], k.shape[1], dtype.itemsize)
        for index, (b, i) in enumerate(pieces):
            queries, grad = q[b, i].to(dtype), dy[b, i].to(dtype)
            p = kept[index].to(dtype) if kept else logits.again(b, i, ctx.shifts[index])
            _add_product(dv[b], p, grad, 1.0)
            dp = workspace.take(*p.shape)
            torch.bmm(grad, values[b].transpose(1, 2), out=dp)
            ds = _softmax_backward(dp, p, -1, dtype, grad_input=dp)
            dq[b, i] = apply_map(ds, logits.k[b]).mul_(ctx.scale)
            _add_product(dk[b], ds, queries, ctx.scale)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def empty_as(tokens: Tensor, count: int) -> Tensor:
    """(B, count, C) uninitialised, in memory as ``tokens`` lies: tokens or channels first."""
    batch, channels = tokens.shape[0], tokens.shape[2]
    if tokens.stride(1) == 1:
        return tokens.new_empty(batch, channels, count).transpose(1, 2)
    return tokens.new_empty(batch, count, channels)


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """Add factor · aᵀb to ``total``, in the precision of ``total``."""
    if total.dtype == a.dtype:
        total.baddbmm_(a.transpose(1, 2), b, alpha=factor)
    else:
        total.add_(torch.bmm(a.transpose(1, 2), b), alpha=factor)
