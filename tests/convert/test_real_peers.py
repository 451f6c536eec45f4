"""The real blocks of other libraries: timm's always, mmcv's where mmcv is installed.

What mmcv's blocks compute is tested without it too (``test_blocks.py``).
"""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import GlobalContext, NonLocalAttn
from torch import Tensor, nn

import nlsurgery
from nlsurgery.convert import Choices, convert_state, recipe_of
from nlsurgery.convert.fit import load_converted
from tests.convert import peers
from tests.convert.cases import MODES, SIZES
from tests.convert.test_blocks import build
from tests.models import trained_looking


def trained(block: nn.Module, seed: int = 0) -> nn.Module:
    """Random values everywhere, statistics as after training, float64."""
    block.double().load_state_dict(
        peers.fill({k: tuple(v.shape) for k, v in block.state_dict().items()}, seed)
    )
    return block.eval()


def check_both_ways(
    real: nn.Module,
    layout: str,
    x: Tensor,
    choices: Choices | None = None,
    twin: nn.Module | None = None,
) -> None:
    """Ours equals the real block; a second real block loads strictly what comes back."""
    done = convert_state(
        {f"b.{k}": v for k, v in real.state_dict().items()}, layout, choices=choices
    )
    (spec,) = done.blocks
    with torch.no_grad():
        wanted = real(x)
        ours = build(spec, done, x.dim() - 2, x.shape[1])(x)
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-9)
        back = convert_state(done.tensors, "nlsurgery", layout, options={spec.place: spec.options})
        assert twin is not None
        twin.double().load_state_dict({k.removeprefix("b."): v for k, v in back.tensors.items()})
        torch.testing.assert_close(twin.eval()(x), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("channels", [16, 64])
def test_timm_non_local(channels: int) -> None:
    x = peers.numbers(2, channels, 6, 5, scale=1.0)
    check_both_ways(trained(NonLocalAttn(channels)), "timm", x, twin=NonLocalAttn(channels))


@pytest.mark.parametrize("fuse_add", [True, False], ids=["add", "scale"])
def test_timm_global_context(fuse_add: bool) -> None:
    options = {"fuse_add": fuse_add, "fuse_scale": not fuse_add}
    x = peers.numbers(2, 24, 6, 5, scale=1.0)
    check_both_ways(
        trained(GlobalContext(24, **options)), "timm", x, twin=GlobalContext(24, **options)
    )


@pytest.mark.parametrize("layer", ["nl", "gc"])
@pytest.mark.parametrize("name", ["resnet10t", "resnet14t"], ids=["basic", "bottleneck"])
def test_timm_network(name: str, layer: str) -> None:
    """A network trained with ``attn_layer`` in every block becomes the plain one, operated."""
    torch.manual_seed(0)
    attended = timm.create_model(name, num_classes=7, block_args={"attn_layer": layer})
    trained_looking(attended).double().eval()
    done = convert_state(attended.state_dict())
    plain = timm.create_model(name, num_classes=7)
    nlsurgery.apply(plain, recipe_of(done), input_size=(3, 64, 64))
    load_converted(plain.double(), done, "x.pth")
    x = peers.numbers(1, 3, 64, 64, scale=1.0)
    with torch.no_grad():
        wanted, ours = attended(x), plain.eval()(x)
        with nlsurgery.disabled(plain):
            assert (plain(x) - wanted).abs().max() > 1e-2
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-8)
    back = convert_state(done.tensors, "nlsurgery", "timm")
    again = timm.create_model(name, num_classes=7, block_args={"attn_layer": layer}).double()
    again.load_state_dict(back.tensors)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("bn", [True, False], ids=["bn", "plain"])
@pytest.mark.parametrize("sub_sample", [True, False], ids=["pool", "full"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_mmcv_non_local(dims: int, mode: str, sub_sample: bool, bn: bool) -> None:
    bricks = pytest.importorskip("mmcv.cnn.bricks.non_local", exc_type=ImportError)
    options = {
        "in_channels": 8,
        "mode": mode,
        "sub_sample": sub_sample,
        "norm_cfg": {"type": f"BN{dims}d"} if bn else None,
    }
    make = getattr(bricks, f"NonLocal{dims}d")
    choices = Choices(mode=mode) if mode == "dot_product" else None
    x = peers.numbers(2, 8, *SIZES[dims], scale=1.0)
    check_both_ways(trained(make(**options)), "mmcv", x, choices, make(**options))


@pytest.mark.parametrize("pooling_type", ["att", "avg"])
@pytest.mark.parametrize("fusion", ["channel_add", "channel_mul"])
def test_mmcv_context_block(fusion: str, pooling_type: str) -> None:
    bricks = pytest.importorskip("mmcv.cnn.bricks.context_block", exc_type=ImportError)
    options = {"in_channels": 16, "ratio": 1 / 4, "fusion_types": (fusion,)}
    real = trained(bricks.ContextBlock(**options, pooling_type=pooling_type))
    x = peers.numbers(2, 16, 6, 5, scale=1.0)
    check_both_ways(real, "mmcv", x, twin=bricks.ContextBlock(**options))
