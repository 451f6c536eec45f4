"""A converted block computes what its peer does, in both directions, for every layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nlsurgery.blocks.registration import block_type
from nlsurgery.convert import BlockSpec, Choices, Conversion, convert_state
from tests.convert import peers
from tests.convert.cases import CASES, MODES, SIZES, Case


def build(spec: BlockSpec, conversion: Conversion, dims: int, channels: int) -> nn.Module:
    """Our block in float64, strictly loaded with what the conversion says."""
    options = dict(spec.options)
    block = block_type(spec.type).build(spec.channels or channels, dims=dims, **options).double()
    start = f"{spec.place}." if spec.place else ""
    values = {
        k.removeprefix(start): v for k, v in conversion.tensors.items() if k.startswith(start)
    }
    block.load_state_dict(values, strict=True)
    return block.eval()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_block_computes_what_the_peer_does(case: Case) -> None:
    conversion = convert_state(case.keyed(), case.layout, choices=case.choices)
    (spec,) = conversion.blocks
    x = peers.numbers(2, case.channels, *case.size, seed=5, scale=1.0)
    block = build(spec, conversion, len(case.size), case.channels)
    with torch.no_grad():
        ours = block(x)
    theirs = case.peer(case.state, x)
    assert (theirs - x).abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_block_comes_back_as_it_was(case: Case) -> None:
    there = convert_state(case.keyed(), case.layout, choices=case.choices)
    known = {spec.place: spec.options for spec in there.blocks}
    here = {spec.place: case.prefix for spec in there.blocks}
    back = convert_state(there.tensors, "nlsurgery", case.layout, options=known, places=here)
    x = peers.numbers(2, case.channels, *case.size, seed=6, scale=1.0)
    joint = "_" if case.layout == "caffe2" else "."
    state = {k.removeprefix(f"{case.prefix}{joint}"): v for k, v in back.tensors.items()}
    before = {
        key.replace("norm.", "bn.") if "slowfast" in case.name else key: value
        for key, value in case.state.items()
    }
    assert not set(before) - set(state)
    for key, value in before.items():
        if "unscaled" not in case.name and "eps" not in case.name:
            torch.testing.assert_close(state[key], value, rtol=1e-12, atol=1e-12)
    peer = case.peer
    if case.name == "timm-nl-unscaled":
        peer = peers.timm_nl
    elif case.name == "slowfast-eps":
        peer = next(other.peer for other in CASES if other.name == "slowfast-softmax-pool-bn")
    torch.testing.assert_close(peer(state, x), case.peer(case.state, x), rtol=0, atol=1e-9)


OTHERS = [
    ("alexhex7", "mmcv", lambda s, x: peers.mmcv(s, x, "embedded_gaussian", use_scale=False)),
    ("mmcv", "alexhex7", lambda s, x: peers.alexhex7(s, x, "embedded_gaussian")),
    ("alexhex7", "timm", peers.timm_nl),
    ("timm", "alexhex7", lambda s, x: peers.alexhex7(s, x, "embedded_gaussian")),
    ("timm", "mmcv", lambda s, x: peers.mmcv(s, x, "embedded_gaussian", use_scale=False)),
    ("slowfast", "caffe2", lambda s, x: peers.caffe2(s, x, softmax=True, scale=True, pool=True)),
    ("caffe2", "slowfast", lambda s, x: peers.slowfast(s, x, "softmax", (1, 2, 2))),
]


@pytest.mark.parametrize(
    ("source", "target", "peer"), OTHERS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_from_one_project_to_another(source: str, target: str, peer: object) -> None:
    bn_name = {
        "alexhex7": "alexhex7-2d-embedded_gaussian-full-bn",
        "mmcv": "mmcv-2d-embedded_gaussian-full-bn",
        "timm": "timm-nl",
        "slowfast": "slowfast-softmax-pool-bn",
        "caffe2": "caffe2-softmax-pool-bn-True",
    }[source]
    case = next(case for case in CASES if case.name == bn_name)
    prefix = {"slowfast": "s4.pathway0_nonlocal3"}.get(source, case.prefix)
    done = convert_state(case.keyed(prefix), source, target)
    (spec,) = done.blocks
    joint = "_" if target == "caffe2" else "."
    state = {k.removeprefix(f"{spec.place}{joint}"): v for k, v in done.tensors.items()}
    x = peers.numbers(2, case.channels, *case.size, seed=7, scale=1.0)
    torch.testing.assert_close(peer(state, x), case.peer(case.state, x), rtol=0, atol=1e-9)
    assert spec.name == prefix


IMAGES = [(mode, target) for mode in MODES for target in ("alexhex7", "mmcv")]
VIDEOS = [(mode, target) for mode in MODES[1:3] for target in ("slowfast", "caffe2")]


@pytest.mark.parametrize(
    ("mode", "target"), [*IMAGES, *VIDEOS, ("embedded_gaussian", "timm")], ids=str
)
def test_our_own_block_in_every_layout_that_holds_it(mode: str, target: str) -> None:
    """Scaled where there are logits to scale, without biases, and with BatchNorm."""
    dims = 3 if target in ("slowfast", "caffe2") else 2
    options = {
        "mode": mode,
        "use_scale": mode == "embedded_gaussian",
        "bias": False,
        "sub_sample": target != "timm",
        "pool_order": "before_conv" if dims == 3 else "after_conv",
    }
    block = block_type("non_local").build(8, dims=dims, inter_channels=4, **options)
    values = peers.fill({k: tuple(v.shape) for k, v in block.state_dict().items()})
    block.double().load_state_dict(values)
    state = {f"b.{key}": value for key, value in block.state_dict().items()}
    host = "nonlocal_conv4_1" if target == "caffe2" else "b"
    done = convert_state(state, "nlsurgery", target, options={"b": options}, places={"b": host})
    joint = "_" if target == "caffe2" else "."
    theirs = {k.removeprefix(f"{host}{joint}"): v for k, v in done.tensors.items()}
    x = peers.numbers(2, 8, *SIZES[dims], seed=8, scale=1.0)
    softmax = mode == "embedded_gaussian"
    wanted = {
        "alexhex7": lambda: peers.alexhex7(theirs, x, mode),
        "mmcv": lambda: peers.mmcv(theirs, x, mode),
        "slowfast": lambda: peers.slowfast(
            theirs, x, "softmax" if softmax else "dot_product", (1, 2, 2)
        ),
        "caffe2": lambda: peers.caffe2(theirs, x, softmax=softmax, scale=True, pool=True),
        "timm": lambda: peers.timm_nl(theirs, x),
    }[target]()
    with torch.no_grad():
        torch.testing.assert_close(block.eval()(x), wanted, rtol=0, atol=1e-9)


def test_pool_orders_are_not_the_same_function() -> None:
    """What ``pool_order`` is for: taking SlowFast's block as ``after_conv`` would be far off."""
    case = next(case for case in CASES if case.name == "slowfast-softmax-pool-bn")
    conversion = convert_state(case.keyed(), "slowfast")
    (spec,) = conversion.blocks
    assert spec.options["pool_order"] == "before_conv"
    other = BlockSpec(
        spec.name, spec.place, None, spec.type, 8, 3, {**spec.options, "pool_order": "after_conv"}
    )
    x = peers.numbers(2, 8, *SIZES[3], seed=5, scale=1.0)
    with torch.no_grad():
        wrong = build(other, conversion, 3, 8)(x)
    assert (wrong - case.peer(case.state, x)).abs().max() > 0.05


def test_float32_stays_float32_within_its_rounding() -> None:
    for case in CASES[::9]:
        state = {k: v.float() if v.is_floating_point() else v for k, v in case.keyed().items()}
        done = convert_state(state, case.layout, choices=case.choices)
        (spec,) = done.blocks
        kinds = {v.dtype for k, v in done.tensors.items() if not k.endswith("tracked")}
        assert kinds == {torch.float32}, case.name
        x = peers.numbers(2, case.channels, *case.size, seed=5, scale=1.0)
        block = build(spec, done, len(case.size), case.channels).float()
        with torch.no_grad():
            ours = block(x.float())
        wanted = case.peer(case.state, x).float()
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5, msg=case.name)


def test_choices_are_not_ignored() -> None:
    case = next(case for case in CASES if case.name == "ccnet-3")
    done = convert_state(case.keyed(), "ccnet", choices=Choices(recurrence=3))
    assert done.blocks[0].options["recurrence"] == 3
    assert not done.notes
    assert "recurrence" in convert_state(case.keyed(), "ccnet").notes[0]
