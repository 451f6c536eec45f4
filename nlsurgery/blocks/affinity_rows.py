"""Softmax attention over rows of the map, on oneDNN's products (``products.py``).

Forward takes some queries and all keys at a time: their logits in float32, the softmax, and the product
with the values, in bfloat16 where these are so. Backward forms weights again from each row's sum of
exponentials: in bfloat16 over rows (``affinity_fused.py``), else over tiles of queries and keys, where every
pass but the exponentials is part of a product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nlsurgery.blocks.affinity import scaled, softmax_gradients
from nlsurgery.blocks.affinity_chunks import pieces
from nlsurgery.blocks.affinity_fused import bfloat16_gradients, is_spread
from nlsurgery.blocks.affinity_tiles import EVEN, FLOOR
from nlsurgery.blocks.products import product, product_and

#: The natural logarithm of 2.
LOG_2 = math.log(2)
#: Powers of two up to this one need no shift.
NEAR = 60.0
#: Logits formed at a time (4 MB), and up to how many where those are fewer rows than a product is fast with.
ROWS, MANY_ROWS = 1 << 20, 1 << 22
FAST_ROWS = 256
#: Queries and keys of a tile in backward (2 MB): larger ones are no faster, and take memory.
TILE_QUERIES, TILE_KEYS = 1 << 10, 1 << 9


def row_attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Σ_j softmax_j(scale · q_i · k_j) v_j over rows of the map, without autocast.

    Args:
        q: (B, N, C') queries on a CPU.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        scale: The factor on the logits.

    Returns:
        (B, N, V) in the dtype of ``v``.
    """
    has_backward = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    return _Rows.apply(q, k, v, scale, has_backward)  # type: ignore[no-any-return]


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, has_backward: bool
    ) -> Tensor:
        y, total = attended(q, k, v, scale, has_backward=has_backward)
        if has_backward:
            kept = [] if q.dtype == torch.bfloat16 else [y]
            ctx.save_for_backward(q, k, v, total, *kept)
            ctx.scale = scale
        return y.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        q, k, v, total, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *softmax_gradients(q, k, v, ctx.scale, dy), None, None
        y = kept[0] if kept else None
        return *row_gradients(q, k, v, y, total, dy, ctx.scale), None, None


def attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    has_backward: bool = False,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to values without a graph.

    Args:
        q: (B, N, C') queries on a CPU.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        scale: The factor on the logits.
        has_backward: Whether the second result is wanted; it is empty otherwise.
        kept: (B, N, M) bfloat16, which the softmax of bfloat16 queries is written to.

    Returns:
        (B, N, V) in bfloat16 or float32, and (B, N), each row's logarithm of its sum of exponentials.
    """
    batch, num_queries, num_keys = q.shape[0], q.shape[1], k.shape[1]
    exact = v.dtype != torch.bfloat16
    values = v.float() if exact else v
    y = values.new_empty(batch, v.shape[2], num_queries)
    total = q.new_empty(batch, num_queries if has_backward else 0, dtype=torch.float32)
    for b in range(batch):
        keys = k[b].float()
        for i in pieces(num_queries, _rows(num_keys, exact)):
            # Powers of two take a quarter of the time of MKL's exponentials.
            logits = product(q[b, i].float() * (scale / LOG_2), keys)
            peak = logits.amax(-1, keepdim=True)
            shifted = bool(peak.abs().max() > NEAR)
            if shifted:
                logits.sub_(peak)
            p = logits.exp2_()
            sums = p.sum(-1, keepdim=True)
            if exact:
                torch.div(product(values[b].t(), p), sums.t(), out=y[b, :, i])
            else:
                # Divided before they are rounded: a rounded sum would be rounded again.
                p.mul_(sums.reciprocal())
                weights = p.to(v.dtype) if kept is None else kept[b, i].copy_(p)
                y[b, :, i] = torch.mm(values[b].t(), weights.t())
            if has_backward:
                row_total = sums.log_()
                total[b, i] = (row_total.add_(peak, alpha=LOG_2) if shifted else row_total).squeeze(
                    1
                )
    return y.transpose(1, 2), total


def _rows(num_keys: int, exact: bool) -> int:
    # Rounded weights take memory besides the logits.
    most = MANY_ROWS if exact else MANY_ROWS // 2
    return max(64, min(FAST_ROWS, most // max(1, num_keys)), ROWS // max(1, num_keys))


def row_gradients(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor | None, total: Tensor, dy: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v, of what :func:`attended` takes and gives.

    Args:
        q: (B, N, C') queries.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        y: (B, N, V) float32, not used where queries are bfloat16.
        total: (B, N).
        dy: (B, N, V) gradient.
        scale: The factor on the logits.
    """
    if y is None or q.dtype == torch.bfloat16:
        return bfloat16_gradients(q, k, v, total, dy, scale)
    queries, keys, values, dy = (t.float() for t in (q, k, v, dy))
    found = _float_gradients(queries, keys, values, y, dy, total, scale)
    return tuple(g.to(t.dtype) for g, t in zip(found, (q, k, v), strict=True))


def _float_gradients(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, dy: Tensor, total: Tensor, scale: float
) -> list[Tensor]:
    floor = FLOOR / LOG_2 if is_spread(q, k, total, scale) else None
    # Of softmax: ds = p (dp - Σ_j p_j dp_j), and Σ_j p_j dp_j = y · dy.
    dot = dy.mul(y).sum(-1).neg_()
    found: list[list[Tensor]] = [[], [], []]
    for b in range(q.shape[0]):
        item = _Item(k[b], v[b], scale, floor)
        dq = q.new_zeros(q.shape[2], q.shape[1])
        for i in pieces(q.shape[1], TILE_QUERIES, EVEN):
            part = item.add(q[b, i], dy[b, i], total[b, i] / -LOG_2, dot[b, i])
            if part is not None:
                torch.mul(part, scale, out=dq[:, i])
        for kept, gradient in zip(found, (dq, *item.gathered()), strict=True):
            kept.append(gradient)
    return [_stacked(g, like) for g, like in zip(found, (q, k, v), strict=True)]


def _stacked(items: list[Tensor], like: Tensor) -> Tensor:
    """(C, count) of each batch item as (B, count, C)."""
    if not items:
        return torch.zeros_like(like)
    stacked = items[0].unsqueeze(0) if len(items) == 1 else torch.stack(items)
    return stacked.transpose(1, 2)


class _Item:
    """The gradients of one batch item, gathered over tiles of queries."""

    def __init__(self, k: Tensor, v: Tensor, scale: float, floor: float | None) -> None:
        self.k, self.v, self.scale, self.floor = k, v, scale, floor
        self.columns = list(pieces(k.shape[0], TILE_KEYS, EVEN))
        #: Of each tile of keys, (C', keys) and (V, keys) so far.
        self.dk: list[Tensor | None] = [None] * len(self.columns)
        self.dv: list[Tensor | None] = [None] * len(self.columns)

    def add(self, q: Tensor, dy: Tensor, shift: Tensor, dot: Tensor) -> Tensor | None:
        """Add the parts of some queries.

        Args:
            q: (rows, C').
            dy: (rows, V) gradient.
            shift: (rows,) the logarithm to base 2 of each row's sum of exponentials, negative.
            dot: (rows,) Σ_j p_j dp_j, negative.

        Returns:
            (C', rows), the gradient of the scaled queries; ``None`` where there are no keys.
        """
        q, dy = scaled(q, self.scale).contiguous(), dy.contiguous()
        powers = q / LOG_2
        dq = None
        for j, columns in enumerate(self.columns):
            keys, values = self.k[columns], self.v[columns]
            # Keys are the rows of a tile: what belongs to a query is a bias of the product.
            p = product(keys, powers, shift)
            if self.floor is not None:
                p.clamp_(min=self.floor)
            p.exp2_()
            self.dv[j] = _plus(self.dv[j], dy.t(), p)
            ds = product_and("mul", p, values, dy, dot)
            self.dk[j] = _plus(self.dk[j], q.t(), ds)
            dq = _plus(dq, keys.t(), ds.t())
        return dq

    def gathered(self) -> tuple[Tensor, Tensor]:
        """(C', M) and (V, M), the gradients of keys and values."""
        return _joined(self.dk, self.k), _joined(self.dv, self.v)


def _joined(parts: list[Tensor | None], like: Tensor) -> Tensor:
    made = [part for part in parts if part is not None]
    parts.clear()
    if not made:
        return like.new_zeros(like.shape[1], like.shape[0])
    return made[0] if len(made) == 1 else torch.cat(made, 1)


def _plus(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return product(a, b) if total is None else product_and("add", total, a, b)
