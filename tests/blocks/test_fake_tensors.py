"""Blocks of tensors without values: memory is planned, and large models are laid out, with such."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nlsurgery.blocks import NonLocal, products

from .test_forms import PAIRS
from .test_identity import BLOCKS, build


def check(make: Callable[[], nn.Module], *shape: int, dtype: torch.dtype = torch.float32) -> None:
    """The result and the gradients have the real ones' shapes and dtypes, the result its strides."""

    def result() -> list[tuple[object, ...]]:
        block = make()
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        y = block(x)
        assert y.stride() == x.stride()
        wanted = [x, *(p for p in block.parameters() if p.requires_grad)]
        found = torch.autograd.grad(y.float().sum(), wanted, allow_unused=True)
        return [(t.shape, t.dtype) for t in (y, *found) if t is not None]

    real = result()
    with FakeTensorMode():
        assert result() == real


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block(name):
    check(lambda: build(name), 2, 16, 8, 6)


@pytest.mark.parametrize("processor", ["mkl", "onednn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("mode", "form"), [*PAIRS, ("embedded_gaussian", "auto")])
def test_every_form(mode, form, dtype, processor, request):
    request.getfixturevalue(processor)
    if processor == "onednn" and dtype == torch.bfloat16 and not products.multiplies_bfloat16():
        pytest.skip("oneDNN multiplies no bfloat16 without AVX-512")

    def make() -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return NonLocal(64, mode=mode, implementation=form)
        finally:
            torch.set_default_dtype(before)

    check(make, 1, 64, 40, 40, dtype=dtype)
