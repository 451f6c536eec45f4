"""What the tests of blocks share: inputs, and blocks with parameters that hide nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from nlsurgery.blocks import products

SHAPES = {1: (2, 6, 7), 2: (2, 6, 3, 4), 3: (2, 6, 2, 2, 3)}
needs_bfloat16 = pytest.mark.skipif(
    not products.multiplies_bfloat16(), reason="oneDNN multiplies no bfloat16 without AVX-512"
)
BFLOAT16 = pytest.param(torch.bfloat16, marks=needs_bfloat16)
MODES = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What is made without a dtype has this one: parameters of fake tensors can not be cast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def feature_map(dims: int = 2, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A random (B, C, *spatial) with ``dims`` spatial dimensions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPES[dims], generator=generator, dtype=torch.float64).to(dtype)


def randomised(block: nn.Module, *, seed: int = 1, std: float = 0.5) -> nn.Module:
    """Give every parameter and floating buffer a value that is neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * std)
        for name, buffer in block.named_buffers():
            if buffer.is_floating_point():
                noise = torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
                buffer.copy_(noise + 0.5 if name.endswith("var") else noise)
    return block
