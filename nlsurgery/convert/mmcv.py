"""mmcv's NonLocal1d/2d/3d under the names of mmdet, mmpretrain, mmseg, and those of mmaction2."""

from __future__ import annotations

import re
from typing import Any

from nlsurgery.convert import gcnet, pairwise
from nlsurgery.convert.base_names import (
    mmaction_from_ours,
    mmaction_to_ours,
    mmdet_from_ours,
    mmdet_to_ours,
)
from nlsurgery.convert.layout import (
    BlockKind,
    Choices,
    Converted,
    Layout,
    OurBlock,
    State,
    cannot_hold,
)
from nlsurgery.errors import CheckpointError

NAME = "mmcv"
_MODES = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
_BN = "weight|bias|running_mean|running_var|num_batches_tracked"
_PATTERN = re.compile(
    rf"(?P<prefix>(?:.*\.)?)(?P<local>(?:g|phi)(?:\.0)?\.conv\.(?:weight|bias)"
    rf"|(?:theta|conv_out)\.conv\.(?:weight|bias)|conv_out\.bn\.(?:{_BN})"
    rf"|concat_project\.conv\.weight)"
)


def to_ours(state: State, choices: Choices, where: str) -> Converted:
    """Convert one ``NonLocal1d/2d/3d``; its ``use_scale`` (on by default) scales no ``gaussian``."""
    sub_sample = "g.0.conv.weight" in state
    if ("phi.0.conv.weight" in state) != (sub_sample and "theta.conv.weight" in state):
        raise CheckpointError(f"{where}: g and phi must both have a pool (a '.0') or neither")
    origin = {_our_name(key): key for key in state}
    scaled = "theta.conv.weight" in state and choices.use_scale is not False
    return pairwise.read_block(
        {new: state[old] for new, old in origin.items()},
        origin,
        choices,
        where,
        sub_sample=sub_sample,
        pool_order="after_conv",
        use_scale=scaled,
    )


def _our_name(key: str) -> str:
    if key.startswith("conv_out.bn."):
        return key.removeprefix("conv_out.")
    return key.replace(".0.", ".").replace(".conv.", ".").replace("conv_out.", "out.")


def from_ours(block: OurBlock) -> Converted:
    """Convert one of our non-local blocks; a bias of ``out`` before a BatchNorm is folded."""
    channels, inner, dims = pairwise.require_plain(
        block, NAME, pool_order="after_conv", modes=_MODES, dims=(1, 2, 3)
    )
    options = block.options
    scaled = options["mode"] == "embedded_gaussian" and bool(options["use_scale"])
    if not scaled:
        pairwise.logit_factor(options, inner, NAME, block.where)
    reduction = channels // inner
    if max(channels // max(reduction, 1), 1) != inner:
        raise cannot_hold(
            NAME, block.where, f"{inner} inner channels of {channels}", "it has C // reduction"
        )
    tensors = pairwise.with_biases(block.tensors)
    normed = "bn.weight" in tensors
    if normed:
        tensors = pairwise.fold_out_bias(tensors)
    names = {_their_name(key, options["sub_sample"]): key for key in tensors}
    needs: dict[str, Any] = {
        "type": f"NonLocal{dims}d",
        "in_channels": channels,
        "reduction": reduction,
        "mode": options["mode"],
        "use_scale": scaled,
        "sub_sample": options["sub_sample"],
        "norm_cfg": {"type": f"BN{dims}d"} if normed else None,
    }
    origin = {new: old for new, old in names.items() if old in block.tensors}
    renamed = {new: tensors[old] for new, old in names.items()}
    return Converted(renamed, origin, needs, channels, dims, "non_local")


def _their_name(key: str, sub_sample: bool) -> str:
    part, name = key.split(".", 1)
    if part == "bn":
        return f"conv_out.bn.{name}"
    if part == "out":
        return f"conv_out.conv.{name}"
    pooled = sub_sample and part in ("g", "phi")
    return f"{part}.0.conv.{name}" if pooled else f"{part}.conv.{name}"


def _accepts(local: frozenset[str]) -> bool:
    has_g = "g.conv.weight" in local or "g.0.conv.weight" in local
    return has_g and "conv_out.conv.weight" in local


def _mmdet_host(prefix: str, keys: frozenset[str]) -> str | None:
    """A plugin stands inside the residual branch; one as wide as conv3 is taken as after it."""
    match = re.fullmatch(r"(?:backbone\.)?(.*layer\d+\.\d+)\.nonlocal_block\w*", prefix)
    if match is None:
        return None
    return f"{match[1]}.bn3"


def _mmaction_host(prefix: str, keys: frozenset[str]) -> str | None:
    match = re.fullmatch(r"(?:backbone\.)?(.*layer\d+\.\d+)\.non_local_block", prefix)
    return match[1] if match else None


def _mmdet_name(host: str) -> str | None:
    match = re.fullmatch(r"(layer\d+\.\d+)\.(?:bn3|bn2)", host)
    return f"backbone.{match[1]}.nonlocal_block" if match else None


def _mmaction_name(host: str) -> str | None:
    match = re.fullmatch(r"layer\d+\.\d+", host)
    return f"backbone.{host}.non_local_block" if match else None


def _is_mmaction(keys: frozenset[str]) -> bool:
    return any(".non_local_block." in key or re.search(r"conv1\.conv\.", key) for key in keys)


def _kind(host: Any, name_at: Any) -> BlockKind:
    return BlockKind(
        "NonLocalNd",
        _PATTERN,
        _accepts,
        to_ours,
        from_ours,
        host,
        name_at,
        ("non_local",),
        choices=("mode", "use_scale", "bn_eps"),
    )


LAYOUT = Layout(
    NAME,
    "mmcv blocks in an mmdet, mmpretrain or mmseg ResNet",
    (_kind(_mmdet_host, _mmdet_name), gcnet.KIND),
    mmdet_to_ours,
    mmdet_from_ours,
    aliases=("mmdet", "mmpretrain", "mmseg", "gcnet"),
    tells=lambda keys: not _is_mmaction(keys),
)

MMACTION = Layout(
    "mmaction2",
    "mmcv blocks in an mmaction2 ResNet or ResNet3d, TSM included",
    (_kind(_mmaction_host, _mmaction_name),),
    mmaction_to_ours,
    mmaction_from_ours,
    aliases=("tsm",),
    tells=_is_mmaction,
)
