"""Recipe entries become insertion points: every selector matches exactly, or it is an error."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from nlsurgery.errors import ModelError, SelectorError, close_names
from nlsurgery.probe import Call
from nlsurgery.recipe import Recipe
from nlsurgery.schema import Depth, Every, InsertEntry
from nlsurgery.shapes import Feature
from nlsurgery.sites import Site, find_hook
from nlsurgery.stages import Anatomy, Stage, stage_at
from nlsurgery.tree import CallTree, is_dead, iterates_children
from nlsurgery.walk import CHILD_NAME, OutputPath, parent_fqn


@dataclass(frozen=True, slots=True)
class InsertionPoint:
    """One place for one block.

    Attributes:
        where: The recipe entry, for errors: ``recipes/x.yaml: inserts[1]``.
        entry: The entry itself.
        stage: Name of the stage.
        block: fqn of the residual block.
        at: ``output``, or the sub-module's path in the block.
        site: The host and how its output is laid out.
        feature: The feature map there.
    """

    where: str
    entry: InsertEntry
    stage: str
    block: str
    at: str
    site: Site
    feature: Feature


def resolve(anatomy: Anatomy, recipe: Recipe) -> tuple[InsertionPoint, ...]:
    """Find the places a recipe names in a model.

    Args:
        anatomy: The model's stages.
        recipe: The recipe.

    Raises:
        SelectorError: An entry matches nothing, or a place that cannot take a block.
    """
    points: list[InsertionPoint] = []
    for index, entry in enumerate(recipe.inserts):
        where = f"{recipe.origin}: inserts[{index}]"
        stage = _find_stage(anatomy, entry, where)
        for number in _block_numbers(entry, stage, where):
            points.append(_point(anatomy.tree, entry, stage, number, where))
    _check_occupied(anatomy.tree, points)
    return tuple(points)


def _find_stage(anatomy: Anatomy, entry: InsertEntry, where: str) -> Stage:
    wanted = str(entry.stage)
    for stage in anatomy.stages:
        if wanted == stage.name or wanted in stage.aliases:
            return stage
    tree = anatomy.tree
    fqn = _module_path(tree, wanted)
    if fqn is not None and fqn in tree.by_fqn:
        stage_here = stage_at(tree, fqn)
        if stage_here is not None:
            return stage_here
        raise SelectorError(
            f"{where}.stage {wanted!r} is a module of {anatomy.model}, but {_why_not(tree, fqn)}; "
            f"name one of its stages: {_stage_names(anatomy)}"
        )
    if fqn is not None:
        raise SelectorError(
            f"{where}.stage {wanted!r} is a module of {anatomy.model} that its forward does not call; "
            f"name one of: {_stage_names(anatomy)}"
        )
    known = [name for stage in anatomy.stages for name in (stage.name, *stage.aliases)]
    raise SelectorError(
        f"{where}.stage {wanted!r} is no stage of {anatomy.model}"
        f"{close_names(wanted, [*known, *tree.by_fqn])}; its stages: {_stage_names(anatomy)}. "
        f"See: nlsurgery inspect"
    )


def _why_not(tree: CallTree, fqn: str) -> str:
    call = tree.by_fqn[fqn]
    if tree.counts[fqn] != 1:
        return f"it is called {tree.counts[fqn]} times a forward"
    if tree.feature(call) is None:
        shapes = ", ".join(str(out.shape) for out in call.outputs) or "no tensor"
        return f"it returns no feature map that can be told apart ({shapes})"
    return "it holds several stages"


def _stage_names(anatomy: Anatomy) -> str:
    if not anatomy.stages:
        return "none was found"
    return ", ".join(
        "/".join((s.name, *(a for a in s.aliases if a.startswith("res")), s.fqn))
        for s in anatomy.stages
    )


def _module_path(tree: CallTree, wanted: str) -> str | None:
    if wanted in tree.modules and wanted:
        return wanted
    flat = wanted.replace(".", "_")
    matches = [fqn for fqn in tree.modules if fqn and fqn.replace(".", "_") == flat]
    return matches[0] if len(matches) == 1 else None


def _block_numbers(entry: InsertEntry, stage: Stage, where: str) -> list[int]:
    count = len(stage.blocks)
    after = entry.after
    if after == "all":
        return list(range(count))
    if after == "last":
        return [count - 1]
    if after == "before_last":
        if count < 2:
            raise SelectorError(
                f"{where}.after 'before_last': stage {entry.stage!r} ({stage.fqn}) has one block only; "
                f"use 'last'"
            )
        return [count - 2]
    if isinstance(after, Every):
        numbers = list(range(after.every - 1, count, after.every))
        if not numbers:
            raise SelectorError(
                f"{where}.after {{every: {after.every}}} matches nothing: stage {entry.stage!r} "
                f"({stage.fqn}) has {count} blocks"
            )
        return numbers
    if isinstance(after, Depth):
        fractions = after.depth if isinstance(after.depth, list) else [after.depth]
        return [max(0, math.ceil(fraction * count - 1e-9) - 1) for fraction in fractions]
    asked = [after] if isinstance(after, int) else list(after)
    for number in asked:
        if not -count <= number < count:
            raise SelectorError(
                f"{where}.after {number}: stage {entry.stage!r} ({stage.fqn}) has {count} "
                f"block{'s' if count > 1 else ''}, indices 0 to {count - 1} (or {-count} to -1)"
            )
    return [number % count for number in asked]


def _point(
    tree: CallTree, entry: InsertEntry, stage: Stage, number: int, where: str
) -> InsertionPoint:
    block = stage.blocks[number]
    call = tree.by_fqn[block]
    at = "output"
    guard: str | None = None
    if entry.at != "output":
        at = _inner_path(tree, block, entry, where)
        guard, call = block, tree.by_fqn[f"{block}.{at}"]
    branch = stage.branch if entry.branch is None else entry.branch
    feature, path = _feature_at(tree, call, branch, where)
    host, owner = _host(tree, call)
    _check_calls(tree, host, where)
    if not entry.allow_dead:
        _check_live(tree, call, path, where)
    if guard is None and not tree.modules[host]._modules:
        guard = _guardian(tree, host)
    site = Site(host, owner, guard, feature.layout, path)
    return InsertionPoint(where, entry, stage.name, block, at, site, feature)


def _guardian(tree: CallTree, host: str) -> str | None:
    """The nearest module around a bare layer that is called: it sees to it that the layer keeps its hook.

    Fusing and SyncBatchNorm conversion replace bare layers (ReLU, BatchNorm), not what is around them.
    """
    around = parent_fqn(host)
    while around and tree.counts.get(around, 0) != 1:
        around = parent_fqn(around)
    return around if around != host else None


def _feature_at(
    tree: CallTree, call: Call, branch: int | None, where: str
) -> tuple[Feature, OutputPath]:
    output = tree.main_output(call)
    branches = tree.branches(call)
    if branch is not None:
        if branch >= len(branches):
            raise SelectorError(
                f"{where}.branch {branch}: {call.fqn} returns {len(branches)} feature map"
                f"{'' if len(branches) == 1 else 's'}"
            )
        output = branches[branch]
    if output is None and len(branches) > 1:
        raise SelectorError(
            f"{where}: {call.fqn} returns {len(branches)} feature maps; say which with 'branch: 0' "
            f"to 'branch: {len(branches) - 1}'"
        )
    feature = None if output is None else tree.read(call, output)
    if output is None or feature is None:
        raise SelectorError(
            f"{where}: the output of {call.fqn} is no feature map whose axes can be told apart "
            f"({', '.join(str(out.shape) for out in call.outputs) or 'no tensor'}); choose another "
            f"place, or give example_input="
        )
    return feature, output.path


def _inner_path(tree: CallTree, block: str, entry: InsertEntry, where: str) -> str:
    prefix = block + "."
    inside = {
        fqn.removeprefix(prefix): call
        for fqn, call in tree.by_fqn.items()
        if fqn.startswith(prefix)
    }
    roles = dict(_roles(tree, block))
    if entry.at in roles:
        return roles[entry.at]
    names = [n for n in inside if n == entry.at] or fnmatch.filter(inside, entry.at)
    if not names:
        names = [n for n in inside if fnmatch.fnmatch(f".{n}", entry.at)]
    if len(names) == 1:
        return names[0]
    known = [*roles, *inside]
    if not names:
        raise SelectorError(
            f"{where}.at {entry.at!r} is no sub-module of {block}"
            f"{close_names(entry.at, known)}; there are: {', '.join(known) or 'none'}"
        )
    raise SelectorError(f"{where}.at {entry.at!r} matches several in {block}: {', '.join(names)}")


def _roles(tree: CallTree, block: str) -> Iterator[tuple[str, str]]:
    """Places by role: ``after_conv<k>`` and ``before_add``, on the block's main branch.

    ``after_conv<k>`` is behind the k-th convolution and the normalisation that follows it, before the
    activation (many networks share one activation module, which can host nothing); a basic block's second
    is its third as well, so that one recipe fits networks of either kind. ``before_add`` is the last place
    of the main branch before the shortcut is added.
    """
    call = tree.by_fqn[block]
    main = _main_branch(tree, call)
    number = 0
    after: dict[int, Call] = {}
    node: int | None = None
    for kid in main:
        if _is_convolution(tree, kid):
            number += 1
            after[number] = kid
        elif node is None or kid.inputs != (node,) or not _is_norm(tree, kid):
            node = None
            continue
        else:
            after[number] = kid
        node = tree.node_of(kid)
    if number == 2:
        # A bottleneck's last position, on a basic block alike.
        after[3] = after[2]
    for k, kid in after.items():
        yield f"after_conv{k}", kid.fqn.removeprefix(block + ".")
    last = _before_add(tree, call, main)
    if last is not None:
        yield "before_add", last.fqn.removeprefix(block + ".")


def _main_branch(tree: CallTree, block: Call) -> list[Call]:
    """The layers of a residual block but those of its shortcut, in the order they run.

    The shortcut is what reaches the last addition through fewer convolutions than the longest chain.
    """
    start = set(block.inputs)
    leaves = [kid for kid in _leaves(tree, block) if tree.node_of(kid) not in start]
    add = _last_addition(tree, block)
    if add is None:
        return leaves
    depth = _depths(tree, start, add)
    preds = tree.trace.nodes[add].preds
    deepest = max((depth.get(pred, 0) for pred in preds), default=0)
    main = {pred for pred in preds if depth.get(pred, 0) == deepest}
    shortcut: set[int] = set()
    queue = [pred for pred in preds if pred not in main]
    while queue:
        node = queue.pop()
        if node in depth and node not in start and node not in shortcut:
            shortcut.add(node)
            queue += tree.trace.nodes[node].preds
    return [kid for kid in leaves if tree.node_of(kid) not in shortcut]


def _depths(tree: CallTree, start: set[int], end: int) -> dict[int, int]:
    """For every node between a block's input and its end: most convolutions on a path to it."""
    depth = dict.fromkeys(start, 0)
    for node in range(min(start, default=0), end + 1):
        info = tree.trace.nodes[node]
        before = [depth[pred] for pred in info.preds if pred in depth]
        if before and node not in start:
            depth[node] = max(before) + (info.op == "convolution")
    return depth


def _last_addition(tree: CallTree, block: Call) -> int | None:
    """The addition that a block ends with, looking back through its activation."""
    node = tree.node_of(block)
    while node is not None:
        info = tree.trace.nodes[node]
        if info.op.startswith("add") and len(info.preds) == 2:
            return node
        node = info.preds[0] if len(info.preds) == 1 else None
    return None


def _before_add(tree: CallTree, block: Call, main: Sequence[Call]) -> Call | None:
    add = _last_addition(tree, block)
    if add is None:
        return None
    convolutions = [kid.end for kid in main if _is_convolution(tree, kid)]
    prefix = block.fqn + "."
    inside = [kid for kid in tree.trace.calls if kid.fqn.startswith(prefix)]
    kept = {kid.index for kid in main}
    side = {tree.node_of(kid) for kid in _leaves(tree, block) if kid.index not in kept}
    ends = [
        kid
        for kid in inside
        if tree.node_of(kid) in tree.trace.nodes[add].preds
        and tree.is_single(kid)
        and tree.node_of(kid) not in side
        and kid.end >= max(convolutions, default=0)
    ]
    weighted = [kid for kid in ends if any(True for _ in tree.modules[kid.fqn].parameters())]
    return weighted[-1] if weighted else ends[-1] if ends else None


def _is_convolution(tree: CallTree, call: Call) -> bool:
    """Whether a layer convolves a feature map; a gate's convolution of pooled channels does not."""
    weight = getattr(tree.modules[call.fqn], "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 3:
        return False
    return any(math.prod(out.shape[2:]) > 1 for out in call.outputs)


def _is_norm(tree: CallTree, call: Call) -> bool:
    """Whether a layer keeps per-channel numbers: what an activation or a dropout does not."""
    module = tree.modules[call.fqn]
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return bool(tensors) and all(t.dim() <= 1 for t in tensors)


def _leaves(tree: CallTree, call: Call) -> Iterator[Call]:
    for kid in tree.children.get(call.index, ()):
        weight = getattr(tree.modules[kid.fqn], "weight", None)
        if weight is not None or not tree.children.get(kid.index):
            yield kid
        else:
            yield from _leaves(tree, kid)


def _host(tree: CallTree, call: Call) -> tuple[str, str | None]:
    """Descend from a container to the child that returns its output; else find an owner inside it."""
    module = tree.modules[call.fqn]
    while iterates_children(module):
        node = tree.node_of(call)
        kids = tree.children.get(call.index, ())
        inner = [k for k in kids if tree.node_of(k) == node and tree.is_single(k)]
        if not inner or tree.main_output(inner[-1]) is None:
            return call.fqn, _owner(tree, call)
        call = inner[-1]
        module = tree.modules[call.fqn]
    return call.fqn, None


def _owner(tree: CallTree, call: Call) -> str:
    for kid in reversed(tree.children.get(call.index, [])):
        fqn = kid.fqn
        if not iterates_children(tree.modules[fqn]):
            return fqn.removeprefix(call.fqn).lstrip(".")
        return ".".join((fqn.removeprefix(call.fqn).lstrip("."), _owner(tree, kid)))
    raise SelectorError(f"{call.fqn} is an empty container and cannot take a block")


def _check_calls(tree: CallTree, host: str, where: str) -> None:
    times = tree.counts.get(host, 0)
    if times == 1:
        return
    parent = host.rpartition(".")[0]
    raise SelectorError(
        f"{where}: {host} is called {times} times a forward, so a block there would run {times} times; "
        f"choose 'at: output' of {parent or 'its parent'}, or a module that runs once"
    )


def _check_live(tree: CallTree, call: Call, path: OutputPath, where: str) -> None:
    if not is_dead(tree, call, path):
        return
    alternative = _nearest_live(tree, call)
    raise SelectorError(
        f"{where}: no output of the model depends on the feature map of {call.fqn}, so a block there "
        f"would never learn (a dead place); the nearest live one is {alternative or 'not known'}. "
        f"'allow_dead: true' overrides"
    )


def _nearest_live(tree: CallTree, call: Call) -> str | None:
    for other in reversed(tree.trace.calls[: call.index]):
        if not tree.is_block(other):
            continue
        if not is_dead(tree, other):
            return other.fqn
    return None


def _check_occupied(tree: CallTree, points: Sequence[InsertionPoint]) -> None:
    taken: dict[tuple[str, OutputPath], InsertionPoint] = {}
    for point in points:
        key = (point.site.host, point.site.path)
        if key in taken and not point.entry.stack:
            raise SelectorError(
                f"{point.where} names the place that {taken[key].where.rpartition(': ')[2]} has "
                f"already ({point.block}, at {point.at}); 'stack: true' puts one block on another"
            )
        taken[key] = point
        if _has_block_at(tree.modules[point.site.host], point) and not point.entry.stack:
            raise SelectorError(
                f"{point.where}: {point.site.host} holds an inserted block already; 'stack: true' puts "
                f"another on it, nlsurgery.remove(model) takes them out"
            )


def _has_block_at(host: nn.Module, point: InsertionPoint) -> bool:
    """Whether an earlier operation put a block on this feature map of the host."""
    if find_hook(host) is None:
        return False
    holder = host if point.site.owner is None else host.get_submodule(point.site.owner)
    places = getattr(holder._modules.get(CHILD_NAME), "places", None)
    return places is None or any(path == point.site.path for _, path in places)


#: Where torch keeps its integer modules, and what stands there that computes in floats all the same.
_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
_FLOAT_ADAPTERS = ("FloatFunctional", "FXFloatFunctional")


def check_float(model: nn.Module) -> None:
    """Refuse hosts of quantised models.

    Raises:
        ModelError: The model computes in integers.
    """
    for name, module in model.named_modules():
        kind = type(module)
        is_int = kind.__module__.startswith(_QUANTISED) and kind.__name__ not in _FLOAT_ADAPTERS
        if is_int:
            raise ModelError(
                f"{type(model).__name__} is quantised ({name} is {type(module).__name__}): operate on "
                f"the float model, then quantise it"
            )
