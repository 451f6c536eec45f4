"""Gradients of softmax attention over parts of the map, on oneDNN's products (``products.py``).

Of softmax: ds = p (dp - Σ_j p_j dp_j), and Σ_j p_j dp_j = y · dy. The difference and the factor p are part of
the product that forms dp, and in bfloat16 exponentials of the one that forms logits. Keys are the rows of a
part: what belongs to a query is then a bias of a product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nlsurgery.blocks.affinity_chunks import Workspace, centred, empty_as, pieces
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
#: Values that are cast to float32 at a time.
CAST = 1 << 20


def rows_at_a_time(num_keys: int, tokens: Tensor) -> int:
    """How many rows of the map go together, of all keys, in the dtype of ``tokens``."""
    size = max(1, num_keys * tokens.itemsize)
    exact = is_exact(tokens)
    return max(64, min(FAST_ROWS[exact], MANY_ROWS // size), ROWS[exact] // size)


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
        total: (B, N), each row's logarithm of its sum of exponentials, or of its sum in ``kept``.
        dy: (B, N, V) gradient.
        scale: The factor on the logits.
        kept: The softmax of each batch item as (M, N), each column times a factor; empty to form it again.
    """
    found = empty_as(q, q.shape[1]), empty_as(k, k.shape[1]), empty_as(v, v.shape[1])
    q, k, v, y, dy = (computed(t) for t in (q, k, v, y, dy))
    for b in range(q.shape[0]):
        item = q[b], k[b], v[b], y[b], total[b], dy[b], scale
        if is_exact(v):
            sums, factor = _exact_gradients(*item), 1.0
        else:
            sums, factor = _gradients(*item, kept[b] if kept else None)
        by = scale * factor, scale * factor, factor
        for gradient, gathered, each in zip(found, sums, by, strict=True):
            gathered.write(gradient[b], each)
    return found


_Sums = tuple["_Sum", "_Sum", "_Sum"]


def _exact_gradients(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, total: Tensor, dy: Tensor, scale: float
) -> _Sums:
    """Over tiles, as float32 exponentials are a pass over them."""
    rows = list(pieces(q.shape[0], TILE_QUERIES, EVEN))
    columns = list(pieces(k.shape[0], TILE_KEYS, EVEN))
    # As forward has them: logits that are rounded in another way are further from their total.
    powers, bias = (q * (scale / LOG_2)).contiguous(), total / -LOG_2
    floor = FLOOR / LOG_2 if is_spread(q, k, total, scale) else None
    dot = dy.mul(y).sum(-1).neg_()
    upstream = dy.contiguous()
    dq, dk, dv = _sums(q, dy, rows, columns)
    for m, i in enumerate(rows):
        for n, j in enumerate(columns):
            p = product(k[j], powers[i], bias[i])
            if floor is not None:
                # What is far below would be denormal numbers, which some processors multiply slowly.
                p.clamp_(min=floor)
            p.exp2_()
            dv.add(n, p, dy[i])
            ds = product_and("mul", p, v[j], upstream[i], dot[i])
            dk.add(n, ds, q[i])
            dq.add(m, ds.t(), k[j])
            del p, ds  # before the next take their memory
    return dq, dk, dv


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    total: Tensor,
    dy: Tensor,
    scale: float,
    kept: Tensor | None,
) -> tuple[_Sums, float]:
    """In bfloat16, over rows of all keys; and a factor that is left, as weights are less than 1 by it."""
    if kept is None:
        rows = list(pieces(q.shape[0], rows_at_a_time(k.shape[0], k), EVEN))
        queries, keys = factors(q, k, scale)
        keys, bias, factor = first_factor(keys), -(total + ABOVE_TOTAL * LOG_2), 2.0**ABOVE_TOTAL
        inverse = total.new_full(total.shape, factor)
    else:
        rows, factor, inverse = [slice(0, q.shape[0])], 1.0, total.neg().exp_()
        dy = _times(dy, inverse)
    dot = dy.mul(y).sum(-1).neg_()
    values, k = first_factor(v), centred(k)
    ones = v.new_ones(1, v.shape[0])
    dq, dk, dv = _sums(q, dy, rows, [slice(0, k.shape[0])])
    for m, i in enumerate(rows):
        p = exponentials(keys, queries[i], bias[i]) if kept is None else kept
        dv.add(0, p, dy[i])
        ds = product_and("mul", p, values, dy[i], dot[i])
        # Its sum over keys should be 0, and tells what the rounding of y and of y · dy took.
        excess = torch.mm(ones, ds).mul_(inverse[i])
        ds.addcmul_(p, excess, value=-1.0)
        dk.add(0, ds, q[i])
        dq.add(m, ds.t(), k)
        del p, ds  # before the next take their memory
    return (dq, dk, dv), factor


def _sums(q: Tensor, dy: Tensor, rows: list[slice], columns: list[slice]) -> _Sums:
    dq = _Sum(rows, across=True)
    dk = _Sum(columns, across=q.stride(1) != 1)
    dv = _Sum(columns, across=dy.stride(1) != 1)
    return dq, dk, dv


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
