"""Gradients of softmax attention over chunks of queries whose weights are given, and products into sums."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nlsurgery.blocks.affinity import accumulator
from nlsurgery.blocks.memory_format import transposed

_softmax_backward = torch.ops.aten._softmax_backward_data.out
#: Bytes of logits that one chunk may take: they should stay in the last-level cache.
CHUNK_BYTES = 16 << 20
#: Values of a lower precision that are added to a sum at a time.
ADDED_VALUES = 1 << 20
#: A key channel's mean is subtracted where its square is more than this share of the mean square.
ASIDE = 0.4


def pieces(count: int, size: int, multiple: int = 1) -> Iterator[slice]:
    """Cut ``count`` into pieces of at most ``size``: equal ones, or all but the last a ``multiple``."""
    size = max(1, size)
    step = max(1, -(-count // max(1, -(-count // size))))
    step = min(size, -(-step // multiple) * multiple)
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def chunks(
    batch: int, num_queries: int, num_keys: int, itemsize: int = 4
) -> Iterator[tuple[slice, slice]]:
    """Cut (B, N) into pieces whose logits, of ``itemsize`` bytes, take at most :data:`CHUNK_BYTES`."""
    rows = CHUNK_BYTES // (itemsize * max(1, num_keys))
    for b in pieces(batch, rows // max(1, num_queries)):
        # At least 64 rows: fewer make the products slow.
        for i in pieces(num_queries, max(64, rows)):
            yield b, i


_kept = threading.local()


class Workspace:
    """One piece of memory for the chunks of a call, one after the other.

    On a CPU a thread keeps up to :data:`CHUNK_BYTES` of each name: to get new pages from the system
    for every call takes as long as a chunk's softmax.
    """

    def __init__(self, like: Tensor, dtype: torch.dtype, name: str) -> None:
        self.buffer = like.new_empty(0, dtype=dtype)
        self.name = name

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


def gradients_over_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dy: Tensor,
    weights: Callable[[slice, slice], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, over chunks of queries.

    Args:
        q: (B, N, C') queries.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        scale: The factor on the logits.
        dy: (B, N, V) gradient.
        weights: Gives the softmax rows of a chunk by its batch items and queries.

    Returns:
        The three; sums over chunks in the accumulator's dtype.
    """
    dq = empty_as(q, q.shape[1])
    gathered: Callable[[Tensor], Tensor] = _itself
    if adds_up(q, k):
        gathered = across
        dk, dv = (torch.zeros_like(t, dtype=accumulator(t.dtype)) for t in (k, v))
        gather = add_product
    else:
        dk, dv = (empty_as(t, t.shape[1]) for t in (k, v))
        gather = set_product
    workspace = Workspace(q, q.dtype, "gradients")
    for b, i in chunks(q.shape[0], q.shape[1], k.shape[1], q.itemsize):
        p = weights(b, i)
        gather(dv[b], p.transpose(1, 2), gathered(dy[b, i]), 1.0)
        dp = workspace.take(*p.shape)
        torch.bmm(dy[b, i], v[b].transpose(1, 2), out=dp)
        ds = _softmax_backward(dp, p, -1, q.dtype, grad_input=dp)
        set_product(dq[b, i], ds, k[b], scale)
        gather(dk[b], ds.transpose(1, 2), gathered(q[b, i]), scale)
    return dq, dk, dv


def adds_up(q: Tensor, k: Tensor) -> bool:
    """Whether the gradients of keys and values are sums over chunks."""
    pieces = chunks(q.shape[0], q.shape[1], k.shape[1], q.itemsize)
    return any(i.stop < q.shape[1] for _, i in pieces)


def _itself(tokens: Tensor) -> Tensor:
    return tokens


def along(tokens: Tensor) -> Tensor:
    """(B, N, C) with the channels of a token side by side."""
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()


def across(tokens: Tensor) -> Tensor:
    """(B, N, C) in memory as (B, C, N).

    So torch's CPU products of bfloat16 take half the time where N is large and they sum over it, or
    C is 512 and they sum over that.
    """
    if tokens.stride(1) == 1:
        return tokens.transpose(1, 2).contiguous().transpose(1, 2)
    return transposed(tokens.contiguous()).transpose(1, 2)


def centred(k: Tensor) -> Tensor:
    """Keys (…, M, C') less the mean of those channels whose values lie to one side of 0.

    The gradients of a query's logits sum to 0, but for rounding, which what keys share would multiply.
    """
    count = k.shape[-2]
    # Sums: to find the least and the largest takes six times as long.
    total = k.sum(-2, keepdim=True)
    is_aside = total.square() > ASIDE * count * k.square().sum(-2, keepdim=True)
    return k - torch.where(is_aside, total / count, 0) if bool(is_aside.any()) else k


def balanced(dk: Tensor) -> Tensor:
    """The gradient of keys (…, M, C') in a half precision less its mean over keys, in place.

    It sums to 0, as what all keys share changes no softmax, but for rounding, which what the keys' inputs
    share would multiply in the gradient of their weight. Taken of rounded values: of float32 sums that were
    rounded again it had less effect.
    """
    return dk.sub_(dk.mean(-2, keepdim=True)) if dk.itemsize == 2 else dk


def empty_as(tokens: Tensor, count: int) -> Tensor:
    """(B, count, C) uninitialised, in memory as ``tokens`` lies: tokens or channels first."""
    batch, channels = tokens.shape[0], tokens.shape[2]
    if tokens.stride(1) == 1:
        return tokens.new_empty(batch, channels, count).transpose(1, 2)
    return tokens.new_empty(batch, count, channels)


def like(values: Tensor, tokens: Tensor) -> Tensor:
    """(B, N, C) values in the dtype of ``tokens`` and in memory as they lie."""
    values = values.to(tokens.dtype)
    if values.stride(1) == 1 and tokens.stride(1) != 1:
        return transposed(values.transpose(1, 2))
    return values


def add_product(total: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """Add factor · a b to ``total``, in the precision and memory order of ``total``."""
    total, first, second = _in_order(total, a, b)
    if total.dtype == a.dtype:
        total.baddbmm_(first, second, alpha=factor)
        return
    summand = torch.bmm(first, second)
    # torch casts a whole summand first: here a few rows.
    rows = max(1, ADDED_VALUES * summand.shape[1] // max(1, summand.numel()))
    for part, added in zip(*(torch.split(t, rows, 1) for t in (total, summand)), strict=True):
        part.add_(added, alpha=factor)


def set_product(total: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """Set ``total`` to factor · a b, of matrices or batches of them."""
    total, first, second = _in_order(total, a, b)
    multiply = torch.mm if total.dim() == 2 else torch.bmm
    multiply(first, second, out=total)
    if factor != 1.0:
        total.mul_(factor)


def _in_order(total: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``total``, a and b, or ``total``ᵀ, bᵀ and aᵀ: as ``total`` lies in memory."""
    if total.stride(-2) == 1:
        return total.mT, b.mT, a.mT
    return total, a, b
