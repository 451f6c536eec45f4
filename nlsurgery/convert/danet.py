"""DANet's two modules: position (PAM, SAGAN's names) and channel (CAM, ``gamma`` alone)."""

from __future__ import annotations

import re
from dataclasses import replace

from nlsurgery.convert import sagan
from nlsurgery.convert.layout import (
    BlockKind,
    Choices,
    Converted,
    Layout,
    OurBlock,
    State,
    require_shape,
    unknown_host,
)

NAME = "danet"
_GAMMA = re.compile(r"(?P<prefix>(?:.*\.)?)(?P<local>gamma)")


def pam_to_ours(state: State, choices: Choices, where: str) -> Converted:
    """Convert one ``PAM_Module``."""
    read = sagan.to_ours(state, choices, where)
    return replace(read, options={"part": "position", **read.options}, type="danet")


def pam_from_ours(block: OurBlock) -> Converted:
    """Convert one of our self-attention blocks, or DANet blocks with ``part: position``."""
    return replace(sagan.from_ours(block, NAME), type="danet")


def cam_to_ours(state: State, choices: Choices, where: str) -> Converted:
    """Convert one ``CAM_Module``, which has no channels of its own."""
    require_shape(state, "gamma", (1,), where)
    return Converted(dict(state), {"gamma": "gamma"}, {"part": "channel"}, 0, 0, "danet")


def cam_from_ours(block: OurBlock) -> Converted:
    """Convert one of our DANet blocks with ``part: channel``."""
    require_shape(block.tensors, "gamma", (1,), block.where)
    return Converted(dict(block.tensors), {"gamma": "gamma"}, {}, 0, 0, "danet")


def _is_gamma(local: frozenset[str]) -> bool:
    return local == {"gamma"}


def _strip(key: str) -> str | None:
    return key.removeprefix("pretrained.")


def _tells(keys: frozenset[str]) -> bool:
    """Not by a lone ``gamma``: a transformer's layer scale is called so too."""
    by_name = sagan.names_danet(keys)
    return by_name or (
        not sagan.names_ccnet(keys) and any(".query_conv." in f".{key}" for key in keys)
    )


def _sa(host: str) -> str | None:
    return f"{host}.sa" if host else "sa"


def _sc(host: str) -> str | None:
    return f"{host}.sc" if host else "sc"


LAYOUT = Layout(
    NAME,
    "junfu1115/DANet",
    (
        BlockKind(
            "PAM_Module",
            sagan.PATTERN,
            sagan.accepts,
            pam_to_ours,
            pam_from_ours,
            unknown_host,
            _sa,
            ("self_attention", "danet:position"),
        ),
        BlockKind(
            "CAM_Module",
            _GAMMA,
            _is_gamma,
            cam_to_ours,
            cam_from_ours,
            unknown_host,
            _sc,
            ("danet:channel",),
            exclusive=True,
        ),
    ),
    base_to_ours=_strip,
    tells=_tells,
)
