"""The concatenation mode in O(N log N + N·C'): sort once, then suffix sums.

f_ij = ReLU(w·[θ_i ; φ_j]) = ReLU(a_i + b_j) with scalars a_i = w_θ·θ_i and b_j = w_φ·φ_j. With
the keys in descending order of b, the ones active for query i are the first n_i, so that
Σ_j ReLU(a_i + b_j) v_j = a_i·P_v[n_i] + P_bv[n_i], with P the running sums. Backward is the same
sum with the roles swapped (dv) and two of its parts (da, db).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nlsurgery.blocks.affinity import (
    accumulator,
    apply_map,
    plain_gradients,
    takes_plain_gradients,
    without_autocast,
)
from nlsurgery.blocks.geometry import takes_plain_operators

#: Bytes of running sums held at a time: they should stay in the last-level cache.
BLOCK_BYTES = 2 << 20
#: Keys summed by one product with a triangular matrix.
KEY_BLOCK = 64


def concatenation_attend(a: Tensor, b: Tensor, v: Tensor, form: str) -> Tensor:
    """1/M Σ_j ReLU(a_i + b_j) v_j.

    Args:
        a: (B, N) the queries' part of the logits.
        b: (B, M) the keys' part.
        v: (B, M, V).
        form: ``explicit`` or ``sorted``.

    Returns:
        (B, N, V) in the dtype of ``v``.
    """
    with without_autocast(v):
        dtype = accumulator(v.dtype)
        a, b = a.to(dtype), b.to(dtype)
        if form == "explicit" or takes_plain_operators():
            weights = scalar_sum_map(a.unsqueeze(2), b.unsqueeze(2))
            if v.dtype == torch.bfloat16:
                # Its range is float32's, and a rounded weight is off by no more than a rounded value.
                weights = weights.to(v.dtype)
            return apply_map(weights, v)
        if torch.compiler.is_compiling():
            return _sorted_sums(a, b, v)
        return _Sorted.apply(a, b, v)  # type: ignore[no-any-return]


@torch.fx.wrap
def scalar_sum_map(a: Tensor, b: Tensor) -> Tensor:
    """ReLU(a_i + b_j) / M of (B, N, 1) and (B, M, 1): (B, N, M), float32 for half inputs."""
    divisor = max(1, b.shape[1])
    a, b = (t.to(accumulator(t.dtype)) / divisor for t in (a, b))
    return torch.relu_(a + b.transpose(1, 2))


def running_sums(v: Tensor) -> Tensor:
    """Sums of the first n rows, for n = 0…M.

    Off the CPU by products with triangular matrices: CUDA's cumsum is not deterministic.

    Args:
        v: (B, M, V).

    Returns:
        (B, at least M + 1, V); row n is the sum of the first n rows of ``v``.
    """
    if v.device.type == "cpu":
        return torch.nn.functional.pad(v, (0, 0, 1, 0)).cumsum(1)
    return _triangular_sums(v)


def _triangular_sums(v: Tensor) -> Tensor:
    batch, length, width = v.shape
    num_blocks = length // KEY_BLOCK + 1
    padding = num_blocks * KEY_BLOCK - length - 1
    padded = torch.nn.functional.pad(v, (0, 0, 1, padding)).view(-1, KEY_BLOCK, width)
    within = torch.matmul(v.new_ones(KEY_BLOCK, KEY_BLOCK).tril(), padded)
    within = within.view(batch, num_blocks, KEY_BLOCK, width)
    before = v.new_ones(num_blocks, num_blocks).tril(-1)
    offsets = torch.matmul(before, within[:, :, -1])
    return (within + offsets.unsqueeze(2)).view(batch, -1, width)


def _active(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys in descending order of b: the order, b in it, and how many are active per query."""
    negative, order = torch.sort(-b, dim=1, stable=True)
    # a_i + b_j > 0 exactly where -b_j < a_i, in floating point too.
    return order, -negative, torch.searchsorted(negative, a.contiguous())


def _channels(v: Tensor) -> Iterator[slice]:
    step = BLOCK_BYTES // (4 * max(1, v.shape[0] * v.shape[1]))
    # On an accelerator, fewer and larger kernels win over cache.
    step = max(16, step) if v.device.type == "cpu" else v.shape[2]
    for first in range(0, v.shape[2], step):
        yield slice(first, first + step)


def _gathered(v: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, K) of ``v`` (B, M, V): (B, K, V)."""
    first = torch.arange(v.shape[0], device=v.device).unsqueeze(1) * v.shape[1]
    rows = v.flatten(0, 1).index_select(0, (index + first).flatten())
    return rows.view(*index.shape, v.shape[2])


def _sorted_sums(a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """The forward sum as plain differentiable operations."""
    order, descending, count = _active(a, b)
    ordered = _gathered(v.to(a.dtype), order)
    sums = _gathered(running_sums(ordered), count)
    weighted = _gathered(running_sums(ordered * descending.unsqueeze(2)), count)
    y = torch.addcmul(weighted, sums, a.unsqueeze(2)) / max(1, b.shape[1])
    return y.to(v.dtype)


def _relu_sums(
    a: Tensor, b: Tensor, v: Tensor, divisor: int, plain: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Σ_j ReLU(a_i + b_j) v_j / divisor, and with ``plain`` Σ_j [a_i + b_j > 0] v_j · plain_i.

    Args:
        a: (B, N).
        b: (B, M).
        v: (B, M, V).
        divisor: What both sums are divided by.
        plain: (B, N, V).

    Returns:
        (B, N, V) in the dtype of ``v``, and (B, N) or ``None``.
    """
    order, descending, count = _active(a, b)
    v = v.contiguous()
    y = v.new_empty(*a.shape, v.shape[2])
    dots = None if plain is None else torch.zeros_like(a)
    for channels in _channels(v):
        ordered = _gathered(v[:, :, channels].to(a.dtype), order)
        sums = _gathered(running_sums(ordered), count)
        if plain is not None and dots is not None:
            dots += (sums * plain[:, :, channels]).sum(2)
        weighted = _gathered(running_sums(ordered.mul_(descending.unsqueeze(2))), count)
        y[:, :, channels] = weighted.addcmul_(sums, a.unsqueeze(2)).div_(divisor)
    return y, None if dots is None else dots.div_(divisor)


class _Sorted(torch.autograd.Function):
    """The sorted sum with its own backward: nothing of size N·M, forward or backward."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, v)
        return _relu_sums(a, b, v, max(1, b.shape[1]))[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        a, b, v = ctx.saved_tensors
        if takes_plain_gradients(dy):
            return plain_gradients(lambda: [_sorted_sums(a, b, v)], (a, b, v), [dy])
        divisor = max(1, b.shape[1])
        dv, db = _relu_sums(b, a, dy, divisor, plain=v)
        da = _relu_sums(a, b, v, divisor, plain=dy)[1]
        assert da is not None
        assert db is not None
        return da, db, dv.to(v.dtype)
