"""caffe2 video-nonlocal-net: blobs ``nonlocal_conv{3,4}_{i}_*``; the pool before the conv."""

from __future__ import annotations

import re

import torch

from nlsurgery.convert import pairwise
from nlsurgery.convert.base_names import caffe2_from_ours, caffe2_to_ours
from nlsurgery.convert.layout import BlockKind, Choices, Converted, Layout, OurBlock, State, ToOurs
from nlsurgery.convert.slowfast import MODES, read_video_block

NAME = "caffe2"
_LOCAL = r"(?:theta|phi|g|out)_[wb]|bn_(?:s|b|rm|riv)"
#: Frames that attend to each other at res3 in models whose BatchNorm is frozen (``add_nonlocal_group``).
RES3_WINDOW = 4
_ENDINGS = {
    "w": "weight",
    "b": "bias",
    "bn_s": "bn.weight",
    "bn_b": "bn.bias",
    "bn_rm": "bn.running_mean",
    "bn_riv": "bn.running_var",
}


def res3_to_ours(state: State, choices: Choices, where: str) -> Converted:
    """Convert a block of res3; where BatchNorm is frozen, frames attend within windows of four there."""
    frozen = "bn_s" in state and "bn_rm" not in state
    window = choices.temporal_window
    if window is None and frozen:
        window = RES3_WINDOW
    return to_ours(state, choices, where, temporal_window=window)


def to_ours(
    state: State, choices: Choices, where: str, *, temporal_window: int | None = None
) -> Converted:
    """Convert one block; ``bn_s`` and ``bn_b`` alone are its frozen affine form."""
    origin = {_our_name(key): key for key in state}
    tensors = {new: state[old] for new, old in origin.items()}
    if "bn.weight" in tensors and not {"bn.running_mean", "bn.running_var"} & set(tensors):
        weight = tensors["bn.weight"]
        eps = pairwise.BN_EPS if choices.bn_eps is None else choices.bn_eps
        tensors["bn.running_mean"] = torch.zeros_like(weight)
        tensors["bn.running_var"] = torch.full_like(weight, 1 - eps)
    scaled = choices.use_scale is not False
    return read_video_block(
        tensors, origin, choices, where, use_scale=scaled, temporal_window=temporal_window
    )


def _our_name(key: str) -> str:
    if key in _ENDINGS:
        return _ENDINGS[key]
    part, ending = key.rsplit("_", 1)
    return f"{part}.{_ENDINGS[ending]}"


def from_ours(block: OurBlock) -> Converted:
    """Convert one of our 3-D blocks."""
    channels, inner, _ = pairwise.require_plain(
        block,
        NAME,
        pool_order="before_conv",
        modes=MODES,
        dims=(3,),
        windows=(RES3_WINDOW,),
    )
    options = block.options
    tensors = pairwise.with_biases(block.tensors)
    tensors.pop("bn.num_batches_tracked", None)
    names = {_their_name(key): key for key in tensors}
    origin = {new: old for new, old in names.items() if old in block.tensors}
    softmax = options["mode"] == "embedded_gaussian"
    needs = {
        "NONLOCAL.USE_SOFTMAX": softmax,
        "NONLOCAL.USE_SCALE": softmax and bool(options["use_scale"]),
        "NONLOCAL.USE_MAXPOOL": options["sub_sample"],
        "NONLOCAL.USE_BN": "bn.weight" in tensors,
        "dim_inner": inner,
        "group_size": options["temporal_window"],
    }
    renamed = {new: tensors[old] for new, old in names.items()}
    return Converted(renamed, origin, needs, channels, 3, "non_local")


def _their_name(key: str) -> str:
    back = {ours: theirs for theirs, ours in _ENDINGS.items()}
    if key in back:
        return back[key]
    part, name = key.split(".")
    return f"{part}_{back[name]}"


def _accepts(local: frozenset[str]) -> bool:
    return {"theta_w", "phi_w", "g_w", "out_w"} <= local


def _host(prefix: str, keys: frozenset[str]) -> str | None:
    match = re.fullmatch(r"nonlocal_conv(\d)_(\d+)", prefix)
    return f"layer{int(match[1]) - 1}.{match[2]}" if match else None


def _name_at(host: str) -> str | None:
    match = re.fullmatch(r"layer(\d)\.(\d+)", host)
    return f"nonlocal_conv{int(match[1]) + 1}_{match[2]}" if match else None


def _kind(name: str, stage: str, convert: ToOurs, *choices: str) -> BlockKind:
    return BlockKind(
        name,
        re.compile(rf"(?P<prefix>nonlocal_conv{stage}_\d+_)(?P<local>{_LOCAL})"),
        _accepts,
        convert,
        from_ours,
        _host,
        _name_at,
        ("non_local",),
        separator="_",
        choices=("mode", "use_scale", "sub_sample", "bn_eps", *choices),
    )


LAYOUT = Layout(
    NAME,
    "facebookresearch/video-nonlocal-net",
    (
        _kind("spacetime_nonlocal at res3", "3", res3_to_ours, "temporal_window"),
        _kind("spacetime_nonlocal", r"\d", to_ours),
    ),
    caffe2_to_ours,
    caffe2_from_ours,
    aliases=("video-nonlocal-net",),
    wrapper="blobs",
    frozen_affine=True,
)
