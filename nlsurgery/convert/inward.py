"""From a foreign layout to ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from nlsurgery.convert.layout import BlockKind, Choices, Converted, FoundBlock, Layout
from nlsurgery.convert.pairwise import BN_EPS
from nlsurgery.convert.registry import OURS
from nlsurgery.convert.request import Builder, Request
from nlsurgery.convert.result import BlockSpec, Conversion, Left
from nlsurgery.convert.sequence import hosts_before, renumber
from nlsurgery.errors import CheckpointError
from nlsurgery.walk import CHILD_NAME

#: What a block's keys may not tell, and the options of the block it is to become may.
_HINTS = ("mode", "sub_sample", "recurrence", "temporal_window")


def to_ours(request: Request) -> Conversion:
    """Convert a state_dict in ``request.layout`` to our names.

    Raises:
        CheckpointError: It has no block of that layout, or one that does not fit it.
    """
    layout, state = request.layout, request.state
    found = layout.blocks(frozenset(state))
    if not found:
        raise CheckpointError(
            f"no block of the layout {layout.name} ({layout.source}) is in the checkpoint"
        )
    _check_choices(request.choices, [block.kind for block in found], layout.name)
    request.check_places(block.prefix for block in found)
    used = {key for block in found for key in block.keys.values()}
    rest = [key for key in state if key not in used]
    moved = _sequence_elements(found, rest)
    result = Builder()
    for key in rest:
        new = layout.base_to_ours(renumber(key, moved))
        if new is None:
            result.left.append(Left(key, "no part of a backbone"))
        else:
            result.put(new, state[key], key)
    _complete_statistics(result, layout.frozen_affine)
    for block in found:
        element = moved.get(block.prefix)
        _put_block(result, request, block, element and _base_path(layout, element))
    return result.done(layout.name, OURS)


def _base_path(layout: Layout, path: str) -> str | None:
    """Where a module of the backbone is in ours."""
    key = layout.base_to_ours(f"{path}.weight")
    return None if key is None else key.removesuffix(".weight")


def _sequence_elements(found: Iterable[FoundBlock], rest: Iterable[str]) -> dict[str, str]:
    """Blocks that are elements of a sequence with others in it: path -> element before."""
    hosts = hosts_before(block.prefix for block in found)
    others = tuple(rest)
    return {
        path: host
        for path, host in hosts.items()
        if any(key.startswith(path.rpartition(".")[0] + ".") for key in others)
    }


def _put_block(result: Builder, request: Request, block: FoundBlock, element: str | None) -> None:
    """Convert one block; ``element`` is what it stands after in a sequence."""
    host = request.places.get(block.prefix, element)
    if host is None:
        host = block.kind.host(block.prefix, frozenset(request.state))
    place = block.prefix if host is None else _free_place(result, host)
    told = request.options.get(place, {})
    seen = request.choices.over({name: told[name] for name in _HINTS if name in told})
    local = {name: request.state[key] for name, key in block.keys.items()}
    where = f"{block.prefix or 'the block'} ({request.layout.name})"
    new = block.kind.to_ours(local, seen.limited(block.kind.choices), where)
    guessed = host is not None and block.prefix not in request.places
    if guessed and not _is_wide(result, host or "", new.channels):
        result.notes.append(
            f"{block.prefix} has {new.channels} channels and so does not stand after {host}: it kept "
            f"its prefix; say with --place {block.prefix}=MODULE after which module it stands"
        )
        host, place = None, block.prefix
    _put_tensors(result, new, block, place)
    result.blocks.append(
        BlockSpec(block.prefix, place, host, new.type, new.channels, new.dims, new.options)
    )
    _note_assumed(result, block.kind, seen, new.options)


def _put_tensors(result: Builder, new: Converted, block: FoundBlock, place: str) -> None:
    for name, value in new.tensors.items():
        old = new.origin.get(name)
        key = f"{place}.{name}" if place else name
        result.put(key, value, None if old is None else block.keys[old])


def _free_place(result: Builder, host: str) -> str:
    """The path of the next block at a host: blocks of one host stack up."""
    stacked = sum(spec.host == host for spec in result.blocks)
    return f"{host}.{CHILD_NAME}.{stacked}".lstrip(".")


def _is_wide(result: Builder, host: str, channels: int) -> bool:
    """Whether a norm that a block is thought to stand after has as many channels as the block."""
    weight = result.tensors.get(f"{host}.weight")
    return weight is None or weight.dim() != 1 or weight.shape[0] == channels or channels == 0


def _note_assumed(
    result: Builder, kind: BlockKind, choices: Choices, options: Mapping[str, Any]
) -> None:
    for name in ("mode", "use_scale", "sub_sample", "recurrence", "temporal_window"):
        if name not in kind.choices or name in choices.given() or name not in options:
            continue
        if name == "mode" and options[name] not in ("embedded_gaussian", "dot_product"):
            continue
        value = True if name == "use_scale" else options[name]
        result.notes.append(
            f"the keys do not tell {name}: taken as {value}, the default of {kind.name}"
        )


def _complete_statistics(result: Builder, frozen_affine: bool) -> None:
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


def _check_choices(choices: Choices, kinds: Iterable[BlockKind], layout: str) -> None:
    known = {name for kind in kinds for name in kind.choices}
    for name, value in choices.given().items():
        if name not in known:
            takes = f"takes {', '.join(sorted(known))}" if known else "takes no choice"
            raise CheckpointError(
                f"{name}={value!r} was asked for, but the blocks of {layout} have it fixed or in "
                f"their keys; it {takes}"
            )
