"""The call tree of a trace: which modules lie on the trunk, and which are its blocks.

The *trunk* is the chain of modules whose output every path to the model's output passes through. A
*block* is the smallest module on it that encloses something parallel, such as a skip connection.
"""

from __future__ import annotations

import inspect
from functools import cached_property

from torch import nn

from nlsurgery.flow import Flow
from nlsurgery.probe import Call, Probe, TensorOutput
from nlsurgery.shapes import Feature, Hints, read_feature

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
        self._features: dict[int, Feature | None] = {}
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

    def main_output(self, call: Call) -> TensorOutput | None:
        """The one tensor of a call's output that carries the features, None when there is no one."""
        if len(call.outputs) == 1:
            return call.outputs[0]
        cuts = [out for out in call.outputs if self.flow.is_cut(out.node)]
        if cuts:
            return cuts[0]
        shaped = [out for out in call.outputs if self.read(call, out) is not None]
        return shaped[0] if len(shaped) == 1 else None

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

    def feature(self, call: Call) -> Feature | None:
        """Layout and size of the call's main output, None when it is no feature map."""
        if call.index not in self._features:
            output = self.main_output(call)
            self._features[call.index] = None if output is None else self.read(call, output)
        return self._features[call.index]

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
            while current is not None and not trunk[current]:
                current = self.trace.calls[current].parent
            if current is not None:
                kinds.add(self.trace.calls[current].kind)
        containers = {nn.Sequential, nn.ModuleList, nn.ModuleDict}
        return frozenset(kinds - containers)

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
        """Whether the call is a block: on the trunk, of a block class, and a feature map."""
        if call.kind not in self.block_kinds or not self.is_trunk(call):
            return False
        return self.feature(call) is not None

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
    return Hints(frozenset(channels), prefix if isinstance(prefix, int) else None)


def feature_info(model: nn.Module) -> list[dict[str, object]]:
    """What a timm model says of its stages: a list of dicts, empty for other models."""
    info = getattr(model, "feature_info", None)
    entries = getattr(info, "info", info)
    if not isinstance(entries, list | tuple):
        return []
    return [entry for entry in entries if isinstance(entry, dict)]
