"""Softmax attention with the map formed and kept: for few keys, and where graphs are recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nlsurgery.blocks import products
from nlsurgery.blocks.affinity import (
    accumulator,
    apply_map,
    scaled,
    softmax_gradients,
    softmax_map,
    takes_plain_gradients,
)
from nlsurgery.blocks.affinity_chunks import (
    Workspace,
    balanced,
    centred,
    chunks,
    empty_as,
    gradients_over_chunks,
    pieces,
    set_product,
)
from nlsurgery.blocks.affinity_operator import operator_attend
from nlsurgery.blocks.affinity_rows import Grids, row_attend, to_powers
from nlsurgery.blocks.geometry import is_compiled, is_eager
from nlsurgery.blocks.products import LOG_2, apart

#: From so many logits on a function of our own is faster than plain operations on a CPU: where there is
#: a backward, and where there is none.
OWN_LOGITS, OWN_LOGITS_FORWARD = 1 << 18, 1 << 20
#: The same where bfloat16 is multiplied four times as fast as float32, but not by fused attention: logits, or
#: multiplications in fewer of them.
OWN_LOGITS_BFLOAT16, FEW_PRODUCTS_BFLOAT16 = 1 << 17, 1 << 21
#: Rows of a multiple of so many logits are replaced by their softmax as fast as that is written elsewhere;
#: others take up to half as long again.
IN_PLACE = 16
#: Logits of an item from which on it goes by itself (``affinity_rows.py``), in bfloat16: where there is a
#: backward, and where there is none, there by whether there are several threads.
ITEM_LOGITS, ITEM_LOGITS_FORWARD = 1 << 19, {False: 1 << 17, True: 3 << 16}
#: The latter of keys of at most so many channels.
NARROW_ITEM, NARROW_ITEM_LOGITS = 16, {False: 3 << 16, True: 1 << 18}
#: Multiplications in an item's logits from which on it goes by itself as well where there is no backward and
#: bfloat16 is multiplied twice as fast as float32, not four times.
LEVEL_ITEM_PRODUCTS = 1 << 24
#: In a compiled graph, whose passes over small maps are one: where there is a backward, with keys of at most
#: ``NARROW`` channels and of more, and where there is none.
GRAPH_LOGITS, GRAPH_LOGITS_FORWARD = {True: 1 << 20, False: 1 << 19}, 1 << 18
#: As in eager mode, of the only item, where there is no backward: no others could go together with it.
ONLY_ITEM_LOGITS_FORWARD = 1 << 16
#: Up to so many logits in all to begin a call takes longer than the calls that a pass over them saves.
FEW_LOGITS = 3 << 16
#: Logits of the items that go together.
GROUP_LOGITS = 1 << 20
#: Up to so many channels a float32 product takes less than two in bfloat16 and the passes between them: of
#: few logits, and of more. Of any number where bfloat16 is multiplied twice as fast, not four times.
NARROW_FEW, NARROW = 48, 32


def explicit_attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, grids: Grids | None = None
) -> Tensor:
    """Σ_j softmax_j(scale · q_i · k_j) v_j with the map formed, without autocast.

    Args:
        q: (B, N, C') queries.
        k: (B, M, C') keys.
        v: (B, M, V) values.
        scale: The factor on the logits.
        grids: Where a query's largest logit is likely that of the key at its place.

    Returns:
        (B, N, V) in the dtype of ``v``.
    """
    has_backward = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if is_compiled() and keeps_bfloat16(q):
        if _goes_by_rows(q, k, has_backward, grids):
            return operator_attend(q, k, v, scale, "explicit", keep=has_backward, grids=grids)
        return apply_map(_rounded_map(q, k, scale), v)
    if _is_plain(q, k, has_backward):
        return apply_map(softmax_map(q, k, scale), v)
    if _goes_by_rows(q, k, has_backward, grids):
        return row_attend(q, k, v, scale, keep=True, grids=grids)
    return _Explicit.apply(q, k, v, scale, has_backward)  # type: ignore[no-any-return]


def _is_plain(q: Tensor, k: Tensor, has_backward: bool) -> bool:
    if q.device.type != "cpu" or not is_eager():
        return True
    logits = q.shape[0] * q.shape[1] * k.shape[1]
    if keeps_bfloat16(q):
        return logits < OWN_LOGITS_BFLOAT16 and logits * q.shape[2] < FEW_PRODUCTS_BFLOAT16
    return logits < (OWN_LOGITS if has_backward else OWN_LOGITS_FORWARD)


def _goes_by_rows(q: Tensor, k: Tensor, has_backward: bool, grids: Grids | None) -> bool:
    if not keeps_bfloat16(q):
        return False
    logits, is_far = q.shape[1] * k.shape[1], grids is not None and q.shape[1] != k.shape[1]
    return is_large_item(q.shape[0], logits, q.shape[2], has_backward, is_far=is_far)


def is_large_item(
    batch: int, logits: int, channels: int, has_backward: bool, *, is_far: bool = False
) -> bool:
    """Whether each of so many bfloat16 items goes by itself, its logits formed by one product.

    Args:
        batch: B.
        logits: N·M of an item.
        channels: C'.
        has_backward: Whether there is one.
        is_far: Whether queries are multiplied with what they are pooled into: their largest logits are then
            often elsewhere, and formed again.
    """
    if is_compiled():
        limit = GRAPH_LOGITS[channels <= NARROW] if has_backward else GRAPH_LOGITS_FORWARD
        return logits >= limit
    if has_backward:
        return logits >= ITEM_LOGITS
    many = logits * channels >= LEVEL_ITEM_PRODUCTS and not is_far
    if many and not products.halves_float32():
        return True
    if batch == 1:
        return logits >= (FEW_LOGITS if channels <= NARROW_FEW else ONLY_ITEM_LOGITS_FORWARD)
    limits = NARROW_ITEM_LOGITS if channels <= NARROW_ITEM else ITEM_LOGITS_FORWARD
    return logits >= limits[products.takes_threads()]


def keeps_bfloat16(q: Tensor) -> bool:
    """Whether maps of such tokens are kept in bfloat16, which is multiplied four times as fast as float32."""
    return q.dtype == torch.bfloat16 and products.are_by_onednn(q.dtype, q.device.type)


class _Explicit(torch.autograd.Function):
    """The map formed and kept, on a CPU: its memory and its order are chosen, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, has_backward: bool
    ) -> Tensor:
        batch, num_queries, num_keys = q.shape[0], q.shape[1], k.shape[1]
        narrow = keeps_bfloat16(q)
        kept: Tensor | None = None
        if narrow and batch * num_queries * num_keys <= FEW_LOGITS:
            if q.shape[2] <= NARROW_FEW or not products.halves_float32():
                kept = softmax_map(q, k, scale).to(q.dtype)
            else:
                kept = _rounded_map(apart(q), apart(k), scale)
            y = apply_map(kept, v)
        else:
            if has_backward:
                dtype = q.dtype if narrow else accumulator(q.dtype)
                kept = q.new_empty(batch, num_queries, num_keys, dtype=dtype)
            y = (_attended_together if narrow else _attended)(q, k, v, scale, kept)
        if has_backward:
            ctx.save_for_backward(q, k, v, kept)
            ctx.scale = scale
        return y.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        q, k, v, kept = ctx.saved_tensors
        if takes_plain_gradients(dy):
            return *softmax_gradients(q, k, v, ctx.scale, dy), None, None
        queries, keys, values, dy = (t.to(kept.dtype) for t in (q, k, v, dy))
        if kept.dtype == torch.bfloat16:
            keys = centred(keys)
            if kept.numel() <= FEW_LOGITS:
                return *_few_gradients(queries, keys, values, kept, ctx.scale, dy), None, None
        found = gradients_over_chunks(queries, keys, values, ctx.scale, dy, lambda b, i: kept[b, i])
        dq, dk, dv = (g.to(t.dtype) for g, t in zip(found, (q, k, v), strict=True))
        return dq, balanced(dk), dv, None, None


def _attended(q: Tensor, k: Tensor, v: Tensor, scale: float, kept: Tensor | None) -> Tensor:
    """The attended values in the accumulator's dtype; the softmax goes to ``kept``."""
    dtype = accumulator(q.dtype)
    queries, keys, values = (t.to(dtype) for t in (q, k, v))
    queries = scaled(queries, scale)
    batch, num_queries, num_keys = q.shape[0], q.shape[1], k.shape[1]
    workspace, other = Workspace(q, dtype, "logits"), Workspace(q, dtype, "rest")
    y = empty_as(values, num_queries)
    for b, i in chunks(batch, num_queries, num_keys, queries.itemsize):
        part = queries[b, i]
        shape = *part.shape[:2], num_keys
        weights = kept[b, i] if kept is not None else other.take(*shape)
        logits = weights if num_keys % IN_PLACE == 0 else workspace.take(*shape)
        torch.bmm(part, keys[b].transpose(1, 2), out=logits)
        torch.softmax(logits, dim=-1, out=weights)
        set_product(y[b, i], weights, values[b], 1.0)
    return y


def _attended_together(
    q: Tensor, k: Tensor, v: Tensor, scale: float, kept: Tensor | None
) -> Tensor:
    """The attended values of bfloat16 items, several at a time; the softmax goes to ``kept``."""
    y = empty_as(v, q.shape[1])
    for b in pieces(q.shape[0], GROUP_LOGITS // max(1, q.shape[1] * k.shape[1])):
        p = _exact_softmax(q[b], k[b], scale, None if kept is None else kept[b])
        set_product(y[b], p, v[b], 1.0)
    return y


def _few_gradients(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor, scale: float, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`gradients_over_chunks` gives of a map that needs no chunks, by as few calls as it takes."""
    dq, dk, dv = (empty_as(tokens, tokens.shape[1]) for tokens in (q, k, v))
    ds = torch._softmax_backward_data(torch.bmm(dy, v.transpose(1, 2)), p, -1, p.dtype)
    set_product(dv, p.transpose(1, 2), dy, 1.0)
    set_product(dq, ds, k, scale)
    set_product(dk, ds.transpose(1, 2), q, scale)
    return dq, balanced(dk), dv


def _rounded_map(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """What :func:`_exact_softmax` gives, by few operators, of which a compiler makes one pass."""
    rounded = torch.bmm(q, k.transpose(1, 2))
    # What the rounding took; the gradient of the logits is that of their rounded part.
    rest = torch.baddbmm(rounded.detach(), q.detach(), k.detach().transpose(1, 2), beta=-1.0)
    return scaled(rounded.float() + rest, scale).softmax(-1).to(q.dtype)


def _exact_softmax(q: Tensor, k: Tensor, scale: float, kept: Tensor | None) -> Tensor:
    """The softmax in float32 of bfloat16 queries (B, N, C') and keys (B, M, C'): (B, N, M) bfloat16."""
    shape = q.shape[0], q.shape[1], k.shape[1]
    rounded = Workspace(q, q.dtype, "gradients").take(*shape) if kept is None else kept
    logits = Workspace(q, torch.float32, "logits").take(*shape)
    if not products.halves_float32():
        _exact_logits(q, k, scale, logits)
        in_place = shape[2] % IN_PLACE == 0
        weights = logits if in_place else Workspace(q, torch.float32, "rest").take(*shape)
        return rounded.copy_(torch.softmax(logits, dim=-1, out=weights))
    if q.shape[2] <= NARROW:
        _exact_logits(q, k, scale / LOG_2, logits)
    else:
        # A product rounded to bfloat16, and another of what the rounding took.
        q, k = apart(q), apart(k)
        torch.bmm(q, k.transpose(1, 2), out=rounded)
        logits.copy_(rounded)
        torch.baddbmm(rounded, q, k.transpose(1, 2), beta=-1.0, out=rounded)
        # Copied by hand: a sum of two dtypes would take new memory for the copy.
        logits.add_(Workspace(q, torch.float32, "rest").take(*shape).copy_(rounded))
        logits.mul_(scale / LOG_2)
    to_powers(logits)
    return rounded.copy_(logits.mul_(logits.sum(-1, keepdim=True).reciprocal_()))


def _exact_logits(q: Tensor, k: Tensor, scale: float, out: Tensor) -> None:
    """Float32 logits; where vectors are multiplied with themselves they are cast once."""
    keys = k.float()
    queries = keys if q.is_set_to(k) else q.float()
    torch.bmm(scaled(queries, scale), keys.transpose(1, 2), out=out)
