"""Channels first and channels last in memory: the same values and gradients, laid out as asked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nlsurgery.blocks import NonLocal
from nlsurgery.blocks.geometry import CHANNELS_LAST
from nlsurgery.blocks.memory_format import to_channels_last, to_format_of, transposed

MAPS = [(2, 128, 20, 26), (1, 64, 32, 64), (1, 256, 4, 8, 9), (2, 3, 4, 5), (1, 1, 300, 300)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 100, 64), (3, 70, 128), (2, 5, 64), (1, 100, 65), (1, 90, 640), (0, 9, 64)]
)
def test_transposed_holds_every_value(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    y = transposed(x)
    assert y.is_contiguous()
    assert torch.equal(y, x.transpose(1, 2))


@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_there_and_back(shape: tuple[int, ...]) -> None:
    last = CHANNELS_LAST[len(shape)]
    x = torch.randn(shape, requires_grad=True)
    y = to_channels_last(x)
    assert y.is_contiguous(memory_format=last)
    assert torch.equal(y, x)
    z = to_format_of(y, x)
    assert torch.equal(z, x)
    upstream = torch.randn(shape)
    (gradient,) = torch.autograd.grad(z, x, upstream)
    assert torch.equal(gradient, upstream)


def test_what_lies_as_asked_is_returned_itself() -> None:
    x = torch.randn(2, 128, 20, 26)
    last = x.to(memory_format=torch.channels_last)
    assert to_channels_last(last) is last
    assert to_format_of(x, x) is x
    assert to_format_of(last, last) is last
    row = x[0]
    assert to_channels_last(row) is row


def test_a_block_sends_back_a_gradient_that_lies_as_its_input_does() -> None:
    """Else the sum with the residual's gradient takes ten times as long as a sum needs."""
    block = NonLocal(128, zero_init=False, implementation="fused")
    x = torch.randn(2, 128, 20, 26, requires_grad=True)
    parts: list[Tensor] = []
    source = x * 1
    source.register_hook(parts.append)
    block(source).sum().backward()
    assert parts[0].is_contiguous()


@pytest.mark.parametrize("shape", MAPS[:3], ids=str)
def test_a_gradient_of_a_gradient(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = to_format_of(to_channels_last(x) ** 3, x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * x)
