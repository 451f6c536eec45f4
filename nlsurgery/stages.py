"""Stages and their blocks, found in the data flow, and every name a user may call a stage by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nlsurgery.grouping import Group, plain_groups, visit, visit_call
from nlsurgery.probe import Call
from nlsurgery.pruning import merge, place_in_network, prune
from nlsurgery.shapes import Feature
from nlsurgery.tree import CallTree, feature_info, iterates_children

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


def find_stages(tree: CallTree) -> Anatomy:
    """Find the stages of a traced model.

    Args:
        tree: The call tree of its probe.
    """
    if any(tree.has_block(call) for call in tree.children.get(None, ())):
        groups = prune(tree, list(merge(tree, list(visit(tree, None)))))
    else:
        groups = plain_groups(tree, None)
    stages = _name(tree, groups)
    return Anatomy(type(tree.model).__name__, tree.trace.input_shape[1:], stages, tree)


def stage_at(tree: CallTree, fqn: str) -> Stage | None:
    """Describe the module at ``fqn`` as a stage of its own: its blocks, or itself as the only one.

    Returns:
        None when the module is no feature map, or holds several stages.
    """
    call = tree.by_fqn[fqn]
    groups = [Group(call.parent, [call])]
    if tree.has_block(call) and not tree.is_block(call):
        inside = prune(tree, list(merge(tree, list(visit_call(tree, call)))))
        if len(inside) != 1:
            return None
        groups = inside
    elif iterates_children(tree.modules[fqn]):
        units = [kid for kid in tree.children.get(call.index, ()) if tree.feature(kid)]
        groups = [Group(call.index, units or [call])]
    feature = tree.feature(groups[0].units[-1])
    if feature is None:
        return None
    return _stage(fqn, (), fqn, feature, groups[0].units)


def _name(tree: CallTree, groups: Sequence[Group]) -> tuple[Stage, ...]:
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
                place = place_in_network(tree, group, feature)
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
    tree: CallTree, group: Group, before: int, rest: Sequence[str]
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
