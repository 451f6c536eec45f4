"""What cannot be converted is one clear error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nlsurgery.blocks.registration import block_type
from nlsurgery.convert import LAYOUTS, Choices, convert_state, detect, layout_named
from nlsurgery.errors import CheckpointError
from tests.convert import peers
from tests.convert.cases import CASES


def under(prefix: str, state: peers.State) -> peers.State:
    return {f"{prefix}.{key}": value for key, value in state.items()}


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
def test_each_layout_is_told_by_its_keys(layout: str) -> None:
    prefix = {
        "mmaction2": "backbone.layer2.0.non_local_block",
        "danet": "head.sa",
        "ccnet": "head.cca",
        "sagan": "attn1",
    }.get(layout)
    source = "mmcv" if layout == "mmaction2" else layout
    case = next(case for case in CASES if case.layout == source)
    keys = set(case.keyed(prefix)) | {"layer1.0.conv1.weight"}
    if layout == "sagan":
        with pytest.raises(CheckpointError, match=r"sagan and danet and ccnet.*--from sagan"):
            detect(keys)
    else:
        assert detect(keys) == layout


def test_a_layer_scale_is_no_channel_attention() -> None:
    with pytest.raises(CheckpointError, match="no block of a known layout"):
        detect(["blocks.0.ls1.gamma", "blocks.0.attn.qkv.weight", "blocks.0.ls2.gamma"])


def test_unknown_names_come_with_close_ones() -> None:
    with pytest.raises(CheckpointError, match="did you mean 'slowfast'"):
        layout_named("slow_fast")
    with pytest.raises(CheckpointError, match=r"no block of a known layout.*fc\.weight.*alexhex7"):
        convert_state({"fc.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match="no block of the layout timm"):
        convert_state({"fc.weight": torch.ones(2, 2)}, "timm")
    with pytest.raises(CheckpointError, match="in the layout slowfast already"):
        convert_state(under("a", peers.slowfast_state(4, 2, bn=True)), target="slowfast")


def drop(key: str) -> Callable[[peers.State], None]:
    def change(state: peers.State) -> None:
        del state[key]

    return change


def cut(key: str) -> Callable[[peers.State], None]:
    def change(state: peers.State) -> None:
        state[key] = state[key][:-1]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("phi.0.weight"), r"a\.b \(alexhex7\): .*both have a pool"),
        (drop("W.1.running_var"), r"a\.b \(alexhex7\): the block lacks 'bn\.running_var'"),
        (cut("theta.weight"), r"theta\.weight must be \(4, 8, 1, 1\).* but is \(3, 8, 1, 1\)"),
        (cut("W.1.weight"), r"bn\.weight must be \(8,\).* but is \(7,\)"),
        (cut("g.0.bias"), r"g\.bias must be \(4,\).* but is \(3,\)"),
    ],
    ids=["no phi", "no statistics", "theta", "bn", "bias"],
)
def test_damaged_blocks(change: Callable[[peers.State], None], message: str) -> None:
    state = peers.alexhex7_state(8, 4, 2, "embedded_gaussian", sub_sample=True, bn=True)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        convert_state(under("a.b", state), "alexhex7")


@pytest.mark.parametrize(
    ("layout", "state", "choices", "message"),
    [
        (
            "alexhex7",
            "alexhex7",
            Choices(use_scale=True),
            "use_scale=True was asked for.*bn_eps, mode",
        ),
        ("sagan", "sagan", Choices(mode="dot_product"), "takes no choice"),
        ("alexhex7", "alexhex7", Choices(mode="gaussian"), "embedded_gaussian or dot_product"),
        ("slowfast", "slowfast", Choices(mode="concatenation"), "embedded_gaussian or dot_product"),
        ("slowfast", "slowfast", Choices(temporal_window=4), "temporal_window=4 was asked for"),
        ("slowfast", "slowfast", Choices(sub_sample=(2, 2)), r"3 positive sizes.*got \(2, 2\)"),
    ],
    ids=["scale", "mode of sagan", "gaussian", "concatenation", "window", "pool"],
)
def test_choices_against_the_keys(layout: str, state: str, choices: Choices, message: str) -> None:
    made = {
        "alexhex7": lambda: peers.alexhex7_state(
            8, 4, 2, "embedded_gaussian", sub_sample=True, bn=True
        ),
        "sagan": lambda: peers.qkv_state(8, 1),
        "slowfast": lambda: peers.slowfast_state(8, 4, bn=True),
    }[state]()
    with pytest.raises(CheckpointError, match=message):
        convert_state(under("a", made), layout, choices=choices)


def ours(type_: str, *, dims: int = 2, **options: Any) -> tuple[peers.State, dict[str, Any]]:
    block = block_type(type_).build(8, dims=dims, **options)
    shapes = {k: tuple(v.shape) for k, v in block.state_dict().items()}
    return under("layer2.0.nlsurgery.0", peers.fill(shapes)), options


HELD_NOWHERE = [
    ("alexhex7", "non_local", {"norm": "ln"}, "a layer or group norm"),
    ("alexhex7", "non_local", {"mode": "gaussian", "use_scale": True}, "a scaled gaussian block"),
    ("mmcv", "non_local", {"sub_sample": True, "pool_order": "before_conv"}, "a pool before_conv"),
    ("mmcv", "non_local", {"inter_channels": 3}, "3 inner channels of 8"),
    ("mmcv", "non_local", {"dims": 3, "temporal_window": 4}, "temporal_window=4; it has none"),
    (
        "caffe2",
        "non_local",
        {"dims": 3, "pool_order": "before_conv", "temporal_window": 2},
        "temporal_window=2; it has windows of 4",
    ),
    (
        "caffe2",
        "non_local",
        {"dims": 3, "pool_order": "before_conv", "sub_sample": [2, 2, 2]},
        "a pool of 2×2×2",
    ),
    ("alexhex7", "non_local", {"sub_sample": [4, 4]}, "a pool of 4×4; it pools by 2 over space"),
    ("slowfast", "non_local", {"mode": "gaussian"}, "mode 'gaussian'.*dot_product"),
    ("slowfast", "non_local", {}, "a 2-D block; its blocks are 3-D"),
    ("timm", "non_local", {"mode": "dot_product"}, "mode 'dot_product'"),
    ("timm", "non_local", {"sub_sample": True, "pool_order": "after_conv"}, "it does not pool"),
    ("timm", "non_local", {"norm": "none"}, "a block without a norm"),
    ("timm", "global_context", {"fusion": "channel_mul"}, "channel_mul with γ"),
    ("slowfast", "self_attention", {}, "slowfast has no block for self_attention"),
    ("ccnet", "self_attention", {}, "it holds criss_cross"),
]


@pytest.mark.parametrize(
    ("target", "type_", "options", "message"),
    HELD_NOWHERE,
    ids=[f"{target}-{message}" for target, _, _, message in HELD_NOWHERE],
)
def test_what_the_other_side_cannot_hold(
    target: str, type_: str, options: dict[str, Any], message: str
) -> None:
    state, built = ours(type_, **options)
    place = {"layer2.0.nlsurgery.0": "there"}
    known = {"layer2.0.nlsurgery.0": built}
    with pytest.raises(CheckpointError, match=message) as raised:
        convert_state(state, "nlsurgery", target, options=known, places=place)
    assert str(raised.value).startswith("layer2.0.nlsurgery.0: ")


def test_inserted_block_of_another_type() -> None:
    state, _ = ours("eca")
    with pytest.raises(
        CheckpointError, match=r"layer2\.0\.nlsurgery\.0: no other project's layout"
    ):
        convert_state(state, "nlsurgery", "mmcv")


def test_place_without_a_name_in_the_target() -> None:
    state, _ = ours("non_local", dims=3)
    moved = {key.replace("layer2.0", "stem"): value for key, value in state.items()}
    with pytest.raises(CheckpointError, match=r"slowfast has no block at stem; say with --place"):
        convert_state(moved, "nlsurgery", "slowfast")


def test_two_blocks_of_one_name() -> None:
    state, _ = ours("self_attention")
    second = {key.replace("nlsurgery.0", "nlsurgery.1"): value for key, value in state.items()}
    with pytest.raises(CheckpointError, match=r"both become layer2\.0\.attn\.gamma.*--place"):
        convert_state({**state, **second}, "nlsurgery", "sagan")


def test_both_fusions_in_one_context_block() -> None:
    states = [
        peers.context_state(8, 2, fusion=fusion, attend=True, style="mmcv")
        for fusion in ("add", "mul")
    ]
    with pytest.raises(CheckpointError, match="fuses by channel_add and channel_mul"):
        convert_state(under("b", {**states[0], **states[1]}), "gcnet")


def test_place_of_no_block() -> None:
    state = under("nl_1", peers.alexhex7_state(8, 4, 2, "gaussian", sub_sample=True, bn=True))
    with pytest.raises(CheckpointError, match=r"--place nl1: no such block.*'nl_1'"):
        convert_state(state, places={"nl1": "conv_1"})


def test_option_against_what_a_block_was_built_with() -> None:
    state, options = ours("non_local", mode="dot_product")
    with pytest.raises(CheckpointError, match=r"'embedded_gaussian' was asked for.*'dot_product'"):
        convert_state(
            state,
            "nlsurgery",
            "mmaction2",
            choices=Choices(mode="embedded_gaussian"),
            options={"layer2.0.nlsurgery.0": options},
        )


@pytest.mark.parametrize("asked", [(2, 2, 2), [2, 2, 2]], ids=["tuple", "list"])
def test_what_a_block_was_built_with_may_be_said_in_other_words(asked: Any) -> None:
    state, options = ours("non_local", dims=3, sub_sample=[2, 2, 2], pool_order="before_conv")
    fqn = "layer2.0.nlsurgery.0"
    choices = Choices(sub_sample=asked, temporal_window=0)
    built = {fqn: {**options, "temporal_window": None}}
    done = convert_state(state, "nlsurgery", "slowfast", choices=choices, options=built)
    assert done.blocks[0].options["pool_size"] == [2, 2, 2]
    with pytest.raises(CheckpointError, match=r"sub_sample=True was asked for.*\[2, 2, 2\]"):
        convert_state(
            state, "nlsurgery", "slowfast", choices=Choices(sub_sample=True), options=built
        )


def test_danet_with_both_modules_becomes_two() -> None:
    state, options = ours("danet", part="both")
    done = convert_state(state, "nlsurgery", "danet", options={"layer2.0.nlsurgery.0": options})
    assert [spec.place for spec in done.blocks] == ["layer2.0.sa", "layer2.0.sc"]
    x = peers.numbers(1, 8, 4, 5, scale=1.0)
    block = block_type("danet").build(8, dims=2, **options).double()
    block.load_state_dict({k.split(".", 4)[4]: v for k, v in state.items()})
    parts = {
        name: {k.removeprefix(f"{name}."): v for k, v in done.tensors.items()}
        for name in ("layer2.0.sa", "layer2.0.sc")
    }
    wanted = (
        peers.self_attention(parts["layer2.0.sa"], x)
        + peers.channel_attention(parts["layer2.0.sc"], x)
        - x
    )
    with torch.no_grad():
        torch.testing.assert_close(block(x), wanted, rtol=0, atol=1e-9)
