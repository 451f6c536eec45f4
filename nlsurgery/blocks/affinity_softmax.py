"""Softmax attention that keeps no N×M tensor, forward or backward.

Two forms beside the explicit one: torch's fused attention (``affinity_fused.py``), and tiles of
queries and keys (``affinity_tiles.py``). Logits of half inputs are formed in float32 in both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nlsurgery.blocks.affinity import apply_map, softmax_map, without_autocast
from nlsurgery.blocks.affinity_fused import fused_attend
from nlsurgery.blocks.affinity_tiles import tiled_attend
from nlsurgery.blocks.geometry import is_recorded


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
        return tiled_attend(q, k, v, scale)


def fits(num_keys: int, value_size: int) -> bool:
    """Whether an N×M tensor may be kept: no larger than the four projections, and in the cache."""
    return num_keys <= min(1024, 4 * value_size)
