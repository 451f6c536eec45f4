"""The call tree of a trace: which modules lie on the trunk, and which are its blocks.

The *trunk* is the chain of modules whose output every path to the model's output passes through. A
*block* is the smallest module on it that encloses something parallel, such as a skip connection.
"""

from __future__ import annotations

import inspect
from functools import cached_property

from torch import nn

from nlsurgery.catalog import registered
from nlsurgery.flow import Flow
from nlsurgery.probe import Call, Probe, TensorOutput
from nlsurgery.shapes import Feature, Hints, read_feature
from nlsurgery.walk import OutputPath

_ITERATION = (".children()", ".named_children()", "._modules", "self.values()", "self.items()")


def iterates_children(module: nn.Module) -> bool:
    """Whether a module's forward runs whatever children it has, so that it can be given no other."""
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return True
    try:
        source = inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return False
    return any(mark in source for mark in _ITERATION)


class CallTree:
    """The modules of one model as its forward called them.

    Args:
        model: The live model (its modules are looked at, never run).
        probe: Its probe.
    """

    def __init__(self, model: nn.Module, probe: Probe) -> None:
        self.model = model
        self.probe = probe
        self.trace = probe.trace
        self.flow = Flow(probe.trace)
        self.counts = probe.trace.num_calls()
        self.children: dict[int | None, list[Call]] = {}
        for call in self.trace.calls:
            self.children.setdefault(call.parent, []).append(call)
        self._features: dict[tuple[int, int], Feature | None] = {}
        self._branches: dict[int, tuple[TensorOutput, ...]] = {}
        self._hints = _hints(model)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module by fqn."""
        return dict(self.model.named_modules())

    @cached_property
    def by_fqn(self) -> dict[str, Call]:
        """The first call of each module."""
        first: dict[str, Call] = {}
        for call in self.trace.calls:
            first.setdefault(call.fqn, call)
        return first

    @cached_property
    def _second(self) -> dict[str, Call]:
        first: dict[str, Call] = {}
        for call in self.probe.second.calls if self.probe.second else ():
            first.setdefault(call.fqn, call)
        return first

    def is_single(self, call: Call) -> bool:
        """Whether the module runs once a forward."""
        return self.counts[call.fqn] == 1

    def branches(self, call: Call) -> tuple[TensorOutput, ...]:
        """The tensors of a call's output that carry features: one, or one for each parallel branch.

        Of several feature maps, those that every path to the output passes through stand for all;
        a tensor that nothing reads (a side output) is none.
        """
        if call.index not in self._branches:
            self._branches[call.index] = self._find_branches(call)
        return self._branches[call.index]

    def _find_branches(self, call: Call) -> tuple[TensorOutput, ...]:
        shaped = [out for out in call.outputs if self.read(call, out) is not None]
        if len(shaped) < 2:
            return tuple(shaped)
        cuts = [out for out in shaped if self.flow.is_cut(out.node)]
        if cuts:
            return tuple(cuts[:1])
        live = [out for out in shaped if self.flow.is_live(out.node)]
        unique = {out.node: out for out in live or shaped}
        return tuple(unique.values())

    def main_output(self, call: Call) -> TensorOutput | None:
        """The one tensor of a call's output that carries the features, None when there is no one."""
        if len(call.outputs) == 1:
            return call.outputs[0]
        branches = self.branches(call)
        return branches[0] if len(branches) == 1 else None

    def is_trunk(self, call: Call) -> bool:
        """Whether all that reaches the output passes through this call's output."""
        if not self.is_single(call) or not call.outputs:
            return False
        if any(self.flow.is_cut(out.node) for out in call.outputs):
            return True
        return 1 < len(call.outputs) <= 16 and self._joint_cut[call.index]

    @cached_property
    def _joint_cut(self) -> dict[int, bool]:
        return {
            call.index: self.flow.is_joint_cut(out.node for out in call.outputs)
            for call in self.trace.calls
            if 1 < len(call.outputs) <= 16
        }

    def feature(self, call: Call, branch: int = 0) -> Feature | None:
        """Layout and size of the call's output (of one of its branches), None when it is no feature map."""
        key = (call.index, branch)
        if key not in self._features:
            found = self.branches(call)
            self._features[key] = self.read(call, found[branch]) if branch < len(found) else None
        return self._features[key]

    def read(self, call: Call, output: TensorOutput) -> Feature | None:
        """Layout and size of one tensor of a call's output."""
        second = self._second.get(call.fqn)
        shape2 = None
        if second is not None:
            shape2 = next((o.shape for o in second.outputs if o.path == output.path), None)
        inputs2 = self.probe.second.input_shape if self.probe.second and shape2 else None
        return read_feature(
            output.shape, self.trace.input_shape, shape2, inputs2, call.sizes, self._hints
        )

    @cached_property
    def block_kinds(self) -> frozenset[type[nn.Module]]:
        """Classes of the smallest trunk modules that enclose parallel paths."""
        trunk = [self.is_trunk(call) for call in self.trace.calls]
        kinds: set[type[nn.Module]] = set()
        done: set[int] = set()
        for index, node in enumerate(self.trace.nodes):
            if node.call in done or self.flow.is_cut(index) or not self.flow.is_between(index):
                continue
            current = node.call
            if current is None:
                continue
            done.add(current)
            while current is not None and not (trunk[current] and self._is_map(current)):
                current = self.trace.calls[current].parent
            if current is not None and self._has_weights(self.trace.calls[current]):
                kinds.add(self._whole(self.trace.calls[current]).kind)
        containers = {nn.Sequential, nn.ModuleList, nn.ModuleDict}
        return frozenset(kinds - containers)

    def _whole(self, call: Call) -> Call:
        """The block around a special container that is a part of it (OSA's list of layers)."""
        if call.parent is None or not issubclass(call.kind, nn.Sequential):
            return call
        parent = self.trace.calls[call.parent]
        sisters = [kid for kid in self.children[call.parent] if kid.kind is call.kind]
        part = len(sisters) == 1 and not iterates_children(self.modules[parent.fqn])
        return parent if part and self.is_trunk(parent) and self._is_map(parent.index) else call

    def _is_map(self, index: int) -> bool:
        return self.feature(self.trace.calls[index]) is not None

    def _has_weights(self, call: Call) -> bool:
        """Whether a module computes with more than per-channel numbers, which a bare norm does not."""
        return any(p.dim() > 1 for p in self.modules[call.fqn].parameters())

    @cached_property
    def _blocks(self) -> list[bool]:
        """Which calls are blocks: the innermost on the trunk, and off it the outermost of their class.

        A side input that runs along a row of residual modules (GCViT's global query) or a later skip
        from a stage (multi-scale heads) takes modules off the trunk whose sisters are on it.
        """
        candidates = [self._may_be_block(call) for call in self.trace.calls]
        on_trunk = [
            ok and self.is_trunk(call)
            for ok, call in zip(candidates, self.trace.calls, strict=True)
        ]
        holds = [False] * len(candidates)
        for call in reversed(self.trace.calls):
            if call.parent is not None:
                holds[call.parent] |= on_trunk[call.index] or holds[call.index]
        holders = {call.kind for call in self.trace.calls if holds[call.index]}
        found: list[bool] = []
        covered: list[bool] = []
        for call in self.trace.calls:
            above = call.parent is not None and covered[call.parent]
            block = candidates[call.index] and not holds[call.index]
            if not on_trunk[call.index]:
                block = block and call.kind not in holders
            if block and not on_trunk[call.index]:
                block = not above and any(self.flow.is_live(o.node) for o in self.branches(call))
            found.append(block)
            covered.append(above or block)
        return found

    def _may_be_block(self, call: Call) -> bool:
        if call.kind not in self.block_kinds or not self.is_single(call):
            return False
        return self.feature(call) is not None and self._has_weights(call)

    @cached_property
    def _has_block(self) -> list[bool]:
        found = [False] * len(self.trace.calls)
        for call in reversed(self.trace.calls):
            if self.is_block(call) or any(
                found[k.index] for k in self.children.get(call.index, ())
            ):
                found[call.index] = True
        return found

    def is_block(self, call: Call) -> bool:
        """Whether the call is a block: a feature map, of a block class, on the trunk or in a branch."""
        return self._blocks[call.index]

    def has_block(self, call: Call) -> bool:
        """Whether the call is a block or holds one."""
        return self._has_block[call.index]

    def blocky_children(self, index: int | None) -> list[Call]:
        """The child calls that are or hold blocks, in order."""
        return [call for call in self.children.get(index, ()) if self._has_block[call.index]]

    def ancestors(self, call: Call) -> list[Call]:
        """The calls around a call, innermost first."""
        around = []
        while call.parent is not None:
            call = self.trace.calls[call.parent]
            around.append(call)
        return around

    def node_of(self, call: Call) -> int | None:
        """The graph node of the call's main output."""
        output = self.main_output(call)
        return None if output is None else output.node


def is_dead(tree: CallTree, call: Call, path: OutputPath | None = None) -> bool:
    """Whether nothing of a call's feature map reaches an output of the model.

    Args:
        tree: The call tree.
        call: The call.
        path: Which tensor of its output; its (first) feature map when None.
    """
    outputs = tree.branches(call) if path is None else call.outputs
    output = next((o for o in outputs if path is None or o.path == path), None)
    if output is None:
        return True
    if not tree.flow.is_live(output.node):
        return True
    feature = tree.read(call, output)
    prefix = feature.layout.num_prefix_tokens if feature else 0
    return bool(prefix) and tree.flow.only_prefix_read(output.node, prefix)


def _hints(model: nn.Module) -> Hints:
    channels: set[int] = set()
    for name in ("num_features", "embed_dim", "embed_dims", "hidden_dim", "dims"):
        value = getattr(model, name, None)
        if isinstance(value, int):
            channels.add(value)
        elif isinstance(value, tuple | list):
            channels.update(item for item in value if isinstance(item, int))
    for entry in feature_info(model):
        if isinstance(declared := entry.get("num_chs"), int):
            channels.add(declared)
    prefix = getattr(model, "num_prefix_tokens", None)
    known = registered(model)
    sequence = known is not None and known.token_order == "sequence"
    return Hints(frozenset(channels), prefix if isinstance(prefix, int) else None, sequence)


def feature_info(model: nn.Module) -> list[dict[str, object]]:
    """What a timm model says of its stages: a list of dicts, empty for other models."""
    info = getattr(model, "feature_info", None)
    entries = getattr(info, "info", info)
    if not isinstance(entries, list | tuple):
        return []
    return [entry for entry in entries if isinstance(entry, dict)]
