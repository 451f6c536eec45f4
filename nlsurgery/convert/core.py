"""Whole state_dicts from one layout to another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nlsurgery.convert.layout import BlockKind, Choices, FoundBlock, Layout, OurBlock, State
from nlsurgery.convert.ours import FoundOurs, block_options, find_ours
from nlsurgery.convert.pairwise import BN_EPS
from nlsurgery.convert.registry import OURS, detect, layout_named
from nlsurgery.convert.result import BlockSpec, Conversion, Left
from nlsurgery.convert.sequence import hosts_before, renumber
from nlsurgery.errors import CheckpointError, close_names
from nlsurgery.walk import CHILD_NAME

Options = Mapping[str, Mapping[str, Any]]


def convert_state(
    state: State,
    source: str = "auto",
    target: str = OURS,
    *,
    choices: Choices | None = None,
    places: Mapping[str, str] | None = None,
    options: Options | None = None,
) -> Conversion:
    """Convert a state_dict, blocks and backbone; nothing of the input is changed.

    Args:
        state: Tensors by key.
        source: A layout's name, ``nlsurgery``, or ``auto`` to tell by the keys.
        target: A layout's name or ``nlsurgery``.
        choices: What the keys do not tell.
        places: Block prefix in the source -> where it goes: to nlsurgery the module it stands
            after, otherwise the block's prefix in the result.
        options: What our blocks are built with, by path (``layer3.1.nlsurgery.0``), where that is
            known: from nlsurgery what they were built with, to nlsurgery what they will be.

    Raises:
        CheckpointError: The layout is unknown or not clear, the tensors do not fit it, or the target
            cannot hold a block.
    """
    asked = Choices() if choices is None else choices
    name = detect(state) if source == "auto" else source
    name = name if name == OURS else layout_named(name).name
    goal = target if target == OURS else layout_named(target).name
    if name == goal:
        raise CheckpointError(f"the checkpoint is in the layout {name} already")
    if name != OURS and goal != OURS:
        middle = convert_state(state, name, OURS, choices=asked, places=places, options=options)
        built = {spec.place: spec.options for spec in middle.blocks}
        return _joined(middle, convert_state(middle.tensors, OURS, goal, options=built))
    if goal == OURS:
        return _to_ours(state, layout_named(name), asked, places or {}, options or {})
    return _from_ours(state, layout_named(goal), asked, places or {}, options)


class _Builder:
    """Collects a result; no key is written twice."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.origin: dict[str, str | None] = {}
        self.left: list[Left] = []
        self.blocks: list[BlockSpec] = []
        self.notes: list[str] = []

    def put(self, new: str, value: Tensor, old: str | None) -> None:
        if new in self.tensors:
            raise CheckpointError(
                f"{old or new} and {self.origin[new] or new} both become {new}; say with --place "
                f"where the blocks go"
            )
        self.tensors[new] = value
        self.origin[new] = old

    def done(self, source: str, target: str) -> Conversion:
        return Conversion(
            source,
            target,
            self.tensors,
            self.origin,
            tuple(self.left),
            tuple(self.blocks),
            tuple(dict.fromkeys(self.notes)),
        )


def _to_ours(
    state: State, layout: Layout, choices: Choices, places: Mapping[str, str], hints: Options
) -> Conversion:
    found = layout.blocks(frozenset(state))
    if not found:
        raise CheckpointError(
            f"no block of the layout {layout.name} ({layout.source}) is in the checkpoint"
        )
    _check_choices(choices, [block.kind for block in found], layout.name)
    _check_places(places, [block.prefix for block in found])
    used = {key for block in found for key in block.keys.values()}
    rest = [key for key in state if key not in used]
    moved = _sequence_elements(found, rest)
    result = _Builder()
    for key in rest:
        new = layout.base_to_ours(key)
        if new is None:
            result.left.append(Left(key, "no part of a backbone"))
        else:
            result.put(renumber(new, moved), state[key], key)
    _complete_statistics(result, layout.frozen_affine)
    stack: dict[str, int] = {}
    for block in found:
        _put_ours(result, block, state, choices, places, hints, moved, stack, layout.name)
    return result.done(layout.name, OURS)


def _sequence_elements(found: Iterable[FoundBlock], rest: Iterable[str]) -> dict[str, str]:
    """Blocks without a telling name that are elements of a sequence: path -> element before."""
    hosts = hosts_before(block.prefix for block in found)
    others = tuple(rest)
    return {
        path: host
        for path, host in hosts.items()
        if any(key.startswith(path.rpartition(".")[0] + ".") for key in others)
    }


def _put_ours(
    result: _Builder,
    block: FoundBlock,
    state: State,
    choices: Choices,
    places: Mapping[str, str],
    hints: Options,
    moved: Mapping[str, str],
    stack: dict[str, int],
    layout: str,
) -> None:
    where = f"{block.prefix or 'the block'} ({layout})"
    host = places.get(block.prefix, moved.get(block.prefix))
    if host is None:
        host = block.kind.host(block.prefix, frozenset(state))
    place = block.prefix
    if host is not None:
        place = f"{host}.{CHILD_NAME}.{stack.get(host, 0)}".lstrip(".")
    told = {name: hints.get(place, {}).get(name) for name in ("mode", "sub_sample", "recurrence")}
    seen = choices.over({name: value for name, value in told.items() if value is not None})
    local = {name: state[key] for name, key in block.keys.items()}
    new = block.kind.to_ours(local, seen.limited(block.kind.choices), where)
    if host is not None and block.prefix not in places and not _is_wide(result, host, new.channels):
        result.notes.append(
            f"{block.prefix} has {new.channels} channels and so does not stand after {host}: it kept "
            f"its prefix; say with --place {block.prefix}=MODULE after which module it stands"
        )
        host, place = None, block.prefix
    if host is not None:
        stack[host] = stack.get(host, 0) + 1
    for name, value in new.tensors.items():
        old = new.origin.get(name)
        key = f"{place}.{name}" if place else name
        result.put(key, value, None if old is None else block.keys[old])
    result.blocks.append(
        BlockSpec(block.prefix, place, host, new.type, new.channels, new.dims, new.options)
    )
    _note_assumed(result, block.kind, seen, new.options)


def _is_wide(result: _Builder, host: str, channels: int) -> bool:
    """Whether a norm that a block is thought to stand after has as many channels as the block."""
    weight = result.tensors.get(f"{host}.weight")
    return weight is None or weight.dim() != 1 or weight.shape[0] == channels or channels == 0


def _note_assumed(
    result: _Builder, kind: BlockKind, choices: Choices, options: Mapping[str, Any]
) -> None:
    for name in ("mode", "use_scale", "sub_sample", "recurrence"):
        if name not in kind.choices or name in choices.given() or name not in options:
            continue
        if name == "mode" and options[name] not in ("embedded_gaussian", "dot_product"):
            continue
        value = True if name == "use_scale" else options[name]
        result.notes.append(
            f"the keys do not tell {name}: taken as {value}, the default of {kind.name}"
        )


def _complete_statistics(result: _Builder, frozen_affine: bool) -> None:
    """Add what a BatchNorm of torch has beside what other frameworks store."""
    for key in list(result.tensors):
        head, _, name = key.rpartition(".")
        is_norm = head.rpartition(".")[2].startswith("bn") or head.endswith("downsample.1")
        if frozen_affine and name == "weight" and is_norm:
            value = result.tensors[key]
            if f"{head}.running_mean" not in result.tensors:
                result.put(f"{head}.running_mean", torch.zeros_like(value), None)
                result.put(f"{head}.running_var", torch.full_like(value, 1 - BN_EPS), None)
        if f"{head}.running_mean" in result.tensors:
            counter = f"{head}.num_batches_tracked"
            if counter not in result.tensors:
                result.put(counter, torch.zeros((), dtype=torch.long), None)


def _from_ours(
    state: State,
    layout: Layout,
    choices: Choices,
    places: Mapping[str, str],
    options: Options | None,
) -> Conversion:
    found = find_ours(frozenset(state), options or ())
    if not found:
        raise CheckpointError("no block of nlsurgery is in the checkpoint")
    _check_places(places, [block.prefix for block in found])
    used = {key for block in found for key in block.keys.values()}
    result = _Builder()
    for key in state:
        if key not in used:
            new = layout.base_from_ours(key)
            if new is None:
                result.left.append(Left(key, f"{layout.name} has no name for it"))
            else:
                result.put(new, state[key], key)
    for block in found:
        _put_theirs(result, block, state, layout, block_options(block, options, choices), places)
    return result.done(OURS, layout.name)


def _put_theirs(
    result: _Builder,
    block: FoundOurs,
    state: State,
    layout: Layout,
    options: Mapping[str, Any],
    places: Mapping[str, str],
) -> None:
    where = block.prefix or "the block"
    kind = next((k for k in layout.kinds if _holds(k, block.type)), None)
    if kind is None:
        held = sorted({name.split(":")[0] for k in layout.kinds for name in k.types})
        raise CheckpointError(
            f"{where}: {layout.name} has no block for {block.type.split(':')[0]}; it holds "
            f"{', '.join(held)}"
        )
    prefix: str | None = places.get(block.prefix)
    if prefix is None:
        prefix = block.prefix if block.host is None else kind.name_at(block.host)
    if prefix is None:
        raise CheckpointError(
            f"{where}: {layout.name} has no block at {block.host or 'the root'}; say with --place "
            f"{block.prefix}=PREFIX what it is called there"
        )
    local = {name: state[key] for name, key in block.keys.items()}
    new = kind.from_ours(OurBlock(block.type, local, options, where))
    for name, value in new.tensors.items():
        old = new.origin.get(name)
        result.put(kind.key(prefix, name), value, None if old is None else block.keys[old])
    gone = set(block.keys) - set(new.origin.values())
    result.left += [Left(block.keys[name], "folded into its neighbours") for name in sorted(gone)]
    result.blocks.append(
        BlockSpec(block.prefix, prefix, block.host, new.type, new.channels, new.dims, new.options)
    )


def _holds(kind: BlockKind, type_: str) -> bool:
    return type_ in kind.types


def _check_choices(choices: Choices, kinds: Iterable[BlockKind], layout: str) -> None:
    known = {name for kind in kinds for name in kind.choices}
    for name, value in choices.given().items():
        if name not in known:
            takes = f"takes {', '.join(sorted(known))}" if known else "takes no choice"
            raise CheckpointError(
                f"{name}={value!r} was asked for, but the blocks of {layout} have it fixed or in "
                f"their keys; it {takes}"
            )


def _check_places(places: Mapping[str, str], prefixes: list[str]) -> None:
    for place in places:
        if place not in prefixes:
            raise CheckpointError(
                f"--place {place}: no such block{close_names(place, prefixes)}; there are "
                f"{', '.join(repr(prefix) for prefix in prefixes[:8])}"
            )


def _joined(first: Conversion, second: Conversion) -> Conversion:
    """Two conversions in a row as one."""
    origin = {
        new: None if middle is None else first.origin[middle]
        for new, middle in second.origin.items()
    }
    names = {spec.place: spec.name for spec in first.blocks}
    blocks = tuple(replace(spec, name=names.get(spec.name, spec.name)) for spec in second.blocks)
    later = [Left(first.origin[row.key] or row.key, row.reason) for row in second.left]
    left = [row for row in later if row.key not in first.added]
    return Conversion(
        first.source,
        second.target,
        second.tensors,
        origin,
        (*first.left, *left),
        blocks,
        (*first.notes, *second.notes),
    )
