"""CCNet's criss-cross attention: SAGAN's names; how often it recurs is not in the keys."""

from __future__ import annotations

from nlsurgery.convert import sagan
from nlsurgery.convert.gcnet import reduction_for
from nlsurgery.convert.layout import (
    BlockKind,
    Choices,
    Converted,
    Layout,
    OurBlock,
    State,
    unknown_host,
)
from nlsurgery.errors import CheckpointError

NAME = "ccnet"


def to_ours(state: State, choices: Choices, where: str) -> Converted:
    """Convert one ``CrissCrossAttention``; two passes unless ``choices`` say otherwise."""
    channels, inner, dims = sagan.check(state, "{}_conv", where)
    if dims != 2:
        raise CheckpointError(
            f"{where}: criss-cross attention is 2-D, but the kernels are {dims}-D"
        )
    recurrence = 2 if choices.recurrence is None else choices.recurrence
    options = {"reduction": reduction_for(channels, inner), "recurrence": recurrence}
    origin = {key: key for key in state}
    return Converted(dict(state), origin, options, channels, dims, "criss_cross")


def from_ours(block: OurBlock) -> Converted:
    """Convert one of our criss-cross blocks."""
    channels, inner, dims = sagan.check(block.tensors, "{}_conv", block.where)
    needs = {
        "in_dim": channels,
        "query_channels": inner,
        "recurrence": block.options["recurrence"],
    }
    origin = {key: key for key in block.tensors}
    return Converted(dict(block.tensors), origin, needs, channels, dims, "criss_cross")


def _name_at(host: str) -> str | None:
    return f"{host}.cca" if host else "cca"


LAYOUT = Layout(
    NAME,
    "speedinghzl/CCNet",
    (
        BlockKind(
            "CrissCrossAttention",
            sagan.PATTERN,
            sagan.accepts,
            to_ours,
            from_ours,
            unknown_host,
            _name_at,
            ("criss_cross",),
            choices=("recurrence",),
        ),
    ),
    tells=lambda keys: not sagan.names_danet(keys),
)
