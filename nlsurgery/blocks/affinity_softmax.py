"""Softmax attention that keeps no N×M tensor, forward or backward.

Two forms beside the explicit one: torch's fused attention, and chunks of queries whose softmax is
computed again in backward (only q, k and v are saved). Logits are formed in float32 for half
inputs in all of them: unscaled logits in bfloat16 are off by up to 0.1.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nlsurgery.blocks.affinity import (
    accumulator,
    apply_map,
    differentiable_gradients,
    softmax_map,
    without_autocast,
)
from nlsurgery.blocks.geometry import is_recorded

_softmax_backward = torch.ops.aten._softmax_backward_data.out
#: Bytes of logits that one chunk may take: they should stay in the last-level cache.
CHUNK_BYTES = 16 << 20
#: What rows of fused attention begin on a multiple of, by device; on others 8, 16 bytes of half precision.
ALIGNED = {"cpu": 1, "meta": 1}
#: Bytes of a bfloat16 map that is kept for backward on a CPU though its projections are smaller.
KEPT_BYTES = 4 << 20
#: Beyond this size (times a share by the row's largest weight), rounding a logit to bfloat16
#: shows in the result; and what a guess may leave of a row's largest logit.
ROUNDED_LOGIT, LEFT_LOGIT = 3.0, 4.0
#: The logarithms of a row's sum of exponentials between which no row leaves so much: its share is
#: at most 0.781, where the largest weight is 0.61.
LEFT_TOTAL = (-4.6, 5.6)
#: Up to so many multiplications, a float32 product takes less time than what rounding asks for.
FEW_PRODUCTS = 50_000_000
#: How many rows of a map are looked at first, and how many rows and keys a map has at least for that.
FEW_ROWS = 32
MANY = 128


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


def fused_attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Σ_j softmax_j(scale · q_i · k_j) v_j by torch's fused attention, without autocast.

    Args:
        q: (B, heads, N, C') queries.
        k: (B, heads, M, C') keys.
        v: (B, heads, M, V) values.
        scale: The factor on the logits.

    Returns:
        (B, heads, N, V).
    """
    query, key, value = _fusable(q), _fusable(k), _fusable(v)
    y = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return y if value.shape[3] == v.shape[3] else y[..., : v.shape[3]]


def _fusable(tokens: Tensor) -> Tensor:
    """(B, heads, N, C') as torch's fused attention takes it: of others it silently forms the N×M tensor.

    Channels have to be contiguous, and off the CPU each row has to begin on a multiple of 16 bytes:
    channels are padded with zeros to a multiple of :data:`ALIGNED`, which adds nothing to a logit and
    channels of zeros to the result (torch, ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``).
    """
    multiple = ALIGNED.get(tokens.device.type, 8)
    missing = -tokens.shape[3] % multiple
    if missing:
        return F.pad(tokens, (0, missing)).contiguous()
    if torch.compiler.is_compiling():
        return tokens
    rows = zip(tokens.stride()[:3], tokens.shape[:3], strict=True)
    places = (tokens.storage_offset(), *(step for step, size in rows if size > 1))
    if tokens.stride(3) == 1 and not any(place % multiple for place in places):
        return tokens
    return tokens.clone(memory_format=torch.contiguous_format)


def fits(num_keys: int, value_size: int) -> bool:
    """Whether an N×M tensor may be kept: no larger than the four projections, and in the cache."""
    return num_keys <= min(1024, 4 * value_size)


def _is_kept(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether backward finds the N×M tensor rather than form it again."""
    if fits(k.shape[1], v.shape[2]):
        return True
    num_bytes = q.shape[0] * q.shape[1] * k.shape[1] * v.itemsize
    return _is_low(q) and num_bytes <= KEPT_BYTES


def _is_low(q: Tensor) -> bool:
    """Whether no product of this dtype and device gives its result in float32."""
    return q.dtype == torch.bfloat16 and q.device.type == "cpu"


def chunks(
    batch: int, num_queries: int, num_keys: int, itemsize: int = 4
) -> Iterator[tuple[slice, slice]]:
    """Cut (B, N) into pieces whose logits, of ``itemsize`` bytes, take at most :data:`CHUNK_BYTES`."""
    rows = max(1, CHUNK_BYTES // (itemsize * max(1, num_keys)))
    together = max(1, rows // max(1, num_queries))
    # Equal pieces of at least 64 rows: fewer make the products slow.
    pieces = -(-num_queries // max(64, min(rows, num_queries)))
    step = max(1, -(-num_queries // max(1, pieces)))
    for first in range(0, batch, together):
        for row in range(0, num_queries, step):
            yield slice(first, first + together), slice(row, min(row + step, num_queries))


_kept = threading.local()


class _Workspace:
    """One piece of memory for the chunks of a call, one after the other.

    On a CPU a thread keeps up to :data:`CHUNK_BYTES` of each name: to get new pages from the system
    for every call takes as long as a chunk's softmax.
    """

    def __init__(self, like: Tensor, dtype: torch.dtype, name: str) -> None:
        self.buffer = like.new_empty(0, dtype=dtype)
        self.name = name

    def converted(self, values: Tensor) -> Tensor:
        """``values`` in the dtype of this memory: themselves, or a copy in it."""
        if values.dtype == self.buffer.dtype:
            return values
        return self.take(*values.shape).copy_(values)

    def take(self, *shape: int) -> Tensor:
        """An uninitialised tensor over it."""
        size = math.prod(shape)
        if self.buffer.numel() < size:
            self.buffer = self._memory(size)
        return self.buffer[:size].view(shape)

    def _memory(self, size: int) -> Tensor:
        num_bytes = size * self.buffer.itemsize
        plain = type(self.buffer) is Tensor and self.buffer.device.type == "cpu"
        if not plain or num_bytes > CHUNK_BYTES:
            return self.buffer.new_empty(size)
        kept: Tensor | None = getattr(_kept, self.name, None)
        if kept is None or kept.numel() < num_bytes:
            with torch.inference_mode(False):
                kept = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
            setattr(_kept, self.name, kept)
        return kept[:num_bytes].view(self.buffer.dtype)


class _Logits:
    """Forms softmax rows for one call: which products, in which precision.

    In bfloat16 on a CPU a float32 product takes more than twice as long, and no product of
    bfloat16 gives float32. For all but small maps the product runs there in bfloat16, and where a
    row's largest logit m is so large that rounding it matters, with -m in the accumulator: the
    logits that weigh are then near 0, where bfloat16 is fine enough. A few rows give a guess of all
    m; rows that it misses are done again.
    """

    def __init__(self, q: Tensor, k: Tensor, scale: float, *, keep: bool = False) -> None:
        low = _is_low(q)
        self.rounded = low and q.numel() * k.shape[1] > FEW_PRODUCTS
        self.dtype = q.dtype if self.rounded else accumulator(q.dtype)
        #: The dtype of all other products.
        self.factor_dtype = q.dtype if low else self.dtype
        self.scale = scale
        self.q, self.k = (q, k) if self.rounded else (q.to(self.dtype), k.to(self.dtype))
        self.workspace = None if keep else _Workspace(q, self.dtype, "logits")

    def again(self, b: slice, i: slice, shift: Tensor | None) -> Tensor:
        """Probabilities of queries ``i`` of batch items ``b`` by the shift :meth:`rows` gave."""
        queries, keys = self._factors(b, i)
        return self._softmax(self._product(queries, keys, shift))

    def rows(self, b: slice, i: slice, guess: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Probabilities of queries ``i`` of batch items ``b``, and their shift if there is one.

        Unless they are to be kept, they lie in a workspace, and hold until the next call.

        Args:
            b: Batch items.
            i: Queries.
            guess: What :meth:`guess` gave.
        """
        queries, keys = self._factors(b, i)
        if guess is not None:
            return self._shifted(queries, keys, guess[b, i])
        logits = self._product(queries, keys, None)
        if not self.rounded or self._largest(logits) <= ROUNDED_LOGIT:
            return self._softmax(logits), None
        top = logits.amax(-1, keepdim=True)
        p = self._softmax(logits)
        largest = p.amax(-1, keepdim=True).float()
        if not self._matters(top * abs(self.scale), largest, ROUNDED_LOGIT).any():
            return p, None
        return self._softmax(self._product(queries, keys, top)), top

    def guess(self) -> Tensor | None:
        """For each row a logit near those that weigh, (B, N, 1).

        Over keys of mean k̄ that spread alike in all directions, such a logit of q is q·k̄ + c|q|; a
        few whole rows, each with the mean of its logits by the squares of their weights, tell c.
        ``None`` for small maps, and where the rows say that rounding does not show.
        """
        every = self.q.shape[1] // FEW_ROWS
        if not self.rounded or min(self.q.shape[1], self.k.shape[1]) < MANY:
            return None
        logits = torch.bmm(self.q[:, ::every], self.k.transpose(1, 2))
        if self._largest(logits.amax(-1)) <= ROUNDED_LOGIT:
            return None
        weights = torch.softmax(logits * (2 * self.scale), -1)
        centre = (weights * logits).sum(-1, keepdim=True)
        mean = (self.q * self.k.mean(1, keepdim=True)).sum(-1, keepdim=True)
        length = (self.q * self.q).sum(-1, keepdim=True).sqrt_()
        ratio = (centre - mean[:, ::every]) / length[:, ::every]
        return mean.addcmul_(length, ratio.nanmedian(1, keepdim=True).values.nan_to_num_(0.0))

    def _shifted(self, queries: Tensor, keys: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Rows by a guessed shift; those whose largest logit it misses by too much once more."""
        logits = self._product(queries, keys, shift)
        first = logits[..., 0].float() * self.scale
        p = self._softmax(logits)
        # A row's largest logit is the logarithm of its sum plus that of its largest weight.
        total = first - p[..., 0].float().log_()
        rows = ((total < LEFT_TOTAL[1]) & (total > LEFT_TOTAL[0])).logical_not_()
        item, row = rows.nonzero(as_tuple=True)
        if not row.numel():
            return p, shift
        largest, key = p[item, row].max(-1)
        exact = (queries[item, row].float() * keys[item, :, key]).sum(-1)
        left = (exact - shift[item, row, 0]) * self.scale
        missed = self._matters(left, largest.float(), LEFT_LOGIT)
        if not missed.any():
            return p, shift
        item, row = item[missed], row[missed]
        shift = shift.clone()
        shift[item, row, 0] = exact[missed].to(shift.dtype)
        if 2 * row.numel() > rows.numel():
            return self._softmax(self._product(queries, keys, shift)), shift
        for one in sorted(set(item.tolist())):
            again = row[item == one]
            logits = torch.baddbmm(
                -shift[one, again][None], queries[one, again][None], keys[one][None]
            )
            p[one, again] = self._softmax(logits)[0]
        return p, shift

    def _factors(self, b: slice, i: slice) -> tuple[Tensor, Tensor]:
        return self.q[b, i], self.k[b].transpose(1, 2)

    def _product(self, queries: Tensor, keys: Tensor, shift: Tensor | None) -> Tensor:
        size = (queries.shape[0], queries.shape[1], keys.shape[2])
        out = self.workspace.take(*size) if self.workspace else None
        if shift is None:
            return torch.bmm(queries, keys, out=out)
        return torch.baddbmm(-shift, queries, keys, out=out)

    def _largest(self, logits: Tensor) -> float:
        if not logits.numel():
            return 0.0
        low, high = logits.aminmax()
        return abs(self.scale) * max(-low.item(), high.item())

    @staticmethod
    def _matters(top: Tensor, largest: Tensor, bound: float) -> Tensor:
        """Where rounding shows: it grows with a logit, and averages out over keys of like weight.

        A row that is nearly one key's alone hardly changes with that key's logit either.

        Args:
            top: The rows' largest logits.
            largest: Their largest weights.
            bound: How large a logit may be in a row whose weight is one key's as much as others'.

        Returns:
            bool, False wherever ``top`` is at most ``bound``.
        """
        share = torch.minimum(largest.sqrt(), 2 * (1 - largest))
        return top.abs() * share > bound

    def _softmax(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return torch.softmax(logits, dim=-1, out=logits)


class _Chunked(torch.autograd.Function):
    """Attention over chunks of queries; backward forms each chunk's softmax again.

    Where all the rows together are no larger than the projections, or small, they are kept instead.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keep = any(ctx.needs_input_grad[:3]) and _is_kept(q, k, v)
        logits = _Logits(q, k, scale, keep=keep)
        y = empty_as(v, q.shape[1])
        halves = _Workspace(q, v.dtype, "weights")
        guess = logits.guess()
        kept: list[Tensor] = []
        ctx.shifts = []
        for b, i in chunks(q.shape[0], q.shape[1], k.shape[1], logits.dtype.itemsize):
            p, shift = logits.rows(b, i, guess)
            weights = p.to(v.dtype) if keep else halves.converted(p)
            ctx.shifts.append(shift)
            if keep:
                kept.append(weights)
            y[b, i] = apply_map(weights, v[b])
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        q, k, v, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            y = apply_map(softmax_map(q, k, ctx.scale), v)
            return *differentiable_gradients(y, (q, k, v), dy), None
        logits = _Logits(q, k, ctx.scale)
        dtype = logits.factor_dtype
        keys, values = k.to(dtype), v.to(dtype)
        dq = empty_as(q, q.shape[1])
        dk, dv = (empty_as(t, t.shape[1], accumulator(dtype)).zero_() for t in (k, v))
        workspace = _Workspace(q, dtype, "gradients")
        halves = _Workspace(q, dtype, "weights")
        pieces = chunks(q.shape[0], q.shape[1], k.shape[1], logits.dtype.itemsize)
        for index, (b, i) in enumerate(pieces):
            queries, grad = q[b, i].to(dtype), dy[b, i].to(dtype)
            p = kept[index] if kept else logits.again(b, i, ctx.shifts[index])
            p = halves.converted(p)
            _add_product(dv[b], p, grad, 1.0)
            dp = workspace.take(*p.shape)
            torch.bmm(grad, values[b].transpose(1, 2), out=dp)
            ds = _softmax_backward(dp, p, -1, dtype, grad_input=dp)
            dq[b, i] = apply_map(ds, keys[b]).mul_(ctx.scale)
            _add_product(dk[b], ds, queries, ctx.scale)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def empty_as(tokens: Tensor, count: int, dtype: torch.dtype | None = None) -> Tensor:
    """(B, count, C) uninitialised, in memory as ``tokens`` lies: tokens or channels first."""
    batch, channels = tokens.shape[0], tokens.shape[2]
    if tokens.stride(1) == 1:
        return tokens.new_empty(batch, channels, count, dtype=dtype).transpose(1, 2)
    return tokens.new_empty(batch, count, channels, dtype=dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """Add factor · aᵀb to ``total``, in the precision and memory order of ``total``."""
    first, second = a.transpose(1, 2), b
    if total.stride(1) == 1:
        total, first, second = total.transpose(1, 2), b.transpose(1, 2), a
    if total.dtype == a.dtype:
        total.baddbmm_(first, second, alpha=factor)
    else:
        total.add_(torch.bmm(first, second), alpha=factor)
