"""Softmax attention that keeps no N×M tensor, forward or backward.

Two forms beside the explicit one: torch's fused attention (``affinity_fused.py``), and chunks of
queries whose softmax is computed again in backward (only q, k and v are saved). Logits of half inputs
are formed in float32 in both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nlsurgery.blocks.affinity import (
    accumulator,
    apply_map,
    softmax_gradients,
    softmax_map,
    without_autocast,
)
from nlsurgery.blocks.affinity_chunks import Workspace, chunks, empty_as, gradients_over_chunks
from nlsurgery.blocks.affinity_fused import fused_attend
from nlsurgery.blocks.geometry import is_recorded


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


def fits(num_keys: int, value_size: int) -> bool:
    """Whether an N×M tensor may be kept: no larger than the four projections, and in the cache."""
    return num_keys <= min(1024, 4 * value_size)


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
        logits, weights = Workspace(q, dtype, "logits"), Workspace(q, v.dtype, "weights")
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
            return *softmax_gradients(q, k, v, scale, dy), None
        dtype = accumulator(q.dtype)
        queries, keys, values = (t.to(dtype) for t in (q, k, v))
        logits = Workspace(q, dtype, "logits")

        def weights(index: int, b: slice, i: slice) -> Tensor:
            if kept:
                p: Tensor = kept[index]
                return p.to(dtype)
            return _softmax(queries[b, i], keys[b], scale, logits)

        gradients = gradients_over_chunks(queries, keys, values, scale, dy.to(dtype), weights)
        return *(g.to(t.dtype) for g, t in zip(gradients, (q, k, v), strict=True)), None


def _softmax(q: Tensor, k: Tensor, scale: float, workspace: Workspace | None) -> Tensor:
    """Softmax rows; they hold until the workspace's next use."""
    out = workspace.take(*q.shape[:2], k.shape[1]) if workspace else None
    logits = torch.bmm(q, k.transpose(1, 2), out=out)
    if scale != 1.0:
        logits.mul_(scale)
    return torch.softmax(logits, dim=-1, out=logits)
