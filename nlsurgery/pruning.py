"""Which groups of blocks are stages: stems, down-samplers, decoders and heads are left out."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from nlsurgery.dilation import refinement
from nlsurgery.grouping import Group, map_size
from nlsurgery.probe import Call
from nlsurgery.shapes import Feature
from nlsurgery.tree import CallTree, is_dead


def merge(tree: CallTree, groups: list[Group]) -> Iterator[Group]:
    """Join neighbouring lone blocks of one parent and one resolution into one group."""
    current: Group | None = None
    for group in groups:
        if (
            current is not None
            and group.lone
            and current.lone
            and group.owner == current.owner
            and _same_place(tree, group, current)
        ):
            current.units += group.units
            continue
        if current is not None:
            yield current
        current = group
    if current is not None:
        yield current


def _same_map(tree: CallTree, one: Call, two: Call) -> bool:
    """Whether two calls return maps of one size, in as many branches."""
    branches = len(tree.branches(one)) == len(tree.branches(two))
    return branches and map_size(tree, one) == map_size(tree, two)


def _same_place(tree: CallTree, one: Group, two: Group) -> bool:
    """Whether two groups have one resolution, and one dilation where both dilate."""
    first, second = one.units[-1], two.units[-1]
    if not _same_map(tree, first, second):
        return False
    dilations = {_dilation(tree.modules[unit.fqn]) for unit in (first, second)}
    return len(dilations) == 1


def prune(tree: CallTree, groups: list[Group]) -> list[Group]:
    """Leave out stems, down-samplers and heads: what is no stage of its own."""
    groups = _going_down(tree, groups)
    owners = {
        (_path_parent(tree, g), _container_kind(tree, g))
        for g in groups
        if not g.plain and not g.lone
    }
    kept: list[Group] = []
    last = max((i for i, g in enumerate(groups) if not g.plain), default=-1)
    for index, group in enumerate(groups):
        sibling = (_path_parent(tree, group), _container_kind(tree, group)) in owners
        if group.plain and not (sibling and _is_composite(tree, group)):
            continue
        if index < last and _leads_into(tree, group, groups[index + 1]):
            continue
        kept.append(group)
    return _without_heads(tree, _without_strays(tree, _joined(tree, kept)))


def _going_down(tree: CallTree, groups: list[Group]) -> list[Group]:
    """Cut the groups off where the map gets finer again: decoders, pyramids and heads of branches."""
    deepest = 0
    for index, group in enumerate(groups):
        branches = range(len(tree.branches(group.units[-1])))
        features = [tree.feature(group.units[-1], branch) for branch in branches]
        reduction = max((feature.reduction for feature in features if feature), default=deepest)
        if 2 * reduction <= deepest:
            return groups[:index]
        deepest = max(deepest, reduction)
    return groups


def _is_composite(tree: CallTree, group: Group) -> bool:
    """Whether a group's units are modules made of modules: bare convolutions are a stem."""
    return any(tree.children.get(unit.index) for unit in group.units)


def _family(tree: CallTree, group: Group) -> tuple[str, type[nn.Module] | None]:
    return _path_parent(tree, group), _container_kind(tree, group)


def _joined(tree: CallTree, groups: list[Group]) -> list[Group]:
    """Join neighbours of one family and size that hold one block each: a row of wrapped blocks."""
    joined: list[Group] = []
    for group in groups:
        before = joined[-1] if joined else None
        if (
            before is not None
            and not (group.plain or before.plain)
            and group.owner != before.owner
            and len(group.units) == 1
            and _family(tree, group) == _family(tree, before)
            and _same_place(tree, group, before)
            and before.single
        ):
            before.units = [*before.units[:-1], _wrapper(tree, before.units[-1])]
            before.units.append(_wrapper(tree, group.units[0]))
            continue
        group.single = len(group.units) == 1
        joined.append(group)
    return joined


def _wrapper(tree: CallTree, unit: Call) -> Call:
    """The outermost container around one block alone that returns the block's output."""
    for call in tree.ancestors(unit):
        if tree.node_of(call) != tree.node_of(unit) or len(tree.blocky_children(call.index)) != 1:
            break
        unit = call
    return unit


def _without_strays(tree: CallTree, groups: list[Group]) -> list[Group]:
    """Leave out single blocks before and after a row of sibling stages: stems and heads."""
    sizes: dict[tuple[str, type[nn.Module] | None], list[int]] = {}
    for group in groups:
        if not group.lone and not group.plain:
            sizes.setdefault(_family(tree, group), []).append(len(group.units))
    if not sizes:
        return groups
    main = max(sizes, key=lambda key: sum(sizes[key]))
    if len(sizes[main]) < 2:
        return groups
    return [
        group
        for group in groups
        if len(group.units) > 1
        or _family(tree, group) == main
        or _path_parent(tree, group) == main[0]
    ]


def _without_heads(tree: CallTree, groups: list[Group]) -> list[Group]:
    """Leave out what follows the backbone: groups at an earlier place, and dead ends of class tokens."""
    groups = list(groups)
    while len(groups) > 1:
        last, before = groups[-1], groups[-2]
        ends = [(group, tree.feature(group.units[-1])) for group in (before, last)]
        places = [place_in_network(tree, g, feature) for g, feature in ends if feature]
        falls = len(places) == 2 and places[1] < places[0]
        falls |= _adds_tokens(tree, groups)
        coarser = map_size(tree, last.units[-1]) != map_size(tree, before.units[-1])
        family = coarser or (_family(tree, last) == _family(tree, before) and not last.lone)
        if not falls and (family or not _is_dead_end(tree, last, groups)):
            break
        groups.pop()
    return groups


def _adds_tokens(tree: CallTree, groups: list[Group]) -> bool:
    """Whether a short last group joins a class token to the feature map: attention that pools it."""
    one, two = (tree.feature(group.units[-1]) for group in groups[-2:])
    if one is None or two is None:
        return False
    if len(groups[-1].units) >= max(len(group.units) for group in groups[:-1]):
        return False
    return two.layout.num_prefix_tokens > one.layout.num_prefix_tokens


def _is_dead_end(tree: CallTree, last: Group, groups: list[Group]) -> bool:
    """Whether the last group is a small one after which no feature map is read."""
    if len(last.units) >= max(len(group.units) for group in groups):
        return False
    return is_dead(tree, last.units[-1])


def _leads_into(tree: CallTree, group: Group, following: Group) -> bool:
    """Whether a group is the down-sampler of the next: one block, another class, same resolution."""
    if len(group.units) != 1 and not group.plain:
        return False
    if not _same_map(tree, group.units[-1], following.units[-1]):
        return False
    return group.units[-1].kind not in {unit.kind for unit in following.units}


def _path_parent(tree: CallTree, group: Group) -> str:
    return tree.trace.calls[group.owner].fqn.rpartition(".")[0] if group.owner is not None else ""


def _container_kind(tree: CallTree, group: Group) -> type[nn.Module] | None:
    return tree.trace.calls[group.owner].kind if group.owner is not None else None


def place_in_network(tree: CallTree, group: Group, feature: Feature) -> int:
    """k of ``res<k>``: log2 of the stride the stage would have were its dilation a stride."""
    stride = feature.reduction * _dilation(tree.modules[group.units[-1].fqn])
    return max(0, round(math.log2(max(stride, 1))))


def _dilation(module: nn.Module) -> int:
    """By how much a module's map is finer than its place: the dilation of most spatial convolutions.

    1 when it is no power of two. Where surgery dilated the module, what it changed tells exactly.
    """
    convolutions = [
        conv
        for conv in module.modules()
        if isinstance(conv, nn.Conv2d | nn.Conv3d) and max(conv.kernel_size) > 1
    ]
    known = [factor for conv in convolutions if (factor := refinement(conv)) is not None]
    dilations = [max(conv.dilation) for conv in convolutions]
    value = max(known) if known else max(sorted(set(dilations)), key=dilations.count, default=1)
    return value if value & (value - 1) == 0 else 1
