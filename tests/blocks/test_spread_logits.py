"""Widely spread logits: weights that would be denormal numbers, which slow products many times."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nlsurgery.blocks import (
    NonLocal,
    affinity_chunks,
    affinity_fused,
    affinity_softmax,
    affinity_tiles,
)
from nlsurgery.blocks import attend as attend_module
from nlsurgery.blocks.affinity_fused import fused_attend
from nlsurgery.blocks.affinity_softmax import has_denormal_weights, softmax_attend
from nlsurgery.blocks.attend import attend

pytestmark = pytest.mark.usefixtures("mkl")

SMALLEST = torch.finfo(torch.float32).smallest_normal
COUNT, CHANNELS = 600, 16


def tokens(spread: float, *, heads: int = 1, values: int = CHANNELS) -> list[Tensor]:
    """Queries, keys and values (1, heads, N, C) whose logits have the standard deviation ``spread``."""
    generator = torch.Generator().manual_seed(0)
    sizes = CHANNELS, CHANNELS, values
    q, k, v = (torch.randn(1, heads, COUNT, size, generator=generator) for size in sizes)
    return [q, k * spread / CHANNELS**0.5, v]


def maps(spread: float) -> list[Tensor]:
    """The same as maps (1, C, 20, 30)."""
    return [t[0].transpose(1, 2).reshape(1, -1, 20, 30) for t in tokens(spread)]


def has_denormals(weights: Tensor) -> bool:
    size = weights.abs()
    return bool(((size > 0) & (size < SMALLEST)).any())


def gradients(form, operands: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    operands = [t.detach().to(dtype).requires_grad_() for t in operands]
    y = form(*operands, 1.0)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [y, *torch.autograd.grad(y, operands, dy)]


def explicit(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.einsum("bhnc,bhmc->bhnm", q * scale, k).softmax(-1) @ v


@pytest.mark.parametrize(
    ("spread", "expected"), [(0.0, False), (1.0, False), (8.0, False), (20.0, True), (60.0, True)]
)
def test_denormal_weights_are_noticed(spread, expected):
    q, k, _ = (t[0] for t in tokens(spread))
    found = has_denormals(torch.bmm(q, k.transpose(1, 2)).softmax(-1))
    assert found == expected
    assert has_denormal_weights(q, k, 1.0) == expected
    assert not has_denormal_weights(q, k, 1e-3)


def test_few_logits_are_not_looked_at(monkeypatch):
    q, k, _ = (t[0] for t in tokens(20.0))
    monkeypatch.setattr(affinity_softmax, "FEW_LOGITS", COUNT * COUNT + 1)
    assert not has_denormal_weights(q, k, 1.0)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_some_rows_of_some_items_suffice(batch):
    q, k, _ = (t[0].expand(batch, -1, -1) for t in tokens(20.0))
    assert has_denormal_weights(q, k, 1.0)


@pytest.fixture
def forms(monkeypatch):
    """The forms that ``attend`` takes."""
    taken: list[str] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, scale: float, form: str, *grids) -> Tensor:
        taken.append(form)
        return softmax_attend(q, k, v, scale, form, *grids)

    monkeypatch.setattr(attend_module, "softmax_attend", spy)
    return taken


@pytest.mark.parametrize(
    ("spread", "implementation", "dtype", "expected"),
    [
        (1.0, "auto", torch.float32, "explicit"),
        (20.0, "auto", torch.float32, "chunked"),
        (20.0, "explicit", torch.float32, "explicit"),
        (20.0, "auto", torch.bfloat16, "fused"),
        (20.0, "auto", torch.float64, "explicit"),
    ],
)
def test_auto_leaves_the_explicit_form(forms, spread, implementation, dtype, expected, monkeypatch):
    if dtype == torch.bfloat16:
        monkeypatch.setattr("nlsurgery.blocks.choose.SMALL_MAP", COUNT)
    monkeypatch.setattr("nlsurgery.blocks.choose.SMALL_MAPS", COUNT * COUNT)
    q, k, v = (t.to(dtype) for t in maps(spread))
    y = attend(q, k, v, "embedded_gaussian", 1.0, implementation)
    assert forms == [expected]
    wanted = attend(*(t.double() for t in (q, k, v)), "embedded_gaussian", 1.0, "explicit")
    assert (y - wanted).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-5) * wanted.norm()


def test_a_gaussian_block_leaves_it_too(forms):
    block = NonLocal(512, mode="gaussian").eval()
    x = 0.42 * torch.randn(1, 512, 24, 24, generator=torch.Generator().manual_seed(0))
    assert block.chosen_implementation(x.shape) == "explicit"
    with torch.no_grad():
        assert torch.equal(block(x), x)
    assert forms == ["chunked"]


def test_values_that_cannot_be_read_keep_the_explicit_form():
    q, k, v = (torch.stack([t, t]) for t in maps(20.0))

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, "embedded_gaussian", 1.0, "auto")

    mapped = torch.func.vmap(one)(q, k, v)
    torch.testing.assert_close(mapped[0], one(q[0], k[0], v[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spread", [1.0, 20.0])
@pytest.mark.parametrize(("heads", "values"), [(1, CHANNELS), (2, CHANNELS), (2, 24), (1, 8)])
def test_fused_gradients_in_float32(spread, heads, values, monkeypatch):
    taken = []
    tiled = affinity_fused.tiled_gradients
    monkeypatch.setattr(
        affinity_fused, "tiled_gradients", lambda *args: taken.append(1) or tiled(*args)
    )
    operands = tokens(spread, heads=heads, values=values)
    found = gradients(fused_attend, operands, torch.float32)
    assert bool(taken) == (spread == 20.0)
    for one, other in zip(found, gradients(explicit, operands, torch.float64), strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() < 2e-5 * other.norm()


@pytest.mark.parametrize("spread", [20.0, 60.0])
def test_no_product_of_the_tiles_meets_a_denormal_weight(spread, monkeypatch):
    multiplied = []
    product = affinity_tiles.add_product

    def spy(total: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
        multiplied.append(has_denormals(a))
        product(total, a, b, factor)

    monkeypatch.setattr(affinity_tiles, "add_product", spy)
    operands = tokens(spread)
    gradients(fused_attend, operands, torch.float32)
    gradients(
        lambda q, k, v, scale: softmax_attend(q[0], k[0], v[0], scale, "chunked"),
        operands,
        torch.float32,
    )
    assert len(multiplied) >= 7
    assert not any(multiplied)


@pytest.mark.parametrize("spread", [1.0, 20.0, 60.0])
def test_fused_gradients_in_bfloat16(spread, monkeypatch):
    weights = []
    backward = affinity_chunks._softmax_backward

    def spy(dp: Tensor, p: Tensor, *args: object, **options: object) -> Tensor:
        weights.append(has_denormals(p.float()))
        return backward(dp, p, *args, **options)

    monkeypatch.setattr(affinity_chunks, "_softmax_backward", spy)
    operands = [t.bfloat16() for t in tokens(spread)]
    found = gradients(fused_attend, operands, torch.bfloat16)
    assert weights == [False]
    for one, other in zip(found, gradients(explicit, operands, torch.float64), strict=True):
        assert (one - other).norm() < 2e-2 * other.norm()
