"""Softmax attention in a compiled graph on a CPU: one operator, which takes the best form when it runs.

Inside a graph sizes may be unknown and values always are, so that no form could be chosen there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nlsurgery.blocks import products
from nlsurgery.blocks.affinity_fused import fused_gradients, fused_values, needs_values
from nlsurgery.blocks.affinity_row_gradients import row_gradients
from nlsurgery.blocks.affinity_rows import Grids, attended
from nlsurgery.blocks.affinity_tiles import tiled_gradients, tiled_values
from nlsurgery.blocks.choose import choose_implementation
from nlsurgery.blocks.geometry import is_compiled

#: Multiplications in the logits of one item and head below which torch's fused attention takes least.
SMALL_PRODUCT = 1 << 22


def is_small(q: Tensor, k: Tensor) -> bool:
    """Whether torch's fused attention takes least, whatever the processor, of (…, N, C') and (…, M, C')."""
    return is_small_head(q.shape[-2] * k.shape[-2], q.shape[-1])


def is_small_head(logits: int, channels: int) -> bool:
    """:func:`is_small` of so many logits of each head, and channels of its keys."""
    return logits * channels < SMALL_PRODUCT


def takes_operator(q: Tensor) -> bool:
    """Whether a graph that is being compiled gets the operator; an exported one does not.

    Args:
        q: Queries of any shape.
    """
    known = q.dtype in (torch.float32, torch.bfloat16) and q.device.type == "cpu"
    return known and is_compiled()


def operator_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    form: str,
    *,
    keep: bool = False,
    grids: Grids | None = None,
) -> Tensor:
    """Σ_j softmax_j(scale · q_i · k_j) v_j by the operator.

    Args:
        q: (B, N, C') queries.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        scale: The factor on the logits.
        form: ``fused``, ``chunked``, ``explicit`` for all rows of a bfloat16 map at a time where oneDNN is
            faster, or ``auto`` to choose when it runs.
        keep: Whether an ``explicit`` map is kept for backward.
        grids: Where a query's largest logit is likely that of the key at its place.

    Returns:
        (B, N, V) in the dtype of ``v``.
    """
    across = [tokens.stride(1) == 1 for tokens in (q, k, v)]
    places = [] if grids is None else [*grids[0], *grids[1]]
    y: Tensor = _attention(q, k, v, scale, form, keep, across, places)[0]
    return y.transpose(1, 2) if across[2] else y


@torch.library.custom_op("nlsurgery::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    form: str,
    keep: bool,
    across: Sequence[bool],
    places: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The attended values, (B, N) each row's logarithm of its sum of exponentials, and the map if it is kept.

    Args:
        q: (B, N, C') queries.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        scale: The factor on the logits.
        form: As :func:`operator_attend` has it.
        keep: Likewise.
        across: Whether q, k and v lie channels first: what is made like them is then (B, C', N).
        places: The sizes of both maps of ``grids``, one after the other.
    """
    kept: list[Tensor] = []
    if _is_fused(q, k, v, form):
        y, total = fused_values(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), scale)
        y, total = y.squeeze(1)[..., : v.shape[2]], total.squeeze(1)
    elif products.are_by_onednn(q.dtype, q.device.type):
        half = len(places) // 2
        y, total = attended(
            q,
            k,
            v,
            scale,
            kept if keep else None,
            whole=form == "explicit",
            grids=(places[:half], places[half:]) if places else None,
        )
    else:
        y, total, _ = tiled_values(q, k, v, scale)
    total = total.reshape(q.shape[:2]).contiguous()
    return (
        _laid(y.to(v.dtype), across[2]),
        total,
        products.stacked(kept) if keep else q.new_empty(0),
    )


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    form: str,
    keep: bool,
    across: Sequence[bool],
    places: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    total = q.new_empty(q.shape[:2], dtype=torch.float32)
    kept = q.new_empty(q.shape[0], k.shape[1], q.shape[1]) if keep else q.new_empty(0)
    return _empty(v, q.shape[1], across[2]), total, kept


@torch.library.custom_op("nlsurgery::attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    total: Tensor,
    kept: Tensor,
    dy: Tensor,
    scale: float,
    form: str,
    across: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, of which ``across`` lie channels first."""
    found: tuple[Tensor, ...]
    if kept.dim() == 1 and _is_fused(q, k, v, form):
        query, key, value = (t.unsqueeze(1) for t in (q, k, v))
        values = y.unsqueeze(1) if needs_values(q) else None
        total, dy = total.unsqueeze(1), dy.unsqueeze(1)
        found = fused_gradients(query, key, value, values, total, dy, scale)
        found = tuple(g.squeeze(1) for g in found)
    elif products.are_by_onednn(q.dtype, q.device.type):
        found = row_gradients(q, k, v, y, total, dy, scale, list(kept) if kept.dim() > 1 else ())
    else:
        found = tiled_gradients(q, k, v, y, dy, total.unsqueeze(2), scale)
    dq, dk, dv = (
        _laid(g.to(t.dtype), is_across)
        for g, t, is_across in zip(found, (q, k, v), across, strict=True)
    )
    return dq, dk, dv


@_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    pairs = zip((q, k, v), others[-1], strict=True)
    dq, dk, dv = (_empty(t, t.shape[1], is_across) for t, is_across in pairs)
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, ctx.scale, ctx.form, _, ctx.across, _ = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Any, ...]:
    q, k, v, y, total, kept = ctx.saved_tensors
    if ctx.across[2]:
        y, dy = y.transpose(1, 2), dy.transpose(1, 2)
    found = _attention_backward(q, k, v, y, total, kept, dy, ctx.scale, ctx.form, ctx.across)
    pairs = zip(found, ctx.across, strict=True)
    return *(g.transpose(1, 2) if is_across else g for g, is_across in pairs), *[None] * 5


_attention.register_autograd(_differentiate, setup_context=_keep)


def _laid(tokens: Tensor, across: bool) -> Tensor:
    """(B, N, C) contiguous, or (B, C, N)."""
    return tokens.transpose(1, 2).contiguous() if across else tokens.contiguous()


def _empty(tokens: Tensor, count: int, across: bool) -> Tensor:
    batch, channels = tokens.shape[0], tokens.shape[2]
    shape = (batch, channels, count) if across else (batch, count, channels)
    return tokens.new_empty(shape)


def _is_fused(q: Tensor, k: Tensor, v: Tensor, form: str) -> bool:
    """Whether torch's fused attention computes it: else rows or tiles do, which keep no map either."""
    if q.numel() == 0 or k.numel() == 0:
        # torch's kernel divides by zero where there is nothing.
        return False
    if form == "auto":
        if is_small(q, k):
            return True
        form = choose_implementation(
            "embedded_gaussian",
            num_queries=q.shape[1],
            num_keys=k.shape[1],
            head_size=q.shape[2],
            value_size=v.shape[2],
            batch=q.shape[0],
            dtype=v.dtype,
        )
    if products.are_by_onednn(q.dtype, q.device.type) and products.halves(q.dtype):
        # A small map is formed eagerly: by rows it is not kept, and they are as fast.
        return form == "fused"
    # Tiles would form float32 factors, and are slower than torch's fused attention on a small map.
    return q.dtype == torch.bfloat16 or form in ("fused", "explicit")
