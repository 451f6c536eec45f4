"""From ours to a foreign layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nlsurgery.convert.layout import BlockKind, Layout, OurBlock
from nlsurgery.convert.ours import FoundOurs, block_options, find_ours
from nlsurgery.convert.registry import OURS
from nlsurgery.convert.request import Builder, Request
from nlsurgery.convert.result import BlockSpec, Conversion, Left
from nlsurgery.errors import CheckpointError


def from_ours(request: Request) -> Conversion:
    """Convert a state_dict of ours to ``request.layout``.

    Raises:
        CheckpointError: It has no block, or one that the layout cannot hold.
    """
    layout, state = request.layout, request.state
    found = find_ours(frozenset(state), request.options)
    if not found:
        raise CheckpointError("no block of nlsurgery is in the checkpoint")
    request.check_places(block.prefix for block in found)
    used = {key for block in found for key in block.keys.values()}
    result = Builder()
    for key in state:
        if key not in used:
            new = layout.base_from_ours(key)
            if new is None:
                result.left.append(Left(key, f"{layout.name} has no name for it"))
            else:
                result.put(new, state[key], key)
    for block in found:
        options = block_options(block, request.options, request.choices, state)
        _put_block(result, request, block, options)
    return result.done(OURS, layout.name)


def _put_block(
    result: Builder, request: Request, block: FoundOurs, options: Mapping[str, Any]
) -> None:
    where = block.prefix or "the block"
    kind = _kind_for(request.layout, block, where)
    prefix = _prefix_for(request, kind, block, where)
    local = {name: request.state[key] for name, key in block.keys.items()}
    new = kind.from_ours(OurBlock(block.type, local, options, where))
    for name, value in new.tensors.items():
        old = new.origin.get(name)
        result.put(kind.key(prefix, name), value, None if old is None else block.keys[old])
    gone = sorted(set(block.keys) - set(new.origin.values()))
    result.left += [Left(block.keys[name], "folded into its neighbours") for name in gone]
    result.blocks.append(
        BlockSpec(block.prefix, prefix, block.host, new.type, new.channels, new.dims, new.options)
    )


def _kind_for(layout: Layout, block: FoundOurs, where: str) -> BlockKind:
    for kind in layout.kinds:
        if block.type in kind.types:
            return kind
    held = sorted({name.split(":")[0] for kind in layout.kinds for name in kind.types})
    raise CheckpointError(
        f"{where}: {layout.name} has no block for {block.type.split(':')[0]}; it holds "
        f"{', '.join(held)}"
    )


def _prefix_for(request: Request, kind: BlockKind, block: FoundOurs, where: str) -> str:
    if block.prefix in request.places:
        return request.places[block.prefix]
    prefix = block.prefix if block.host is None else kind.name_at(block.host)
    if prefix is None:
        raise CheckpointError(
            f"{where}: {request.layout.name} has no block at {block.host or 'the root'}; say with "
            f"--place {block.prefix}=PREFIX what it is called there"
        )
    return prefix
