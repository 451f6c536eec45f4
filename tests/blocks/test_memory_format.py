"""Channels first and channels last in memory: the same values and gradients, laid out as asked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nlsurgery.blocks import NonLocal, SelfAttention, attend, residual
from nlsurgery.blocks.geometry import CHANNELS_LAST
from nlsurgery.blocks.memory_format import (
    to_channels_last,
    to_format_of,
    transposed,
    with_channels_as,
)
from nlsurgery.blocks.norms import GroupNorm

from .cases import BFLOAT16, MODES, randomised

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


@pytest.mark.parametrize("spatial", [(6, 5), (24, 25), (2, 16, 17)], ids=str)
def test_attended_values_lie_as_the_input_does(spatial: tuple[int, ...]) -> None:
    first = torch.randn(2, 64, *spatial)
    kind = CHANNELS_LAST[first.dim()]
    last = torch.randn(2, 128, *spatial).to(memory_format=kind)
    turned = with_channels_as(first, last)
    assert turned.is_contiguous(memory_format=kind)
    assert torch.equal(turned, first)
    assert with_channels_as(turned, last) is turned
    assert with_channels_as(first, first) is first
    assert with_channels_as(turned, first) is turned
    sequence = first.flatten(2)
    assert with_channels_as(sequence, sequence.mT.contiguous().mT) is sequence


def test_a_block_projects_attended_values_as_its_input_lies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []
    convolve = residual.convolve

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return convolve(x, weight, bias)

    monkeypatch.setattr(residual, "convolve", spy)
    block = NonLocal(64, implementation="chunked", norm="none")
    x = torch.randn(2, 64, 24, 25).to(memory_format=torch.channels_last)
    block(x)
    assert seen[-1]


@pytest.mark.parametrize("shape", MAPS[:3], ids=str)
def test_a_gradient_of_a_gradient(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = to_format_of(to_channels_last(x) ** 3, x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * x)


@pytest.mark.parametrize("x_last", [False, True], ids=["x first", "x last"])
@pytest.mark.parametrize("y_last", [False, True], ids=["y first", "y last"])
@pytest.mark.parametrize("shape", [(2, 16, 40, 60), (2, 16, 7, 8), (2, 16, 5, 20, 21)], ids=str)
def test_groups_of_values_that_hardly_vary_are_normalised_exactly(shape, y_last, x_last) -> None:
    """Of channels that lie last torch's group normalisation is 1e-2 off here: its variance cancels."""
    last = CHANNELS_LAST[len(shape)]
    kinds = [last if is_last else torch.contiguous_format for is_last in (x_last, y_last)]
    out, norm = (nn.Conv2d if len(shape) == 4 else nn.Conv3d)(16, 16, 1), GroupNorm(16, 16)
    nn.init.eye_(out.weight.view(16, 16))
    x = torch.zeros(shape).contiguous(memory_format=kinds[0])
    y = (1 + 0.01 * torch.randn(shape)).contiguous(memory_format=kinds[1]).requires_grad_()
    upstream = torch.randn(shape)
    results = []
    for dtype in (torch.float32, torch.float64):
        z = residual.add_projected(x.to(dtype), y.to(dtype), out.to(dtype), norm.to(dtype))
        results.append([z, *torch.autograd.grad(z, y, upstream.to(dtype))])
    assert results[0][0].is_contiguous(memory_format=kinds[0])
    for found, wanted in zip(*results, strict=True):
        assert float((found - wanted).detach().norm() / wanted.detach().norm()) < 1e-4


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
@pytest.mark.parametrize("size", [(9,), (3, 3), (2, 3, 3)], ids=str)
@pytest.mark.parametrize("name", [*MODES, "self_attention"])
def test_few_positions_of_many_channels_go_by_rows(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    size: tuple[int, ...],
    dtype: torch.dtype,
    training: bool,
) -> None:
    seen: list[Tensor] = []
    project = attend.to_rows
    monkeypatch.setattr(attend, "to_rows", lambda x: seen.append(project(x)) or seen[-1])
    block: nn.Module = (
        SelfAttention(256, dims=len(size))
        if name == "self_attention"
        else NonLocal(256, dims=len(size), mode=name, zero_init=False)
    )
    block = randomised(block, std=0.05).to(dtype).train(training)
    x = torch.randn(2, 256, *size).to(dtype).requires_grad_()
    upstream = torch.randn_like(x)
    found = []
    for rows in (50, 0):
        monkeypatch.setattr(attend, "FEW_ROWS", rows)
        y = block(x)
        assert y.is_contiguous()
        found.append([y, *torch.autograd.grad(y, [x, *block.parameters()], upstream)])
        assert len(seen) == (0 if name == "gaussian" else 1)
    assert all(rows.stride(1) == 1 for rows in seen)
    wide = x.detach().double().requires_grad_()
    y = block.double()(wide)
    exact = [y, *torch.autograd.grad(y, [wide, *block.parameters()], upstream.double())]
    limit = 1e-5 if dtype == torch.float32 else 5e-3
    for rows, columns, expected in zip(*found, exact, strict=True):
        # Some of these gradients are 0 but for rounding, in either order.
        error, other = (rows - expected).norm(), (columns - expected).norm()
        assert error <= 4 * other + limit * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(9,), (3, 3), (2, 3, 3)], ids=str)
def test_the_identity_by_rows(size: tuple[int, ...], dtype: torch.dtype) -> None:
    block = NonLocal(256, dims=len(size)).to(dtype).eval()
    x = torch.randn(2, 256, *size).to(dtype)
    y = block(x)
    assert torch.equal(y, x)
    assert y.stride() == x.stride()


def test_other_devices_get_tokens_that_are_contiguous() -> None:
    x = torch.empty(2, 64, 8, 8, device="meta")
    y = attend.laid_out(x, "embedded_gaussian", (32, 32), None, "auto")
    assert y.is_contiguous(memory_format=torch.channels_last)
