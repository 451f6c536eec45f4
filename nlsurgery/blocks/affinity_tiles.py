"""Softmax attention over tiles of queries and keys, forward and backward, on plain matrix products.

A tile of logits stays in a cache between the two products. A row's sum of exponentials is gathered tile
by tile (Milakov and Gimelshein, arXiv:1805.02867; Rabe and Staats, arXiv:2112.05682). The row's largest
logit is not looked for in every tile: float32 holds exponentials of logits that differ by 80 as exactly
as those of equal ones, so a shift is changed only where a tile's sum says that it has to be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nlsurgery.blocks.affinity import accumulator, scaled, softmax_gradients, takes_plain_gradients
from nlsurgery.blocks.affinity_chunks import Workspace, add_product, chunks, empty_as, pieces

#: Devices on which a look at a value does not wait for what was begun before.
READABLE = ("cpu",)
#: Logits in a tile on those (8 MB in float32), and the keys of a tile with as many logits.
TILE = 1 << 21
TILE_KEYS = 1 << 11
#: Rows and columns of a tile are a multiple of so many: a product of others takes up to a tenth longer.
EVEN = 64
#: Logits up to this one, none below twice its negative, need no shift: exponentials are far from
#: overflow and underflow.
NEAR = 40.0
#: What is further below a row's shift counts as this far. Denormal weights would make a product slow.
FLOOR = -60.0
#: A row's sum of exponentials beyond which its shift is changed.
LARGE_SUM = 1e20


def tiles(
    batch: int, num_queries: int, num_keys: int, device_type: str
) -> tuple[list[tuple[slice, slice]], list[slice]]:
    """Cut (B, N, M) logits into tiles; where values are not :data:`READABLE` a tile takes all keys.

    Returns:
        The batch items and queries of each row of tiles, and the keys of each tile in a row.
    """
    if device_type not in READABLE:
        return list(chunks(batch, num_queries, num_keys)), list(pieces(num_keys, num_keys))
    rows = max(TILE // TILE_KEYS, TILE // max(1, num_keys))
    width = max(TILE_KEYS, TILE // max(1, min(rows, num_queries)))
    together = TILE // max(1, num_queries * num_keys)
    upper = [(b, i) for b in pieces(batch, together) for i in pieces(num_queries, rows, EVEN)]
    return upper, list(pieces(num_keys, width, EVEN))


def tiled_attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Σ_j softmax_j(scale · q_i · k_j) v_j over tiles, without autocast.

    Args:
        q: (B, N, C') queries.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        scale: The factor on the logits.

    Returns:
        (B, N, V) in the dtype of ``v``.
    """
    return _Tiled.apply(q, k, v, scale)  # type: ignore[no-any-return]


class _Tiled(torch.autograd.Function):
    """Attention over tiles; backward forms each tile's weights again from the rows' sums."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        y, total, ctx.near = tiled_values(q, k, v, scale)
        # Not rounded to a half precision, which would show in the gradients of queries and keys.
        ctx.save_for_backward(q, k, v, y, total)
        ctx.scale = scale
        return y.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        q, k, v, y, total = ctx.saved_tensors
        if takes_plain_gradients(dy):
            return *softmax_gradients(q, k, v, ctx.scale, dy), None
        dtype = accumulator(q.dtype)
        queries, keys, values, dy = (t.to(dtype) for t in (q, k, v, dy))
        found = tiled_gradients(queries, keys, values, y, dy, total, ctx.scale, ctx.near)
        return *(g.to(t.dtype) for g, t in zip(found, (q, k, v), strict=True)), None


def tiled_values(
    q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, list[bool]]:
    """Attend to values, of (B, N, C') queries, (B, M, C') keys and (B, M, V) values, without a graph.

    Returns:
        (B, N, V) and (B, N, 1) in the accumulator's dtype, the second each row's logarithm of its sum of
        exponentials, and whether the logits of each row of tiles needed no shift.
    """
    dtype = accumulator(q.dtype)
    queries, keys, values = (t.to(dtype) for t in (q, k, v))
    y = empty_as(values, q.shape[1]).zero_()
    total = queries.new_empty(*q.shape[:2], 1)
    rows, columns = tiles(q.shape[0], q.shape[1], k.shape[1], q.device.type)
    workspace = Workspace(q, dtype, "logits")
    near = []
    for b, i in rows:
        row = _Row(scaled(queries[b, i], scale), workspace)
        for j in columns:
            row.add(keys[b, j], values[b, j], y[b, i])
        total[b, i] = row.finish(y[b, i])
        near.append(row.shift is None)
    return y, total, near


class _Row:
    """The attention of some queries, gathered over tiles of keys."""

    def __init__(self, q: Tensor, workspace: Workspace) -> None:
        self.q, self.workspace = q, workspace
        #: (B, rows, 1): what is subtracted from logits, and the sum of their exponentials so far.
        self.shift: Tensor | None = None
        self.total: Tensor | None = None

    def add(self, k: Tensor, v: Tensor, y: Tensor) -> None:
        """Add a tile's part of Σ_j exp(logit - shift) v_j to ``y``, and of the sum to the total."""
        logits = _logits(self.q, k, self.workspace)
        if self.total is None:
            peak = logits.amax(-1, keepdim=True)
            if not (_is_readable(peak) and _is_near(peak) and bool(logits.min() >= -2 * NEAR)):
                self.shift = peak
            self.total = self._summed(logits)
        else:
            summed = self._summed(logits)
            if bool(summed.max() > LARGE_SUM):
                self._raise(_logits(self.q, k, self.workspace), y)
            else:
                self.total.add_(summed)
        add_product(y, logits, v, 1.0)

    def finish(self, y: Tensor) -> Tensor:
        """Divide ``y`` by the sums; the logarithm of the sum of the logits' exponentials, (B, rows, 1)."""
        if self.total is None:
            return self.q.new_zeros(*self.q.shape[:2], 1)
        y.div_(self.total)
        total = self.total.log_()
        return total if self.shift is None else total.add_(self.shift)

    def _summed(self, logits: Tensor) -> Tensor:
        """Turn logits into weights in place; their sum over keys."""
        return _exponentials(logits, self.shift).sum(-1, keepdim=True)

    def _raise(self, logits: Tensor, y: Tensor) -> None:
        """Shift by this tile's largest logit where it is larger, and add the tile's sum."""
        peak = logits.amax(-1, keepdim=True)
        before = torch.zeros_like(peak) if self.shift is None else self.shift
        self.shift = torch.maximum(before, peak)
        factor = before.sub(self.shift).exp_()
        y.mul_(factor)
        assert self.total is not None
        self.total.mul_(factor).add_(self._summed(logits))


def _is_readable(values: Tensor) -> bool:
    return values.device.type in READABLE


def _is_near(logits: Tensor) -> bool:
    return bool(logits.abs().max() <= NEAR)


def _exponentials(logits: Tensor, shift: Tensor | None) -> Tensor:
    """exp(logits - shift) in place."""
    if shift is not None:
        logits.sub_(shift)
        if _is_readable(logits):
            logits.clamp_(min=FLOOR)
    return logits.exp_()


def _logits(q: Tensor, k: Tensor, workspace: Workspace) -> Tensor:
    """q kᵀ, of scaled queries; it holds until the workspace's next use."""
    out = workspace.take(*q.shape[:2], k.shape[1])
    return torch.bmm(q, k.transpose(1, 2), out=out)


def tiled_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    dy: Tensor,
    total: Tensor,
    scale: float,
    near: list[bool] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v.

    Args:
        q: (B, N, C') queries.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        y: (B, N, V) result.
        dy: (B, N, V) its gradient.
        total: (B, N, 1) logarithm of each row's sum of exponentials.
        scale: The factor on the logits.
        near: Whether the logits of each row of tiles needed no shift; ``None`` where it is not known.
    """
    dq, dk, dv = (empty_as(t, t.shape[1]).zero_() for t in (q, k, v))
    rows, columns = tiles(q.shape[0], q.shape[1], k.shape[1], q.device.type)
    first, second = Workspace(q, q.dtype, "logits"), Workspace(q, q.dtype, "gradients")
    for (b, i), unshifted in zip(rows, near or [False] * len(rows), strict=True):
        queries, upstream, row_total = scaled(q[b, i], scale), dy[b, i], total[b, i]
        # Of softmax: ds = p (dp - Σ_j p_j dp_j), and Σ_j p_j dp_j = y · dy.
        mean = upstream.mul(y[b, i]).sum(-1, keepdim=True).neg_()
        shift = None
        if unshifted and _is_near(row_total):
            # Weights are left undivided: to divide the row's gradient takes less.
            divisor = row_total.neg().exp_()
            upstream, mean = upstream * divisor, mean.mul_(divisor)
        else:
            shift = row_total
        for j in columns:
            p = _exponentials(_logits(queries, k[b, j], first), shift)
            add_product(dv[b, j], p.transpose(1, 2), upstream, 1.0)
            ds = second.take(*p.shape)
            torch.baddbmm(mean, upstream, v[b, j].transpose(1, 2), out=ds)
            ds.mul_(p)
            add_product(dq[b, i], ds, k[b, j], scale)
            add_product(dk[b, j], ds.transpose(1, 2), queries, 1.0)
    return dq, dk, dv
