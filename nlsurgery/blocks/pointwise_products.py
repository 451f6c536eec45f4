"""1×1 convolutions of one map as matrix products by oneDNN (``products.py``), and their gradients.

Eagerly they are an autograd function; in a compiled graph an operator, as the compiler would take MKL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nlsurgery.blocks.affinity import plain_gradients, scaled, takes_plain_gradients
from nlsurgery.blocks.geometry import CHANNELS_LAST, is_compiled
from nlsurgery.blocks.products import is_exact, product, product_and, stacked

#: The weight (C', C, 1, …) of a 1×1 convolution, and its bias (C',).
Layer = tuple[Tensor, Tensor | None]


def pointwise_products(
    x: Tensor, layers: Sequence[Layer], factor: float = 1.0
) -> tuple[Tensor, ...]:
    """Several 1×1 convolutions of one map.

    Args:
        x: (B, C, *spatial) in float32 or bfloat16.
        layers: The weight and bias of each.
        factor: What the first's result is multiplied with; in bfloat16 before it is rounded.

    Returns:
        One (B, C', *spatial) of each, lying as ``x`` does.
    """
    if is_last(x):
        rows = x.movedim(1, -1)
        found = _multiplied(rows.flatten(0, -2), layers, factor)
        return tuple(y.view(*rows.shape[:-1], y.shape[1]).movedim(-1, 1) for y in found)
    return tuple(
        y.view(*y.shape[:2], *x.shape[2:]) for y in _multiplied(x.flatten(2), layers, factor)
    )


def _multiplied(x: Tensor, layers: Sequence[Layer], factor: float) -> Sequence[Tensor]:
    """One (B, C', N) of each layer for columns (B, C, N), (N, C') for rows (N, C)."""
    if is_compiled():
        biases = [bias for _, bias in layers if bias is not None]
        has_bias = [bias is not None for _, bias in layers]
        return _operator(x, [w.flatten(1) for w, _ in layers], biases, has_bias, factor)  # type: ignore[no-any-return]
    parameters: list[Tensor | None] = []
    for weight, bias in layers:
        parameters += [weight.flatten(1), bias]
    return _Pointwise.apply(x, factor, *parameters)  # type: ignore[no-any-return]


def is_last(x: Tensor) -> bool:
    """Whether the channels of (B, C, *spatial) lie side by side in memory."""
    if x.dim() in CHANNELS_LAST:
        return x.stride(1) == 1 and x.is_contiguous(memory_format=CHANNELS_LAST[x.dim()])
    return x.stride(1) == 1 and x.movedim(1, -1).is_contiguous()


class _Pointwise(torch.autograd.Function):
    """W x + bias of columns (B, C, N) or rows (N, C) for several W (C', C), the first times a factor."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factor: float, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *parameters)
        ctx.set_materialize_grads(False)
        ctx.factor = factor
        return tuple(_mapped(x, w, b, f) for w, b, f in _layers(parameters, factor))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        inputs, needed = (x, *parameters), (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
        if takes_plain_gradients(*upstream):
            layers = _layers(parameters, ctx.factor)
            found = plain_gradients(
                lambda: [_plain(x, w, b) * f for w, b, f in layers], inputs, upstream
            )
            return found[0], None, *found[1:]
        gradients: list[Tensor | None] = [None] * len(inputs)
        for n, (weight, _, factor) in enumerate(_layers(parameters, ctx.factor)):
            dy = upstream[n]
            if dy is None:
                continue
            dy = dy.contiguous()
            if needed[0]:
                gradients[0] = _added(gradients[0], dy, weight.t(), factor)
            if needed[2 * n + 1]:
                gradients[2 * n + 1] = _weight_gradient(dy, x, factor)
            if needed[2 * n + 2]:
                gradients[2 * n + 2] = _bias_gradient(dy, factor)
        return gradients[0], None, *gradients[1:]


# Schemas are written out: torch 2.6 infers none of a list of tensors.
@torch.library.custom_op(
    "nlsurgery::pointwise",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] biases, bool[] has_bias, float factor) -> Tensor[]",
)
def _operator(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], has_bias: list[bool], factor: float
) -> list[Tensor]:
    """W x + bias of each layer, the first times a factor; ``biases`` has those that there are."""
    parameters = _with_biases(weights, biases, has_bias)
    return [_mapped(x, w, b, f) for w, b, f in _layers(parameters, factor)]


@_operator.register_fake
def _(x: Tensor, weights: list[Tensor], *_: Any) -> list[Tensor]:
    if x.dim() == 2:
        return [x.new_empty(x.shape[0], w.shape[0]) for w in weights]
    return [x.new_empty(x.shape[0], w.shape[0], x.shape[2]) for w in weights]


@torch.library.custom_op(
    "nlsurgery::pointwise_input_gradient",
    mutates_args=(),
    schema="(Tensor[] upstream, Tensor[] weights, float factor) -> Tensor",
)
def _input_gradient(upstream: list[Tensor], weights: list[Tensor], factor: float) -> Tensor:
    total = None
    for dy, weight, part in zip(upstream, weights, _factors(factor), strict=False):
        total = _added(total, dy.contiguous(), weight.t(), part)
    assert total is not None
    return total


@_input_gradient.register_fake
def _(upstream: list[Tensor], weights: list[Tensor], _: float) -> Tensor:
    dy, channels = upstream[0], weights[0].shape[1]
    shape = (dy.shape[0], channels) if dy.dim() == 2 else (dy.shape[0], channels, dy.shape[2])
    return dy.new_empty(shape)


@torch.library.custom_op(
    "nlsurgery::pointwise_parameter_gradients",
    mutates_args=(),
    schema="(Tensor[] upstream, Tensor x, bool[] has_bias, float factor) -> (Tensor[], Tensor[])",
)
def _parameter_gradients(
    upstream: list[Tensor], x: Tensor, has_bias: list[bool], factor: float
) -> tuple[list[Tensor], list[Tensor]]:
    weights, biases = [], []
    for given, has, part in zip(upstream, has_bias, _factors(factor), strict=False):
        dy = given.contiguous()
        weights.append(_weight_gradient(dy, x, part))
        if has:
            biases.append(_bias_gradient(dy, part))
    return weights, biases


@_parameter_gradients.register_fake
def _(
    upstream: list[Tensor], x: Tensor, has_bias: list[bool], _: float
) -> tuple[list[Tensor], list[Tensor]]:
    weights = [dy.new_empty(dy.shape[1], x.shape[1]) for dy in upstream]
    pairs = zip(upstream, has_bias, strict=True)
    return weights, [dy.new_empty(dy.shape[1]) for dy, has in pairs if has]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, _, ctx.has_bias, ctx.factor = inputs
    ctx.save_for_backward(x, *weights)
    ctx.shapes = [y.shape for y in output]


def _differentiate(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    given = [
        x.new_zeros(shape) if dy is None else dy
        for shape, dy in zip(ctx.shapes, upstream, strict=True)
    ]
    dx = _input_gradient(given, weights, ctx.factor) if ctx.needs_input_grad[0] else None
    dw, db = _parameter_gradients(given, x, ctx.has_bias, ctx.factor)
    return dx, dw, db, None, None


_operator.register_autograd(_differentiate, setup_context=_keep)


def _with_biases(
    weights: Sequence[Tensor], biases: Sequence[Tensor], has_bias: Sequence[bool]
) -> list[Tensor | None]:
    found: Iterator[Tensor | None] = iter(biases)
    parameters: list[Tensor | None] = []
    for weight, has in zip(weights, has_bias, strict=True):
        parameters += [weight, next(found) if has else None]
    return parameters


def _bias_gradient(dy: Tensor, factor: float) -> Tensor:
    return _scale_(dy.sum((0, 2) if dy.dim() == 3 else 0), factor)


def _layers(
    parameters: Sequence[Tensor | None], factor: float
) -> Iterator[tuple[Tensor, Tensor | None, float]]:
    """Each weight, its bias and the factor."""
    layers = zip(parameters[::2], parameters[1::2], _factors(factor), strict=False)
    yield from layers  # type: ignore[misc]


def _factors(factor: float) -> Iterator[float]:
    """That of the first layer, and 1 for all others."""
    return chain((factor,), repeat(1.0))


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias) if x.dim() == 2 else F.conv1d(x, weight.unsqueeze(2), bias)


def _mapped(x: Tensor, weight: Tensor, bias: Tensor | None, factor: float) -> Tensor:
    """factor · (W x + bias)."""
    if is_exact(x):
        if x.dim() == 2:
            return _scale_(product(x, weight, bias), factor)
        y = stacked([product(weight, item.t()) for item in x])
        return _scale_(y if bias is None else y.add_(bias.unsqueeze(1)), factor)
    # The sum and the factor are part of the product.
    start = weight.new_zeros(1) if bias is None else scaled(bias, factor)
    if x.dim() == 2:
        return torch.addmm(start, x, weight.t(), alpha=factor)
    start = start.unsqueeze(1)
    if x.shape[0] == 1:
        return stacked([torch.addmm(start, weight, x[0], alpha=factor)])
    return torch.baddbmm(start, _repeated(weight, x), x, alpha=factor)


def _added(total: Tensor | None, x: Tensor, weight: Tensor, factor: float) -> Tensor:
    """total + factor · W x; ``total`` may be overwritten."""
    if total is None:
        return _mapped(x, weight, None, factor)
    if is_exact(x):
        x = scaled(x, factor)
        if x.dim() == 2:
            return product_and("add", total, x, weight)
        pairs = zip(total, x, strict=True)
        return stacked([product_and("add", part, weight, item.t()) for part, item in pairs])
    if x.dim() == 2:
        return total.addmm_(x, weight.t(), alpha=factor)
    if x.shape[0] == 1:
        total[0].addmm_(weight, x[0], alpha=factor)
        return total
    return total.baddbmm_(_repeated(weight, x), x, alpha=factor)


def _weight_gradient(dy: Tensor, x: Tensor, factor: float) -> Tensor:
    """(C', C), factor times the sum over positions of dy xᵀ."""
    if x.dim() == 2:
        dw = product(dy.t(), x.t())
    elif x.shape[0] == 1 or is_exact(x):
        dw = product(dy[0], x[0])
        for upstream, item in zip(dy[1:], x[1:], strict=True):
            dw = product_and("add", dw, upstream, item)
    else:
        # One product, as sums of several would be rounded.
        dy, x = (t.transpose(0, 1).flatten(1) for t in (dy, x))
        dw = product(dy, x)
    return _scale_(dw, factor)


def _repeated(weight: Tensor, x: Tensor) -> Tensor:
    # A batch of products takes several times as long where the first factor is transposed.
    return weight.contiguous().expand(x.shape[0], -1, -1)


def _scale_(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x.mul_(factor)
