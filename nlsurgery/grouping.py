"""Which modules belong together: the blocks of a model in groups that may be stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nlsurgery.probe import Call
from nlsurgery.tree import CallTree, iterates_children
from nlsurgery.walk import parent_fqn


@dataclass(slots=True)
class Group:
    """Blocks of one stage before it has a name."""

    owner: int | None
    units: list[Call]
    plain: bool = False
    lone: bool = False
    single: bool = False


def visit(tree: CallTree, index: int | None) -> Iterator[Group]:
    """Yield the groups of blocks under a call, in order; ``None`` is the model itself."""
    blocky = tree.blocky_children(index)
    if len(blocky) == 1:
        yield from visit_call(tree, blocky[0])
        return
    sizes = {map_size(tree, unit) for call in blocky for unit in _units(tree, call)}
    if len(sizes) == 1 and not all(_is_stage(tree, call) for call in blocky):
        yield from _rows(tree, index, blocky)
        return
    for call in tree.children.get(index, ()):
        if tree.has_block(call):
            inside = list(visit_call(tree, call))
            whole = len(inside) > 1 and _is_one_of_a_row(tree, call, blocky)
            yield from _as_one(tree, call, inside) if whole else inside
        elif tree.is_trunk(call) and tree.feature(call):
            kids = [kid for kid in tree.children.get(call.index, ()) if tree.feature(kid)]
            container = iterates_children(tree.modules[call.fqn])
            yield Group(call.index, kids if kids and container else [call], plain=True)


def visit_call(tree: CallTree, call: Call) -> Iterator[Group]:
    """Yield the groups in one call: itself alone when it is a block, else those under it."""
    if tree.is_block(call):
        yield Group(call.parent, [call], lone=True)
    else:
        yield from visit(tree, call.index)


def _rows(tree: CallTree, index: int | None, blocky: list[Call]) -> Iterator[Group]:
    """Split neighbours of one size by the list they stand in: one list is one group."""
    rows: dict[str, list[Call]] = {}
    for call in blocky:
        members = tree.blocky_children(call.index) if _is_stage(tree, call) else [call]
        for member in members:
            rows.setdefault(parent_fqn(member.fqn), []).append(member)
    for row in rows.values():
        if len(row) == 1 and len(rows) > 1:
            yield from visit_call(tree, row[0])
        else:
            yield Group(index, [call for call in row if tree.feature(call)] or row)


def _is_one_of_a_row(tree: CallTree, call: Call, blocky: list[Call]) -> bool:
    """Whether a call is one of a row of stages: modules of one class and list, of several sizes."""
    row = [
        other
        for other in blocky
        if other.kind is call.kind and parent_fqn(other.fqn) == parent_fqn(call.fqn)
    ]
    ends = {map_size(tree, list(_units(tree, other))[-1]) for other in row}
    return len(row) > 2 and len(ends) > 1


def _as_one(tree: CallTree, call: Call, inside: list[Group]) -> list[Group]:
    """Take a row's member as one stage: its longest list of blocks at its last resolution.

    A member with more than two resolutions inside has stages of its own and stays as it is.
    """
    groups = [group for group in inside if not group.plain]
    trunk = [parent_fqn(u.fqn) for group in groups for u in group.units if tree.is_trunk(u)]
    if trunk:  # a list with no block on the trunk is a side branch
        groups = [group for group in groups if parent_fqn(group.units[-1].fqn) in trunk]
    sizes = [map_size(tree, group.units[-1]) for group in groups]
    if len(dict.fromkeys(sizes)) > 2:
        return inside
    lists: dict[str, list[Call]] = {}
    for unit in (unit for group in groups for unit in group.units):
        if map_size(tree, unit) == sizes[-1]:
            lists.setdefault(parent_fqn(unit.fqn), []).append(unit)
    longest = max(len(units) for units in lists.values())
    return [Group(call.index, [u for u in lists.values() if len(u) == longest][-1])]


def _units(tree: CallTree, call: Call) -> Iterator[Call]:
    if tree.is_block(call):
        yield call
    else:
        for kid in tree.blocky_children(call.index):
            yield from _units(tree, kid)


def _is_stage(tree: CallTree, call: Call) -> bool:
    """Whether a call is a plain container of three or more blocks of one class: no block itself."""
    while not tree.is_block(call):
        kids = tree.blocky_children(call.index)
        if len(kids) != 1:
            container = iterates_children(tree.modules[call.fqn])
            return container and len(kids) > 2 and len({kid.kind for kid in kids}) == 1
        call = kids[0]
    return False


def map_size(tree: CallTree, call: Call) -> tuple[int, ...]:
    """(H, W) or (T, H, W) of a call's feature map, empty when it returns none."""
    feature = tree.feature(call)
    return feature.feature_size if feature else ()


def plain_groups(tree: CallTree, index: int | None) -> list[Group]:
    """Group the modules of a network without skip connections (VGG) by resolution."""
    groups: list[Group] = []
    for unit in _plain_units(tree, index):
        if groups and map_size(tree, groups[-1].units[-1]) == map_size(tree, unit):
            groups[-1].units.append(unit)
        else:
            groups.append(Group(unit.parent, [unit]))
    for group in groups:
        group.units = _split_at_convolutions(tree, group.units)
    return groups


def _plain_units(tree: CallTree, index: int | None) -> Iterator[Call]:
    for call in tree.children.get(index, ()):
        kids = tree.children.get(call.index, ())
        if kids and iterates_children(tree.modules[call.fqn]):
            yield from _plain_units(tree, call.index)
        elif tree.is_trunk(call) and tree.feature(call):
            yield call


def _split_at_convolutions(tree: CallTree, units: list[Call]) -> list[Call]:
    """One unit per convolution: the last module (norm, activation) before the next convolution."""
    ends: list[Call] = []
    weighted = False
    for unit in units:
        weight = getattr(tree.modules[unit.fqn], "weight", None)
        convolution = weight is not None and weight.dim() > 2
        if (convolution and weighted) or not ends:
            ends.append(unit)
        else:
            ends[-1] = unit
        weighted = weighted or convolution or bool(tree.children.get(unit.index))
    return ends
