"""GCNet's ContextBlock, as in mmcv and xvjiarui/GCNet: ``conv_mask``, ``channel_*_conv``."""

from __future__ import annotations

import re

from torch import Tensor

from nlsurgery.convert.layout import (
    BlockKind,
    Choices,
    Converted,
    OurBlock,
    State,
    cannot_hold,
    require_shape,
)
from nlsurgery.errors import CheckpointError

NAME = "ContextBlock"
FUSIONS = ("channel_add", "channel_mul")
_PATTERN = re.compile(
    r"(?P<prefix>(?:.*\.)?)(?P<local>conv_mask\.(?:weight|bias)"
    r"|channel_(?:add|mul)_conv\.[013]\.(?:weight|bias))"
)


def to_ours(state: State, choices: Choices, where: str) -> Converted:
    """Convert one ``ContextBlock``; ``pooling_type='avg'`` is a ``conv_mask`` of zeros."""
    fused = [name for name in FUSIONS if f"{name}_conv.0.weight" in state]
    if len(fused) != 1:
        raise CheckpointError(
            f"{where}: the block fuses by {' and '.join(fused) or 'nothing'}; a global_context "
            f"block holds one of {', '.join(FUSIONS)}"
        )
    return context_block(dict(state), {key: key for key in state}, fused[0], where)


def context_block(
    tensors: dict[str, Tensor], origin: dict[str, str], fusion: str, where: str
) -> Converted:
    """Check and complete tensors that have our names.

    Raises:
        CheckpointError: They do not fit each other.
    """
    conv = f"{fusion}_conv"
    weight = tensors[f"{conv}.0.weight"]
    if weight.dim() not in (3, 4, 5):
        raise CheckpointError(f"{where}: {conv}.0 must be a 1×1 convolution")
    hidden, channels, ones = weight.shape[0], weight.shape[1], (1,) * (weight.dim() - 2)
    if not any(key.startswith("conv_mask.") for key in tensors):
        tensors["conv_mask.weight"] = weight.new_zeros((1, channels, *ones))
        tensors["conv_mask.bias"] = weight.new_zeros(1)
    tensors.setdefault("conv_mask.bias", weight.new_zeros(1))
    wanted = {
        "conv_mask.weight": (1, channels, *ones),
        "conv_mask.bias": (1,),
        f"{conv}.0.weight": (hidden, channels, *ones),
        f"{conv}.0.bias": (hidden,),
        f"{conv}.1.weight": (hidden, *ones),
        f"{conv}.1.bias": (hidden, *ones),
        f"{conv}.3.weight": (channels, hidden, *ones),
        f"{conv}.3.bias": (channels,),
    }
    for key, shape in wanted.items():
        require_shape(tensors, key, shape, where)
    if fusion == "channel_mul":
        tensors["gamma"] = weight.new_ones(1)
    options = {"fusion": fusion, "reduction": reduction_for(channels, hidden)}
    return Converted(tensors, origin, options, channels, len(ones), "global_context")


def reduction_for(channels: int, inner: int) -> float:
    """A reduction r with ``int(channels // r) == inner``, whole where there is one."""
    whole = channels // inner
    if whole and channels // whole == inner:
        return whole
    return channels / (inner + 0.5)


def checked_context(block: OurBlock, layout: str) -> tuple[str, int, int]:
    """Check that GCNet's form can compute what our block does.

    Returns:
        (fusion, C, hidden channels).

    Raises:
        CheckpointError: γ of a ``channel_mul`` block is not 1, or it is not an image's block.
    """
    fusion = next((f for f in FUSIONS if f"{f}_conv.0.weight" in block.tensors), FUSIONS[0])
    require_shape(
        block.tensors,
        f"{fusion}_conv.0.weight",
        tuple(
            block.tensors.get(f"{fusion}_conv.0.weight", block.tensors["conv_mask.weight"]).shape
        ),
        block.where,
    )
    weight = block.tensors[f"{fusion}_conv.0.weight"]
    if weight.dim() != 4:
        raise cannot_hold(layout, block.where, f"a {weight.dim() - 2}-D block", "its are 2-D")
    if fusion == "channel_mul" and not bool((block.tensors["gamma"] == 1).all()):
        raise cannot_hold(
            layout,
            block.where,
            f"channel_mul with γ = {float(block.tensors['gamma']):.3g}",
            "it has no γ, so only γ = 1 is the same function",
        )
    return fusion, weight.shape[1], weight.shape[0]


def from_ours(block: OurBlock) -> Converted:
    """Convert one of our global context blocks."""
    fusion, channels, hidden = checked_context(block, NAME)
    tensors = {key: value for key, value in block.tensors.items() if key != "gamma"}
    needs = {
        "type": "ContextBlock",
        "in_channels": channels,
        "ratio": hidden / channels,
        "pooling_type": "att",
        "fusion_types": [fusion],
    }
    return Converted(tensors, {k: k for k in tensors}, needs, channels, 2, "global_context")


def _accepts(local: frozenset[str]) -> bool:
    return any(f"{fusion}_conv.0.weight" in local for fusion in FUSIONS)


def _host(prefix: str, keys: frozenset[str]) -> str | None:
    match = re.fullmatch(r"(?:backbone\.)?(.*layer\d+\.\d+)\.context_block\w*", prefix)
    return f"{match[1]}.bn3" if match else None


def _name_at(host: str) -> str | None:
    match = re.fullmatch(r"(layer\d+\.\d+)\.(?:bn3|bn2)", host)
    return f"backbone.{match[1]}.context_block" if match else None


KIND = BlockKind(
    "ContextBlock",
    _PATTERN,
    _accepts,
    to_ours,
    from_ours,
    _host,
    _name_at,
    ("global_context",),
)
