"""Down-samplings become dilation: an existing network gets a finer feature map, its weights kept.

A network of stride 32 cut to ``output_stride`` 8 keeps its first three halvings. Each later one is taken
out (stride 1), and every spatial convolution that used to work on the coarser map is dilated by what its
map has grown, so that its weights meet the same distances in the image.
Source: Yu and Koltun, "Multi-Scale Context Aggregation by Dilated Convolutions" (arXiv 1511.07122); Chen et
al., "Rethinking Atrous Convolution" (arXiv 1706.05587), Sec. 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from nlsurgery.errors import ModelError
from nlsurgery.probe import Call, Trace

#: On a convolution turned into a dilated one: its own stride, padding and dilation.
ORIGINAL_NAME = "_nlsurgery_original"
#: On the model: the output stride it was brought to.
STRIDE_NAME = "_nlsurgery_output_stride"


@dataclass(frozen=True, slots=True)
class Redilation:
    """One module to change.

    Attributes:
        fqn: Its path.
        keep_stride: Whether it still halves the map.
        factor: What its dilation is multiplied by.
    """

    fqn: str
    keep_stride: bool
    factor: int


class SameAvgPool2d(nn.Module):
    """An average pooling with its stride taken out: the map keeps its size, padded at its far ends.

    Args:
        original: The pooling in whose place it stands.
    """

    def __init__(self, original: nn.AvgPool2d) -> None:
        super().__init__()
        self.original = original

    def forward(self, x: Tensor) -> Tensor:
        """Pool (B, C, H, W) to the same size."""
        pool = self.original
        height, width = _pair(pool.kernel_size)
        left, top = (width - 1) // 2, (height - 1) // 2
        x = F.pad(x, (left, width - 1 - left, top, height - 1 - top))
        return F.avg_pool2d(x, (height, width), 1, 0, pool.ceil_mode, pool.count_include_pad)


def plan_dilation(model: nn.Module, trace: Trace, output_stride: int) -> tuple[Redilation, ...]:
    """Find what has to change for a network to keep 1/``output_stride`` of its input's size.

    Args:
        model: The network; only looked at.
        trace: Its forward.
        output_stride: 8 or 16, in pixels.

    Raises:
        ModelError: It is coarsened by something that cannot be taken out, or not at all.
    """
    changes = tuple(_changes(model, trace, output_stride))
    if not changes and getattr(model, STRIDE_NAME, None) != output_stride:
        raise ModelError(
            f"output_stride: {output_stride}: {type(model).__name__} has no down-sampling beyond 1/"
            f"{output_stride} that a convolution does; take it out of the recipe"
        )
    return changes


def _changes(model: nn.Module, trace: Trace, output_stride: int) -> Iterator[Redilation]:
    modules = dict(model.named_modules())
    counts = trace.num_calls()
    for call in trace.calls:
        module = modules[call.fqn]
        stride = None if module._modules else _stride(module)
        reached = _input_stride(trace, call)
        if reached is None or stride is None or reached * stride <= output_stride:
            continue
        if isinstance(module, nn.Conv2d):
            factor = max(1, reached // output_stride)
            if max(_pair(module.kernel_size)) == 1:
                factor = 1
            _check_padding(module, call, trace)
            if stride > 1 or factor > 1:
                yield Redilation(call.fqn, stride == 1, factor)
        elif stride > 1 and isinstance(module, nn.AvgPool2d) and counts[call.fqn] == 1:
            yield Redilation(call.fqn, False, 1)
        elif stride > 1:
            raise ModelError(
                f"output_stride: {output_stride}: {call.fqn} of {type(model).__name__} is a "
                f"{type(module).__name__} of stride {stride}, which cannot become dilation; only "
                f"networks that down-sample by convolution can be brought to a finer map"
            )


def _stride(module: nn.Module) -> int | None:
    """The stride of a layer, None for modules that have none."""
    stride = getattr(module, "stride", None)
    if isinstance(stride, int):
        return stride
    if isinstance(stride, tuple) and stride and all(isinstance(s, int) for s in stride):
        return int(max(stride))
    return None


def _input_stride(trace: Trace, call: Call) -> int | None:
    """Image height over the height of what a layer reads, None when that is no spatial map."""
    for node in call.inputs:
        shape = trace.nodes[node].shape
        if len(shape) == 4 and len(trace.input_shape) == 4 and shape[-2] > 1:
            return int(2 ** round(math.log2(trace.input_shape[-2] / shape[-2])))
    return None


def _check_padding(conv: nn.Conv2d, call: Call, trace: Trace) -> None:
    """Only a convolution that gives ceil(size / stride) keeps its map's size without its stride."""
    stride = conv.stride[0]
    sizes = [trace.nodes[node].shape[-2] for node in call.inputs[:1]]
    same = all(-(-size // stride) == out.shape[-2] for size in sizes for out in call.outputs)
    if not same or any(kernel % 2 == 0 for kernel in conv.kernel_size):
        raise ModelError(
            f"output_stride: {call.fqn} has kernel {tuple(conv.kernel_size)}, stride "
            f"{tuple(conv.stride)} and padding {conv.padding}: only convolutions with an odd kernel "
            f"that pad to the size of their map can become dilated ones"
        )


def dilate(model: nn.Module, changes: tuple[Redilation, ...], output_stride: int) -> None:
    """Carry changes out, in place. :func:`undo_dilation` takes them back.

    Args:
        model: The network the changes were planned for.
        changes: What :func:`plan_dilation` found.
        output_stride: What the model will be marked with.
    """
    for change in changes:
        module = model.get_submodule(change.fqn)
        if isinstance(module, nn.Conv2d):
            _dilate_conv(module, change)
        elif isinstance(module, nn.AvgPool2d):
            parent, _, name = change.fqn.rpartition(".")
            model.get_submodule(parent)._modules[name] = SameAvgPool2d(module).train(
                module.training
            )
    if changes:
        model.__dict__[STRIDE_NAME] = output_stride


def _dilate_conv(conv: nn.Conv2d, change: Redilation) -> None:
    names = ("stride", "padding", "dilation", "_reversed_padding_repeated_twice")
    if ORIGINAL_NAME not in conv.__dict__:
        conv.__dict__[ORIGINAL_NAME] = {name: conv.__dict__[name] for name in names}
    if not change.keep_stride:
        conv.stride = (1, 1)
    if change.factor > 1:
        height, width = _pair(conv.dilation)
        conv.dilation = (height * change.factor, width * change.factor)
        if not isinstance(conv.padding, str):
            top, left = _pair(conv.padding)
            conv.padding = (top * change.factor, left * change.factor)
        conv._reversed_padding_repeated_twice = [
            side * change.factor for side in conv._reversed_padding_repeated_twice
        ]


def undo_dilation(model: nn.Module) -> None:
    """Give every module its own stride and dilation back."""
    for module in list(model.modules()):
        original = module.__dict__.pop(ORIGINAL_NAME, None)
        if original is not None:
            module.__dict__.update(original)
        for name, child in module._modules.items():
            if isinstance(child, SameAvgPool2d):
                module._modules[name] = child.original.train(child.training)
    model.__dict__.pop(STRIDE_NAME, None)


def refinement(conv: nn.Conv2d | nn.Conv3d) -> int | None:
    """By how much surgery made a convolution's output finer than it was, None when it did not."""
    original = conv.__dict__.get(ORIGINAL_NAME)
    if original is None:
        return None
    wider = max(conv.dilation) // max(original["dilation"])
    return int(wider * max(original["stride"]) // max(conv.stride))


def output_stride_of(model: nn.Module) -> int | None:
    """The output stride that surgery brought a model to, None when it did not."""
    value = model.__dict__.get(STRIDE_NAME)
    return value if isinstance(value, int) else None


def _pair(value: object) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, tuple | list) and len(value) == 2:
        return int(value[0]), int(value[1])
    raise ModelError(f"a size must be one or two integers, but got {value!r}")
