"""Softmax attention by one of its forms.

The map is formed (``affinity_explicit.py``), or no N×M tensor is kept, forward or backward: by torch's
fused attention (``affinity_fused.py``), by tiles of queries and keys (``affinity_tiles.py``), or where oneDNN
multiplies faster by rows of the map (``affinity_rows.py``).
Logits of half inputs are formed in float32 in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nlsurgery.blocks import products
from nlsurgery.blocks.affinity import accumulator, without_autocast
from nlsurgery.blocks.affinity_explicit import explicit_attend
from nlsurgery.blocks.affinity_fused import fused_attend
from nlsurgery.blocks.affinity_operator import is_small, operator_attend, takes_operator
from nlsurgery.blocks.affinity_rows import Grids, row_attend
from nlsurgery.blocks.affinity_tiles import tiled_attend
from nlsurgery.blocks.choose import SLOWLY_FUSED, goes_by_onednn
from nlsurgery.blocks.geometry import is_eager, takes_plain_operators

#: Below so many logits a map is not looked at: products with denormal weights do not take long either.
FEW_LOGITS = 1 << 18
#: Batch items, and rows of the logits of each, that are looked at.
SAMPLED_ITEMS, SAMPLED_ROWS = 2, 4
#: How far below a row's largest logit weights are denormal numbers, or their gradients: so far, give or take.
DENORMAL = (90.0, 15.0)
#: The share of such weights which makes a product noticeably slower.
NOTICEABLE = 5e-4


def softmax_attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, form: str, grids: Grids | None = None
) -> Tensor:
    """Σ_j softmax_j(scale · q_i · k_j) v_j.

    Args:
        q: (B, N, C') queries.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        scale: The factor on the logits.
        form: ``explicit``, ``fused`` or ``chunked``, or in a graph ``auto``.
        grids: The sizes of the queries' and the keys' map, where a query's largest logit is likely that of
            the key at its place.

    Returns:
        (B, N, V) in the dtype of ``v``.
    """
    with without_autocast(q):
        if form == "explicit" or takes_plain_operators():
            return explicit_attend(q, k, v, scale, grids)
        if form in ("auto", "fused") or not is_eager():
            if takes_operator(q):
                return operator_attend(q, k, v, scale, form, grids=grids)
            query, key, value = (tokens.unsqueeze(1) for tokens in (q, k, v))
            return fused_attend(query, key, value, scale).squeeze(1)
        if products.are_by_onednn(q.dtype, q.device.type):
            return row_attend(q, k, v, scale, grids=grids)
        return tiled_attend(q, k, v, scale)


def heads_attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Σ_j softmax_j(scale · q_i · k_j) v_j for each head, no N×M tensor kept; without autocast.

    Args:
        q: (B, heads, N, C') queries.
        k: (B, heads, M, C') keys.
        v: (B, heads, M, V) values.
        scale: The factor on the logits.

    Returns:
        (B, heads, N, V) in the dtype of ``v``.
    """
    attend: Callable[..., Tensor]
    fast = is_eager() and products.are_by_onednn(q.dtype, q.device.type) and not is_small(q, k)
    if fast and goes_by_onednn(q.shape[2] * k.shape[2], q.shape[3], q.dtype):
        attend = row_attend
    elif is_eager() and q.device.type == "cpu" and q.dtype == SLOWLY_FUSED:
        attend = tiled_attend
    elif takes_operator(q):
        attend = partial(operator_attend, form="auto")
    else:
        return fused_attend(q, k, v, scale)
    queries, keys, values = (t.flatten(0, 1) for t in (q, k, v))
    y = attend(queries, keys, values, scale)
    return y.view(*q.shape[:2], *y.shape[1:])


def may_have_denormal_weights(q: Tensor, k: Tensor) -> bool:
    """Whether products with denormal weights would take long: not of a few, nor by oneDNN.

    Args:
        q: (B, N, C') queries on a CPU.
        k: (B, M, C') keys.
    """
    # Processors that MKL leaves AVX-512 idle on multiply denormal numbers at full speed.
    if products.are_by_onednn(torch.float32, "cpu") or accumulator(q.dtype) != torch.float32:
        return False
    return q.shape[0] * q.shape[1] * k.shape[1] >= FEW_LOGITS


def has_denormal_weights(q: Tensor, k: Tensor, scale: float) -> bool:
    """Whether many weights of softmax_j(scale · q_i · k_j) are denormal numbers, in some rows of it.

    A product with those takes up to 25 times as long on a CPU. Never so where values cannot be read
    (in a graph, on another device, under ``torch.func.vmap``, of fake tensors).

    Args:
        q: (B, N, C') queries.
        k: (B, M, C') keys.
        scale: The factor on the logits.
    """
    if q.device.type != "cpu" or not is_eager() or not may_have_denormal_weights(q, k):
        return False
    items = slice(None, None, -(-q.shape[0] // SAMPLED_ITEMS))
    rows = slice(None, None, -(-q.shape[1] // SAMPLED_ROWS))
    with torch.no_grad(), without_autocast(q):
        logits = torch.bmm(q[items, rows].float(), k[items].float().transpose(1, 2)).mul_(scale)
        below = logits.amax(-1, keepdim=True) - logits
        count = below.sub_(DENORMAL[0]).abs_().lt(DENORMAL[1]).sum()
    try:
        return bool(count > NOTICEABLE * below.numel())
    except RuntimeError:
        return False
