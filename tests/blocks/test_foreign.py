"""Blocks of timm and of users behind the γ-blend."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from nlsurgery.blocks import GammaBlend, block_type, build_foreign, import_foreign
from nlsurgery.errors import BlockError


class Doubled(nn.Module):
    """A user's block: 2x + offset."""

    def __init__(self, in_channels: int, dims: int, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((in_channels, *[1] * dims), 2.0))
        self.offset = offset

    def forward(self, x):
        return x * self.weight + self.offset


@pytest.fixture
def package(monkeypatch):
    module = types.ModuleType("usersown.blocks")
    module.Doubled = Doubled
    module.number = lambda in_channels: in_channels
    module.Plain = nn.Identity
    monkeypatch.setitem(sys.modules, "usersown", types.ModuleType("usersown"))
    monkeypatch.setitem(sys.modules, "usersown.blocks", module)


def built(path, allow=("usersown",), **options):
    import_foreign(path, allow)
    return build_foreign(path, 4, dims=2, options=options)


@pytest.mark.usefixtures("package")
def test_a_user_s_module_is_blended_by_gamma():
    block = built("usersown.blocks.Doubled", offset=1.0)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(block(x), x)
    with torch.no_grad():
        block.gamma.fill_(0.25)
    torch.testing.assert_close(block(x), x + 0.25 * (2 * x + 1 - x))
    block.reset_parameters()
    assert torch.equal(block(x), x)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("allow", [(), ("users",), ("usersown.other",)], ids=str)
def test_an_import_that_is_not_allowed_does_not_happen(monkeypatch, allow):
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail("imported"))
    with pytest.raises(BlockError, match=r"not allowed; pass allow_imports=\['usersown'\]"):
        built("usersown.blocks.Doubled", allow)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("usersown.blocks.Dubled", {}, "did you mean 'Doubled'"),
        ("usersown.nothing.X", {}, "cannot be imported"),
        ("usersown.blocks.number", {}, "must give an nn.Module, got int"),
        ("usersown.blocks.Doubled", {"ofset": 1}, "ofset"),
    ],
)
def test_what_cannot_be_built_says_so(path, options, message):
    with pytest.raises(BlockError, match=message):
        built(path, **options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_zero_gamma_lets_nothing_non_finite_through(bad):
    class Bad(nn.Module):
        def forward(self, x):
            return x * bad

    x = torch.randn(1, 4, 2, 2)
    assert torch.equal(GammaBlend(Bad(), 4)(x), x)


def test_a_module_that_writes_into_its_input_is_refused():
    with pytest.raises(BlockError, match="writes into its input"):
        GammaBlend(nn.ReLU(inplace=True), 4)(torch.randn(1, 4, 2, 2))


@pytest.mark.parametrize("inner", [nn.Conv2d(4, 5, 1), nn.MaxPool2d(2), nn.LSTM(2, 2)], ids=repr)
def test_a_module_that_changes_the_shape_is_refused(inner):
    class Wrapped(nn.Module):
        def forward(self, x):
            return inner(x[0] if isinstance(inner, nn.LSTM) else x)

    with pytest.raises(BlockError, match="must keep the shape"):
        GammaBlend(Wrapped(), 4)(torch.randn(1, 4, 2, 2))


@pytest.mark.parametrize("name", ["se", "ese", "eca", "ecam", "gc", "gca", "cbam", "lcbam", "nl"])
def test_timm_s_layers_start_as_the_identity(name):
    torch.manual_seed(0)
    block = block_type("timm").build(32, dims=2, name=name)
    x = torch.randn(2, 32, 8, 8)
    assert torch.equal(block.eval()(x), x)
    with torch.no_grad():
        block.gamma.fill_(0.5)
        torch.testing.assert_close(block(x), 0.5 * (x + block.inner(x)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "none_such"}, "knows no 'none_such'"),
        ({"name": ""}, "must not be empty"),
        ({"name": "se", "options": {"rd_ration": 2}}, "rd_ration"),
        ({"name": "se", "dims": 3}, "dims must be 2"),
    ],
)
def test_timm_s_errors_are_block_errors(options, message):
    with pytest.raises(BlockError, match=message):
        block_type("timm").build(32, **{"dims": 2, **options})
