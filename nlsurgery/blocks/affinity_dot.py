"""The dot-product mode by its cheaper association: q(kᵀv)/M in place of (qkᵀ)v/M."""

from __future__ import annotations

import torch
from torch import Tensor

from nlsurgery.blocks.affinity import apply_map, dot_product_map, without_autocast


def reassociation_pays(num_queries: int, num_keys: int, head_size: int) -> bool:
    """Whether N·C'² + M·C'² multiplications are fewer than 2·N·M·C'."""
    return 2 * num_queries * num_keys > head_size * (num_queries + num_keys)


def dot_product_attend(q: Tensor, k: Tensor, v: Tensor, form: str) -> Tensor:
    """1/M Σ_j (q_i · k_j) v_j.

    Args:
        q: (B, N, C').
        k: (B, M, C').
        v: (B, M, V).
        form: ``explicit`` or ``reassociated``.

    Returns:
        (B, N, V) in the dtype of ``v``.
    """
    if form == "explicit" and q.dtype == torch.bfloat16:
        # Its range is float32's, and a rounded f is off by no more than a rounded θ.
        with without_autocast(q):
            return apply_map(torch.bmm(q / max(1, k.shape[1]), k.transpose(1, 2)), v)
    if form == "explicit":
        return apply_map(dot_product_map(q, k), v)
    with without_autocast(q):
        # alpha acts on the float32 accumulator, so that sums over M beyond 65,504 stay finite.
        nothing = k.new_zeros((1, 1, 1))
        summary = torch.baddbmm(nothing, k.transpose(1, 2), v, beta=0, alpha=1 / max(1, k.shape[1]))
        return torch.bmm(q, summary)
