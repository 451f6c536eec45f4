"""1×1 convolutions as matrix products, on processors where those are faster."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nlsurgery.blocks import (
    NonLocal,
    affinity_explicit,
    affinity_operator,
    affinity_rows,
    projection,
)
from nlsurgery.blocks.geometry import pointwise
from nlsurgery.blocks.pointwise_products import pointwise_products
from nlsurgery.blocks.projection import goes_by_products
from nlsurgery.blocks.residual import project, queries_factor

from .cases import BFLOAT16, needs_bfloat16

#: How far off a value of some rounded ones may be, in norm.
ERROR = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def error(found: Tensor, exact: Tensor) -> float:
    return float(((found.double() - exact).norm() / exact.norm()).detach())


LAYOUT = {3: None, 4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture
def every_projection(monkeypatch, onednn):
    monkeypatch.setattr(projection, "MANY_PRODUCTS", 0)
    monkeypatch.setattr(projection, "MANY_ITEM_PRODUCTS", 0)
    monkeypatch.setattr(projection, "FEW_PRODUCTS", {})
    monkeypatch.setattr(projection, "FEW_PRODUCTS_LAST", {})


@pytest.mark.usefixtures("every_projection")
def test_small_items_of_a_batch_are_convolved(monkeypatch):
    x, weight = torch.randn(4, 8, 5, 5), torch.randn(6, 8, 1, 1)
    monkeypatch.setattr(projection, "MANY_ITEM_PRODUCTS", 8 * 25 * 6)
    assert goes_by_products(x, weight)
    monkeypatch.setattr(projection, "MANY_ITEM_PRODUCTS", 8 * 25 * 6 + 1)
    assert not goes_by_products(x, weight)
    # Of channels last all positions are the rows of one product.
    assert goes_by_products(x.to(memory_format=torch.channels_last), weight)


@pytest.mark.usefixtures("every_projection")
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(7,), (6, 5), (3, 4, 5)], ids=str)
def test_projections_by_products(size, batch, bias, last):
    convolution = pointwise(10, 6, len(size), bias=bias)
    x = torch.randn(batch, 10, *size)
    if last and len(size) > 1:
        x = x.to(memory_format=LAYOUT[x.dim()])
    inputs = [x.requires_grad_(), *convolution.parameters()]
    dy = torch.randn(batch, 6, *size)
    assert goes_by_products(x, convolution.weight)
    y, plain = project(convolution, x), convolution(x)
    kind = LAYOUT[x.dim()] if last and len(size) > 1 else torch.contiguous_format
    assert y.is_contiguous(memory_format=kind)
    torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)
    pairs = [torch.autograd.grad(t, inputs, dy, retain_graph=True) for t in (y, plain)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    penalties = [
        torch.autograd.grad(t.pow(2).sum(), x, create_graph=True)[0].pow(2).sum()
        for t in (y, plain)
    ]
    again = [torch.autograd.grad(penalty, inputs[1]) for penalty in penalties]
    for one, other in zip(*again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("every_projection")
def test_projections_that_torch_does_as_fast_are_left_to_it(monkeypatch):
    x, weight = torch.randn(1, 10, 6, 5), torch.randn(4, 10, 1, 1)
    assert goes_by_products(x, weight)
    assert not goes_by_products(x.expand(16, -1, -1, -1), weight)
    assert not goes_by_products(x.double(), weight.double())
    assert not goes_by_products(x[..., :3], weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not goes_by_products(x, weight)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not goes_by_products(x, weight)


@needs_bfloat16
@pytest.mark.usefixtures("every_projection", "level")
def test_float32_is_left_to_torch_where_mkl_is_as_fast():
    x, weight = torch.randn(1, 10, 6, 5), torch.randn(4, 10, 1, 1)
    assert not goes_by_products(x, weight)
    assert goes_by_products(x.bfloat16(), weight.bfloat16())


@pytest.mark.usefixtures("every_projection")
@pytest.mark.parametrize("mode", ["embedded_gaussian", "dot_product", "concatenation"])
@pytest.mark.parametrize("training", [True, False])
def test_a_block_projects_by_them(mode, training):
    block = NonLocal(32, mode=mode).train(training)
    x = torch.randn(2, 32, 12, 12, requires_grad=True)
    with torch.profiler.profile() as profile:
        y = block(x)
    assert "mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}
    assert torch.equal(y, x)
    y.sum().backward()
    assert block.bn.weight.grad.isfinite().all()


@pytest.mark.usefixtures("every_projection")
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_several_projections_and_a_factor(dtype, factor, batch, bias, last):
    convolutions = [pointwise(64, size, 2, bias=bias).to(dtype) for size in (16, 16, 24)]
    x = torch.randn(batch, 64, 6, 5).to(dtype)
    x = (x.to(memory_format=torch.channels_last) if last else x).requires_grad_()
    layers = [(c.weight, c.bias) for c in convolutions]
    given = [x, *(p for c in convolutions for p in c.parameters())]
    made = pointwise_products(x, layers, factor)
    kind = torch.channels_last if last else torch.contiguous_format
    assert all(y.dtype == dtype and y.is_contiguous(memory_format=kind) for y in made)
    dy = [torch.randn_like(y) for y in made]
    exact = [t.detach().double().requires_grad_() for t in given]
    wide = dict(zip(map(id, given), exact, strict=True))
    factors = (factor, 1.0, 1.0)
    expected = [
        f * nn.functional.conv2d(wide[id(x)], wide[id(w)], None if b is None else wide[id(b)])
        for (w, b), f in zip(layers, factors, strict=True)
    ]
    for y, other in zip(made, expected, strict=True):
        # Scaled before they are rounded: after it the error would be 2.3e-3.
        assert error(y, other) < (2e-3 if dtype == torch.bfloat16 else 1e-6)
    found = torch.autograd.grad(made, given, dy, retain_graph=True)
    wanted = torch.autograd.grad(expected, exact, [t.double() for t in dy])
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) < ERROR[dtype]
    # One of the results may have no gradient.
    found = torch.autograd.grad(made[1:], given[0], dy[1:])
    expected = [nn.functional.conv2d(exact[0], wide[id(w)], None) for w, _ in layers[1:]]
    wanted = torch.autograd.grad(expected, exact[0], [t.double() for t in dy[1:]])
    assert error(found[0], wanted[0]) < ERROR[dtype]


@needs_bfloat16
@pytest.mark.usefixtures("every_projection")
def test_which_bfloat16_maps_go_by_them(monkeypatch):
    x, weight = torch.randn(1, 10, 6, 5).bfloat16(), torch.randn(4, 10, 1, 1).bfloat16()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert goes_by_products(x, weight)
    assert goes_by_products(x.repeat(16, 1, 1, 1), weight)
    assert not goes_by_products(x.to(memory_format=torch.channels_last), weight)
    monkeypatch.setattr(projection, "BATCH_WEIGHTS", 39)
    assert goes_by_products(x, weight)
    assert not goes_by_products(x.repeat(2, 1, 1, 1), weight)


@needs_bfloat16
def test_queries_are_scaled_where_it_saves_a_product(onednn, monkeypatch):
    monkeypatch.setattr(affinity_explicit, "ITEM_LOGITS", 30 * 30)
    monkeypatch.setattr(affinity_explicit, "ITEM_LOGITS_FORWARD", {False: 20 * 30, True: 20 * 30})
    monkeypatch.setattr(affinity_explicit, "ONLY_ITEM_LOGITS_FORWARD", 20 * 15)
    monkeypatch.setattr(affinity_explicit, "NARROW_ITEM", 0)
    monkeypatch.setattr(affinity_explicit, "NARROW_FEW", 0)
    monkeypatch.setattr(affinity_operator, "SMALL_PRODUCT", 30 * 30 * 3)
    layers = [pointwise(10, 6, 2).bfloat16() for _ in range(3)]
    x = torch.randn(2, 10, 6, 5).bfloat16()
    assert queries_factor(x, 0.3, *layers) == 0.3
    assert queries_factor(x, 0.3, *layers, heads=2) == 0.3
    assert queries_factor(x, 0.3, *layers, heads=3) == 1.0
    assert queries_factor(x, 0.3, *layers, pool=(2, 2)) == 1.0
    assert queries_factor(x, 0.3, *layers, pool=(2, 2), form="chunked") == 0.3
    with torch.no_grad():
        assert queries_factor(x[:, :, :4].contiguous(), 0.3, *layers) == 1.0
        assert queries_factor(x, 0.3, *layers, pool=(1, 2)) == 1.0
        assert queries_factor(x[:, :, 1:].contiguous(), 0.3, *layers) == 0.3
        assert queries_factor(x[:1], 0.3, *layers, pool=(1, 2)) == 0.3
        monkeypatch.setattr(affinity_explicit, "NARROW_ITEM", 6)
        monkeypatch.setattr(affinity_explicit, "NARROW_FEW", 6)
        assert queries_factor(x, 0.3, *layers) == 1.0
        assert queries_factor(x[:1], 0.3, *layers, pool=(1, 2)) == 1.0
    assert queries_factor(x.to(memory_format=torch.channels_last), 0.3, *layers) == 0.3
    assert queries_factor(x, 0.25, *layers) == 1.0
    assert queries_factor(x[..., :4], 0.3, *layers) == 1.0
    assert queries_factor(x[:, :, 1:].contiguous(), 0.3, *layers) == 1.0
    assert queries_factor(x.float(), 0.3, *layers) == 1.0
    assert queries_factor(x, 0.3, pointwise(10, 6, 2)) == 1.0
    layers[0].register_forward_hook(lambda *_: None)
    assert queries_factor(x, 0.3, *layers) == 1.0


@needs_bfloat16
@pytest.mark.usefixtures("every_projection")
@pytest.mark.parametrize("pool_order", [None, "after_conv", "before_conv"])
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_block_with_a_scale_forms_logits_by_one_product(batch, last, pool_order, monkeypatch):
    seen = []
    formed = affinity_rows.factors
    monkeypatch.setattr(
        affinity_rows, "factors", lambda q, k, scale: seen.append(scale) or formed(q, k, scale)
    )
    options = {"sub_sample": True, "pool_order": pool_order} if pool_order else {}
    block = NonLocal(
        64, 32, use_scale=True, zero_init=False, norm="none", implementation="chunked", **options
    ).bfloat16()
    for layer in (block.theta, block.phi):
        nn.init.normal_(layer.weight, std=0.25)
    x = torch.randn(batch, 64, 24, 22).bfloat16()
    x = (x.to(memory_format=torch.channels_last) if last else x).requires_grad_()
    y = block(x)
    assert seen == [1.0] * batch
    dy = torch.randn_like(y)
    given = [x, *block.parameters()]
    found = torch.autograd.grad(y - x, given, dy)
    exact = NonLocal(
        64, 32, use_scale=True, norm="none", implementation="explicit", **options
    ).double()
    exact.load_state_dict(block.state_dict())
    wide = x.detach().double().requires_grad_()
    wanted = torch.autograd.grad(exact(wide) - wide, [wide, *exact.parameters()], dy.double())
    for name, one, other in zip(("x", *dict(block.named_parameters())), found, wanted, strict=True):
        if name != "phi.bias":  # 0 but for rounding
            # Where keys are pooled, the largest of rounded values may be another one.
            assert error(one, other) < (1e-1 if pool_order == "after_conv" else 2e-2), name
    assert error(block.attention(x.detach()), exact.attention(wide.detach())) < 8e-3
