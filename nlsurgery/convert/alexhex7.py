"""AlexHex7/Non-local_pytorch: ``g``, ``theta``, ``phi``, ``W``; the pool after the conv, no scale."""

from __future__ import annotations

import re

from nlsurgery.convert import pairwise
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

NAME = "alexhex7"
_MODES = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
_BN = "weight|bias|running_mean|running_var|num_batches_tracked"
_PATTERN = re.compile(
    rf"(?P<prefix>(?:.*\.)?)(?P<local>(?:g|phi)(?:\.0)?\.(?:weight|bias)|theta\.(?:weight|bias)"
    rf"|W\.(?:(?:0\.)?(?:weight|bias)|1\.(?:{_BN}))|concat_project\.0\.weight)"
)


def to_ours(state: State, choices: Choices, where: str) -> Converted:
    """Convert one ``NONLocalBlock1D/2D/3D``."""
    sub_sample = "g.0.weight" in state
    if ("phi.0.weight" in state) != (sub_sample and "theta.weight" in state):
        raise CheckpointError(f"{where}: g and phi must both have a pool (a '.0') or neither")
    normed = any(key.startswith("W.1.") for key in state)
    origin = {_our_name(key, normed): key for key in state}
    tensors = {new: state[old] for new, old in origin.items()}
    return pairwise.read_block(
        tensors,
        origin,
        choices,
        where,
        sub_sample=sub_sample,
        pool_order="after_conv",
        use_scale=False,
    )


def _our_name(key: str, normed: bool) -> str:
    if key.startswith("W."):
        head, name = key.rsplit(".", 1)
        return f"bn.{name}" if normed and head == "W.1" else f"out.{name}"
    return key.replace(".0.", ".")


def from_ours(block: OurBlock) -> Converted:
    """Convert one of our non-local blocks."""
    channels, inner, dims = pairwise.require_plain(
        block, NAME, pool_order="after_conv", modes=_MODES, dims=(1, 2, 3)
    )
    options = block.options
    factor = pairwise.logit_factor(options, inner, NAME, block.where)
    tensors = pairwise.with_biases(pairwise.scale_logits(block.tensors, factor))
    normed = "bn.weight" in tensors
    names = {_their_name(key, options["sub_sample"], normed): key for key in tensors}
    origin = {new: old for new, old in names.items() if old in block.tensors}
    needs = {
        "in_channels": channels,
        "inter_channels": inner,
        "dimension": dims,
        "sub_sample": options["sub_sample"],
        "bn_layer": normed,
        "module": f"non_local_{options['mode']}",
    }
    renamed = {new: tensors[old] for new, old in names.items()}
    return Converted(renamed, origin, needs, channels, dims, "non_local")


def _their_name(key: str, sub_sample: bool, normed: bool) -> str:
    part, name = key.split(".", 1)
    if part == "bn":
        return f"W.1.{name}"
    if part == "out":
        return f"W.0.{name}" if normed else f"W.{name}"
    if part == "concat_project" or (sub_sample and part in ("g", "phi")):
        return f"{part}.0.{name}"
    return key


def _accepts(local: frozenset[str]) -> bool:
    has_out = "W.weight" in local or "W.0.weight" in local
    return has_out and ("g.weight" in local or "g.0.weight" in local)


def _name_at(host: str) -> str | None:
    return f"{host}.non_local" if host else "non_local"


def _host(prefix: str, keys: frozenset[str]) -> str | None:
    """The block that a ``non_local`` or ``nl`` child of it stands after."""
    match = re.fullmatch(r"(.+)\.(?:non_?local(?:_block)?|nl(?:_block)?)", prefix)
    return match[1] if match else unknown_host(prefix, keys)


LAYOUT = Layout(
    NAME,
    "AlexHex7/Non-local_pytorch",
    (
        BlockKind(
            "NONLocalBlockND",
            _PATTERN,
            _accepts,
            to_ours,
            from_ours,
            _host,
            _name_at,
            ("non_local",),
            choices=("mode", "bn_eps"),
        ),
    ),
)
