"""The columns of the coverage table: what is tried on one model, each answer "yes" or the reason."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import nlsurgery
from benchmarks.coverage_models import Entry
from benchmarks.coverage_weights import LARGE, model_inputs, operate, with_weights
from nlsurgery.probe import flatten_output

#: Columns that need weights and real forwards, and of these those of tools.
RUN_COLUMNS = ("identity", "keys", "backward", "deepcopy")
TOOL_COLUMNS = ("compile", "export", "fx", "features_only")

Tool = Callable[[nn.Module, tuple[Tensor, ...]], object]


def check_weights(entry: Entry, row: dict[str, Any], tools: bool) -> Iterator[tuple[str, Any]]:
    """Operate on real weights: same bits out, same keys, gradients to each block, copies of their own.

    Yields:
        A column and its answer, as soon as there is one; ``run_size`` and the input size if it is not
        the model's own.

    Args:
        entry: The model.
        row: What :func:`check_graph` found.
        tools: Also compile, export and trace the operated model; n/a where the original passes no more.
    """
    model, row = with_weights(entry, row)
    if "run_size" in row:
        yield "run_size", row["run_size"]
    part, inputs = model_inputs(model, row)
    with torch.no_grad():
        before = _tensors(part(*inputs))
    state = _digests(model)
    operate(model, row)
    yield "identity", _answer(lambda: _same(before, part, inputs))
    yield "keys", _answer(lambda: _keys_kept(state, model))
    yield "backward", _answer(lambda: nlsurgery.verify(model, gradient=True))
    yield "deepcopy", _answer(lambda: _copy_is_its_own(model, row, before))
    if not tools:
        return
    yield (
        "compile",
        _unless_original_fails(
            _answer(lambda: _compiled(part, inputs, before)), entry, row, "compile"
        ),
    )
    for name in TOOLS:
        answer = _answer(lambda name=name: _with_tool(model, row, name))
        yield name, _unless_original_fails(answer, entry, row, name)
    if entry.library == "timm":
        yield "features_only", _answer(lambda: _features_only(entry, row))
    else:
        yield "features_only", _extracted_or_not(entry, row)


def _unless_original_fails(answer: str, entry: Entry, row: dict[str, Any], name: str) -> str:
    if answer == "yes":
        return answer
    plain = _answer(lambda: _with_tool(with_weights(entry, row)[0], row, name))
    return answer if plain == "yes" else f"n/a (original: {plain})"


def _tensors(output: object) -> list[Tensor]:
    return [tensor for _, tensor in flatten_output(output)]


def _answer(check: Callable[[], object]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"no: {type(error).__name__}: {lines[0][:110]}"
    return "yes"


def _same(before: list[Tensor], part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        after = _tensors(part(*inputs))
    if len(before) != len(after):
        raise AssertionError(f"{len(before)} outputs became {len(after)}")
    for one, two in zip(before, after, strict=True):
        if not torch.equal(one.nan_to_num(), two.nan_to_num()):
            raise AssertionError(f"differs by {(one - two).abs().max().item():.2e}")


def _digests(model: nn.Module) -> dict[str, bytes]:
    """A digest of every tensor's bytes: a second copy of a large model would not fit beside it."""
    known: dict[tuple[int, ...], bytes] = {}
    digests = {}
    for key, value in model.state_dict().items():
        place = (value.data_ptr(), *value.shape)
        if place not in known:
            known[place] = hashlib.blake2b(_bytes(value), digest_size=16).digest()
        digests[key] = known[place]
    return digests


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def _keys_kept(state: dict[str, bytes], model: nn.Module) -> None:
    after = _digests(model)
    lost = [key for key, digest in state.items() if after.get(key) != digest]
    new = set(after) - set(state)
    if lost or new != set(nlsurgery.report(model).new_keys):
        raise AssertionError(f"{len(lost)} keys lost or changed, such as {lost[:1]}")


def _copy_is_its_own(model: nn.Module, row: dict[str, Any], before: list[Tensor]) -> None:
    twin = copy.deepcopy(model)
    part, inputs = model_inputs(model, row)
    twin_part, _ = model_inputs(twin, row)
    own = list(nlsurgery.inserted_blocks(twin).values())
    with torch.no_grad():
        for block in own:
            for parameter in block.parameters():
                parameter.add_(0.1)
    _same(before, part, inputs)
    # Calls rather than outputs: in a network whose values grow to 1e19, a block's are rounded away.
    called: list[nn.Module] = []
    hooks = [
        block.register_forward_hook(lambda module, args, output: called.append(module))
        for block in (*own, *nlsurgery.inserted_blocks(model).values())
    ]
    with torch.no_grad():
        twin_part(*inputs)
    for hook in hooks:
        hook.remove()
    if {id(module) for module in called} != {id(block) for block in own}:
        raise AssertionError("the copy does not run its own blocks")


def _with_tool(model: nn.Module, row: dict[str, Any], name: str) -> None:
    part, inputs = model_inputs(model, row)
    if name == "compile":
        with torch.no_grad():
            _compiled(part, inputs, _tensors(part(*inputs)))
    else:
        TOOLS[name](part, inputs)


def _compiled(part: nn.Module, inputs: tuple[Tensor, ...], expected: list[Tensor]) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(part, backend="eager", fullgraph=True)
        for one, two in zip(expected, _tensors(compiled(*inputs)), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


#: What is tried on the operated model beside ``torch.compile``, by column.
TOOLS: dict[str, Tool] = {
    "export": lambda part, inputs: torch.export.export(part, inputs),
    "fx": lambda part, _: torch.fx.symbolic_trace(part),
}


def _features_only(entry: Entry, row: dict[str, Any]) -> None:
    model, row = with_weights(entry, row, features_only=True)
    size = row.get("run_size", row["input_size"])
    torch.manual_seed(0)
    x = torch.randn(1 if row["params"] > LARGE else 2, *size)
    with torch.no_grad():
        before = _tensors(model(x))
    operate(model, {**row, "run_size": size})
    _same(before, model, (x,))


def _extracted_or_not(entry: Entry, row: dict[str, Any]) -> str:
    """torchvision's form of it: the stages by ``create_feature_extractor``, before and after the surgery."""
    model, row = with_weights(entry, row)
    before: dict[str, Tensor] = {}
    plain = _answer(lambda: before.update(_extracted(model, row)))
    if plain != "yes":
        return f"n/a (original: {plain})"
    operate(model, row)
    return _answer(lambda: _same_features(before, _extracted(model, row)))


def _extracted(model: nn.Module, row: dict[str, Any]) -> dict[str, Tensor]:
    from torchvision.models.feature_extraction import create_feature_extractor

    part, inputs = model_inputs(model, row)
    prefix = next(name for name, module in model.named_modules() if module is part)
    names = [fqn.removeprefix(prefix + ".") for _, fqn, *_ in row["stages"]]
    with torch.no_grad():
        features: dict[str, Tensor] = create_feature_extractor(part, names).eval()(*inputs)
    return features


def _same_features(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    if list(before) != list(after):
        raise AssertionError(f"features {list(before)} became {list(after)}")
    for name, feature in before.items():
        if not all(map(torch.equal, _tensors(feature), _tensors(after[name]))):
            raise AssertionError(f"the feature of {name} differs")
