"""Softmax attention in a compiled graph on a CPU: one operator, which takes the best form when it runs.

Inside a graph sizes may be unknown and values always are, so that no form could be chosen there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nlsurgery.blocks import products
from nlsurgery.blocks.affinity_fused import fused_gradients, fused_values, needs_values
from nlsurgery.blocks.affinity_row_gradients import row_gradients
from nlsurgery.blocks.affinity_rows import attended
from nlsurgery.blocks.affinity_tiles import tiled_gradients, tiled_values
from nlsurgery.blocks.choose import choose_implementation
from nlsurgery.blocks.geometry import is_compiled

#: Multiplications in the logits of one item and head below which torch's fused attention takes least.
SMALL_PRODUCT = 1 << 22


def is_small(q: Tensor, k: Tensor) -> bool:
    """Whether torch's fused attention takes least, whatever the processor, of (B, heads, N, C') and keys."""
    return q.shape[2] * k.shape[2] * q.shape[3] < SMALL_PRODUCT


def takes_operator(q: Tensor) -> bool:
    """Whether a graph that is being compiled gets the operator; an exported one does not.

    Args:
        q: Queries of any shape.
    """
    known = q.dtype in (torch.float32, torch.bfloat16) and q.device.type == "cpu"
    return known and is_compiled()


def operator_attend(q: Tensor, k: Tensor, v: Tensor, scale: float, form: str) -> Tensor:
    """Σ_j softmax_j(scale · q_i · k_j) v_j by the operator.

    Args:
        q: (B, heads, N, C') queries.
        k: (B, heads, M, C') keys.
        v: (B, heads, M, V) values.
        scale: The factor on the logits.
        form: ``fused`` or ``chunked``, or ``auto`` to choose when it runs.

    Returns:
        (B, heads, N, V) in the dtype of ``v``.
    """
    return _attention(q, k, v, scale, form)[0]  # type: ignore[no-any-return]


@torch.library.custom_op("nlsurgery::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, form: str) -> tuple[Tensor, Tensor]:
    """The attended values, and the logarithm of each row's sum of exponentials, (B, heads, N)."""
    y, total = _values(q, k, v, scale, form)
    shape = *q.shape[:3], v.shape[3]
    return y.reshape(shape).contiguous(), total.reshape(q.shape[:3]).contiguous()


def _values(q: Tensor, k: Tensor, v: Tensor, scale: float, form: str) -> tuple[Tensor, Tensor]:
    if _is_fused(q, k, v, form):
        y, total = fused_values(q, k, v, scale)
        return y[..., : v.shape[3]], total
    queries, keys, values = (t.flatten(0, 1) for t in (q, k, v))
    if products.are_by_onednn(q.dtype, q.device.type):
        return attended(queries, keys, values, scale)
    return tiled_values(queries, keys, values, scale)[:2]


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, form: str) -> tuple[Tensor, Tensor]:
    shape = q.shape[:3]
    return v.new_empty(*shape, v.shape[3]), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("nlsurgery::attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    total: Tensor,
    dy: Tensor,
    scale: float,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    found: tuple[Tensor, ...]
    if _is_fused(q, k, v, form):
        found = fused_gradients(q, k, v, y if needs_values(q) else None, total, dy, scale)
    else:
        queries, keys, values, y, total, dy = (t.flatten(0, 1) for t in (q, k, v, y, total, dy))
        if products.are_by_onednn(q.dtype, q.device.type):
            found = row_gradients(queries, keys, values, y, total, dy, scale)
        else:
            found = tiled_gradients(queries, keys, values, y, dy, total.unsqueeze(2), scale)
    dq, dk, dv = (g.reshape(t.shape).contiguous() for g, t in zip(found, (q, k, v), strict=True))
    return dq, dk, dv


@_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.form = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    return *_attention_backward(*ctx.saved_tensors, dy, ctx.scale, ctx.form), None, None


_attention.register_autograd(_differentiate, setup_context=_keep)


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
            num_queries=q.shape[2],
            num_keys=k.shape[2],
            head_size=q.shape[3],
            value_size=v.shape[3],
            batch=q.shape[0] * q.shape[1],
            dtype=v.dtype,
        )
    if products.are_by_onednn(q.dtype, q.device.type):
        # A small map is formed eagerly: by rows it is not kept, and they are as fast.
        return form == "fused"
    # Tiles would form float32 factors, and are slower than torch's fused attention on a small map.
    return q.dtype == torch.bfloat16 or form in ("fused", "explicit")
