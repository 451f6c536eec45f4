"""Stages and their blocks, found in the data flow, and every name a user may call a stage by."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from nlsurgery.dilation import refinement
from nlsurgery.probe import Call
from nlsurgery.shapes import Feature
from nlsurgery.tree import CallTree, feature_info, is_dead, iterates_children
from nlsurgery.walk import parent_fqn

#: Modules that are named as stages are by default: then a model's own names are the stages' names.
_STAGE_NAME = re.compile(r"stage\d+")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a backbone.

    Attributes:
        name: ``stage1`` ... ``stageN``, in order.
        aliases: Every other name for it: ``res2``, ``c2``, ``-1``, its path, ...
        fqn: The module whose output is the stage's, or the common path of its blocks.
        num_chs: Channels at its end.
        reduction: Its stride against the input.
        layout: ``NCHW``, ``NHWC``, ``NLC``, ``NCTHW`` or ``NTHWC``.
        feature_size: (H, W) or (T, H, W) at its end, at the probed input size.
        blocks: The fqns of its blocks, in order.
        branch: Which of its blocks' feature maps it is, where they return several; else None.
    """

    name: str
    aliases: tuple[str, ...]
    fqn: str
    num_chs: int
    reduction: int
    layout: str
    feature_size: tuple[int, ...]
    blocks: tuple[str, ...]
    branch: int | None = None


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What a model is made of, as far as the surgery cares.

    Attributes:
        model: Its class name.
        input_size: The probed input, without the batch.
        stages: Its stages, in order.
    """

    model: str
    input_size: tuple[int, ...]
    stages: tuple[Stage, ...]
    tree: CallTree = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "model": self.model,
            "input_size": list(self.input_size),
            "stages": [asdict(stage) for stage in self.stages],
        }

    def __str__(self) -> str:
        lines = [f"{self.model}, input {'x'.join(map(str, self.input_size))}"]
        for stage in self.stages:
            size = "x".join(map(str, stage.feature_size))
            lines.append(
                f"{stage.name:8s} {stage.fqn:24s} /{stage.reduction:<4d} {stage.num_chs:5d} chs "
                f"{size:>9s} {stage.layout:5s} {len(stage.blocks):3d} blocks  "
                f"({', '.join(stage.aliases)})"
            )
        return "\n".join(lines)


@dataclass(slots=True)
class _Group:
    """Blocks of one stage before it has a name."""

    owner: int | None
    units: list[Call]
    plain: bool = False
    lone: bool = False
    single: bool = False


def find_stages(tree: CallTree) -> Anatomy:
    """Find the stages of a traced model.

    Args:
        tree: The call tree of its probe.
    """
    if any(tree.has_block(call) for call in tree.children.get(None, ())):
        groups = _prune(tree, list(_merge(tree, list(_visit(tree, None)))))
    else:
        groups = _plain_groups(tree, None)
    stages = _name(tree, groups)
    return Anatomy(type(tree.model).__name__, tree.trace.input_shape[1:], stages, tree)


def stage_at(tree: CallTree, fqn: str) -> Stage | None:
    """Describe the module at ``fqn`` as a stage of its own: its blocks, or itself as the only one.

    Returns:
        None when the module is no feature map, or holds several stages.
    """
    call = tree.by_fqn[fqn]
    groups = [_Group(call.parent, [call])]
    if tree.has_block(call) and not tree.is_block(call):
        inside = _prune(tree, list(_merge(tree, list(_visit_call(tree, call)))))
        if len(inside) != 1:
            return None
        groups = inside
    elif iterates_children(tree.modules[fqn]):
        units = [kid for kid in tree.children.get(call.index, ()) if tree.feature(kid)]
        groups = [_Group(call.index, units or [call])]
    feature = tree.feature(groups[0].units[-1])
    if feature is None:
        return None
    return _stage(fqn, (), fqn, feature, groups[0].units)


def _visit(tree: CallTree, index: int | None) -> Iterator[_Group]:
    """Yield the groups of blocks under a call, in order; ``None`` is the model itself."""
    blocky = tree.blocky_children(index)
    if len(blocky) == 1:
        yield from _visit_call(tree, blocky[0])
        return
    sizes = {_size(tree, unit) for call in blocky for unit in _units(tree, call)}
    if len(sizes) == 1 and not all(_is_stage(tree, call) for call in blocky):
        yield from _rows(tree, index, blocky)
        return
    for call in tree.children.get(index, ()):
        if tree.has_block(call):
            inside = list(_visit_call(tree, call))
            whole = len(inside) > 1 and _is_one_of_a_row(tree, call, blocky)
            yield from _as_one(tree, call, inside) if whole else inside
        elif tree.is_trunk(call) and tree.feature(call):
            kids = [kid for kid in tree.children.get(call.index, ()) if tree.feature(kid)]
            container = iterates_children(tree.modules[call.fqn])
            yield _Group(call.index, kids if kids and container else [call], plain=True)


def _visit_call(tree: CallTree, call: Call) -> Iterator[_Group]:
    if tree.is_block(call):
        yield _Group(call.parent, [call], lone=True)
    else:
        yield from _visit(tree, call.index)


def _rows(tree: CallTree, index: int | None, blocky: list[Call]) -> Iterator[_Group]:
    """Split neighbours of one size by the list they stand in: one list is one group."""
    rows: dict[str, list[Call]] = {}
    for call in blocky:
        members = tree.blocky_children(call.index) if _is_stage(tree, call) else [call]
        for member in members:
            rows.setdefault(parent_fqn(member.fqn), []).append(member)
    for row in rows.values():
        if len(row) == 1 and len(rows) > 1:
            yield from _visit_call(tree, row[0])
        else:
            yield _Group(index, [call for call in row if tree.feature(call)] or row)


def _is_one_of_a_row(tree: CallTree, call: Call, blocky: list[Call]) -> bool:
    """Whether a call is one of a row of stages: modules of one class and list, of several sizes."""
    row = [
        other
        for other in blocky
        if other.kind is call.kind and parent_fqn(other.fqn) == parent_fqn(call.fqn)
    ]
    ends = {_size(tree, list(_units(tree, other))[-1]) for other in row}
    return len(row) > 2 and len(ends) > 1


def _as_one(tree: CallTree, call: Call, inside: list[_Group]) -> list[_Group]:
    """Take a row's member as one stage: its longest list of blocks at its last resolution.

    A member with more than two resolutions inside has stages of its own and stays as it is.
    """
    groups = [group for group in inside if not group.plain]
    trunk = [parent_fqn(u.fqn) for group in groups for u in group.units if tree.is_trunk(u)]
    if trunk:  # a list with no block on the trunk is a side branch
        groups = [group for group in groups if parent_fqn(group.units[-1].fqn) in trunk]
    sizes = [_size(tree, group.units[-1]) for group in groups]
    if len(dict.fromkeys(sizes)) > 2:
        return inside
    lists: dict[str, list[Call]] = {}
    for unit in (unit for group in groups for unit in group.units):
        if _size(tree, unit) == sizes[-1]:
            lists.setdefault(parent_fqn(unit.fqn), []).append(unit)
    longest = max(len(units) for units in lists.values())
    return [_Group(call.index, [u for u in lists.values() if len(u) == longest][-1])]


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


def _size(tree: CallTree, call: Call) -> tuple[int, ...]:
    feature = tree.feature(call)
    return feature.feature_size if feature else ()


def _merge(tree: CallTree, groups: list[_Group]) -> Iterator[_Group]:
    """Join neighbouring lone blocks of one parent and one resolution into one group."""
    current: _Group | None = None
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
    return branches and _size(tree, one) == _size(tree, two)


def _same_place(tree: CallTree, one: _Group, two: _Group) -> bool:
    """Whether two groups have one resolution, and one dilation where both dilate."""
    first, second = one.units[-1], two.units[-1]
    if not _same_map(tree, first, second):
        return False
    dilations = {_dilation(tree.modules[unit.fqn]) for unit in (first, second)}
    return len(dilations) == 1


def _prune(tree: CallTree, groups: list[_Group]) -> list[_Group]:
    """Leave out stems, down-samplers and heads: what is no stage of its own."""
    groups = _going_down(tree, groups)
    owners = {
        (_path_parent(tree, g), _container_kind(tree, g))
        for g in groups
        if not g.plain and not g.lone
    }
    kept: list[_Group] = []
    last = max((i for i, g in enumerate(groups) if not g.plain), default=-1)
    for index, group in enumerate(groups):
        sibling = (_path_parent(tree, group), _container_kind(tree, group)) in owners
        if group.plain and not (sibling and _is_composite(tree, group)):
            continue
        if index < last and _leads_into(tree, group, groups[index + 1]):
            continue
        kept.append(group)
    return _without_heads(tree, _without_strays(tree, _joined(tree, kept)))


def _going_down(tree: CallTree, groups: list[_Group]) -> list[_Group]:
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


def _is_composite(tree: CallTree, group: _Group) -> bool:
    """Whether a group's units are modules made of modules: bare convolutions are a stem."""
    return any(tree.children.get(unit.index) for unit in group.units)


def _family(tree: CallTree, group: _Group) -> tuple[str, type[nn.Module] | None]:
    return _path_parent(tree, group), _container_kind(tree, group)


def _joined(tree: CallTree, groups: list[_Group]) -> list[_Group]:
    """Join neighbours of one family and size that hold one block each: a row of wrapped blocks."""
    joined: list[_Group] = []
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


def _without_strays(tree: CallTree, groups: list[_Group]) -> list[_Group]:
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


def _without_heads(tree: CallTree, groups: list[_Group]) -> list[_Group]:
    """Leave out what follows the backbone: groups at an earlier place, and dead ends of class tokens."""
    groups = list(groups)
    while len(groups) > 1:
        last, before = groups[-1], groups[-2]
        ends = [(group, tree.feature(group.units[-1])) for group in (before, last)]
        places = [_place_in_network(tree, g, feature) for g, feature in ends if feature]
        falls = len(places) == 2 and places[1] < places[0]
        falls |= _adds_tokens(tree, groups)
        family = _family(tree, last) == _family(tree, before) and not last.lone
        if not falls and (family or not _is_dead_end(tree, last, groups)):
            break
        groups.pop()
    return groups


def _adds_tokens(tree: CallTree, groups: list[_Group]) -> bool:
    """Whether a short last group joins a class token to the feature map: attention that pools it."""
    one, two = (tree.feature(group.units[-1]) for group in groups[-2:])
    if one is None or two is None:
        return False
    if len(groups[-1].units) >= max(len(group.units) for group in groups[:-1]):
        return False
    return two.layout.num_prefix_tokens > one.layout.num_prefix_tokens


def _is_dead_end(tree: CallTree, last: _Group, groups: list[_Group]) -> bool:
    """Whether the last group is a small one after which no feature map is read."""
    if len(last.units) >= max(len(group.units) for group in groups):
        return False
    return is_dead(tree, last.units[-1])


def _leads_into(tree: CallTree, group: _Group, following: _Group) -> bool:
    """Whether a group is the down-sampler of the next: one block, another class, same resolution."""
    if len(group.units) != 1 and not group.plain:
        return False
    if not _same_map(tree, group.units[-1], following.units[-1]):
        return False
    return group.units[-1].kind not in {unit.kind for unit in following.units}


def _path_parent(tree: CallTree, group: _Group) -> str:
    return tree.trace.calls[group.owner].fqn.rpartition(".")[0] if group.owner is not None else ""


def _container_kind(tree: CallTree, group: _Group) -> type[nn.Module] | None:
    return tree.trace.calls[group.owner].kind if group.owner is not None else None


def _plain_groups(tree: CallTree, index: int | None) -> list[_Group]:
    """Group the modules of a network without skip connections (VGG) by resolution."""
    groups: list[_Group] = []
    for unit in _plain_units(tree, index):
        if groups and _size(tree, groups[-1].units[-1]) == _size(tree, unit):
            groups[-1].units.append(unit)
        else:
            groups.append(_Group(unit.parent, [unit]))
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


def _name(tree: CallTree, groups: Sequence[_Group]) -> tuple[Stage, ...]:
    """Turn groups into stages with every name they go by; each parallel branch is a stage."""
    drafts: list[_Draft] = []
    for index, group in enumerate(groups):
        rest = [unit.fqn for other in groups if other is not group for unit in other.units]
        before = groups[index - 1].units[-1].index if index else -1
        fqn, others = _stage_paths(tree, group, before, rest)
        count = len(tree.branches(group.units[-1]))
        for branch in range(count):
            units = [u for u in group.units if len(tree.branches(u)) == count]
            feature = tree.feature(units[-1], branch)
            if feature is not None:
                place = _place_in_network(tree, group, feature)
                chosen = branch if count > 1 else None
                drafts.append(_Draft(index, fqn, others, units, feature, place, chosen))
    return tuple(_named(tree, drafts))


@dataclass(slots=True)
class _Draft:
    """A stage before it has its names."""

    group: int
    fqn: str
    others: tuple[str, ...]
    units: list[Call]
    feature: Feature
    place: int
    branch: int | None


def _named(tree: CallTree, drafts: Sequence[_Draft]) -> Iterator[Stage]:
    places = [draft.place for draft in drafts]
    if len(places) == 4 and places == list(range(places[0], places[0] + 4)):
        places = [2, 3, 4, 5]  # the classic four, also behind a stem of another stride
    declared = {str(entry["module"]) for entry in feature_info(tree.model) if entry.get("module")}
    own_names = any(_STAGE_NAME.fullmatch(draft.fqn) for draft in drafts)
    groups = list(dict.fromkeys(draft.group for draft in drafts))
    for index, draft in enumerate(drafts):
        suffix = "" if draft.branch is None else f":{draft.branch}"
        number = groups.index(draft.group) + 1
        name = (draft.fqn if own_names else f"stage{number}") + suffix
        aliases = []
        if places[index] not in places[index + 1 :]:
            aliases += [f"res{places[index]}", f"c{places[index]}"]
        aliases.append(str(index - len(drafts)))
        flat = draft.fqn.replace(".", "_")
        paths = [draft.fqn, *draft.others]
        paths += [module for module in declared if module.replace(".", "_") == flat]
        paths += [path.replace(".", "_") for path in (draft.fqn, *draft.others)]
        aliases += [path + suffix for path in paths]
        unique = tuple(dict.fromkeys(alias for alias in aliases if alias))
        yield _stage(name, unique, draft.fqn, draft.feature, draft.units, draft.branch)


def _stage(
    name: str,
    aliases: tuple[str, ...],
    fqn: str,
    feature: Feature,
    units: Sequence[Call],
    branch: int | None = None,
) -> Stage:
    return Stage(
        name,
        aliases,
        fqn,
        feature.num_chs,
        feature.reduction,
        feature.layout.kind,
        feature.feature_size,
        tuple(unit.fqn for unit in units),
        branch,
    )


def _stage_paths(
    tree: CallTree, group: _Group, before: int, rest: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    """The stage's own path and other paths to the same output.

    Its own path is the outermost module that returns its output and holds no other stage; where the
    blocks lie in an uncalled list, the path of the list; else the path of its last block.
    """
    last = group.units[-1]
    nodes = [out.node for out in last.outputs]
    around = [
        call.fqn
        for call in tree.ancestors(last)
        if before < call.index < group.units[0].index
        and [out.node for out in call.outputs] == nodes
        and tree.is_single(call)
    ]
    if around:
        return around[-1], tuple(around[:-1])
    common = []
    for parts in zip(*(unit.fqn.split(".") for unit in group.units), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    path = ".".join(common)
    if len(group.units) > 1 and path and not any(fqn.startswith(path + ".") for fqn in rest):
        return path, ()
    return last.fqn, ()


def _place_in_network(tree: CallTree, group: _Group, feature: Feature) -> int:
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
