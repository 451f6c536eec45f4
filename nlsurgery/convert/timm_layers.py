"""timm's NonLocalAttn (``t p g z norm``) and GlobalContext (``conv_attn mlp_*``), as ``attn_layer``.

timm calls them inside the residual branch, before the add: in ResNets ``layerN.i.se``, behind the
last normalisation; in ByobNets ``attn`` and ``attn_last``.
"""

from __future__ import annotations

import math
import re

from nlsurgery.convert import gcnet, pairwise
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

NAME = "timm"
_BN = "weight|bias|running_mean|running_var|num_batches_tracked"
_NL = re.compile(rf"(?P<prefix>(?:.*\.)?)(?P<local>(?:t|p|g|z)\.(?:weight|bias)|norm\.(?:{_BN}))")
_GC = re.compile(
    r"(?P<prefix>(?:.*\.)?)(?P<local>conv_attn\.(?:weight|bias)"
    r"|mlp_(?:add|scale)\.(?:fc1|fc2|norm)\.(?:weight|bias))"
)
_PARTS = {"t": "theta", "p": "phi", "g": "g", "z": "out", "norm": "bn"}
_FUSION = {"add": "channel_add", "scale": "channel_mul"}
_INDEX = {"fc1": "0", "norm": "1", "fc2": "3"}
#: GlobalContext's layer norm has epsilon 1e-6, ours 1e-5. LN_ε(k·h) = LN_{ε/k²}(h), so √10 on the
#: convolution before it makes them equal.
_LN_GAIN = math.sqrt(1e-5 / 1e-6)


def nl_to_ours(state: State, choices: Choices, where: str) -> Converted:
    """Convert one ``NonLocalAttn``; its C^-1/2 (off with ``use_scale=False``) goes into θ."""
    origin = {f"{_PARTS[key.split('.')[0]]}.{key.split('.')[1]}": key for key in state}
    tensors = {new: state[old] for new, old in origin.items()}
    read = pairwise.read_block(
        tensors,
        origin,
        choices,
        where,
        sub_sample=False,
        pool_order="after_conv",
        use_scale=False,
    )
    factor = 1.0 if choices.use_scale is False else read.channels**-0.5
    scaled = pairwise.scale_logits(read.tensors, factor)
    return Converted(scaled, origin, read.options, read.channels, read.dims, read.type)


def nl_from_ours(block: OurBlock) -> Converted:
    """Convert one of our 2-D embedded_gaussian blocks that end in a BatchNorm."""
    channels, inner, _ = pairwise.require_plain(
        block, NAME, pool_order="", modes=("embedded_gaussian",), dims=(2,)
    )
    if "bn.weight" not in block.tensors:
        raise cannot_hold(NAME, block.where, "a block without a norm", "its end in a BatchNorm")
    factor = pairwise.logit_factor(block.options, inner, NAME, block.where) * channels**0.5
    tensors = pairwise.with_biases(pairwise.scale_logits(block.tensors, factor))
    back = {ours: theirs for theirs, ours in _PARTS.items()}
    names = {f"{back[key.split('.')[0]]}.{key.split('.')[1]}": key for key in tensors}
    origin = {new: old for new, old in names.items() if old in block.tensors}
    needs = {"attn_layer": "nl", "in_channels": channels, "rd_channels": inner, "use_scale": True}
    renamed = {new: tensors[old] for new, old in names.items()}
    return Converted(renamed, origin, needs, channels, 2, "non_local")


def gc_to_ours(state: State, choices: Choices, where: str) -> Converted:
    """Convert one ``GlobalContext`` that either adds or scales; ``use_attn=False`` too."""
    fused = [name for name in _FUSION if f"mlp_{name}.fc1.weight" in state]
    if len(fused) != 1:
        raise CheckpointError(
            f"{where}: the block has mlp_{' and mlp_'.join(fused) or '?'}; a global_context block "
            f"holds one of mlp_add, mlp_scale"
        )
    origin = {_gc_name(key): key for key in state}
    tensors = {new: state[old] for new, old in origin.items()}
    conv = f"{_FUSION[fused[0]]}_conv"
    for name in ("weight", "bias"):
        if f"{conv}.1.{name}" in tensors:
            tensors[f"{conv}.1.{name}"] = tensors[f"{conv}.1.{name}"][:, None, None]
        if f"{conv}.0.{name}" in tensors:
            tensors[f"{conv}.0.{name}"] = tensors[f"{conv}.0.{name}"] * _LN_GAIN
    return gcnet.context_block(tensors, origin, _FUSION[fused[0]], where)


def _gc_name(key: str) -> str:
    part, *rest = key.split(".")
    if part == "conv_attn":
        return f"conv_mask.{rest[0]}"
    return f"{_FUSION[part.removeprefix('mlp_')]}_conv.{_INDEX[rest[0]]}.{rest[1]}"


def gc_from_ours(block: OurBlock) -> Converted:
    """Convert one of our 2-D global context blocks."""
    fusion, channels, hidden = gcnet.checked_context(block, NAME)
    mlp = {ours: theirs for theirs, ours in _FUSION.items()}[fusion]
    parts = {index: part for part, index in _INDEX.items()}
    tensors, origin = {}, {}
    for key, value in block.tensors.items():
        if key == "gamma":
            continue
        if key.startswith("conv_mask."):
            new = key.replace("conv_mask", "conv_attn")
        else:
            _, index, name = key.split(".")
            new = f"mlp_{mlp}.{parts[index]}.{name}"
            value = value.flatten() if index == "1" else value
            value = value / _LN_GAIN if index == "0" else value
        tensors[new], origin[new] = value, key
    needs = {
        "attn_layer": "gc",
        "channels": channels,
        "rd_channels": hidden,
        "fuse_add": mlp == "add",
        "fuse_scale": mlp == "scale",
    }
    return Converted(tensors, origin, needs, channels, 2, "global_context")


def _nl_accepts(local: frozenset[str]) -> bool:
    return {"t.weight", "p.weight", "g.weight", "z.weight", "norm.weight"} <= local


def _gc_accepts(local: frozenset[str]) -> bool:
    return "mlp_add.fc1.weight" in local or "mlp_scale.fc1.weight" in local


def _host(prefix: str, keys: frozenset[str]) -> str | None:
    head, _, name = prefix.rpartition(".")
    behind = {
        "se": ("bn3", "bn2"),
        "attn": ("conv2b_kxk", "conv2_kxk"),
        "attn_last": ("conv3_1x1", "conv2_kxk"),
    }
    for sibling in behind.get(name, ()):
        if any(key.startswith(f"{head}.{sibling}.") for key in keys):
            return f"{head}.{sibling}"
    return None


def _name_at(host: str) -> str | None:
    match = re.fullmatch(r"(layer\d\.\d+)\.bn[23]", host)
    return f"{match[1]}.se" if match else None


LAYOUT = Layout(
    NAME,
    "huggingface/pytorch-image-models",
    (
        BlockKind(
            "NonLocalAttn",
            _NL,
            _nl_accepts,
            nl_to_ours,
            nl_from_ours,
            _host,
            _name_at,
            ("non_local",),
            choices=("use_scale", "bn_eps"),
        ),
        BlockKind(
            "GlobalContext",
            _GC,
            _gc_accepts,
            gc_to_ours,
            gc_from_ours,
            _host,
            _name_at,
            ("global_context",),
        ),
    ),
)
