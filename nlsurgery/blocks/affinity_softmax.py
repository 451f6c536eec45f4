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


def _probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    logits = torch.bmm(q, k.transpose(1, 2))
    if scale != 1.0:
        logits.mul_(scale)
    return torch.softmax(logits, dim=-1, out=logits)


class _Chunked(torch.autograd.Function):
    """Attention over chunks of queries; backward forms each chunk's softmax again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        dtype = accumulator(q.dtype)
        keys = k.to(dtype)
        y = v.new_empty(q.shape[0], q.shape[1], v.shape[2])
        for b, i in chunks(q.shape[0], q.shape[1], k.shape[1]):
            p = _probabilities(q[b, i].to(dtype), keys[b], scale)
            y[b, i] = torch.bmm(p.to(v.dtype), v[b])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        scale, dtype = ctx.scale, accumulator(q.dtype)
        keys, values = k.to(dtype), v.to(dtype)
        dq = q.new_empty(q.shape)
        dk = torch.zeros(k.shape, dtype=dtype, device=k.device)
        dv = torch.zeros(v.shape, dtype=dtype, device=v.device)
        for b, i in chunks(q.shape[0], q.shape[1], k.shape[1]):
            queries, grad = q[b, i].to(dtype), dy[b, i].to(dtype)
            p = _probabilities(queries, keys[b], scale)
            dv[b].baddbmm_(p.transpose(1, 2), grad)
            dp = torch.bmm(grad, values[b].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, dtype)
            dq[b, i] = torch.bmm(ds, keys[b]).mul_(scale)
            dk[b].baddbmm_(ds.transpose(1, 2), queries, alpha=scale)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None
