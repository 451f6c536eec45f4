"""Blocks under torch.fx, torch.compile and torch.export compute what they compute eagerly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from .cases import randomised
from .test_identity import BLOCKS, build

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def random_block(name: str) -> nn.Module:
    return randomised(build(name), std=0.2).eval()


@pytest.mark.parametrize("name", BLOCKS)
def test_fx_symbolic_trace(name):
    block = random_block(name)
    traced = torch.fx.symbolic_trace(block)
    for size in ((5, 4), (7, 1)):
        x = torch.randn(2, 16, *size)
        torch.testing.assert_close(traced(x), block(x), rtol=0, atol=0)
    x = torch.randn(2, 16, 5, 4)
    torch.testing.assert_close(traced.train()(x), block.train()(x), rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_compiles_as_one_graph(name, training):
    block = random_block(name).train(training)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=False)
    x = torch.randn(2, 16, 5, 4, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, block(x), **CLOSE)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(block(x).square().sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BLOCKS)
def test_exports_with_dynamic_sizes(name):
    block = random_block(name)
    # From 4 on: a pooled size of 1 would be another graph.
    sizes = {2: torch.export.Dim("h", min=4, max=64), 3: torch.export.Dim("w", min=4, max=64)}
    program = torch.export.export(block, (torch.randn(2, 16, 6, 5),), dynamic_shapes=(sizes,))
    for size in ((6, 5), (9, 4)):
        x = torch.randn(2, 16, *size)
        torch.testing.assert_close(program.module()(x), block(x), **CLOSE)
