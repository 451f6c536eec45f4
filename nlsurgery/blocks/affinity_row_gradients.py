"""Gradients of softmax attention over tiles of queries and keys, on oneDNN's products (``products.py``).

Of softmax: ds = p (dp - Σ_j p_j dp_j), and Σ_j p_j dp_j = y · dy. The difference and the factor p are part of
the product that forms dp, and in bfloat16 exponentials of the one that forms logits: no pass is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nlsurgery.blocks.affinity_chunks import Workspace, empty_as, pieces
from nlsurgery.blocks.affinity_fused import is_spread
from nlsurgery.blocks.affinity_tiles import EVEN, FLOOR
from nlsurgery.blocks.products import (
    LOG_2,
    beside,
    computed,
    exponentials,
    factors,
    first_factor,
    is_exact,
    product,
    product_and,
)

#: How far above a row's total the shift of bfloat16 weights lies, as a power of two: exponentials less the
#: shift are off by a share of two to minus it.
ABOVE_TOTAL = 16
#: Queries and keys of a tile (2 MB): larger ones are no faster, and take memory.
TILE_QUERIES = 1 << 10
TILE_KEYS = {True: 1 << 9, False: 1 << 10}
#: Where the middle of a key channel is off 0 by more than this share of its range, it is subtracted.
ASIDE = 0.125
#: Values that are cast to float32 at a time.
CAST = 1 << 20


def row_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    total: Tensor,
    dy: Tensor,
    scale: float,
    rest: Tensor | None = None,
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v.

    Args:
        q: (B, N, C') queries.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        y: (B, N, V), the attended values.
        total: (B, N), each row's logarithm of its sum of exponentials, or of its sum in ``kept``.
        dy: (B, N, V) gradient.
        scale: The factor on the logits.
        rest: (B, N, V) bfloat16, what rounding took from ``y``; ``None`` if that is nothing, or not known.
        kept: The softmax of each batch item as (M, N), each column times a factor; empty to form it again.
    """
    found = empty_as(q, q.shape[1]), empty_as(k, k.shape[1]), empty_as(v, v.shape[1])
    q, k, v, y, dy = (computed(t) for t in (q, k, v, y, dy))
    for b in range(q.shape[0]):
        queries, keys, values, upstream = q[b], k[b], v[b], dy[b]
        if kept:
            rows, columns, power = [slice(0, q.shape[1])], [slice(0, k.shape[1])], 0
            weights = _given(kept[b])
            upstream = _times(upstream, total[b].neg().exp_())
        else:
            rows = list(pieces(q.shape[1], TILE_QUERIES, EVEN))
            columns = list(pieces(k.shape[1], TILE_KEYS[is_exact(v)], EVEN))
            power = 0 if is_exact(v) else ABOVE_TOTAL
            weights = _formed_again(queries, keys, total[b], scale, len(rows))
        dot = _dot(upstream, y[b], None if rest is None else rest[b])
        sums = _gathered(queries, keys, values, upstream, dot, rows, columns, weights)
        unit = 2.0**power
        by = scale * unit, scale * unit, unit
        for gradient, gathered, factor in zip(found, sums, by, strict=True):
            gathered.write(gradient[b], factor)
    return found


_Weights = Callable[[slice, slice], Tensor]


def _given(p: Tensor) -> _Weights:
    return lambda i, j: p


def _formed_again(q: Tensor, k: Tensor, total: Tensor, scale: float, num_parts: int) -> _Weights:
    """Weights (keys, rows) by queries and keys; bfloat16 ones less :data:`ABOVE_TOTAL`."""
    if is_exact(q):
        # As forward has them: logits that are rounded in another way are further from their total.
        powers, bias = (q * (scale / LOG_2)).contiguous(), total / -LOG_2
        floor = FLOOR / LOG_2 if is_spread(q, k, total, scale) else None
        return lambda i, j: _powers(product(k[j], powers[i], bias[i]), floor)
    queries, keys = factors(q, k, scale)
    keys, bias = first_factor(keys), -(total + ABOVE_TOTAL * LOG_2)
    if num_parts > 1:
        queries = queries.contiguous()
    return lambda i, j: exponentials(keys[j], queries[i], bias[i])


def _powers(logits: Tensor, floor: float | None) -> Tensor:
    # What is far below would be denormal numbers, which some processors multiply slowly.
    return (logits if floor is None else logits.clamp_(min=floor)).exp2_()


def _gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dy: Tensor,
    dot: Tensor,
    rows: list[slice],
    columns: list[slice],
    weights: _Weights,
) -> tuple[_Sum, _Sum, _Sum]:
    """The gradients of q, k and v over tiles of the ``rows`` of queries and ``columns`` of keys."""
    values, upstream, bias = _with_dot(v, dy, dot.neg_())
    values, k = first_factor(values), _centred(k)
    if len(rows) > 1:
        upstream = upstream.contiguous()
    dq = _Sum(rows, across=True)
    dk = _Sum(columns, across=q.stride(1) != 1)
    dv = _Sum(columns, across=dy.stride(1) != 1)
    for m, i in enumerate(rows):
        for n, j in enumerate(columns):
            p = weights(i, j)
            dv.add(n, p, dy[i])
            p = product_and("mul", p, values[j], upstream[i], None if bias is None else bias[i])
            dk.add(n, p, q[i])
            dq.add(m, p.t(), k[j])
    return dq, dk, dv


def _with_dot(v: Tensor, dy: Tensor, dot: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """v, dy and a bias such that v dyᵀ with the bias is v dyᵀ + dot.

    In bfloat16 the bias would be rounded: two more channels take its place.
    """
    if is_exact(v):
        return v, dy, dot
    rounded = dot.to(v.dtype)
    rest = dot.sub_(rounded).to(v.dtype)
    ones = v.new_ones(v.shape[0], 1)
    return beside(v, ones, ones), beside(dy, rounded.unsqueeze(1), rest.unsqueeze(1)), None


def _centred(k: Tensor) -> Tensor:
    """Keys (M, C') less the middle of those channels whose values lie to one side of 0.

    The gradients of a query's logits sum to 0, but for rounding, which what keys share would multiply.
    """
    if k.shape[0] == 0:
        return k
    low, high = k.amin(0), k.amax(0)
    middle = (low + high) / 2
    is_aside = middle.abs() > ASIDE * (high - low)
    return k - torch.where(is_aside, middle, 0) if bool(is_aside.any()) else k


def _dot(dy: Tensor, y: Tensor, rest: Tensor | None) -> Tensor:
    """The sums over channels of dy (y + rest), (N,) float32."""
    if is_exact(dy):
        return dy.mul(y).sum(-1)
    found = dy.new_empty(dy.shape[0], dtype=torch.float32)
    for i in _cast_pieces(dy):
        values = _cast(y[i], "logits")
        if rest is not None:
            values.add_(_cast(rest[i], "rest"))
        torch.sum(values.mul_(_cast(dy[i], "rest")), 0, out=found[i])
    return found


def _times(tokens: Tensor, factor: Tensor) -> Tensor:
    """bfloat16 tokens (N, C) times float32 factors (N,), lying as they do."""
    found = torch.empty_like(tokens)
    for i in _cast_pieces(tokens):
        found[i] = _cast(tokens[i], "rest").mul_(factor[i]).t()
    return found


def _cast_pieces(tokens: Tensor) -> list[slice]:
    return list(pieces(tokens.shape[0], CAST // max(1, tokens.shape[1])))


def _cast(tokens: Tensor, name: str) -> Tensor:
    """Tokens (N, C) as (C, N) float32, in memory that the next call of the name takes."""
    return Workspace(tokens, torch.float32, name).take(*reversed(tokens.shape)).copy_(tokens.t())


class _Sum:
    """A gradient gathered over tiles: parts of its rows, each a sum of products.

    Args:
        parts: The rows of each part.
        across: Whether sums are gathered as (C, N).
    """

    def __init__(self, parts: list[slice], *, across: bool) -> None:
        self.parts, self.across = parts, across
        self.sums: list[Tensor | None] = [None] * len(parts)

    def add(self, part: int, weights: Tensor, tokens: Tensor) -> None:
        """Add weights (n, m) times tokens (m, C) to a part, in float32."""
        a, b = (tokens.t(), weights) if self.across else (weights, tokens.t())
        total = self.sums[part]
        if total is None:
            self.sums[part] = product(a, b)
        elif is_exact(a):
            self.sums[part] = product_and("add", total, a, b)
        else:
            total = self.sums[part] = total.float()
            made = product(a, b)
            total.add_(Workspace(total, total.dtype, "rest").take(*made.shape).copy_(made))

    def write(self, to: Tensor, factor: float) -> None:
        """Write the sums times ``factor`` to (N, C)."""
        for part, total in zip(self.parts, self.sums, strict=True):
            if total is None:
                to[part] = 0
                continue
            if factor != 1.0:
                total.mul_(factor)
            to[part] = total.t() if self.across else total
