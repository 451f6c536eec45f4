"""Blocks under torch.func: per-sample gradients are those of one sample at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from nlsurgery.blocks import NonLocal, SelfAttention

from .cases import randomised
from .test_forms import PAIRS
from .test_identity import BLOCKS, build


def loss_of(block: nn.Module):
    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(block, parameters, (x.unsqueeze(0),)).square().mean()

    return loss


def check_per_sample_gradients(block: nn.Module, x: Tensor) -> None:
    parameters = {name: p.detach() for name, p in block.named_parameters()}
    found = vmap(grad(loss_of(block), argnums=(0, 1)), (None, 0))(parameters, x)
    for index, sample in enumerate(x):
        wanted_x = sample.clone().requires_grad_()
        named = dict(copy.deepcopy(block).named_parameters())
        loss_of(block)(named, wanted_x).backward()
        torch.testing.assert_close(found[1][index], wanted_x.grad, rtol=1e-9, atol=1e-9)
        for name, parameter in named.items():
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[0][name][index], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BLOCKS)
def test_per_sample_gradients_of_every_block(name):
    x = torch.randn(3, 16, 5, 4, dtype=torch.float64)
    check_per_sample_gradients(randomised(build(name), std=0.2).double().eval(), x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("mode", "form"), PAIRS)
def test_per_sample_gradients_of_every_form(mode, form, memory_format):
    block = NonLocal(8, 4, mode=mode, implementation=form, norm="gn", sub_sample=True)
    x = torch.randn(2, 8, 12, 10, dtype=torch.float64).to(memory_format=memory_format)
    check_per_sample_gradients(randomised(block).double(), x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.parametrize("form", ["explicit", "fused", "chunked"])
def test_forward_mode(form):
    block = randomised(SelfAttention(16, implementation=form)).double()
    x, tangent = (torch.randn(1, 16, 6, 5, dtype=torch.float64) for _ in range(2))
    _, found = jvp(block, (x,), (tangent,))
    step = 1e-6
    wanted = (block(x + step * tangent) - block(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-6, atol=1e-6)


def check_batches_of_gradients(block: nn.Module, x: Tensor) -> None:
    x.requires_grad_()
    y, wanted_of = block(x), [x, *block.parameters()]
    upstream = torch.randn(2, *y.shape, dtype=x.dtype)

    def gradients(dy: Tensor, batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            y, wanted_of, dy, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )

    found = gradients(upstream, True)
    for index, dy in enumerate(upstream):
        for batch, wanted in zip(found, gradients(dy, False), strict=True):
            if wanted is not None:
                limit = 1e-9 if x.dtype == torch.float64 else 1e-4
                assert (batch[index] - wanted).norm() <= limit * max(1.0, float(wanted.norm()))


@pytest.mark.parametrize("name", BLOCKS)
def test_batches_of_gradients_of_every_block(name):
    # What torch.autograd.functional.jacobian(vectorize=True) asks for.
    block = randomised(build(name), std=0.2).double().eval()
    check_batches_of_gradients(block, torch.randn(2, 16, 6, 5, dtype=torch.float64))


@pytest.mark.parametrize("processor", ["mkl", "onednn", "level"])
@pytest.mark.parametrize(("mode", "form"), PAIRS)
def test_batches_of_gradients_of_every_form(mode, form, processor, request):
    request.getfixturevalue(processor)
    block = NonLocal(16, 8, mode=mode, implementation=form)
    check_batches_of_gradients(randomised(block, std=0.2).eval(), torch.randn(2, 16, 20, 41))
