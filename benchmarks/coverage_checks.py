"""The columns of the coverage table: what is tried on one model, each answer "yes" or the reason."""

from __future__ import annotations

import copy
import hashlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import nlsurgery
from benchmarks.coverage_models import Entry, build, build_lean
from nlsurgery.resolve import resolve
from nlsurgery.stages import Anatomy

#: Columns that need the graph alone, and columns that need weights and real forwards.
GRAPH_COLUMNS = ("plan", "recipes", "hints")
RUN_COLUMNS = ("identity", "keys", "backward", "deepcopy")
TOOL_COLUMNS = ("compile", "export", "fx", "features_only")

Tool = Callable[[nn.Module, tuple[Tensor, ...]], object]

#: Models of more parameters share one tensor among all parameters of one kind, name and shape, and run
#: on one input in place of two, of half their size where they can be built for it: neither their memory
#: nor their time would fit. Videos get one input too.
LARGE = 40_000_000

BLOCK = {"type": "non_local", "reduction": 2, "sub_sample": False, "norm": "bn"}


def chosen_recipe(anatomy: Anatomy) -> tuple[str, dict[str, Any]]:
    """The five-block recipe where res3 and res4 are long enough, else its form by depth.

    Returns:
        ``"five"`` or ``"depth"``, and the recipe.
    """
    named = {alias: stage for stage in anatomy.stages for alias in stage.aliases}
    deep = all(place in named for place in ("res3", "res4"))
    if deep and len(named["res3"].blocks) > 3 and len(named["res4"].blocks) > 5:
        return "five", _recipe(("res3", [1, 3]), ("res4", [1, 3, 5]))
    counts = [len(stage.blocks) for stage in anatomy.stages]
    names = [stage.name for stage in anatomy.stages]
    if len(counts) > 2:
        return "depth", _recipe((names[-3], {"depth": 0.5}), (names[-2], {"depth": 1.0}))
    longest = max(range(len(counts)), key=counts.__getitem__)
    fractions = (0.2, 0.35, 0.5, 0.65, 0.8)
    numbers = sorted({max(0, int(counts[longest] * fraction) - 1) for fraction in fractions})
    return "depth", _recipe((names[longest], numbers))


def _recipe(*places: tuple[str, Any]) -> dict[str, Any]:
    inserts = [{"stage": stage, "after": after, "block": BLOCK} for stage, after in places]
    return {"version": 1, "inserts": inserts}


def check_graph(entry: Entry) -> dict[str, Any]:
    """inspect, plan with its rehearsal, which packaged recipes fit, and what the library says itself."""
    row: dict[str, Any] = {}
    clock = time.process_time()
    model = build(entry)
    row["build_s"] = round(time.process_time() - clock, 3)
    row["params"] = sum(p.numel() for p in model.parameters())
    clock = time.process_time()
    anatomy = nlsurgery.inspect(model)
    row["inspect_s"] = round(time.process_time() - clock, 3)
    row["input_size"] = list(anatomy.input_size)
    row["layout"] = "/".join(dict.fromkeys(stage.layout for stage in anatomy.stages))
    row["stages"] = [
        [s.name, s.fqn, s.num_chs, s.reduction, s.layout, len(s.blocks)] for s in anatomy.stages
    ]
    row["form"], recipe = chosen_recipe(anatomy)
    clock = time.process_time()
    plan = nlsurgery.plan(model, recipe)
    row["plan_s"] = round(time.process_time() - clock, 3)
    row["plan"] = "yes"
    row["blocks"] = len(plan.insertions)
    row["recipes"] = _fitting(anatomy)
    row["hints"] = _compare_with_hints(model, anatomy)
    return row


def _fitting(anatomy: Anatomy) -> list[str]:
    fits = []
    for name in nlsurgery.list_recipes():
        recipe = nlsurgery.load_recipe(name)
        if recipe.output_stride is not None:
            continue
        try:
            resolve(anatomy, recipe)
        except nlsurgery.RecipeError:
            continue
        fits.append(name)
    return fits


def _compare_with_hints(model: nn.Module, anatomy: Anatomy) -> str:
    """Compare stages with timm's feature_info by (channels, reduction); stems and heads aside."""
    info = getattr(model, "feature_info", None)
    entries = getattr(info, "info", info)
    if not isinstance(entries, list | tuple) or not anatomy.stages:
        return "none"
    found = {(stage.num_chs, stage.reduction) for stage in anatomy.stages}
    lowest = min(reduction for _, reduction in found)
    missing = [
        f"{e.get('module')} ({e.get('num_chs')} chs, /{e.get('reduction')})"
        for e in entries
        if isinstance(e, dict)
        and e.get("reduction", 0) >= lowest
        and (e.get("num_chs"), e.get("reduction")) not in found
    ]
    return "yes" if not missing else "differs: " + ", ".join(dict.fromkeys(missing))


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
    model, row = _with_weights(entry, row)
    if "run_size" in row:
        yield "run_size", row["run_size"]
    part, inputs = _inputs(model, row)
    with torch.no_grad():
        before = _tensors(part(*inputs))
    state = _digests(model)
    _operate(model, row)
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


def _operate(model: nn.Module, row: dict[str, Any]) -> None:
    size = row.get("run_size")
    anatomy = row.get("anatomy") or nlsurgery.inspect(model, input_size=size)
    nlsurgery.apply(model, chosen_recipe(anatomy)[1], input_size=size)


def _unless_original_fails(answer: str, entry: Entry, row: dict[str, Any], name: str) -> str:
    if answer == "yes":
        return answer
    plain = _answer(lambda: _with_tool(_with_weights(entry, row)[0], row, name))
    return answer if plain == "yes" else f"n/a (original: {plain})"


def _with_weights(
    entry: Entry, row: dict[str, Any], **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """A model with storage, and its row; with input size and anatomy if the size is not its own."""
    if row["params"] <= LARGE:
        return randomised(build(entry, meta=False, **options)), row
    for size in [row["run_size"]] if "run_size" in row else _smaller_sizes(row["input_size"]):
        # What is built for one size is built for the smaller one; a convolutional network takes both.
        for more in ({"img_size": tuple(size[-2:])}, {}):
            try:
                model = randomised(build_lean(entry, **options, **more))
                anatomy = nlsurgery.inspect(model, input_size=size)
                part, inputs = _inputs(model, row | {"run_size": size})
                with torch.no_grad():
                    part(*inputs)  # on the meta device no index is out of bounds
            except Exception:
                continue
            return model, row | {"run_size": size, "anatomy": anatomy}
    return randomised(build_lean(entry, **options)), row | {"run_size": row["input_size"]}


def _smaller_sizes(size: list[int]) -> Iterator[list[int]]:
    """Half of an input size, in steps that patches of 14, 16 or 32 pixels divide."""
    halves = {
        tuple(max(step, side // 2 // step * step) for side in size[-2:]) for step in (14, 16, 32)
    }
    for half in sorted(halves, reverse=True):
        yield [*size[:-2], *half]


def randomised(model: nn.Module) -> nn.Module:
    """Replace zeros that would hide a block: a zero head makes every model equal to every other."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(0, 0.02, generator=generator)
    return model


def _inputs(model: nn.Module, row: dict[str, Any]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    from nlsurgery.probe import first_input

    torch.manual_seed(0)
    part, args, _ = first_input(model, row.get("run_size", row["input_size"]), None)
    return part.run, tuple(t[:1] if t.dim() == 5 or row["params"] > LARGE else t for t in args)


def _tensors(output: object) -> list[Tensor]:
    from nlsurgery.probe import flatten_output

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
    part, inputs = _inputs(model, row)
    twin_part, _ = _inputs(twin, row)
    with torch.no_grad():
        for block in nlsurgery.inserted_blocks(twin).values():
            for parameter in block.parameters():
                parameter.add_(0.1)
        _same(before, part, inputs)
        changed = _tensors(twin_part(*inputs))
    if all(torch.equal(one, two) for one, two in zip(before, changed, strict=True)):
        raise AssertionError("the copy does not run its own blocks")


def _with_tool(model: nn.Module, row: dict[str, Any], name: str) -> None:
    part, inputs = _inputs(model, row)
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
    model, row = _with_weights(entry, row, features_only=True)
    size = row.get("run_size", row["input_size"])
    torch.manual_seed(0)
    x = torch.randn(1 if row["params"] > LARGE else 2, *size)
    with torch.no_grad():
        before = _tensors(model(x))
    _operate(model, {**row, "run_size": size})
    _same(before, model, (x,))


def _extracted_or_not(entry: Entry, row: dict[str, Any]) -> str:
    """torchvision's form of it: the stages by ``create_feature_extractor``, before and after the surgery."""
    model, row = _with_weights(entry, row)
    before: dict[str, Tensor] = {}
    plain = _answer(lambda: before.update(_extracted(model, row)))
    if plain != "yes":
        return f"n/a (original: {plain})"
    _operate(model, row)
    return _answer(lambda: _same_features(before, _extracted(model, row)))


def _extracted(model: nn.Module, row: dict[str, Any]) -> dict[str, Tensor]:
    from torchvision.models.feature_extraction import create_feature_extractor

    part, inputs = _inputs(model, row)
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
