"""From projected maps to the attended map, by the chosen form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nlsurgery.blocks.affinity import SOFTMAX_MODES, accumulator
from nlsurgery.blocks.affinity_concat import concatenation_attend
from nlsurgery.blocks.affinity_dot import dot_product_attend
from nlsurgery.blocks.affinity_explicit import FEW_PRODUCTS_BFLOAT16, keeps_bfloat16
from nlsurgery.blocks.affinity_operator import takes_operator
from nlsurgery.blocks.affinity_softmax import (
    has_denormal_weights,
    may_have_denormal_weights,
    softmax_attend,
)
from nlsurgery.blocks.choose import choose_implementation, without_denormals
from nlsurgery.blocks.geometry import is_eager, num_keys, to_map, to_tokens, working_dtype
from nlsurgery.blocks.memory_format import to_channels_last, to_rows
from nlsurgery.blocks.projection import small_products, torch_takes_onednn
from nlsurgery.blocks.residual import convolve, is_plain, parameters_of, project

#: Up to so many positions a map's layout does not matter on a CPU.
FEW_QUERIES = 1 << 7
#: Up to so many positions, of so many channels, are multiplied faster where channels lie side by side.
FEW_ROWS, ROW_CHANNELS = 50, (1 << 8, 1 << 10)
#: In bfloat16 not for more multiplications with a square weight.
ROW_PRODUCTS = 1 << 27
#: Up to so many logits calls of torch's take longer than what they compute, but in half precisions.
FEW_LOGITS, FEW_LOGITS_HALF = 1 << 17, 1 << 15


@torch.fx.wrap
def laid_out(
    x: Tensor, mode: str, sizes: tuple[int, int], pool: Sequence[int] | None, implementation: str
) -> Tensor:
    """``x`` in the memory format that the chosen form reads fastest.

    Args:
        x: (B, C, *spatial).
        mode: The pairwise function.
        sizes: Channels of keys and of values.
        pool: By how many keys are pooled along each axis, if they are.
        implementation: The block's option.

    Returns:
        ``x`` itself, or a channels-last copy where tokens must be contiguous.
    """
    form, num_queries = implementation, math.prod(x.shape[2:])
    if form == "auto" and x.device.type == "cpu" and is_eager() and num_queries <= FEW_QUERIES:
        return to_rows(x) if _takes_rows(x, mode, num_queries) else x
    if form == "auto":
        form = choose_implementation(
            mode,
            num_queries=num_queries,
            num_keys=num_keys(x.shape[2:], pool),
            head_size=sizes[0],
            value_size=sizes[1],
            batch=x.shape[0],
            dtype=working_dtype(x),
            device_type=x.device.type,
        )
    return to_channels_last(x) if form in ("fused", "sorted") else x


def _takes_rows(x: Tensor, mode: str, num_queries: int) -> bool:
    """Whether so few positions are projected faster on a CPU with their channels side by side."""
    least, most = ROW_CHANNELS
    if num_queries > FEW_ROWS or not least <= x.shape[1] <= most or mode == "gaussian":
        return False
    if working_dtype(x) != x.dtype:
        return False
    if x.dtype == torch.bfloat16:
        return x.numel() * x.shape[1] <= ROW_PRODUCTS
    # MKL takes 16 columns at a time.
    return x.dtype == torch.float32 and num_queries % 16 > 0 and not torch_takes_onednn(x)


@torch.fx.wrap
def attend(q: Tensor, k: Tensor, v: Tensor, mode: str, scale: float, implementation: str) -> Tensor:
    """1/C(x) · Σ_j f(q_i, k_j) v_j over maps.

    Args:
        q: (B, C', *spatial) queries; in ``concatenation`` their part of the logits, C' = 1.
        k: (B, C', *key sizes), likewise.
        v: (B, V, *key sizes).
        mode: The pairwise function.
        scale: The factor on the logits of the softmax modes.
        implementation: The form, ``auto`` to choose it here.

    Returns:
        (B, V, *spatial), in the dtype of ``v``.
    """
    num_queries = math.prod(q.shape[2:])
    form = implementation
    if form == "auto":
        form = choose_implementation(
            mode,
            num_queries=num_queries,
            num_keys=math.prod(k.shape[2:]),
            head_size=q.shape[1],
            value_size=v.shape[1],
            batch=v.shape[0],
            dtype=v.dtype,
            device_type=v.device.type,
        )
    if form in ("explicit", "reassociated") and _are_few(v, num_queries):
        return attend_few(q, k, v, mode, scale, form)
    queries, keys, values = to_tokens(q), to_tokens(k), to_tokens(v)
    if implementation == "auto" and mode in SOFTMAX_MODES:
        form = _without_denormals(form, queries, keys, v.dtype, scale)
    if mode == "dot_product":
        y = dot_product_attend(queries, keys, values, form)
    elif mode == "concatenation":
        y = concatenation_attend(queries.squeeze(2), keys.squeeze(2), values, form)
    else:
        # A position is most like itself, or what it was pooled into.
        grids = (q.shape[2:], k.shape[2:]) if mode == "gaussian" else None
        y = softmax_attend(queries, keys, values, scale, form, grids)
    return to_map(y, q.shape[2:])


def _are_few(v: Tensor, num_queries: int) -> bool:
    """Whether plain operators take longer to call than to attend to values (B, V, *key sizes)."""
    if not is_eager() or v.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    few = FEW_LOGITS_HALF if v.itemsize == 2 else FEW_LOGITS
    if v.numel() * num_queries > few * v.shape[1]:
        return False
    return v.numel() * num_queries < FEW_PRODUCTS_BFLOAT16 or not keeps_bfloat16(v)


def attend_few(q: Tensor, k: Tensor, v: Tensor, mode: str, scale: float, form: str) -> Tensor:
    """:func:`attend` by no more calls than it takes, without autocast.

    Args:
        q: (B, C', *spatial) queries, as :func:`attend` takes them.
        k: (B, C', *key sizes).
        v: (B, V, *key sizes).
        mode: The pairwise function.
        scale: The factor on the logits of the softmax modes.
        form: ``explicit`` or ``reassociated``.

    Returns:
        (B, V, *spatial), in the dtype of ``v``.
    """
    batch, channels, given = v.shape[0], v.shape[1], v.dtype
    queries, keys, values = q.flatten(2), k.flatten(2), v.flatten(2)
    if (dtype := accumulator(given)) != given:
        queries, keys, values = queries.to(dtype), keys.to(dtype), values.to(dtype)
    factor = scale if mode in SOFTMAX_MODES else 1 / max(1, keys.shape[2])
    left, right = queries.transpose(1, 2), values.transpose(1, 2)
    if form == "reassociated":
        right = torch.bmm(keys, right).mul_(factor)
    else:
        left = left + keys if mode == "concatenation" else torch.bmm(left, keys)
        left = left if factor == 1.0 else left.mul_(factor)
        if mode in SOFTMAX_MODES:
            left = left.softmax(-1)
        elif mode == "concatenation":
            left = left.relu_()
    if values.stride(1) == 1:
        y = torch.bmm(left, right).view(batch, *q.shape[2:], channels).movedim(-1, 1)
    else:
        y = torch.bmm(right.transpose(1, 2), left.transpose(1, 2))
        y = y.view(batch, channels, *q.shape[2:])
    return y if given == dtype else y.to(given)


def _without_denormals(
    form: str, queries: Tensor, keys: Tensor, dtype: torch.dtype, scale: float
) -> str:
    """The chosen form of softmax attention, or where its weights are denormal numbers another."""
    if takes_operator(queries):
        # In a graph no logits can be looked at, but by an operator.
        is_safe = form == "explicit" and not may_have_denormal_weights(queries, keys)
        return form if is_safe else "auto"
    if form == "explicit" and has_denormal_weights(queries, keys, scale):
        return without_denormals(dtype)
    return form


@torch.fx.wrap
def logits_and_values(
    x: Tensor, theta: nn.Module, phi: nn.Module, g: nn.Module, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute w · [θ(x); φ(x)] by its two parts, of queries and of keys, and g(x): what can be, together.

    Args:
        x: (B, C, *spatial).
        theta: θ.
        phi: φ.
        g: g.
        weight: The 2C' values of ``concat_project``, queries first.

    Returns:
        Two of (B, 1, *spatial), and (B, V, *spatial).
    """
    if not (is_plain(theta) and is_plain(phi)):
        parts = logit_part(x, theta, weight, True), logit_part(x, phi, weight, False)
        return *parts, project(g, x)
    layers = parameters_of(theta), parameters_of(phi)
    sides = weight.view(2, 1, -1)
    side = torch.bmm(sides, torch.cat([w for w, _ in layers]).view(2, -1, x.shape[1]))
    bias = None
    if any(b is not None for _, b in layers):
        biases = [w.new_zeros(w.shape[0]) if b is None else b for w, b in layers]
        bias = torch.bmm(sides, torch.cat(biases).view(2, -1, 1)).flatten()
    side = side.view(2, -1, *[1] * (x.dim() - 2))
    found = small_products(x, [(side, bias), parameters_of(g)]) if is_plain(g) else None
    both, v = (convolve(x, side, bias), project(g, x)) if found is None else found
    return both[:, :1], both[:, 1:], v


@torch.fx.wrap
def logit_part(x: Tensor, projection: nn.Module | None, weight: Tensor, first: bool) -> Tensor:
    """Compute w · projection(x), the part of a concatenation's logits that comes from one side.

    Args:
        x: (B, C, *spatial).
        projection: θ or φ; ``None`` where ``x`` is projected already.
        weight: The 2C' values of ``concat_project``, queries first.
        first: Whether this is the queries' side.

    Returns:
        (B, 1, *spatial).
    """
    if projection is not None and is_plain(projection):
        side, bias = _folded(projection, weight, first)
    else:
        x = x if projection is None else projection(x)
        side, bias = _side(weight, first), None
    return convolve(x, side.view(1, -1, *[1] * (x.dim() - 2)), bias)


def _side(weight: Tensor, first: bool) -> Tensor:
    return weight.flatten().chunk(2)[0 if first else 1].unsqueeze(0)


def _folded(projection: nn.Module, weight: Tensor, first: bool) -> tuple[Tensor, Tensor | None]:
    """The two linear maps as one, so that the C' channels are never formed: (1, C), and (1,) or ``None``."""
    side = _side(weight, first)
    bias = None if projection.bias is None else side @ projection.bias  # type: ignore[operator]
    return side @ projection.weight.flatten(1), bias  # type: ignore[operator]
