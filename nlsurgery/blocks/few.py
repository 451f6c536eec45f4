"""A non-local block of few values by as few calls as there can be, with one choice for all of it.

Up to some thousand values a call of torch's takes longer than what it computes, and so do choices in Python:
those of ``project_together``, ``attend`` and ``add_projected`` took a quarter of that of 64 channels at 8×8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nlsurgery.blocks import products
from nlsurgery.blocks.affinity_dot import reassociation_pays
from nlsurgery.blocks.attend import FEW_QUERIES, attend_few
from nlsurgery.blocks.geometry import is_eager
from nlsurgery.blocks.projection import joined, parted, small_product
from nlsurgery.blocks.residual import add_branch, finite, is_plain, normalised, parameters_of

#: A map of fewer values is such a one.
FEW_VALUES = 1 << 14
#: More weights than these take longer to join.
FEW_WEIGHTS = 1 << 16


def are_few(x: Tensor) -> bool:
    """Whether (B, C, *spatial) lies and is computed such that :func:`few_non_local` may take it."""
    if type(x) is not Tensor or x.numel() >= FEW_VALUES or not is_eager():
        return False
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not x.is_contiguous():
        return False
    if x.numel() > FEW_QUERIES * x.shape[0] * x.shape[1]:
        return False
    if x.dtype == torch.bfloat16:
        return products.multiplies_bfloat16()
    return x.dtype in (torch.float32, torch.float64)


def few_attended(
    x: Tensor, projections: Sequence[nn.Module], mode: str, scale: float
) -> Tensor | None:
    """Queries, keys and values of all positions, and the attended map.

    Args:
        x: (B, C, *spatial) of which :func:`are_few` is true.
        projections: The 1×1 convolutions of queries, keys and values (V channels).
        mode: The pairwise function: ``embedded_gaussian`` or ``dot_product``.
        scale: The factor on the logits.

    Returns:
        (B, V, *spatial); ``None`` where a projection has to be called, or is not of its dtype.
    """
    if not all(is_plain(module) for module in projections):
        return None
    layers = [parameters_of(module) for module in projections]
    weights = [weight for weight, _ in layers]
    if sum([weight.numel() for weight in weights]) > FEW_WEIGHTS:
        return None
    for weight in weights:
        if weight.dtype != x.dtype:
            return None
    if (layer := joined(layers)) is None:
        return None
    q, k, v = parted(small_product(x, *layer), layers)
    form = "explicit"
    if mode == "dot_product":
        positions = x.shape[2:].numel()
        form = "reassociated" if reassociation_pays(positions, positions, q.shape[1]) else form
    return attend_few(q, k, v, mode, scale, form)


def few_non_local(
    x: Tensor,
    projections: Sequence[nn.Module],
    out: nn.Module,
    norm: nn.Module | None,
    mode: str,
    scale: float,
) -> Tensor | None:
    """:func:`few_attended`, and the rest of a non-local block.

    Args:
        x: (B, C, *spatial) of which :func:`are_few` is true.
        projections: θ, φ and g.
        out: The 1×1 convolution C' → C.
        norm: What follows it, or ``None``.
        mode: The pairwise function.
        scale: The factor on the logits.

    Returns:
        A new tensor like ``x``; ``None`` where :func:`few_attended` returns that.
    """
    if not is_plain(out):
        return None
    weight, bias = parameters_of(out)
    y = few_attended(x, projections, mode, scale) if weight.dtype == x.dtype else None
    if y is None:
        return None
    z = finite(small_product(y, weight, bias), fresh=True)
    return add_branch(x, z if norm is None else normalised(z, norm, x))
