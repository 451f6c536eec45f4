"""SAGAN's self-attention: ``query_conv``, ``key_conv``, ``value_conv``, ``gamma``; no scale.

DANet's position module and CCNet's criss-cross attention have the same names: the keys alone do
not tell the three apart, unless a head's own names do.
"""

from __future__ import annotations

import re

from nlsurgery.convert.gcnet import reduction_for
from nlsurgery.convert.layout import (
    BlockKind,
    Choices,
    Converted,
    Layout,
    OurBlock,
    State,
    cannot_hold,
    require_shape,
    unknown_host,
)
from nlsurgery.errors import CheckpointError

NAME = "sagan"
PATTERN = re.compile(
    r"(?P<prefix>(?:.*\.)?)(?P<local>(?:query|key|value)_conv\.(?:weight|bias)|gamma)"
)
_PARTS = ("query", "key", "value")


def to_ours(state: State, choices: Choices, where: str) -> Converted:
    """Convert one ``Self_Attn``."""
    channels, inner, dims = check(state, "{}_conv", where)
    origin = {key.replace("_conv.", "."): key for key in state}
    tensors = {new: state[old] for new, old in origin.items()}
    options = {"reduction": reduction_for(channels, inner)}
    return Converted(tensors, origin, options, channels, dims, "self_attention")


def check(state: State, name: str, where: str) -> tuple[int, int, int]:
    """Check the shapes of a block of queries, keys, values and γ.

    Args:
        state: Its tensors.
        name: How the convolutions are called, with ``{}`` for query, key and value.
        where: How errors name the block.

    Returns:
        (C, channels of queries, dims).

    Raises:
        CheckpointError: A tensor is missing or does not fit.
    """
    key = f"{name.format('query')}.weight"
    if key not in state or state[key].dim() not in (3, 4, 5):
        raise CheckpointError(f"{where}: {key} must be a 1×1 convolution of 1 to 3 dimensions")
    inner, channels, ones = state[key].shape[0], state[key].shape[1], state[key].dim() - 2
    for part in _PARTS:
        width = channels if part == "value" else inner
        require_shape(state, f"{name.format(part)}.weight", (width, channels, *(1,) * ones), where)
        require_shape(state, f"{name.format(part)}.bias", (width,), where)
    require_shape(state, "gamma", (1,), where)
    return channels, inner, ones


def from_ours(block: OurBlock, layout: str = NAME) -> Converted:
    """Convert one of our 2-D self-attention blocks."""
    channels, inner, dims = check(block.tensors, "{}", block.where)
    if dims != 2:
        raise cannot_hold(layout, block.where, f"a {dims}-D block", "its are 2-D")
    origin = {re.sub("^(query|key|value)", r"\1_conv", key): key for key in block.tensors}
    tensors = {new: block.tensors[old] for new, old in origin.items()}
    needs = {"in_dim": channels, "query_channels": inner}
    return Converted(tensors, origin, needs, channels, dims, "self_attention")


def accepts(local: frozenset[str]) -> bool:
    """Whether local names are a block of queries, keys, values and γ."""
    return {"query_conv.weight", "key_conv.weight", "value_conv.weight", "gamma"} <= local


def names_danet(keys: frozenset[str]) -> bool:
    """Whether a DANet head's own names are among the keys."""
    return any(re.search(r"(^|\.)(sa\.query_conv\.|sc\.gamma$)", key) for key in keys)


def names_ccnet(keys: frozenset[str]) -> bool:
    """Whether a CCNet head's own names are among the keys."""
    return any(re.search(r"(^|\.)(cca|pc)\.query_conv\.", key) for key in keys)


def name_at(host: str) -> str | None:
    """``<host>.attn``."""
    return f"{host}.attn" if host else "attn"


LAYOUT = Layout(
    NAME,
    "SAGAN's public PyTorch implementations (Self_Attn)",
    (
        BlockKind(
            "Self_Attn",
            PATTERN,
            accepts,
            to_ours,
            from_ours,
            unknown_host,
            name_at,
            ("self_attention",),
        ),
    ),
    tells=lambda keys: not names_danet(keys) and not names_ccnet(keys),
)
