"""The residual side of a block: with a zero gate the branch changes no bit of the host's output.

``0 · inf`` is NaN, so a zero γ (or a zero BatchNorm) alone does not keep an overflowing branch out.
:func:`finite` therefore puts 0 in place of every non-finite value *before* the gate: a branch that
overflows adds nothing there. Its gradient passes unchanged, so a loss scaler still sees overflow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlsurgery.blocks.affinity_explicit import is_large_item
from nlsurgery.blocks.affinity_operator import is_small_head
from nlsurgery.blocks.geometry import (
    CHANNELS_LAST,
    has_sizes,
    is_batched,
    is_compiled,
    is_eager,
    num_keys,
    working_dtype,
)
from nlsurgery.blocks.memory_format import to_format_of, with_channels_as, with_channels_first
from nlsurgery.blocks.norms import BatchNorm, GroupNorm
from nlsurgery.blocks.pointwise_products import pointwise_products
from nlsurgery.blocks.products import is_power_of_two
from nlsurgery.blocks.projection import (
    goes_by_products,
    is_small_product,
    joined,
    may_go_by_products,
    parted,
    small_product,
    small_products,
    torch_takes_onednn,
)

#: Below so many values, batch normalisation takes less time than folding it.
FOLDED_VALUES = 1 << 17
#: Below so many values, a gradient's layout does not matter.
DENSE_VALUES = 1 << 14
#: Below so many positions, weights take longer to join than inputs to read; fewer in bfloat16, where
#: torch's CPU convolutions take long to begin.
MANY_POSITIONS = 1024
MANY_POSITIONS_BFLOAT16 = 128
#: Weights of so many values in all are joined only for as many positions as the input has channels.
MANY_WEIGHTS = 1 << 20
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ONES = {(1,), (1, 1), (1, 1, 1)}
_NO_PADDING = {(0,), (0, 0), (0, 0, 0), "same", "valid"}
_FUNCTIONS = {3: F.conv1d, 4: F.conv2d}


def is_plain(module: nn.Module) -> bool:
    """Whether a convolution may be computed from its parameters, its ``forward`` left out.

    That is so for torch's own 1×1 convolutions without groups or hooks; a replaced, quantised,
    parametrised or hooked projection is always called.
    """
    if type(module) not in _CONVS or _is_hooked(module):
        return False
    assert isinstance(module, _CONVS)
    if module.kernel_size not in _ONES or module.stride not in _ONES:
        return False
    return module.groups == 1 and module.padding in _NO_PADDING


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    hooks = hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


@torch.fx.wrap
def project(projection: nn.Module, x: Tensor) -> Tensor:
    """``projection(x)`` of a 1×1 convolution; in 3-D by what has a fast form on every backend.

    Args:
        projection: The module; one that is not plain is called.
        x: (B, C, *spatial).

    Returns:
        (B, C', *spatial) in the memory format of ``x``.
    """
    if is_plain(projection):
        return convolve(x, *parameters_of(projection))
    return projection(x)  # type: ignore[no-any-return]


@torch.fx.wrap
def project_scaled(
    x: Tensor,
    scale: float,
    *projections: nn.Module,
    pool: Sequence[int] | None = None,
    heads: int | None = None,
    form: str = "auto",
) -> tuple[tuple[Tensor, ...], float]:
    """:func:`project_together` queries and what else is projected, the queries scaled where that is better.

    Args:
        x: (B, C, *spatial).
        scale: The factor on the logits.
        projections: The modules, that of the queries first.
        pool: By how many keys are pooled along each axis, if they are.
        heads: Of attention in several heads, how many.
        form: The block's ``implementation``.

    Returns:
        One (B, C', *spatial) of each, and the factor on the logits that is left.
    """
    factor = queries_factor(x, scale, *projections, pool=pool, heads=heads, form=form)
    if factor == 1.0:
        return project_together(x, *projections), scale
    return pointwise_products(x, [parameters_of(p) for p in projections], factor), scale / factor


def queries_factor(
    x: Tensor,
    scale: float,
    *projections: nn.Module,
    pool: Sequence[int] | None = None,
    heads: int | None = None,
    form: str = "auto",
) -> float:
    """The part of the factor on the logits that :func:`project_scaled` gives the queries.

    That is all of it where scaled queries would be rounded twice otherwise, or logits be formed by two
    products: in bfloat16 by oneDNN, for a factor that is no power of two. Elsewhere it is 1.

    Args:
        x: (B, C, *spatial).
        scale: The factor on the logits.
        projections: Those of the queries first.
        pool: By how many keys are pooled along each axis, if they are.
        heads: Of attention in several heads, how many.
        form: The block's ``implementation``.
    """
    if x.dtype != torch.bfloat16 or is_power_of_two(scale) or not has_sizes():
        return 1.0
    if not all(is_plain(projection) for projection in projections):
        return 1.0
    weights = [parameters_of(projection)[0] for projection in projections]
    logits = math.prod(x.shape[2:]) * num_keys(x.shape[2:], pool)
    if heads is not None:
        is_formed_once = not is_small_head(logits, weights[0].shape[0] // heads)
    else:
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
        is_formed_once = form == "chunked" or is_large_item(
            x.shape[0], logits, weights[0].shape[0], trains
        )
    # Else passes form them, which scale them at no cost.
    return scale if is_formed_once and may_go_by_products(x, weights[0]) else 1.0


@torch.fx.wrap
def project_together(x: Tensor, *projections: nn.Module) -> tuple[Tensor, ...]:
    """Several 1×1 convolutions of one input, as one where that is faster: x is read once.

    It is not where the weights are as large as the input, nor in float32 where the channels of a
    batch lie apart.

    Args:
        x: (B, C, *spatial).
        projections: The modules.

    Returns:
        One (B, C', *spatial) of each; views of one tensor where they were computed together.
    """
    if not all(is_plain(projection) for projection in projections):
        return tuple(project(projection, x) for projection in projections)
    layers = [parameters_of(projection) for projection in projections]
    if (found := small_products(x, layers)) is not None:
        return found
    weights = [weight for weight, _ in layers]
    if all(goes_by_products(x, weight) for weight in weights):
        return pointwise_products(x, layers)
    layer = joined(layers) if _joins(x, weights) else None
    if layer is None:
        return tuple(convolve(x, weight, bias) for weight, bias in layers)
    return parted(convolve(x, *layer), layers)


def parameters_of(projection: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of a convolution."""
    held = projection._parameters
    if held.get("weight") is not None and "bias" in held:
        # A fifth of the time that their names take.
        return cast(Tensor, held["weight"]), held["bias"]
    return cast(Tensor, projection.weight), cast("Tensor | None", projection.bias)


def _joins(x: Tensor, weights: Sequence[Tensor]) -> bool:
    # A choice by size would fix the sizes of a traced graph: it is left out there.
    if not is_eager():
        return False
    dtype = working_dtype(x)
    apart = dtype == torch.float32 and x.shape[0] > 1 and x.is_contiguous()
    many = MANY_POSITIONS_BFLOAT16 if dtype == torch.bfloat16 else MANY_POSITIONS
    if apart or x.numel() < many * x.shape[1]:
        return False
    size = sum(weight.numel() for weight in weights)
    return size <= MANY_WEIGHTS or x.numel() >= x.shape[1] ** 2


@torch.fx.wrap
def matrix_of(layer: nn.Module, x: Tensor, *size: int) -> Tensor:
    """The weight of a 1×1 convolution or linear layer that is used as a matrix.

    Args:
        layer: The module; one that is neither is called, and is linear.
        x: What has the dtype and device of its inputs.
        size: Of one input: (C,) or (C, 1, 1).

    Returns:
        (C', C), or (C', C, 1, 1).
    """
    if is_plain(layer) or (type(layer) is nn.Linear and not _is_hooked(layer)):
        return parameters_of(layer)[0]
    units = torch.eye(size[0], dtype=x.dtype, device=x.device).view(-1, *size)
    return layer(units).flatten(1).T  # type: ignore[no-any-return]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 1×1 convolution of (B, C, *spatial) with a weight (C', C, 1, …)."""
    if is_small_product(x, weight):
        return small_product(x, weight, bias)
    if goes_by_products(x, weight):
        return pointwise_products(x, [(weight, bias)])[0]
    if x.dim() != 5:
        return _FUNCTIONS[x.dim()](x, weight, bias)
    tokens = x.movedim(1, -1)
    if tokens.is_contiguous():
        exact = x.device.type == "cpu" and working_dtype(x) == torch.float32
        if exact and is_eager() and torch_takes_onednn(x):
            y = F.conv2d(x.flatten(2, 3), weight.flatten(3), bias)
            return y.view(*y.shape[:2], *x.shape[2:])
        return F.linear(tokens, weight.flatten(1), bias).movedim(-1, 1)
    y = F.conv2d(x.flatten(3), weight.flatten(3), bias)
    return y.reshape(*y.shape[:3], *x.shape[3:])


@torch.fx.wrap
def finite(z: Tensor, fresh: bool = False) -> Tensor:
    """Put 0 in place of NaN and ±inf; the gradient passes unchanged.

    Args:
        z: A branch's values, any shape.
        fresh: Whether nothing else holds ``z``, so that it may be changed in place.

    Returns:
        The same shape, dtype and memory format, all values finite.
    """
    if is_compiled():
        # As much as one comparison, where torch's function takes several.
        return torch.where(z.abs() < math.inf, z, 0.0)
    if not is_eager():
        return torch.nan_to_num(z, nan=0.0, posinf=0.0, neginf=0.0)
    if not (z.requires_grad and torch.is_grad_enabled()):
        replace = torch.nan_to_num_ if fresh else torch.nan_to_num
        return replace(z, nan=0.0, posinf=0.0, neginf=0.0)
    z = z if fresh else z.clone()
    # Unseen by autograd: nothing is saved, and the gradient passes.
    with torch.no_grad():
        return z.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


@torch.fx.wrap
def add_branch(x: Tensor, z: Tensor) -> Tensor:
    """``x + z`` in the dtype and memory format of ``x``.

    Args:
        x: (B, C, *spatial), the host's output.
        z: The same shape in any floating dtype and memory format, finite.

    Returns:
        A new tensor like ``x``; equal to ``x`` to the last bit where ``z`` is 0.
    """
    z = z if z.dtype == x.dtype else z.to(x.dtype)
    return _like(_add(x, z), x)


@torch.fx.wrap
def add_gated(x: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
    """``x + γ · finite(y)`` in the dtype and memory format of ``x``.

    Args:
        x: (B, C, *spatial), the host's output.
        y: The same shape in any floating dtype.
        gamma: (1,).
    """
    scaled = gamma.to(x.dtype) * finite(y).to(x.dtype)
    return _like(_add(x, scaled), x)


@torch.fx.wrap
def add_projected(x: Tensor, y: Tensor, out: nn.Module, norm: nn.Module | None) -> Tensor:
    """Compute ``x + norm(out(y))``, the end of a non-local block.

    In eval, batch normalisation is folded into the weight and bias of ``out`` on the way, where
    the map is large enough for that to pay; the parameters stay as they are.

    Args:
        x: (B, C, *spatial), the host's output.
        y: (B, C', *spatial).
        out: The 1×1 convolution C' → C.
        norm: What follows it, or ``None``.

    Returns:
        A new tensor like ``x``.
    """
    y = with_channels_as(y, x)
    plain = is_plain(out)
    if plain and isinstance(norm, BatchNorm) and _may_fold(norm, y):
        z = finite(_folded(y, out, norm), fresh=True)
    else:
        z = finite(project(out, y), fresh=plain)
        # torch's CPU normalisations of a sequence take up to ten times as long with channels last.
        z = z.contiguous() if z.dim() == 3 else z
        z = z if norm is None else normalised(z, norm, x)
    return add_branch(x, z)


def normalised(z: Tensor, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(z)``, both (B, C, *spatial); of groups in memory as ``x`` lies."""
    if isinstance(norm, GroupNorm):
        # Of channels last torch takes the variance for E[z²] - E[z]², and loses it where z varies little.
        return with_channels_as(_with_dense_gradient(norm(with_channels_first(z))), x)
    return _with_dense_gradient(norm(z))


def _with_dense_gradient(z: Tensor) -> Tensor:
    # torch's CPU normalisations take ten times as long in backward where the gradient lies in memory
    # other than their input does, or is expanded, as that of a sum is.
    if (
        not (z.requires_grad and z.device.type == "cpu")
        or z.numel() < DENSE_VALUES
        or not is_eager()
    ):
        return z
    last = CHANNELS_LAST.get(z.dim(), torch.contiguous_format)
    kind = last if z.is_contiguous(memory_format=last) else torch.contiguous_format
    z.register_hook(partial(_laid_out, kind=kind))  # type: ignore[no-untyped-call]
    return z


def _laid_out(gradient: Tensor, kind: torch.memory_format) -> Tensor:
    # Of many gradients at a time torch knows no memory format.
    return gradient if is_batched(gradient) else gradient.contiguous(memory_format=kind)


def _may_fold(norm: BatchNorm, y: Tensor) -> bool:
    if norm.training or type(norm) is not BatchNorm:
        return False
    # A choice by size would fix the sizes of a traced graph.
    if not torch.compiler.is_compiling() and y.numel() < max(y.shape[1] ** 2, FOLDED_VALUES):
        return False
    hooks = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks
    return norm.running_mean is not None and not hooks


def _folded(y: Tensor, out: nn.Module, norm: BatchNorm) -> Tensor:
    weight, bias = out.weight, out.bias
    assert isinstance(weight, Tensor)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    wide = torch.promote_types(weight.dtype, torch.float32)
    factor = norm.weight.to(wide) * torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    centre = norm.running_mean.to(wide)
    shift = (bias.to(wide) - centre if isinstance(bias, Tensor) else -centre) * factor
    shape = (-1, *[1] * (weight.dim() - 1))
    folded = (weight.to(wide) * factor.view(shape)).to(weight.dtype)
    return convolve(y, folded, (shift + norm.bias.to(wide)).to(weight.dtype))


def _add(x: Tensor, z: Tensor) -> Tensor:
    turned = to_format_of(z, x)
    fresh = turned is not z and not (turned.requires_grad or x.requires_grad)
    return turned.add_(x) if fresh else torch.add(x, turned)


def _like(y: Tensor, x: Tensor) -> Tensor:
    # Strides along sizes of 1 are ambiguous: torch then follows the other summand, and what comes
    # next in the host might pick another kernel.
    if y.stride() == x.stride():
        return y
    like = torch.empty_like(x)
    return y if y.stride() == like.stride() else like.copy_(y)
