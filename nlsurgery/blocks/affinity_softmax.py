"""Softmax attention that keeps no N×M tensor, forward or backward.

Two forms beside the explicit one: torch's fused attention, and chunks of queries whose softmax is
computed again in backward (only q, k and v are saved). Logits are formed in float32 for half
inputs in all of them: unscaled logits in bfloat16 are off by up to 0.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nlsurgery.blocks.affinity import accumulator, apply_map, softmax_map, without_autocast

#: Bytes of logits that one chunk may take: they should stay in the last-level cache.
CHUNK_BYTES = 16 << 20
#: Beyond this size (times the root of the row's largest weight), rounding a logit to bfloat16
#: shows in the result.
ROUNDED_LOGIT = 2.0


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
            query, key, value = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
            return F.scaled_dot_product_attention(query, key, value, scale=scale).squeeze(1)
        return _Chunked.apply(q, k, v, scale)  # type: ignore[no-any-return]


def chunks(batch: int, num_queries: int, num_keys: int) -> Iterator[tuple[slice, slice]]:
    """Cut (B, N) into pieces whose logits take at most :data:`CHUNK_BYTES`."""
    rows = max(1, CHUNK_BYTES // (4 * max(1, num_keys)))
    together = max(1, rows // max(1, num_queries))
    # Equal pieces of at least 64 rows: fewer make the products slow.
    pieces = -(-num_queries // max(64, min(rows, num_queries)))
    step = max(1, -(-num_queries // max(1, pieces)))
    for first in range(0, batch, together):
        for row in range(0, num_queries, step):
            yield slice(first, first + together), slice(row, min(row + step, num_queries))


class _Logits:
    """Forms softmax rows for one call: which products, in which precision.

    In bfloat16 on a CPU a float32 product takes more than twice as long, and no product of
    bfloat16 gives float32. There the product runs in bfloat16, and where a row's largest logit
    m is so large that rounding it matters, once more with -m in the accumulator: the logits that
    weigh are then near 0, where bfloat16 is fine enough.
    """

    def __init__(self, q: Tensor, k: Tensor, scale: float) -> None:
        self.shifted = q.dtype == torch.bfloat16 and q.device.type == "cpu"
        self.dtype = q.dtype if self.shifted else accumulator(q.dtype)
        self.scale = scale
        self.q, self.k = q, k.to(self.dtype)

    def rows(self, b: slice, i: slice, shift: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Probabilities of queries ``i`` of batch items ``b``, and their shift if there is one."""
        queries = self.q[b, i].to(self.dtype)
        keys = self.k[b].transpose(1, 2)
        if shift is not None:
            return self._softmax(torch.baddbmm(-shift, queries, keys)), shift
        logits = torch.bmm(queries, keys)
        if not self.shifted or not logits.numel():
            return self._softmax(logits), None
        top = logits.amax(-1, keepdim=True)
        p = self._softmax(logits)
        # A logit's rounding grows with its size; over many keys of like weight it averages out.
        if (
            top.abs() * self.scale * p.amax(-1, keepdim=True).sqrt()
        ).amax().item() <= ROUNDED_LOGIT:
            return p, None
        return self._softmax(torch.baddbmm(-top, queries, keys)), top

    def _softmax(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return torch.softmax(logits, dim=-1, out=logits)


class _Chunked(torch.autograd.Function):
    """Attention over chunks of queries; backward forms each chunk's softmax again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        logits = _Logits(q, k, scale)
        y = v.new_empty(q.shape[0], q.shape[1], v.shape[2])
        shifts = []
        for b, i in chunks(q.shape[0], q.shape[1], k.shape[1]):
            p, shift = logits.rows(b, i)
            shifts.append(shift)
            y[b, i] = torch.bmm(p.to(v.dtype), v[b])
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.shifts = scale, shifts
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        logits = _Logits(q, k, ctx.scale)
        dtype = logits.dtype
        values = v.to(dtype)
        dq = q.new_empty(q.shape)
        dk = torch.zeros(k.shape, dtype=accumulator(dtype), device=k.device)
        dv = torch.zeros(v.shape, dtype=accumulator(dtype), device=v.device)
        pieces = chunks(q.shape[0], q.shape[1], k.shape[1])
        for (b, i), shift in zip(pieces, ctx.shifts, strict=True):
            queries, grad = q[b, i].to(dtype), dy[b, i].to(dtype)
            p, _ = logits.rows(b, i, shift)
            _add_product(dv[b], p, grad, 1.0)
            dp = torch.bmm(grad, values[b].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, dtype)
            dq[b, i] = torch.bmm(ds, logits.k[b]).mul_(ctx.scale)
            _add_product(dk[b], ds, queries, ctx.scale)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """Add factor · aᵀb to ``total``, in the precision of ``total``."""
    if total.dtype == a.dtype:
        total.baddbmm_(a.transpose(1, 2), b, alpha=factor)
    else:
        total.add_(torch.bmm(a.transpose(1, 2), b), alpha=factor)
