"""The pairwise maths of the non-local block, over tokens (B, N, C').

y_i = 1/C(x) · Σ_j f(x_i, x_j) g(x_j)  (Wang et al., CVPR 2018, Eq. 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nlsurgery.blocks.geometry import is_batched, is_compiled

#: The four pairwise functions of the paper.
MODES = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
#: The two whose normaliser is Σ_j f, hence a softmax over j.
SOFTMAX_MODES = ("gaussian", "embedded_gaussian")

_NOTHING = nullcontext()


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast does not lower the dtype of the pairwise maths."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits and sums are formed: float32 for half precisions."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def logit_scale(head_size: int, use_scale: bool) -> float:
    """The factor on the logits: 1/√head_size, or 1 without ``use_scale``."""
    return 1.0 / math.sqrt(head_size) if use_scale else 1.0


def takes_plain_gradients(*upstream: Tensor | None) -> bool:
    """Whether a backward is differentiated again, or of a batch of gradients (``is_grads_batched``)."""
    return torch.is_grad_enabled() or any(is_batched(dy) for dy in upstream if dy is not None)


def plain_gradients(
    form: Callable[[], Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
) -> tuple[Any, ...]:
    """Gradients by plain operations, which can be differentiated again (a gradient penalty does so).

    Args:
        form: Computes tensors from ``inputs`` by plain operations.
        inputs: Tensors; ``None`` is returned for those that need no gradient, and for ``None``.
        upstream: The gradient of each; ``None`` for 0.
    """
    needed = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        made = form()
    given = [
        torch.zeros_like(y) if dy is None else dy for y, dy in zip(made, upstream, strict=True)
    ]
    found = iter(torch.autograd.grad(made, needed, given, create_graph=again))
    return tuple(
        None if tensor is None or not tensor.requires_grad else next(found) for tensor in inputs
    )


def scaled(q: Tensor, scale: float) -> Tensor:
    """``scale · q``; ``q`` itself where that is the same."""
    return q if scale == 1.0 else q * scale


@torch.fx.wrap
def softmax_map(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """softmax_j(scale · q_i · k_j).

    Args:
        q: (B, N, C') queries.
        k: (B, M, C') keys.
        scale: The factor on the logits.

    Returns:
        (B, N, M), float32 for half inputs; every row sums to 1.
    """
    with without_autocast(q):
        dtype = accumulator(q.dtype)
        if q.dtype != dtype:
            q, k = q.to(dtype), k.to(dtype)
        return torch.bmm(scaled(q, scale), k.transpose(1, 2)).softmax(dim=-1)


@torch.fx.wrap
def dot_product_map(q: Tensor, k: Tensor) -> Tensor:
    """q_i · k_j / M, of q (B, N, C') and k (B, M, C'): (B, N, M), float32 for half inputs."""
    with without_autocast(q):
        dtype = accumulator(q.dtype)
        return torch.bmm(q.to(dtype) / max(1, k.shape[1]), k.to(dtype).transpose(1, 2))


@torch.fx.wrap
def apply_map(attention: Tensor, v: Tensor) -> Tensor:
    """Σ_j attention_ij v_j, of (B, N, M) and (B, M, C'): (B, N, C') in the dtype of ``v``.

    The result lies in memory as ``v`` does, tokens or channels first, but in a compiled graph.
    """
    with without_autocast(v):
        values = v if v.dtype == attention.dtype else v.to(attention.dtype)
        # A graph's backward would copy the map's gradient into the other order.
        if values.stride(1) == 1 and not is_compiled():
            y = torch.bmm(values.transpose(1, 2), attention.transpose(1, 2)).transpose(1, 2)
        else:
            y = torch.bmm(attention, values)
        return y if y.dtype == v.dtype else y.to(v.dtype)


def plain_attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax attention by plain operations, with the map formed.

    Args:
        q: (…, N, C') queries.
        k: (…, M, C') keys.
        v: (…, M, V) values.
        scale: The factor on the logits.

    Returns:
        (…, N, V).
    """
    queries, keys, values = (t.flatten(0, -3) for t in (q, k, v))
    y = apply_map(softmax_map(queries, keys, scale), values)
    return y.reshape(*q.shape[:-1], v.shape[-1])


def softmax_gradients(q: Tensor, k: Tensor, v: Tensor, scale: float, dy: Tensor) -> tuple[Any, ...]:
    """The gradients of :func:`plain_attend` by plain operations.

    Args:
        q: (…, N, C') queries.
        k: (…, M, C') keys.
        v: (…, M, V) values.
        scale: The factor on the logits.
        dy: (…, N, V) gradient.
    """
    return plain_gradients(lambda: [plain_attend(q, k, v, scale)], (q, k, v), [dy])
