"""Softmax attention that keeps no N×M tensor, forward or backward.

Two forms beside the explicit one: torch's fused attention (``affinity_fused.py``), and tiles of
queries and keys (``affinity_tiles.py``). Logits of half inputs are formed in float32 in both.
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
from nlsurgery.blocks.affinity_chunks import (
    Workspace,
    chunks,
    empty_as,
    gradients_over_chunks,
    set_product,
)
from nlsurgery.blocks.affinity_fused import fused_attend
from nlsurgery.blocks.affinity_tiles import tiled_attend
from nlsurgery.blocks.geometry import takes_plain_operators

#: From so many logits on the explicit form is a function of its own on a CPU: where it is trained, and
#: where not.
OWN_LOGITS, OWN_LOGITS_FORWARD = 1 << 18, 1 << 22
#: Below so many logits a map is not looked at: products with denormal weights do not take long either.
FEW_LOGITS = 1 << 18
#: Batch items, and rows of the logits of each, that are looked at.
SAMPLED_ITEMS, SAMPLED_ROWS = 2, 4
#: How far below a row's largest logit weights are denormal numbers, or their gradients: so far, give or take.
DENORMAL = (90.0, 15.0)
#: The share of such weights which makes a product noticeably slower.
NOTICEABLE = 5e-4


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
    has_backward = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if takes_plain_operators() or (form == "explicit" and _is_plain(q, k, has_backward)):
        return apply_map(softmax_map(q, k, scale), v)
    with without_autocast(q):
        if form == "explicit":
            return _Explicit.apply(q, k, v, scale, has_backward)  # type: ignore[no-any-return]
        if form == "fused" or torch.compiler.is_compiling():
            query, key, value = (tokens.unsqueeze(1) for tokens in (q, k, v))
            return fused_attend(query, key, value, scale).squeeze(1)
        return tiled_attend(q, k, v, scale)


def _is_plain(q: Tensor, k: Tensor, has_backward: bool) -> bool:
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    return q.shape[0] * q.shape[1] * k.shape[1] < (
        OWN_LOGITS if has_backward else OWN_LOGITS_FORWARD
    )


class _Explicit(torch.autograd.Function):
    """The map formed and kept, on a CPU: its memory and its order are chosen, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, has_backward: bool
    ) -> Tensor:
        dtype = accumulator(q.dtype)
        queries, keys, values = (t.to(dtype) for t in (q * scale if scale != 1.0 else q, k, v))
        batch, num_queries, num_keys = q.shape[0], q.shape[1], k.shape[1]
        workspace = Workspace(q, dtype, "logits")
        kept = queries.new_empty(batch, num_queries, num_keys) if has_backward else None
        y = empty_as(values, num_queries)
        for b, i in chunks(batch, num_queries, num_keys, queries.itemsize):
            rows = queries[b, i]
            out = workspace.take(*rows.shape[:2], num_keys) if kept is None else kept[b, i]
            torch.bmm(rows, keys[b].transpose(1, 2), out=out)
            torch.softmax(out, dim=-1, out=out)
            set_product(y[b, i], out, values[b], 1.0)
        if kept is not None:
            ctx.save_for_backward(q, k, v, kept)
            ctx.scale = scale
        return y.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        q, k, v, kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *softmax_gradients(q, k, v, ctx.scale, dy), None, None
        queries, keys, values, dy = (t.to(kept.dtype) for t in (q, k, v, dy))
        found = gradients_over_chunks(queries, keys, values, ctx.scale, dy, lambda b, i: kept[b, i])
        return *(g.to(t.dtype) for g, t in zip(found, (q, k, v), strict=True)), None, None


def fits(num_keys: int, value_size: int) -> bool:
    """Whether an N×M tensor may be kept: at most twice the four projections, and few keys."""
    return num_keys <= min(1024, 8 * value_size)


def has_denormal_weights(q: Tensor, k: Tensor, scale: float) -> bool:
    """Whether many weights of softmax_j(scale · q_i · k_j) are denormal numbers, in some rows of it.

    A product with those takes up to 25 times as long on a CPU. Never so where values cannot be read
    (in a graph, on another device, under ``torch.func.vmap``).

    Args:
        q: (B, N, C') queries.
        k: (B, M, C') keys.
        scale: The factor on the logits.
    """
    batch, num_queries, num_keys = q.shape[0], q.shape[1], k.shape[1]
    if q.device.type != "cpu" or torch.compiler.is_compiling() or takes_plain_operators():
        return False
    if accumulator(q.dtype) != torch.float32 or batch * num_queries * num_keys < FEW_LOGITS:
        return False
    items = slice(None, None, -(-batch // SAMPLED_ITEMS))
    rows = slice(None, None, -(-num_queries // SAMPLED_ROWS))
    with torch.no_grad(), without_autocast(q):
        logits = torch.bmm(q[items, rows].float(), k[items].float().transpose(1, 2)).mul_(scale)
        below = logits.amax(-1, keepdim=True) - logits
        count = below.sub_(DENORMAL[0]).abs_().lt(DENORMAL[1]).sum()
    try:
        return bool(count > NOTICEABLE * below.numel())
    except RuntimeError:
        return False
