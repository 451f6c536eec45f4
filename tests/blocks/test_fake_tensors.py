"""Blocks of tensors without values: memory is planned, and large models are laid out, with such."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nlsurgery.blocks import NonLocal, products
from nlsurgery.blocks.geometry import is_transformed

from .cases import default_dtype
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


@pytest.mark.parametrize("processor", ["mkl", "onednn", "level"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("mode", "form"), [*PAIRS, ("embedded_gaussian", "auto")])
def test_every_form(mode, form, dtype, processor, request):
    request.getfixturevalue(processor)
    if processor != "mkl" and dtype == torch.bfloat16 and not products.multiplies_bfloat16():
        pytest.skip("oneDNN multiplies no bfloat16 without AVX-512")

    def make() -> nn.Module:
        with default_dtype(dtype):
            return NonLocal(64, mode=mode, implementation=form)

    check(make, 1, 64, 40, 40, dtype=dtype)


@pytest.fixture(params=[False, True], ids=["fake", "eager"])
def cuda(request, monkeypatch):
    """A GPU whose tensors have no values, and as if they had: what chooses by values asks for a CPU."""
    if not torch.backends.cuda.is_built():
        pytest.skip("this torch knows no CUDA")
    if request.param:
        names = [name for name in sys.modules if name.startswith("nlsurgery.blocks.")]
        for module in [sys.modules[name] for name in names]:
            if hasattr(module, "is_eager"):
                monkeypatch.setattr(module, "is_eager", lambda: not is_transformed())
    with FakeTensorMode():
        try:
            torch.empty(1, device="cuda").uniform_()
        except RuntimeError:
            pytest.skip("torch 2.6 draws even fake numbers on a GPU")
        yield


@contextmanager
def autocast_without_a_gpu() -> Iterator[None]:
    """torch.autocast of a GPU, which torch refuses where there is none."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def check_on_a_gpu(block: nn.Module, x: torch.Tensor) -> None:
    """Nothing is made on another device, and the result is like the input; torch needs a GPU for more."""
    y = block(x.requires_grad_())
    assert (y.device, y.dtype, y.stride()) == (x.device, x.dtype, x.stride())
    with autocast_without_a_gpu():
        assert block(x).dtype == x.dtype
    with torch.no_grad():
        assert block.eval()(x).device == x.device
        if hasattr(block, "attention"):
            assert block.attention(x).device == x.device


HALF_AND_FULL = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)


@HALF_AND_FULL
@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_stays_on_a_gpu(name, dtype, cuda):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        with torch.device("cuda"), default_dtype(dtype):
            block, x = build(name), torch.randn(2, 16, 24, 25).to(memory_format=memory_format)
        check_on_a_gpu(block, x)


@HALF_AND_FULL
@pytest.mark.parametrize(("mode", "form"), [*PAIRS, ("embedded_gaussian", "auto")])
def test_every_form_stays_on_a_gpu(mode, form, dtype, cuda):
    for channels in (16, 1026):
        with torch.device("cuda"), default_dtype(dtype):
            block = NonLocal(channels, mode=mode, implementation=form, sub_sample=channels > 16)
            x = torch.randn(1, channels, 40, 41)
        check_on_a_gpu(block, x)
