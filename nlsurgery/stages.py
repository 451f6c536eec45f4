"""Stages and their blocks, found in the data flow, and every name a user may call a stage by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from nlsurgery.probe import Call
from nlsurgery.shapes import Feature
from nlsurgery.tree import CallTree, feature_info, iterates_children


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
    """

    name: str
    aliases: tuple[str, ...]
    fqn: str
    num_chs: int
    reduction: int
    layout: str
    feature_size: tuple[int, ...]
    blocks: tuple[str, ...]


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
    if len(sizes) == 1 and not all(_holds_many(tree, call) for call in blocky):
        yield _Group(index, [c for c in blocky if tree.feature(c)] or blocky)
        return
    for call in tree.children.get(index, ()):
        if tree.has_block(call):
            yield from _visit_call(tree, call)
        elif tree.is_trunk(call) and tree.feature(call):
            kids = [kid for kid in tree.children.get(call.index, ()) if tree.feature(kid)]
            container = iterates_children(tree.modules[call.fqn])
            yield _Group(call.index, kids if kids and container else [call], plain=True)


def _visit_call(tree: CallTree, call: Call) -> Iterator[_Group]:
    if tree.is_block(call):
        yield _Group(call.parent, [call], lone=True)
    else:
        yield from _visit(tree, call.index)


def _units(tree: CallTree, call: Call) -> Iterator[Call]:
    if tree.is_block(call):
        yield call
    else:
        for kid in tree.blocky_children(call.index):
            yield from _units(tree, kid)


def _holds_many(tree: CallTree, call: Call) -> bool:
    """Whether a call is a row of three or more blocks of one class: a stage, and not a block."""
    while not tree.is_block(call):
        kids = tree.blocky_children(call.index)
        if len(kids) != 1:
            return len(kids) > 2 and len({kid.kind for kid in kids}) == 1
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
            and _size(tree, group.units[-1]) == _size(tree, current.units[-1])
        ):
            current.units += group.units
            continue
        if current is not None:
            yield current
        current = group
    if current is not None:
        yield current


def _prune(tree: CallTree, groups: list[_Group]) -> list[_Group]:
    """Leave out stems, down-samplers and heads: what is no stage of its own."""
    owners = {
        (_path_parent(tree, g), _container_kind(tree, g))
        for g in groups
        if not g.plain and not g.lone
    }
    kept: list[_Group] = []
    last = max((i for i, g in enumerate(groups) if not g.plain), default=-1)
    for index, group in enumerate(groups):
        sibling = (_path_parent(tree, group), _container_kind(tree, group)) in owners
        if group.plain and not sibling:
            continue
        if index < last and _leads_into(tree, group, groups[index + 1]):
            continue
        kept.append(group)
    return kept


def _leads_into(tree: CallTree, group: _Group, following: _Group) -> bool:
    """Whether a group is the down-sampler of the next: one block, another class, same resolution."""
    if len(group.units) != 1 and not group.plain:
        return False
    if _size(tree, group.units[-1]) != _size(tree, following.units[-1]):
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
    features = [tree.feature(group.units[-1]) for group in groups]
    pairs = [(g, f) for g, f in zip(groups, features, strict=True) if f is not None]
    places = [_place_in_network(tree, group, feature) for group, feature in pairs]
    if len(places) == 4 and places == list(range(places[0], places[0] + 4)):
        places = [2, 3, 4, 5]  # the classic four, also behind a stem of another stride
    declared = {str(entry["module"]) for entry in feature_info(tree.model) if entry.get("module")}
    stages = []
    for index, (group, feature) in enumerate(pairs):
        rest = [unit.fqn for other, _ in pairs if other is not group for unit in other.units]
        before = pairs[index - 1][0].units[-1].index if index else -1
        fqn, others = _stage_paths(tree, group, before, rest)
        aliases = []
        if places[index] not in places[index + 1 :]:
            aliases += [f"res{places[index]}", f"c{places[index]}"]
        aliases += [str(index - len(pairs)), fqn, *others]
        aliases += [name for name in declared if name.replace(".", "_") == fqn.replace(".", "_")]
        aliases += [alias.replace(".", "_") for alias in (fqn, *others)]
        unique = tuple(dict.fromkeys(alias for alias in aliases if alias))
        stages.append(_stage(f"stage{index + 1}", unique, fqn, feature, group.units))
    return tuple(stages)


def _stage(
    name: str, aliases: tuple[str, ...], fqn: str, feature: Feature, units: Sequence[Call]
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
    )


def _stage_paths(
    tree: CallTree, group: _Group, before: int, rest: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    """The stage's own path and other paths to the same output.

    Its own path is the outermost module that returns its output and holds no other stage; where the
    blocks lie in an uncalled list, the path of the list; else the path of its last block.
    """
    last = group.units[-1]
    node = tree.node_of(last)
    around = [
        call.fqn
        for call in tree.ancestors(last)
        if before < call.index < group.units[0].index
        and len(call.outputs) == 1
        and call.outputs[0].node == node
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
    """The dilation of all spatial convolutions in a module, 1 when they do not agree."""
    dilations = {
        max(conv.dilation)
        for conv in module.modules()
        if isinstance(conv, nn.Conv2d | nn.Conv3d) and max(conv.kernel_size) > 1
    }
    value = next(iter(dilations)) if len(dilations) == 1 else 1
    return value if value & (value - 1) == 0 else 1
