"""nlsurgery's own blocks in a state_dict: inserted ones, and bare ones under any prefix."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from nlsurgery.convert.layout import Choices, State
from nlsurgery.convert.pairwise import told_pool
from nlsurgery.errors import CheckpointError
from nlsurgery.walk import CHILD_NAME

_BN = "weight|bias|running_mean|running_var|num_batches_tracked"
_QKV = r"(?:{})\.(?:weight|bias)|gamma"
#: Type -> the local names it may have, and those it must have.
_FORMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "non_local": (
        rf"(?:theta|phi|g|out)\.(?:weight|bias)|(?:bn|ln|gn)\.(?:{_BN})|concat_project\.weight",
        ("g.weight", "out.weight"),
    ),
    "self_attention": (
        _QKV.format("query|key|value"),
        ("query.weight", "key.weight", "value.weight", "gamma"),
    ),
    "criss_cross": (
        _QKV.format("query_conv|key_conv|value_conv"),
        ("query_conv.weight", "key_conv.weight", "value_conv.weight", "gamma"),
    ),
    "global_context": (
        r"conv_mask\.(?:weight|bias)|channel_(?:add|mul)_conv\.[013]\.(?:weight|bias)|gamma",
        ("conv_mask.weight",),
    ),
    "danet": (
        r"position\.(?:(?:query|key|value)\.(?:weight|bias)|gamma)|channel\.gamma",
        ("position.query.weight", "channel.gamma"),
    ),
    "danet:channel": ("gamma", ("gamma",)),
}
_INSERTED = re.compile(rf"(?P<fqn>(?:(?P<host>.*)\.)?{CHILD_NAME}\.\d+)\.(?P<local>.+)", re.DOTALL)
#: Options of our builders that decide what a block computes and that its tensors do not tell, as
#: they are by default (``mode``: whichever fits the keys).
UNTOLD: dict[str, dict[str, Any]] = {
    "non_local": {
        "mode": None,
        "use_scale": False,
        "sub_sample": False,
        "pool_order": "after_conv",
        "temporal_window": None,
    },
    "criss_cross": {"recurrence": 2},
}


@dataclass(frozen=True, slots=True)
class FoundOurs:
    """One of our blocks among keys.

    Attributes:
        prefix: Its path; of a part of ``danet`` the part's.
        host: What it is inserted in; ``None`` for a bare block.
        type: Its type, ``danet:channel`` for the channel module alone.
        keys: Keys by local name.
    """

    prefix: str
    host: str | None
    type: str
    keys: Mapping[str, str]


def find_ours(keys: frozenset[str], known: Collection[str] = ()) -> list[FoundOurs]:
    """Find our blocks.

    Args:
        keys: All keys.
        known: Paths of bare blocks; a lone ``gamma`` is a block only there, or if it is all there is.

    Raises:
        CheckpointError: An inserted block has a type that no converter knows.
    """
    groups: dict[str, dict[str, str]] = {}
    hosts: dict[str, str] = {}
    for key in sorted(keys):
        if (match := _INSERTED.fullmatch(key)) is not None:
            groups.setdefault(match["fqn"], {})[match["local"]] = key
            hosts[match["fqn"]] = match["host"] or ""
    if not groups:
        return _bare(keys, known)
    found: list[FoundOurs] = []
    for fqn, members in groups.items():
        kind = _type_of(frozenset(members))
        if kind is None:
            raise CheckpointError(
                f"{fqn}: no other project's layout holds a block with {', '.join(sorted(members)[:4])}"
            )
        found += _parts(FoundOurs(fqn, hosts[fqn], kind, members))
    return found


def _bare(keys: frozenset[str], known: Collection[str]) -> list[FoundOurs]:
    found: list[FoundOurs] = []
    free = set(keys)
    for kind, (pattern, _) in _FORMS.items():
        groups: dict[str, dict[str, str]] = {}
        for key in sorted(free):
            match = re.fullmatch(rf"(?P<prefix>(?:.*\.)?)(?P<local>{pattern})", key)
            if match is not None:
                groups.setdefault(match["prefix"].removesuffix("."), {})[match["local"]] = key
        for prefix, members in groups.items():
            lone = kind == "danet:channel" and prefix not in known and len(keys) > 1
            if _type_of(frozenset(members)) == kind and not lone:
                found += _parts(FoundOurs(prefix, None, kind, members))
                free -= set(members.values())
    return found


def _type_of(local: frozenset[str]) -> str | None:
    for kind, (pattern, needed) in _FORMS.items():
        if set(needed) <= local and all(re.fullmatch(pattern, name) for name in local):
            return kind
    return None


def _parts(block: FoundOurs) -> list[FoundOurs]:
    """``danet`` with both modules as its two modules."""
    if block.type != "danet":
        return [block]
    split = []
    for part, kind in (("position", "self_attention"), ("channel", "danet:channel")):
        members = {
            local.removeprefix(f"{part}."): key
            for local, key in block.keys.items()
            if local.startswith(f"{part}.")
        }
        split.append(FoundOurs(f"{block.prefix}.{part}".strip("."), block.host, kind, members))
    return split


def block_options(
    block: FoundOurs, known: Mapping[str, Mapping[str, Any]], choices: Choices, state: State
) -> dict[str, Any]:
    """The options of a block that its keys do not tell.

    Args:
        block: The block.
        known: Options by the block's path, where they are known (from its model or recipe).
        choices: What the caller says; it may not contradict ``known``.
        state: The tensors.

    Raises:
        CheckpointError: It does, or a pool does not fit the block's dimensions.
    """
    defaults = UNTOLD.get(block.type, {})
    dims = state[block.keys["g.weight"]].dim() - 2 if "g.weight" in block.keys else 0
    told, asked = (
        {name: _one_way(name, v, dims, block.prefix) for name, v in of.items() if name in defaults}
        for of in (known.get(block.prefix, {}), choices.given())
    )
    for name, value in asked.items():
        if told.get(name, value) != value:
            raise CheckpointError(
                f"{block.prefix}: {name}={value!r} was asked for, but the block was built with "
                f"{told[name]!r}"
            )
    options = {**defaults, **asked, **told}
    if block.type == "non_local" and options["mode"] is None:
        if "concat_project.weight" in block.keys:
            options["mode"] = "concatenation"
        else:
            embedded = "theta.weight" in block.keys
            options["mode"] = "embedded_gaussian" if embedded else "gaussian"
    return options


def _one_way(name: str, value: Any, dims: int, where: str) -> Any:
    """An option as a block holds it, of those that can be said in several ways."""
    if name == "sub_sample":
        return told_pool(value, dims, where or "the block")
    return value or None if name == "temporal_window" else value
