"""Softmax attention over rows of the map, on oneDNN's products (``products.py``).

Some queries and all keys are taken at a time. In bfloat16 exponentials are part of the product that forms the
logits, taken of its float32 sums before they are rounded. ``affinity_row_gradients.py`` has the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nlsurgery.blocks.affinity import scaled, softmax_gradients, takes_plain_gradients
from nlsurgery.blocks.affinity_chunks import Workspace, pieces
from nlsurgery.blocks.affinity_row_gradients import divided, row_gradients, rows_at_a_time
from nlsurgery.blocks.products import (
    LOG_2,
    computed,
    exponentials,
    factors,
    first_factor,
    is_exact,
    is_power_of_two,
    product,
    stacked,
)

#: The sizes of the queries' map, and of the keys' map.
Grids = tuple[Sequence[int], Sequence[int]]
#: What is subtracted from a bfloat16 row's logits first: its largest one may lie anywhere from -5 to 52.
SHIFT = 60.0
#: Above this sum of exponentials less the shift they may be off, by a share of as much as the sum.
LARGEST_SUM = math.exp(-8.0)
#: Below this sum weights are lost, as what is less than 1e-38 is 0, or gradients divided by it too large.
SMALLEST_SUM = math.exp(-65.0)
#: The share of rows with another sum above which shifts are told by the largest logits, from there on.
FEW_ROWS = 0.25
#: Weights up to which they are cast for their sum.
CAST = 1 << 19
#: Powers of two up to this one need no shift.
NEAR = 60.0


def row_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    keep: bool = False,
    grids: Grids | None = None,
) -> Tensor:
    """Σ_j softmax_j(scale · q_i · k_j) v_j over rows of the map, without autocast.

    Args:
        q: (B, N, C') queries on a CPU.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        scale: The factor on the logits.
        keep: Whether a bfloat16 map is kept for backward, not formed again.
        grids: Where a query's largest logit is likely that of the key at its place.

    Returns:
        (B, N, V) in the dtype of ``v``.
    """
    has_backward = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    return _Rows.apply(q, k, v, scale, has_backward, keep, grids)  # type: ignore[no-any-return]


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        has_backward: bool,
        keep: bool,
        grids: Grids | None,
    ) -> Tensor:
        kept: list[Tensor] | None = [] if has_backward and keep and not is_exact(v) else None
        y, total = attended(
            q, k, v, scale, kept, whole=keep, has_backward=has_backward, grids=grids
        )
        if has_backward:
            ctx.save_for_backward(q, k, v, y, total, *(kept or ()))
            ctx.scale = scale
        return y.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        q, k, v, y, total, *kept = ctx.saved_tensors
        if takes_plain_gradients(dy):
            return *softmax_gradients(q, k, v, ctx.scale, dy), None, None, None, None
        found = row_gradients(q, k, v, y, total, dy, ctx.scale, kept)
        return *found, None, None, None, None


def attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    kept: list[Tensor] | None = None,
    *,
    whole: bool = False,
    has_backward: bool = True,
    grids: Grids | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to values without a graph.

    Args:
        q: (B, N, C') queries on a CPU.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        scale: The factor on the logits.
        kept: Where the softmax of each batch item is added to, as (M, N), each column times a factor.
        whole: Whether all queries go at a time, as ``kept`` wants it.
        has_backward: Whether the second result is wanted; it is empty otherwise.
        grids: Where a query's largest logit is likely that of the key at its place.

    Returns:
        (B, N, V) in bfloat16 or float32, and (B, N), each row's logarithm of its sum of exponentials, or
        its column's sum in ``kept``.
    """
    q, k, v = (computed(t) for t in (q, k, v))
    y = v.new_empty(q.shape[0], v.shape[2], q.shape[1])
    total = q.new_empty(q.shape[0], q.shape[1] if has_backward else 0, dtype=torch.float32)
    if whole and not has_backward and q.shape[0] > 1 and not is_exact(v):
        together = _items_together(q, k, v, scale, grids)
        if together is not None:
            return together, total
    rows = q.shape[1] if whole else rows_at_a_time(k.shape[1], v)
    is_narrow = True
    for b in range(q.shape[0]):
        item = _Item(q[b], k[b], v[b], scale, grids, is_narrow=is_narrow)
        for i in pieces(q.shape[1], rows):
            weights, sums, shift = item.attend(i, y[b, :, i])
            if kept is not None:
                kept.append(weights.contiguous())
                total[b, i] = sums
            elif has_backward:
                torch.add(sums.log(), shift, out=total[b, i])
            del weights  # before the next take their memory
        is_narrow = item.is_narrow
    return y.transpose(1, 2), total


def _items_together(
    q: Tensor, k: Tensor, v: Tensor, scale: float, grids: Grids | None
) -> Tensor | None:
    """The attended values of bfloat16 items by fewer calls than one after the other takes.

    Args:
        q: (B, N, C') queries on a CPU.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        scale: The factor on the logits.
        grids: Where a query's largest logit is likely that of the key at its place.

    Returns:
        (B, N, V); ``None`` where a row's largest logit is not near that one, or 0, or where a scaled query
        would be rounded.
    """
    if scale != 1.0 and not is_power_of_two(scale):
        return None
    queries = scaled(q, scale)
    below = queries.new_full(q.shape[:2], -SHIFT, dtype=torch.float32)
    sums, values = torch.empty_like(below), []
    for b in range(q.shape[0]):
        if grids is not None:
            below[b].sub_(logits_at_places(queries[b], k[b], grids))
        p = exponentials(first_factor(k[b]), queries[b], below[b])
        sums[b] = _sums(p)
        if b == 0 and not _are_exact(sums[0]):
            return None
        values.append(product(v[b].t(), p.t()))
    if not _are_exact(sums):
        return None
    y = stacked(values)
    return divided(y, sums.unsqueeze(1), y).transpose(1, 2)


def _are_exact(sums: Tensor) -> bool:
    """Whether exponentials of such sums, less the shift, are neither off nor lost."""
    smallest, largest = (float(bound) for bound in torch.aminmax(sums))
    return smallest >= SMALLEST_SUM and largest <= LARGEST_SUM


class _Item:
    """The queries, keys and values of one batch item.

    Args:
        q: (N, C') queries, bfloat16 or float32.
        k: (M, C') keys.
        v: (M, V) values.
        scale: The factor on the logits.
        grids: Where a query's largest logit is likely that of the key at its place.
        is_narrow: Whether most bfloat16 rows are thought to have their largest logit not far from that one,
            or from 0.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        grids: Grids | None,
        *,
        is_narrow: bool,
    ) -> None:
        self.q, self.k, self.values, self.scale = q, k, v.t(), scale
        self.is_narrow, self.is_exact = is_narrow, is_exact(v)
        if not self.is_exact:
            self.queries, keys = factors(q, k, scale)
            self.keys = first_factor(keys)
            self.shift = self.queries.new_full(q.shape[:1], SHIFT, dtype=torch.float32)
            if grids is not None and is_narrow:
                self.shift.add_(logits_at_places(q, k, grids), alpha=scale)

    def attend(self, i: slice, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attend to the values.

        Args:
            i: Which queries.
            y: (V, rows), for the result.

        Returns:
            (M, rows), the softmax, each column times a factor; (rows,), that factor; (rows,) the logarithm
            to add to that of the factor for the logarithm of the sum of exponentials.
        """
        p, sums, shift = self._passes(self.q[i]) if self.is_exact else self._in_product(i)
        values = product(self.values, p.t())
        if self.is_exact:
            torch.div(values, sums, out=y)
        else:
            divided(values, sums, y)
        return p, sums, shift

    def _in_product(self, i: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Exponentials as part of the product; what :meth:`attend` returns."""
        queries = self.queries[i]
        shift = self.shift[i] if self.is_narrow else self._above_peak(queries)
        # Keys come first: what is subtracted from a query's logits is a bias of its column.
        p = exponentials(self.keys, queries, -shift)
        sums = _sums(p)
        if _are_exact(sums):
            return p, sums, shift
        rows = (~((sums >= SMALLEST_SUM) & (sums <= LARGEST_SUM))).nonzero().squeeze(1)
        if self.is_narrow and rows.shape[0] > FEW_ROWS * sums.shape[0]:
            self.is_narrow = False
            return self._in_product(i)
        for part, formed in zip((p, sums, shift), self._passes(self.q[i][rows]), strict=True):
            part.index_copy_(-1, rows, formed)
        return p, sums, shift

    def _above_peak(self, queries: Tensor) -> Tensor:
        """(rows,), a shift above each row's largest logit, which is told by rounded ones."""
        peak = product(self.keys, queries).amax(0).float()
        rounding = peak.abs().mul_(2**-7)
        return peak.add_(rounding).add_(math.log(self.k.shape[0]) - math.log(LARGEST_SUM))

    def _passes(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exponentials of any logits, by passes over them; what :meth:`attend` returns."""
        p = product(q.float() * (self.scale / LOG_2), self.k.float())
        shift = to_powers(p)
        weights = p.to(q.dtype)
        if not self.is_exact:
            # The sum is of what is multiplied.
            p.copy_(weights)
        return weights.t(), p.sum(-1), shift.squeeze(1).mul_(LOG_2)


def logits_at_places(q: Tensor, k: Tensor, grids: Grids) -> Tensor:
    """The rounded logit of each query with the key at its place, or with the one its place is pooled into.

    Args:
        q: (N, C') queries, bfloat16.
        k: (M, C') keys.
        grids: The sizes of the queries' map, and of the keys' map.

    Returns:
        (N,), bfloat16.
    """
    if q.shape[0] == k.shape[0]:
        return (q * k).sum(1)
    spatial, key_sizes = grids
    is_first = k.stride(0) == 1
    spread = k.t().view(-1, *key_sizes) if is_first else k.view(*key_sizes, -1)
    for dim in reversed(range(len(spatial))):
        spread = _spread(spread, dim + is_first, spatial[dim])
    return (q * (spread.flatten(1).t() if is_first else spread.flatten(0, -2))).sum(1)


def _spread(x: Tensor, dim: int, size: int) -> Tensor:
    """As many of a bfloat16 dimension as before it was pooled; what was left over gets the last value."""
    count = x.shape[dim]
    step, rest = divmod(size, count)
    if step == 2 and dim == x.dim() - 1 and x.is_contiguous():
        # Two halves of a 32-bit number: to copy value by value takes four times as long.
        x = x.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF).mul_(0x10001).view(x.dtype)
    elif step > 1:
        shape = *x.shape[: dim + 1], step, *x.shape[dim + 1 :]
        x = x.unsqueeze(dim + 1).expand(shape).flatten(dim, dim + 1)
    if rest:
        last = x.narrow(dim, x.shape[dim] - 1, 1)
        x = torch.cat([x, *[last] * rest], dim)
    return x


def to_powers(logits: Tensor) -> Tensor:
    """Replace logits to base 2, (…, N, M), by their exponentials less a shift (…, N, 1), which is returned.

    Powers of two take a quarter of the time of MKL's exponentials.
    """
    peak = logits.amax(-1, keepdim=True)
    if bool(peak.abs().max() <= NEAR):
        peak.zero_()
    else:
        logits.sub_(peak)
    logits.exp2_()
    return peak


def _sums(p: Tensor) -> Tensor:
    """The sums over keys of bfloat16 (M, rows), (rows,) float32."""
    if p.numel() <= CAST:
        # Copied by hand: a sum would take new memory for the copy.
        return Workspace(p, torch.float32, "logits").take(*p.shape).copy_(p).sum(0)
    # By products: a sum would first cast the whole of it.
    ones = p.new_ones(1, p.shape[0])
    rounded = torch.mm(ones, p)
    rest = torch.addmm(rounded, ones, p, beta=-1.0)
    return rounded.float().add_(rest).squeeze(0)
