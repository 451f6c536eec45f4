"""Whole checkpoints: the operated model computes what the other project's network does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nlsurgery
from nlsurgery.convert import convert_state, detect, recipe_of
from nlsurgery.convert.fit import load_converted, model_options
from nlsurgery.errors import CheckpointError
from tests.convert import peers
from tests.convert.toy import ToyResNet, foreign_names, foreign_state, toy

#: Layout -> (where its blocks stand in the toy, their prefix there).
PLACES = {
    "mmcv": [("layer2.1.bn3", "backbone.layer2.1.nonlocal_block")],
    "mmaction2": [
        ("layer2.1", "backbone.layer2.1.non_local_block"),
        ("layer3.0", "backbone.layer3.0.non_local_block"),
    ],
    "slowfast": [
        ("layer2.1", "s3.pathway0_nonlocal1"),
        ("layer3.0", "s4.pathway0_nonlocal0"),
    ],
    "caffe2": [("layer2.1", "nonlocal_conv3_1"), ("layer3.0", "nonlocal_conv4_0")],
}
CHANNELS = {"layer2": 32, "layer3": 64}


def block_state(layout: str, channels: int, dims: int, seed: int) -> peers.State:
    if layout == "slowfast":
        return peers.slowfast_state(channels, channels // 2, bn=True, seed=seed)
    if layout == "caffe2":
        return peers.caffe2_state(channels, channels // 2, bn="bn", seed=seed)
    return peers.mmcv_state(
        channels, channels // 2, dims, "embedded_gaussian", sub_sample=True, bn=True, seed=seed
    )


def run_block(layout: str, state: peers.State, x: Tensor) -> Tensor:
    if layout == "slowfast":
        return peers.slowfast(state, x, "softmax", (1, 2, 2))
    if layout == "caffe2":
        return peers.caffe2(state, x, softmax=True, scale=True, pool=True)
    return peers.mmcv(state, x, "embedded_gaussian")


def checkpoint(layout: str, model: ToyResNet) -> tuple[peers.State, dict[str, peers.State]]:
    """The toy with blocks in a project's names, and the blocks by host."""
    state, blocks = foreign_state(model, layout), {}
    for seed, (host, prefix) in enumerate(PLACES[layout]):
        channels = CHANNELS[host.split(".")[0]]
        blocks[host] = block_state(layout, channels, model.dims, seed)
        for key, value in blocks[host].items():
            state[f"{prefix}{'_' if layout == 'caffe2' else '.'}{key}"] = value * (
                0.2 if key.rsplit(".", 1)[-1] == "weight" and value.dim() > 1 else 1
            )
            blocks[host][key] = state[f"{prefix}{'_' if layout == 'caffe2' else '.'}{key}"]
    return state, blocks


def with_blocks(
    model: nn.Module, blocks: dict[str, peers.State], run: Callable[[peers.State, Tensor], Tensor]
) -> nn.Module:
    """The original network with the peer's formula behind its modules."""
    for host, state in blocks.items():
        model.get_submodule(host).register_forward_hook(
            lambda module, args, output, state=state: run(state, output)
        )
    return model


VIDEO = [("mmaction2", 3), ("slowfast", 3), ("caffe2", 3)]


@pytest.mark.parametrize(("layout", "time"), [("mmcv", 0), *VIDEO, ("mmaction2", 0)], ids=str)
def test_network_computes_the_same(layout: str, time: int) -> None:
    dims = 3 if time else 2
    original = toy(dims, time or 1)
    state, blocks = checkpoint(layout, original)
    assert detect(state) == layout
    done = convert_state(state)
    assert not done.left
    model = ToyResNet(dims, time or 1).double()
    size = (3, 4, 32, 32) if time else (3, 32, 32)
    nlsurgery.apply(model, recipe_of(done), input_size=size)
    loaded = load_converted(model, done, "x.pth")
    assert not loaded.left
    x = peers.numbers(2, *size, scale=1.0)
    with torch.no_grad():
        plain = original(x)
        wanted = with_blocks(original, blocks, lambda s, y: run_block(layout, s, y))(x)
        ours = model.eval()(x)
    assert (wanted - plain).abs().max() > 1e-3 * wanted.abs().max()
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize("layout", list(PLACES))
def test_every_key_is_accounted_for_and_comes_back(layout: str) -> None:
    state, _ = checkpoint(layout, toy(2 if layout == "mmcv" else 3))
    extra = {
        "mmcv": ("neck.lateral_convs.0.conv.weight", "rpn_head.rpn_cls.bias"),
        "mmaction2": ("cls_head.consensus.weight",),
        "slowfast": ("s2.pathway1_res0.branch2.a.weight", "s1_fuse.conv_f2s.weight"),
        "caffe2": ("conv1_w_momentum", "lr", "res2_0_branch2a_bn_s_momentum"),
    }[layout]
    done = convert_state({**state, **{key: torch.ones(3) for key in extra}}, layout)
    assert sorted(row.key for row in done.left) == sorted(extra)
    counted = [*done.taken, *(old for old, _ in done.renamed), *extra]
    assert sorted(counted) == sorted([*state, *extra])
    assert set(done.tensors) == {*done.taken, *(new for _, new in done.renamed), *done.added}
    known = {spec.place: spec.options for spec in done.blocks}
    back = convert_state(done.tensors, "nlsurgery", layout, options=known)
    for key, value in state.items():
        torch.testing.assert_close(back.tensors[key], value, rtol=0, atol=1e-12)
    lost = {row.key for row in back.left if "num_batches_tracked" not in row.key}
    assert all(key.endswith("out.bias") for key in lost)
    assert set(state) == set(back.tensors)


@pytest.mark.parametrize("layout", ["slowfast", "caffe2"])
def test_single_frame_kernels_fit_a_2d_network(layout: str) -> None:
    video = toy(3, 1)
    state, blocks = checkpoint(layout, video)
    done = convert_state(state)
    model = ToyResNet(2).double()
    nlsurgery.apply(model, recipe_of(done), input_size=(3, 32, 32))
    loaded = load_converted(model, done, "x.pth")
    assert any("single frames" in note for note in loaded.notes)
    x = peers.numbers(2, 3, 32, 32, scale=1.0)
    with torch.no_grad():
        wanted = with_blocks(video, blocks, lambda s, y: run_block(layout, s, y))(x[:, :, None])
        torch.testing.assert_close(model.eval()(x), wanted, rtol=0, atol=1e-9)


def test_longer_kernels_do_not_fit_a_2d_network() -> None:
    state, _ = checkpoint("slowfast", toy(3, 3))
    done = convert_state(state)
    model = ToyResNet(2).double()
    nlsurgery.apply(model, recipe_of(done), input_size=(3, 32, 32))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"x\.pth does not fit .* other shapes: conv1\.weight"
    ):
        load_converted(model, done, "x.pth")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_tsm_names() -> None:
    """TSM wraps its blocks (``.block.``) and the shifted convolution (``.net.``)."""
    state, _ = checkpoint("mmaction2", toy(2))
    tsm = {}
    for key, value in state.items():
        moved = key
        if ".layer2.1." in key and "non_local" not in key:
            moved = key.replace(".layer2.1.", ".layer2.1.block.")
        tsm[moved.replace("conv1.conv.w", "conv1.conv.net.w") if "layer" in key else moved] = value
    assert any(".block.conv1.conv.net.weight" in key for key in tsm)
    assert set(convert_state(tsm).tensors) == set(convert_state(state).tensors)


def test_frozen_affine_norms_of_caffe2() -> None:
    """A scale and shift without statistics, in the backbone too, becomes an equal BatchNorm."""
    model = toy(3)
    state = {
        k: v for k, v in foreign_state(model, "caffe2").items() if k[-3:] not in ("_rm", "riv")
    }
    block = peers.caffe2_state(32, 16, bn="affine")
    done = convert_state({**state, **{f"nonlocal_conv3_1_{k}": v for k, v in block.items()}})
    x = peers.numbers(2, 8, 3, 4, 4)
    norm = nn.BatchNorm3d(8).double().eval()
    start = "bn1."
    values = {k.removeprefix(start): v for k, v in done.tensors.items() if k.startswith(start)}
    norm.load_state_dict(values, strict=True)
    wanted = x * state["res_conv1_bn_s"].view(-1, 1, 1, 1) + state["res_conv1_bn_b"].view(
        -1, 1, 1, 1
    )
    torch.testing.assert_close(norm(x), wanted, rtol=0, atol=1e-12)


def test_block_in_a_sequence_moves_out_of_it() -> None:
    """``layer2.1`` and ``layer2.3`` are blocks: what follows gets the numbers of the original."""
    model = toy(2)
    blocks = {
        name: peers.alexhex7_state(
            32, 16, 2, "embedded_gaussian", sub_sample=True, bn=True, seed=seed
        )
        for seed, name in enumerate(("layer2.0", "layer2.1"))
    }
    state = {}
    for key, value in model.state_dict().items():
        state[key.replace("layer2.1.", "layer2.2.")] = value
    for name, position in (("layer2.0", 1), ("layer2.1", 3)):
        state |= {f"layer2.{position}.{key}": value for key, value in blocks[name].items()}
    done = convert_state(state)
    assert [(spec.name, spec.host) for spec in done.blocks] == [
        ("layer2.1", "layer2.0"),
        ("layer2.3", "layer2.1"),
    ]
    operated = nlsurgery.apply(ToyResNet(2).double(), recipe_of(done), input_size=(3, 32, 32))
    load_converted(operated, done, "x.pth")
    x = peers.numbers(1, 3, 32, 32)
    run = with_blocks(model, blocks, lambda s, y: peers.alexhex7(s, y, "embedded_gaussian"))
    with torch.no_grad():
        torch.testing.assert_close(operated.eval()(x), run(x), rtol=0, atol=1e-9)


def operated_for(recipe_block: dict[str, object], after: list[int]) -> nn.Module:
    recipe = {
        "version": 1,
        "inserts": [
            {"stage": "layer2", "after": after, "block": {"type": "non_local", **recipe_block}}
        ],
    }
    return nlsurgery.apply(ToyResNet(3, 3).double(), recipe, input_size=(3, 4, 32, 32))


def slowfast_with_one_block() -> tuple[ToyResNet, peers.State, peers.State]:
    model = toy(3, 3)
    block = peers.slowfast_state(32, 16, bn=True)
    state = foreign_state(model, "slowfast")
    return model, {**state, **{f"s3.pathway0_nonlocal1.{k}": v for k, v in block.items()}}, block


@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("mode", ["embedded_gaussian", "dot_product"])
def test_recipe_says_what_keys_do_not_tell(mode: str, use_scale: bool) -> None:
    """Mode and pool come from the recipe; a scale that it leaves out is folded into θ."""
    options = {"mode": mode, "use_scale": use_scale and mode != "dot_product"}
    model = operated_for(options, [1])
    original, state, block = slowfast_with_one_block()
    done = convert_state(state, options=model_options(model))
    load_converted(model, done, "x.pth")
    kind = "softmax" if mode == "embedded_gaussian" else "dot_product"
    run = with_blocks(original, {"layer2.1": block}, lambda s, y: peers.slowfast(s, y, kind, None))
    x = peers.numbers(1, 3, 4, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), run(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("sub_sample", [(2, 2, 2), (1, 4, 4)], ids=str)
def test_pool_of_the_recipe_is_the_checkpoint_s(sub_sample: tuple[int, ...]) -> None:
    block = {"sub_sample": list(sub_sample), "pool_order": "before_conv"}
    model = operated_for(block, [1])
    original, state, block = slowfast_with_one_block()
    done = convert_state(state, options=model_options(model))
    load_converted(model, done, "x.pth")
    assert recipe_of(done)["inserts"][0]["block"]["sub_sample"] == list(sub_sample)
    run = with_blocks(
        original, {"layer2.1": block}, lambda s, y: peers.slowfast(s, y, "softmax", sub_sample)
    )
    x = peers.numbers(1, 3, 4, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), run(x), rtol=0, atol=1e-9)


def test_windows_of_a_frozen_caffe2_network() -> None:
    """Its blocks at res3 see four frames each, those of res4 all of them; what keys imply is noted."""
    model = toy(3, 3)
    blocks = {
        "nonlocal_conv3_1": peers.caffe2_state(32, 16, bn="affine"),
        "nonlocal_conv4_0": peers.caffe2_state(64, 32, bn="affine"),
    }
    state = foreign_state(model, "caffe2")
    for prefix, block in blocks.items():
        state |= {f"{prefix}_{key}": value for key, value in block.items()}
    done = convert_state(state)
    assert [spec.options.get("temporal_window") for spec in done.blocks] == [4, None]
    assert any("temporal_window: taken as 4" in note for note in done.notes)
    recipe = recipe_of(done)
    operated = nlsurgery.apply(ToyResNet(3, 3).double(), recipe, input_size=(3, 8, 32, 32))
    load_converted(operated, done, "x.pkl")
    flags = {"softmax": True, "scale": True, "pool": True}
    model.get_submodule("layer2.1").register_forward_hook(
        lambda module, args, y: peers.caffe2_groups(blocks["nonlocal_conv3_1"], y, 4, **flags)
    )
    model.get_submodule("layer3.0").register_forward_hook(
        lambda module, args, y: peers.caffe2(blocks["nonlocal_conv4_0"], y, **flags)
    )
    x = peers.numbers(1, 3, 8, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(operated.eval()(x), model(x), rtol=0, atol=1e-9)
    del recipe["inserts"][0]["block"]["temporal_window"]
    other = nlsurgery.apply(ToyResNet(3, 3).double(), recipe, input_size=(3, 8, 32, 32))
    with pytest.raises(
        CheckpointError, match=r"has temporal_window=4.*write temporal_window: 4 in"
    ):
        load_converted(other, convert_state(state, options=model_options(other)), "x.pkl")


@pytest.mark.parametrize(
    ("options", "after", "message"),
    [
        ({"sub_sample": True}, [1], r"has pool_order='before_conv'.*'after_conv'.*in the recipe"),
        (
            {"mode": "concatenation"},
            [1],
            r"'concatenation' was asked for.*embedded_gaussian or dot",
        ),
        (
            {"temporal_window": 2},
            [1],
            r"has temporal_window=None.* 2, and no.*write temporal_window: null in",
        ),
        ({}, [0], r"belongs at layer2\.1\.nlsurgery\.0, where the recipe puts none"),
        ({"inter_channels": 4}, [1], r"other shapes: layer2\.1\.nlsurgery\.0\.theta"),
        ({}, [0, 1], r"no block for layer2\.0\.nlsurgery\.0"),
    ],
    ids=["pool order", "mode", "window", "place", "inner channels", "one too many"],
)
def test_recipe_that_does_not_fit_says_so(
    options: dict[str, object], after: list[int], message: str
) -> None:
    model = operated_for(options, after)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _, state, _ = slowfast_with_one_block()
    with pytest.raises(CheckpointError, match=message):
        load_converted(model, convert_state(state, options=model_options(model)), "x.pth")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_block_of_another_width_keeps_its_prefix() -> None:
    """mmdet's plugin behind conv1 or conv2 is narrower than conv3: its place is not known."""
    state = foreign_state(toy(2), "mmcv")
    block = peers.mmcv_state(8, 4, 2, "embedded_gaussian", sub_sample=False, bn=True)
    prefix = "backbone.layer2.1.nonlocal_block"
    state |= {f"{prefix}.{key}": value for key, value in block.items()}
    done = convert_state(state)
    assert done.blocks[0].place == prefix
    assert recipe_of(done) is None
    assert any("8 channels" in note and "--place" in note for note in done.notes)
    placed = convert_state(state, places={prefix: "layer2.1.relu2"})
    assert placed.blocks[0].place == "layer2.1.relu2.nlsurgery.0"


def test_names_of_a_stem_written_by_hand() -> None:
    assert foreign_names("slowfast")["layer3.1.bn2.running_var"] == (
        "s4.pathway0_res1.branch2.b_bn.running_var"
    )
    assert foreign_names("caffe2")["layer3.1.bn2.running_var"] == "res4_1_branch2b_bn_riv"
    assert foreign_names("mmaction2")["layer1.0.downsample.1.bias"] == (
        "backbone.layer1.0.downsample.bn.bias"
    )
