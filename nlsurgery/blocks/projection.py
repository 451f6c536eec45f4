"""1×1 convolutions as matrix products, on processors where torch's own take longer (``products.py``).

In float32 torch takes MKL for a 1×1 kernel and a batch below 16 on one thread
(``aten/src/ATen/native/Convolution.cpp``), whatever the processor. In bfloat16 its convolutions first copy a
map whose channels come first into another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nlsurgery.blocks import products
from nlsurgery.blocks.geometry import has_sizes, is_eager, working_dtype
from nlsurgery.blocks.pointwise_products import Layer, is_last, pointwise_products
from nlsurgery.blocks.products import is_exact

#: Float32 batches from which on torch itself takes oneDNN, as with more than one thread.
TORCH_BATCH = 16
#: Below so many multiplications to begin takes longer than to multiply.
MANY_PRODUCTS = 1 << 22
#: The same of an item of a float32 batch.
MANY_ITEM_PRODUCTS = 3 << 19
#: Up to how many multiplications torch's products take less time than its convolutions, and than ours; in
#: float32 half as many from :data:`TORCH_BATCH` on.
FEW_PRODUCTS = dict.fromkeys((torch.float32, torch.bfloat16), MANY_PRODUCTS)
#: The same with channels last, of fewer positions than this.
FEW_PRODUCTS_LAST = {torch.float32: MANY_PRODUCTS, torch.bfloat16: 1 << 25}
FEW_POSITIONS_LAST = 1 << 10
#: Weights of so many values in all are joined at no cost, where torch multiplies.
JOINED_WEIGHTS = {torch.float32: 1 << 16, torch.bfloat16: 1 << 19}
#: Multiplications up to which it takes less time to join bfloat16 weights than to begin several products, for
#: results of up to so many values.
JOINED_PRODUCTS, JOINED_RESULTS = 1 << 27, 1 << 20
#: So many times the positions of a bfloat16 map are fewer than the channels of all its items where
#: one convolution is faster, as products copy weights for each. By whether there are several threads.
JOINED_POSITIONS = {False: 1 << 6, True: 1 << 5}
#: Weights of so many values for results of so many are joined where convolutions take long to begin.
CONVOLVED_WEIGHTS, CONVOLVED_RESULTS = 1 << 18, 1 << 18
#: Weights up to which a bfloat16 batch is multiplied faster than convolved.
BATCH_WEIGHTS = 1 << 18


def goes_by_products(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`pointwise_products` is faster than torch's convolution.

    Args:
        x: (B, C, *spatial).
        weight: (C', C, 1, …).
    """
    if not has_sizes() or x.numel() * weight.shape[0] < MANY_PRODUCTS:
        return False
    if not _may_be_multiplied(x, weight):
        return False
    if is_exact(x):
        # An item at a time where channels come first.
        items = x.shape[0] if x.is_contiguous() else 1
        many = x.numel() * weight.shape[0] >= MANY_ITEM_PRODUCTS * items
        return many and not torch_takes_onednn(x)
    return x.is_contiguous() and (x.shape[0] == 1 or weight.numel() <= BATCH_WEIGHTS)


def is_small_product(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`small_product` is faster than torch's convolution, which takes long to begin.

    Args:
        x: (B, C, *spatial).
        weight: (C', C, 1, …).
    """
    return is_eager() and _is_as_given(x, weight) and _is_small(x, weight.shape[0])


def _is_small(x: Tensor, channels: int) -> bool:
    few = FEW_PRODUCTS.get(x.dtype, 0)
    if not x.is_contiguous():
        few = FEW_PRODUCTS_LAST.get(x.dtype, 0)
        if x.numel() >= FEW_POSITIONS_LAST * x.shape[1] or not is_last(x):
            return False
    if is_exact(x) and x.shape[0] >= TORCH_BATCH:
        few >>= 1
    if x.numel() * channels >= few:
        return False
    return is_exact(x) or products.multiplies_bfloat16()


def joined(layers: Sequence[Layer]) -> Layer | None:
    """Several layers as one, its result theirs side by side; ``None`` if only some have a bias."""
    biases = [bias for _, bias in layers if bias is not None]
    if len(biases) not in (0, len(layers)):
        return None
    return torch.cat([weight for weight, _ in layers]), torch.cat(biases) if biases else None


def parted(y: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """The result of each layer, views of that of :func:`joined` ones."""
    return torch.split(y, [weight.shape[0] for weight, _ in layers], dim=1)


def small_products(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...] | None:
    """Several 1×1 convolutions of one map where each would take long to begin: joined, if that is faster.

    Args:
        x: (B, C, *spatial).
        layers: The weight and bias of each.

    Returns:
        One (B, C', *spatial) of each, views of one tensor where they were computed together; ``None`` where
        nothing of this is faster.
    """
    weights = [weight for weight, _ in layers]
    if not (is_eager() and _is_as_given(x, *weights)):
        return None
    multiply = _joint_product(x, weights)
    if multiply is not None and (layer := joined(layers)) is not None:
        return parted(multiply(x, *layer), layers)
    if not _is_small(x, max(weight.shape[0] for weight in weights)):
        return None
    return tuple(small_product(x, weight, bias) for weight, bias in layers)


def _joint_product(x: Tensor, weights: Sequence[Tensor]) -> Callable[..., Tensor] | None:
    """What multiplies joined weights faster than one after the other, if anything does."""
    values = sum([weight.numel() for weight in weights])
    if values <= JOINED_WEIGHTS[x.dtype]:
        if _is_small(x, values // x.shape[1]):
            return small_product
        if not is_exact(x) and x.is_contiguous() and products.are_by_onednn(x.dtype, "cpu"):
            return _joint_bfloat16_product(x, values)
    if is_exact(x) and x.dim() == 4 and values <= CONVOLVED_WEIGHTS:
        results = x.numel() // x.shape[1] * (values // x.shape[1])
        if 0 < results <= CONVOLVED_RESULTS and torch_takes_onednn(x):
            return F.conv2d
    return None


def _joint_bfloat16_product(x: Tensor, values: int) -> Callable[..., Tensor] | None:
    batch, channels = x.shape[:2]
    if x.numel() * values > JOINED_RESULTS * channels**2:
        return None
    factor = JOINED_POSITIONS[products.takes_threads()]
    if x.dim() == 4 and 0 < x.numel() * factor <= (batch * channels) ** 2:
        return F.conv2d
    return _one_product if x.numel() * values < JOINED_PRODUCTS * channels else None


def _one_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return pointwise_products(x, [(weight, bias)])[0]


def torch_takes_onednn(x: Tensor) -> bool:
    """Whether torch's float32 convolutions of a map on a CPU go by oneDNN (``Convolution.cpp``)."""
    return products.takes_threads() or x.shape[0] >= TORCH_BATCH


def small_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 1×1 convolution as a product of torch's.

    Args:
        x: (B, C, *spatial), contiguous or with channels last.
        weight: (C', C, 1, …).
        bias: (C',).

    Returns:
        (B, C', *spatial), lying as ``x`` does.
    """
    by_mkl = x.shape[0] == 1 or not torch_takes_onednn(x)
    if by_mkl and is_exact(x) and x.dim() == 4 and x.numel() > 0:
        # That product by fewer calls; of no positions there is no convolution.
        return F.conv2d(x, weight, bias)
    if not x.is_contiguous():
        return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    start = weight.new_zeros(1) if bias is None else bias.unsqueeze(1)
    matrices = weight.flatten(1).expand(x.shape[0], -1, -1)
    y = torch.baddbmm(start, matrices, x.flatten(2))
    return y.view(x.shape[0], weight.shape[0], *x.shape[2:])


def may_go_by_products(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`pointwise_products` takes a map (B, C, *spatial) and a weight (C', C, 1, …)."""
    return has_sizes() and _may_be_multiplied(x, weight)


def _may_be_multiplied(x: Tensor, weight: Tensor) -> bool:
    lies_well = _is_as_given(x, weight) and (x.is_contiguous() or is_last(x))
    by_onednn = lies_well and products.are_by_onednn(x.dtype, x.device.type)
    return by_onednn and products.halves(x.dtype)


def _is_as_given(x: Tensor, *weights: Tensor) -> bool:
    """Whether torch would convolve on a CPU and in the dtype of both: float32 or bfloat16."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    dtype = working_dtype(x)
    return x.dtype == dtype and all(weight.dtype == dtype for weight in weights)
