"""Gradients of softmax attention over parts of the map, on oneDNN's products (``products.py``).

Of softmax: ds = p (dp - Σ_j p_j dp_j), and Σ_j p_j dp_j = y · dy. The difference and the factor p are part of
the product that forms dp, and in bfloat16 exponentials of the one that forms logits. Keys are the rows of a
part: what belongs to a query is then a bias of a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nlsurgery.blocks.affinity_chunks import (
    Workspace,
    balanced,
    centred,
    empty_as,
    pieces,
    set_product,
)
from nlsurgery.blocks.affinity_fused import is_spread
from nlsurgery.blocks.affinity_tiles import EVEN, FLOOR
from nlsurgery.blocks.products import (
    LOG_2,
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
#: Bytes of weights formed at a time, by whether they are float32, and up to how many where those are fewer
#: rows than products are fast with.
ROWS, MANY_ROWS = {True: 4 << 20, False: 3 << 20}, 16 << 20
FAST_ROWS = {True: 256, False: 512}
#: Queries and keys of a float32 tile (2 MB): larger ones are no faster, and take memory.
TILE_QUERIES, TILE_KEYS = 1 << 10, 1 << 9


def rows_at_a_time(num_keys: int, tokens: Tensor) -> int:
    """How many rows of the map go together, of all keys, in the dtype of ``tokens``."""
    size = max(1, num_keys * tokens.itemsize)
    exact = is_exact(tokens)
    return max(64, min(FAST_ROWS[exact], MANY_ROWS // size), ROWS[exact] // size)


class _Item(NamedTuple):
    """What the gradients of one item of a batch are made from."""

    #: (N, C') queries.
    q: Tensor
    #: (M, C') keys.
    k: Tensor
    #: (M, V) values.
    v: Tensor
    #: (N, V), the attended values.
    y: Tensor
    #: (N,), each row's logarithm of its sum of exponentials, or its column's sum in a kept map.
    total: Tensor
    #: (N, V) gradient.
    dy: Tensor
    #: The factor on the logits.
    scale: float


def row_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    total: Tensor,
    dy: Tensor,
    scale: float,
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v.

    Args:
        q: (B, N, C') queries.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        y: (B, N, V), the attended values.
        total: (B, N), each row's logarithm of its sum of exponentials, or its column's sum in ``kept``.
        dy: (B, N, V) gradient.
        scale: The factor on the logits.
        kept: The softmax of each batch item as (M, N), each column times a factor; empty to form it again.
    """
    dq, like = empty_as(q, q.shape[1]), (k, v)
    found: list[Tensor] = []
    if kept:
        found = [empty_as(t, t.shape[1]) for t in like]
    q, k, v, y, dy = (computed(t) for t in (q, k, v, y, dy))
    for b in range(q.shape[0]):
        item = _Item(q[b], k[b], v[b], y[b], total[b], dy[b], scale)
        if kept:
            _kept_gradients(item, kept[b], dq[b], found[0][b], found[1][b])
            continue
        dk, dv, unit = (_exact_gradients if is_exact(v) else _gradients)(item, dq[b])
        for n, (gathered, factor) in enumerate(((dk, scale * unit), (dv, unit))):
            if b == 0:
                # Not before: until then the sums of an item and its map take the memory.
                found.append(empty_as(like[n], like[n].shape[1]))
            gathered.write(found[n][b], factor)
    key_gradient, value_gradient = found or (torch.zeros_like(tokens) for tokens in like)
    return dq, balanced(key_gradient), value_gradient


def _exact_gradients(item: _Item, to: Tensor) -> tuple[_Sum, _Sum, float]:
    """Over tiles, as float32 exponentials are a pass over them.

    Args:
        item: Of float32.
        to: (N, C'), where the gradient of the queries is written.

    Returns:
        The sums of the gradients of keys and values, and what both are to be multiplied with.
    """
    q, k, v, y, total, dy, scale = item
    columns = list(pieces(k.shape[0], TILE_KEYS, EVEN))
    floor = FLOOR / LOG_2 if is_spread(q, k, total, scale) else None
    bias, dot = total / -LOG_2, dy.mul(y).sum(-1).neg_()
    dk, dv = _key_sums(q, dy, columns)
    for i in pieces(q.shape[0], TILE_QUERIES, EVEN):
        # As forward has them: logits that are rounded in another way are further from their total.
        powers, upstream = (q[i] * (scale / LOG_2)).contiguous(), dy[i].contiguous()
        dq = _Sum([i], across=True)
        for n, j in enumerate(columns):
            p = product(k[j], powers, bias[i])
            if floor is not None:
                # What is far below would be denormal numbers, which some processors multiply slowly.
                p.clamp_(min=floor)
            p.exp2_()
            dv.add(n, p, dy[i])
            ds = product_and("mul", p, v[j], upstream, dot[i])
            dk.add(n, ds, q[i])
            dq.add(0, ds.t(), k[j])
            del p, ds  # before the next take their memory
        dq.write(to, scale)
    return dk, dv, 1.0


def _gradients(item: _Item, to: Tensor) -> tuple[_Sum, _Sum, float]:
    """In bfloat16, over rows of all keys; arguments and result are those of :func:`_exact_gradients`."""
    q, k, v, y, total, dy, scale = item
    rows = list(pieces(q.shape[0], rows_at_a_time(k.shape[0], k), EVEN))
    queries, keys = factors(q, k, scale)
    keys, bias, unit = first_factor(keys), -(total + ABOVE_TOTAL * LOG_2), 2.0**ABOVE_TOTAL
    inverse, dot = total.new_full(total.shape, unit), dy.mul(y).sum(-1).neg_()
    values, k = first_factor(v), centred(k)
    ones = v.new_ones(1, v.shape[0])
    dk, dv = _key_sums(q, dy, [slice(0, k.shape[0])])
    for i in rows:
        p = exponentials(keys, queries[i], bias[i])
        dv.add(0, p, dy[i])
        ds = _logit_gradients(p, values, dy[i], dot[i], ones, inverse[i])
        dk.add(0, ds, q[i])
        dq = _Sum([i], across=True)
        dq.add(0, ds.t(), k)
        del p, ds  # before the next take their memory
        dq.write(to, scale * unit)
    return dk, dv, unit


def _kept_gradients(item: _Item, p: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """In bfloat16, of a map that was kept.

    Args:
        item: Its ``total`` is the sum of each column of ``p``.
        p: (M, N), the softmax, each column times a factor.
        dq: (N, C'), where the gradient of the queries is written.
        dk: (M, C'), likewise.
        dv: (M, V), likewise.
    """
    q, k, v, y, total, dy, scale = item
    dy = divided(dy.t(), total, torch.empty_like(dy).t()).t()
    dot, ones = dy.mul(y).sum(-1).neg_(), v.new_ones(1, v.shape[0])
    set_product(dv, p, dy, 1.0)
    ds = _logit_gradients(p, first_factor(v), dy, dot, ones, total.reciprocal())
    set_product(dk, ds, q, scale)
    set_product(dq, ds.t(), centred(k), scale)


def _logit_gradients(
    p: Tensor, v: Tensor, dy: Tensor, dot: Tensor, ones: Tensor, inverse: Tensor
) -> Tensor:
    """ds = p (dp - Σ p dp) as (M, rows).

    Args:
        p: (M, rows), the softmax, each column times a factor.
        v: (M, V) values.
        dy: (rows, V) gradient.
        dot: (rows,) -Σ p dp.
        ones: (1, M).
        inverse: (rows,), the inverse of the sum of each column of ``p``.
    """
    ds = product_and("mul", p, v, dy, dot)
    # Its sum over keys should be 0, and tells what the rounding of y and of y · dy took.
    excess = torch.mm(ones, ds).mul_(inverse)
    return ds.addcmul_(p, excess, value=-1.0)


def _key_sums(q: Tensor, dy: Tensor, columns: list[slice]) -> tuple[_Sum, _Sum]:
    return _Sum(columns, across=q.stride(1) != 1), _Sum(columns, across=dy.stride(1) != 1)


def divided(values: Tensor, by: Tensor, out: Tensor) -> Tensor:
    """bfloat16 values by float32 ones that broadcast to them, divided before they are rounded: ``out``."""
    exact = Workspace(by, by.dtype, "rest").take(*values.shape).copy_(values)
    return out.copy_(exact.div_(by))


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
        """Write the sums times ``factor`` to (N, C), and give their memory back."""
        for n, part in enumerate(self.parts):
            total, self.sums[n] = self.sums[n], None
            if total is None:
                to[part] = 0
                continue
            if factor != 1.0:
                total.mul_(factor)
            to[part] = total.t() if self.across else total
