"""One forward of a meta copy: which tensor every module returned, and what depends on what.

The live model is never run. Its deep copy holds meta tensors (no storage, no arithmetic), so a probe
costs Python time only and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nlsurgery.catalog import registered
from nlsurgery.constants import Constants, storage_key
from nlsurgery.errors import ModelError, VerifyError
from nlsurgery.walk import CHILD_NAME, HOOK_MARK, OutputPath, backbone_modules


@dataclass(frozen=True, slots=True)
class TensorOutput:
    """One tensor in what a module returned.

    Attributes:
        path: Keys and indices leading to it; ``()`` when the module returned the tensor itself.
        node: Its node in the data-flow graph.
        shape: Its shape.
    """

    path: OutputPath
    node: int
    shape: tuple[int, ...]


@dataclass(slots=True)
class Call:
    """One call of one module."""

    index: int
    fqn: str
    kind: type[nn.Module]
    parent: int | None
    inputs: tuple[int, ...] = ()
    outputs: tuple[TensorOutput, ...] = ()
    sizes: tuple[int, ...] | None = None
    """Plain integers returned beside the tensor, such as MViT's (T, H, W)."""
    end: int = 0
    """Number of graph nodes when it returned: places in the order of computation."""


@dataclass(slots=True)
class Node:
    """One tensor operation: its inputs, the module call it ran in, and its result's shape."""

    preds: tuple[int, ...]
    call: int | None
    op: str
    shape: tuple[int, ...]
    picked: tuple[int, int, int] | None = None
    """For ``select`` and ``slice``: (dim, start, end)."""


@dataclass(slots=True)
class Trace:
    """What one forward did."""

    input_shape: tuple[int, ...]
    calls: list[Call] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    outputs: tuple[TensorOutput, ...] = ()

    def num_calls(self) -> dict[str, int]:
        """How many times each module was called."""
        counts: dict[str, int] = {}
        for call in self.calls:
            counts[call.fqn] = counts.get(call.fqn, 0) + 1
        return counts


@dataclass(frozen=True, slots=True)
class Probe:
    """The trace at the model's input size, and one at another size where the model takes it.

    Attributes:
        trace: The forward at ``trace.input_shape``.
        second: The forward at another size of the same input, or None.
        prefix: The fqn of the sub-module that was run in place of the model, ``""`` for the model.
    """

    trace: Trace
    second: Trace | None
    prefix: str = ""


def flatten_output(value: object, path: OutputPath = ()) -> Iterator[tuple[OutputPath, Tensor]]:
    """Yield every tensor in a module's output with the keys that lead to it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten_output(item, (*path, key))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for index, item in enumerate(value):
            yield from flatten_output(item, (*path, index))


#: Operations whose (first) result has the shape of their first argument.
_KEEPING = frozenset(
    name + suffix
    for name in (
        "relu",
        "silu",
        "gelu",
        "hardswish",
        "hardtanh",
        "sigmoid",
        "add",
        "mul",
        "sub",
        "div",
    )
    for suffix in ("", "_")
) | {"native_batch_norm", "native_layer_norm", "native_group_norm"}


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every tensor operation as a node; keeps all tensors alive so that ids stay unique."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace
        self.node_of: dict[int, int] = {}
        self.written: dict[int, int] = {}
        self.alive: list[Any] = []
        self.constants = Constants()
        self.stack: list[int] = []

    def add(self, tensor: Tensor, node: Node) -> int:
        self.trace.nodes.append(node)
        index = len(self.trace.nodes) - 1
        self.node_of[id(tensor)] = index
        self.alive.append(tensor)
        return index

    def lookup(self, tensor: Tensor) -> int | None:
        """The node a tensor's value comes from: its own, or a later in-place write to its storage."""
        own = self.node_of.get(id(tensor))
        if not self.written:
            return own
        write = self.written.get(storage_key(tensor))
        if write is None or (own is not None and own >= write):
            return own
        return write

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense" and (value := self.constants.value(args[0])) is not None:
            return value.item()
        quick = _quick_result(name, args)
        out = func(*args, **kwargs) if quick is None else quick
        reads: list[Tensor] = []
        _collect(args, reads)
        _collect(kwargs.values(), reads)
        preds = {node for t in reads if (node := self.lookup(t)) is not None}
        made: list[Tensor] = []
        _collect((out,), made)
        if not preds:
            self.constants.note(func, args, kwargs, made)
            return out
        call = self.stack[-1] if self.stack else None
        before = tuple(sorted(preds))
        read_ids = {id(t) for t in reads}
        mutates = func._schema.is_mutable
        for tensor in made:
            picked = _picked(name, args) if name in ("select", "slice") else None
            if id(tensor) in read_ids and not mutates:
                continue
            index = self.add(tensor, Node(before, call, name, tuple(tensor.shape), picked))
            if mutates:
                self.written[storage_key(tensor)] = index
        return out


def _quick_result(name: str, args: tuple[Any, ...]) -> Any:
    """What an operation that keeps shapes returns on the meta device, None for the other operations.

    torch decomposes these in Python there: a BatchNorm takes a millisecond for no result at all.
    """
    if name not in _KEEPING or not args or not isinstance(args[0], Tensor):
        return None
    first = args[0]
    if first.device.type != "meta" or not first.is_floating_point():
        return None
    others = [value for value in args[1:2] if isinstance(value, Tensor)]
    norm = name.startswith("native_")
    if not norm and any(t.shape != first.shape or t.dtype != first.dtype for t in others):
        return None
    if name.endswith("_"):
        return first
    same = torch.empty_like(first)
    return (same, *(first.new_empty(0) for _ in range(2))) if norm else same


def _picked(name: str, args: tuple[Any, ...]) -> tuple[int, int, int] | None:
    tensor, rest = args[0], args[1:]
    dim = (rest[0] if rest else 0) % max(tensor.dim(), 1)
    size = tensor.shape[dim]
    if name == "select":
        start = rest[1] % size if size else 0
        return dim, start, start + 1
    start = rest[1] if len(rest) > 1 and rest[1] is not None else 0
    end = rest[2] if len(rest) > 2 and rest[2] is not None else size
    start, end = (value + size if value < 0 else min(value, size) for value in (start, end))
    return dim, start, end


def _collect(values: Iterable[Any], into: list[Tensor]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            into.append(value)
        elif isinstance(value, list | tuple):
            _collect(value, into)


def record(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], also: Iterable[str] = ()
) -> Trace:
    """Run ``model`` (a meta or fake copy) once and record its modules and tensor operations.

    Args:
        model: A copy that may be run; hooks are added for the run and removed after it.
        args: Positional inputs: tensors on the copy's device.
        kwargs: Keyword inputs.
        also: Paths of inserted blocks to record beside the model's own modules.
    """
    tensors = [t for _, t in flatten_output((args, dict(kwargs)))]
    trace = Trace(max((tuple(t.shape) for t in tensors), key=len, default=()))
    recorder = _Recorder(trace)
    handles = []
    for fqn, module in (
        *backbone_modules(model),
        *((fqn, model.get_submodule(fqn)) for fqn in also),
    ):
        if fqn:
            handles += _watch(module, fqn, recorder)
    for tensor in tensors:
        recorder.add(tensor, Node((), None, "input", tuple(tensor.shape)))
    image = max(range(len(tensors)), key=lambda index: tensors[index].dim(), default=None)
    trace.inputs = () if image is None else (image,)
    try:
        with torch.no_grad(), warnings.catch_warnings(), recorder:
            warnings.simplefilter("ignore")
            result = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    trace.outputs = _outputs(result, recorder)
    return trace


def _outputs(value: object, recorder: _Recorder) -> tuple[TensorOutput, ...]:
    found = []
    for path, tensor in flatten_output(value):
        node = recorder.lookup(tensor)
        if node is not None:
            found.append(TensorOutput(path, node, tuple(tensor.shape)))
    return tuple(found)


def _watch(module: nn.Module, fqn: str, recorder: _Recorder) -> list[Any]:
    trace = recorder.trace

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        parent = recorder.stack[-1] if recorder.stack else None
        call = Call(len(trace.calls), fqn, type(module), parent)
        nodes = (recorder.lookup(t) for _, t in flatten_output((args, kwargs)))
        call.inputs = tuple(node for node in nodes if node is not None)
        trace.calls.append(call)
        recorder.stack.append(call.index)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = trace.calls[recorder.stack.pop()]
        call.outputs = _outputs(output, recorder)
        call.sizes = _plain_sizes(output)
        call.end = len(trace.nodes)

    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave),
    ]


def _plain_sizes(output: object) -> tuple[int, ...] | None:
    if not isinstance(output, tuple | list):
        return None
    for item in output:
        if (
            isinstance(item, tuple | list | torch.Size)
            and item
            and all(isinstance(size, int) for size in item)
        ):
            return tuple(item)
    return None


def meta_copy(model: nn.Module, *, keep_inserted: bool = False) -> nn.Module:
    """Deep-copy a model in eval mode with every tensor on the meta device.

    User hooks that are closures are left out of the copy, so that a probe has no side effects.

    Args:
        model: The live model; only copied.
        keep_inserted: Whether the copy runs the inserted blocks.

    Raises:
        ModelError: The model cannot be deep-copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _own_tensors(module):
            if id(tensor) not in memo:
                memo[id(tensor)] = _to_meta(tensor)
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be deep-copied, so it cannot be probed: {error}"
        ) from error
    for module in twin.modules():
        module.training = False
        if isinstance(module, nn.RNNBase):
            module.forward = types.MethodType(_recurrent_shape, module)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [k for k, hook in hooks.items() if _left_out(hook, keep_inserted)]:
                del hooks[key]
    return twin


def _recurrent_shape(self: nn.RNNBase, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """What a recurrent layer returns on the meta device, without its thousands of steps."""
    width = (self.proj_size or self.hidden_size) * (2 if self.bidirectional else 1)
    return x.sum(-1, keepdim=True).expand(*x.shape[:-1], width), state


def _left_out(hook: object, keep_inserted: bool) -> bool:
    """Tell the hooks a copy goes without: closures of the user's, and those that run inserted blocks."""
    if getattr(hook, HOOK_MARK, False):
        return not keep_inserted
    return isinstance(hook, types.FunctionType) and hook.__closure__ is not None


def _to_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from (p for p in module._parameters.values() if p is not None)
    yield from (b for b in module._buffers.values() if b is not None)
    plain = {
        k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")
    }
    for value in plain.values():
        if isinstance(value, Tensor | list | tuple | dict):
            yield from (t for _, t in flatten_output(value))


def probe(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    example_input: object | None = None,
) -> Probe:
    """Trace a meta copy of ``model`` once, and once more at another size where layouts need it.

    Args:
        model: The live model; only copied.
        input_size: (H, W), (C, H, W) or (C, T, H, W) in pixels and frames, without the batch; read
            off the model when None.
        example_input: A tensor, tuple or dict to call the model with, batch included.

    Raises:
        ModelError: The model cannot be run on such an input.
    """
    twin = meta_copy(model)
    part, prefix, args, kwargs, trace = _first_that_runs(twin, model, input_size, example_input)
    image_alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
    second = _second(part, trace) if image_alone else None
    if second is not None and _same_inside(trace, second):
        second = None  # the model resizes its input: the second size tells nothing
    for found in (trace, second):
        if found is not None:
            _rename(found, prefix)
    return Probe(trace, second, prefix)


_Attempt = tuple[nn.Module, str, tuple[Any, ...], dict[str, Any]]


def _first_that_runs(
    twin: nn.Module,
    model: nn.Module,
    input_size: Sequence[int] | None,
    example_input: object | None,
    also: Sequence[str] = (),
) -> tuple[nn.Module, str, tuple[Any, ...], dict[str, Any], Trace]:
    """Try the likely inputs in order. Returns what ran, its prefix, its input and the trace."""
    errors: list[str] = []
    for part, prefix, args, kwargs in _inputs(twin, model, input_size, example_input):
        start = f"{prefix}." if prefix else ""
        inside = [fqn.removeprefix(start) for fqn in also if fqn.startswith(start)]
        try:
            return part, prefix, args, kwargs, record(part, args, kwargs, inside)
        except VerifyError:
            raise
        except Exception as error:
            shape = next((tuple(t.shape) for _, t in flatten_output((args, kwargs))), ())
            errors.append(f"{prefix or 'model'} on {shape}: {_brief(error)}")
    given = "example_input" if example_input is not None else "the input sizes tried"
    raise ModelError(
        f"{type(model).__name__} does not run on {given} ({'; '.join(errors[:3])}); "
        f"give input_size=(C, H, W) or example_input= as it is called with"
    )


@dataclass(frozen=True, slots=True)
class Part:
    """What of a model is run for an input: the model, or its backbone.

    Attributes:
        model: The whole model.
        run: The module that is called.
    """

    model: nn.Module
    run: nn.Module


def first_input(
    model: nn.Module, input_size: Sequence[int] | None, example_input: object | None
) -> tuple[Part, tuple[Any, ...], dict[str, Any]]:
    """Make real random inputs of the first size that a model runs on, on the model's device.

    Args:
        model: A real model; a meta copy of it is run.
        input_size: As in :func:`probe`.
        example_input: As in :func:`probe`; returned as it is.

    Raises:
        ModelError: The model does not run on such an input.
    """
    if example_input is not None:
        return Part(model, model), *_as_call(example_input, lambda t: t)
    twin = meta_copy(model, keep_inserted=True)
    _, prefix, args, kwargs, _ = _first_that_runs(twin, twin, input_size, None)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    real = tuple(torch.randn(t.shape, dtype=t.dtype, device=device) for t in args)
    return Part(model, model.get_submodule(prefix)), real, kwargs


def _inputs(
    twin: nn.Module, model: nn.Module, input_size: Sequence[int] | None, example: object | None
) -> Iterator[_Attempt]:
    if example is not None:
        yield twin, "", *_as_call(example, _like)
        return
    entry = registered(model)
    if entry is not None and entry.backbone is not None:
        prefixes = [entry.backbone]
    else:
        inner = isinstance(getattr(model, "backbone", None), nn.Module)
        prefixes = ["", "backbone"] if inner else [""]
    for size in candidate_sizes(model, input_size):
        for prefix in prefixes:
            part = twin.get_submodule(prefix)
            image = torch.empty((2, *size), device="meta", dtype=_dtype(model))
            yield part, prefix, (image,) * _num_images(part), {}


def _num_images(model: nn.Module) -> int:
    """How many images a forward takes: its positional parameters without a default, one or two."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    needed = [
        p
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return 2 if len(needed) == 2 else 1


def _dtype(model: nn.Module) -> torch.dtype:
    """The floating dtype that a model computes in: that of its first such parameter."""
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floats, torch.float32)


@dataclass(frozen=True, slots=True)
class Watched:
    """What a run of an operated meta copy showed.

    Attributes:
        calls: How many times each watched block ran.
        trace: The recorded forward.
    """

    calls: dict[str, int]
    trace: Trace


def run_meta(
    twin: nn.Module,
    input_size: Sequence[int] | None,
    example_input: object | None,
    watch: Sequence[str],
) -> Watched:
    """Run an operated meta copy and watch its inserted blocks.

    Args:
        twin: A meta copy that holds the blocks.
        input_size: As in :func:`probe`.
        example_input: As in :func:`probe`.
        watch: Paths of the blocks.

    Raises:
        ModelError: It does not run on such an input.
    """
    _, prefix, _, _, trace = _first_that_runs(twin, twin, input_size, example_input, watch)
    _rename(trace, prefix)
    counts = trace.num_calls()
    return Watched({fqn: counts.get(fqn, 0) for fqn in watch}, trace)


def _rename(trace: Trace, prefix: str) -> None:
    if prefix:
        for call in trace.calls:
            call.fqn = f"{prefix}.{call.fqn}"


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _as_call(
    example: object, convert_tensor: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            return convert_tensor(value)
        if isinstance(value, Mapping):
            return {k: convert(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(convert(v) for v in value)
        return value

    if isinstance(example, Mapping):
        return (), convert(example)
    if isinstance(example, tuple):
        return convert(example), {}
    return (convert(example),), {}


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def _same_inside(first: Trace, second: Trace) -> bool:
    """Whether no module's output follows the input size."""
    pairs = zip(first.calls, second.calls, strict=False)
    shapes = (
        [out.shape for out in one.outputs] == [out.shape for out in two.outputs]
        for one, two in pairs
        if one.fqn == two.fqn
    )
    return all(shapes)


def _second(twin: nn.Module, first: Trace) -> Trace | None:
    """Trace at twice the height and three times the width, when the model can be brought to it."""
    shape = first.input_shape
    if len(shape) < 4:
        return None
    size = (*shape[:-2], 2 * shape[-2], 3 * shape[-1])
    with contextlib.suppress(Exception):
        return record(twin, (torch.empty(size, device="meta", dtype=_dtype(twin)),), {})
    resize = getattr(twin, "set_input_size", None)
    if resize is None:
        return None
    with contextlib.suppress(Exception), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resize(img_size=size[-2:])
        return record(twin, (torch.empty(size, device="meta", dtype=_dtype(twin)),), {})
    return None


def candidate_sizes(model: nn.Module, input_size: Sequence[int] | None) -> list[tuple[int, ...]]:
    """List the input sizes to try, the likeliest first: (C, H, W), or (C, T, H, W) for video."""
    channels, video = _first_projection(model)
    if input_size is not None:
        size = _checked_size(input_size)
        return [(channels, *size)] if len(size) == 2 else [size]
    entry = registered(model)
    made_for = [tuple(entry.input_size)] if entry is not None and entry.input_size else []
    return [*made_for, *_likely_sizes(model, channels, video)]


#: More pixels (or frames) a side than any input has: shapes beyond overflow before they are refused.
_MAX_SIDE = 1_000_000


def _checked_size(input_size: object) -> tuple[int, ...]:
    try:
        size = tuple(operator.index(value) for value in input_size)  # type: ignore[attr-defined]
    except TypeError:
        size = ()
    if len(size) not in (2, 3, 4) or min(size) < 1 or max(size) > _MAX_SIDE:
        raise ModelError(
            f"input_size must be (H, W), (C, H, W) or (C, T, H, W) in positive whole numbers up to "
            f"{_MAX_SIDE:,}, but got {input_size!r}"
        )
    return size


def _likely_sizes(model: nn.Module, channels: int, video: bool) -> list[tuple[int, ...]]:
    if video:
        frames = getattr(model, "temporal_size", None)
        spatial = getattr(model, "spatial_size", None)
        known = [(channels, int(frames), *map(int, spatial))] if frames and spatial else []
        sides_3d = (224, 112, 256) if _has_layer_norm(model) else (112, 224, 256)
        return [*known, *((channels, 16, side, side) for side in sides_3d)]
    sides = [*_declared_sides(model), (224, 224), (256, 256), (299, 299), (384, 384), (512, 512)]
    sides += [(96, 96), (64, 64), (32, 32)]
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    declared = config.get("input_size", (3,))[0] if isinstance(config, dict) else 3
    channel_options = dict.fromkeys((channels, declared, 3))
    unique = dict.fromkeys((c, *side) for side in dict.fromkeys(sides) for c in channel_options)
    return list(unique)


def _has_layer_norm(model: nn.Module) -> bool:
    """Whether a video network is a transformer: those are made for 224 pixels, 3-D ResNets for 112."""
    return any(isinstance(module, nn.LayerNorm) for module in model.modules())


def _declared_sides(model: nn.Module) -> Iterator[tuple[int, int]]:
    embed = getattr(model, "patch_embed", None)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    declared = (
        getattr(embed, "img_size", None),
        getattr(model, "image_size", None),
        getattr(model, "img_size", None),
        config.get("input_size") if isinstance(config, dict) else None,
    )
    for value in declared:
        if isinstance(value, int):
            yield value, value
        elif isinstance(value, tuple | list) and len(value) >= 2:
            yield int(value[-2]), int(value[-1])


def _first_projection(model: nn.Module) -> tuple[int, bool]:
    """Input channels and "is video" of the first convolution in module order; (3, False) if none."""
    for fqn, module in model.named_modules():
        if CHILD_NAME in fqn.split("."):
            continue
        if isinstance(module, nn.Conv3d):
            return module.in_channels, True
        if isinstance(module, nn.Conv2d):
            return module.in_channels, False
    return 3, False
