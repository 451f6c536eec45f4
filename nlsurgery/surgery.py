"""The operations: inspect, plan, apply, verify, disable, remove."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nlsurgery.dilation import Redilation, dilate, plan_dilation, undo_dilation
from nlsurgery.errors import ModelError, SelectorError, VerifyError, close_names
from nlsurgery.liveness import blocks_without_gradient, dead_blocks
from nlsurgery.planning import Plan, build_block, make_plan, make_record
from nlsurgery.probe import meta_copy, probe, run_meta
from nlsurgery.recipe import Recipe, RecipeLike, load_recipe
from nlsurgery.reporting import inserted_blocks, require_operated
from nlsurgery.resolve import check_float
from nlsurgery.splice import (
    Inserted,
    Placed,
    hosts,
    lost_places,
    placed,
    splice,
    withdraw_all,
)
from nlsurgery.stages import Anatomy, find_stages
from nlsurgery.tree import CallTree
from nlsurgery.walk import check_open, check_operable


def inspect(
    model: nn.Module,
    *,
    input_size: Sequence[int] | None = None,
    example_input: object | None = None,
) -> Anatomy:
    """Find the stages of a model, their blocks, and every name they go by.

    Args:
        model: Any backbone, or a model that holds one; only looked at.
        input_size: (H, W), (C, H, W) or (C, T, H, W) without the batch; read off the model when None.
        example_input: What the model is called with, batch included: a tensor, a tuple of positional
            or a dict of keyword arguments; overrides ``input_size``.

    Raises:
        ModelError: The model is wrapped, compiled or scripted, or does not run on such an input.
    """
    return _anatomy(check_open(model), input_size, example_input)


def _anatomy(
    model: nn.Module, input_size: Sequence[int] | None, example_input: object | None
) -> Anatomy:
    return find_stages(CallTree(model, probe(model, input_size, example_input)))


def plan(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    input_size: Sequence[int] | None = None,
    example_input: object | None = None,
    allow_imports: Sequence[str] = (),
) -> Plan:
    """Say exactly what :func:`apply` would do, and what it would cost. Changes nothing.

    Args:
        model: As in :func:`inspect`.
        recipe: A path, the name of a packaged recipe, or a mapping.
        input_size: As in :func:`inspect`; of the whole model, so a recipe with ``within`` needs none.
        example_input: As in :func:`inspect`, likewise.
        allow_imports: Packages whose modules a recipe may import as block types (``type: "pkg.Block"``);
            an import runs their code.

    Raises:
        RecipeError: The recipe cannot be read, is not valid, or names a place that cannot be.
        ModelError: As in :func:`inspect`.
    """
    loaded = load_recipe(recipe, allow_imports=allow_imports)
    part, size, example = _operand(model, loaded, input_size, example_input)
    return _plan(part, loaded, size, example)[0]


def _operand(
    model: nn.Module,
    recipe: Recipe,
    input_size: Sequence[int] | None,
    example_input: object | None,
) -> tuple[nn.Module, Sequence[int] | None, object | None]:
    """What is operated on, and with what input: the model, or the part that ``within`` names."""
    check_open(model)
    if recipe.within is None:
        return model, input_size, example_input
    paths = [fqn for fqn, _ in model.named_modules() if fqn]
    if recipe.within not in paths:
        raise SelectorError(
            f"{recipe.origin}: within {recipe.within!r} is no module of {type(model).__name__}"
            f"{close_names(recipe.within, paths)}"
        )
    return check_operable(model.get_submodule(recipe.within)), recipe.input_size, None


def _plan(
    model: nn.Module,
    recipe: Recipe,
    input_size: Sequence[int] | None,
    example_input: object | None,
) -> tuple[Plan, tuple[Redilation, ...]]:
    """Plan a recipe. Returns the plan and what its output stride changes first."""
    check_float(model)
    changes: tuple[Redilation, ...] = ()
    target = model
    if recipe.output_stride is not None:
        trace = probe(model, input_size, example_input).trace
        changes = plan_dilation(model, trace, recipe.output_stride)
        target = meta_copy(model, keep_inserted=True)
        dilate(target, changes, recipe.output_stride)
    anatomy = _anatomy(target, input_size, example_input)
    if recipe.output_stride is not None:
        _check_stride(anatomy, recipe)
    made = make_plan(target, anatomy, recipe)
    _rehearse(target, made, example_input)
    return made, changes


def _check_stride(anatomy: Anatomy, recipe: Recipe) -> None:
    coarsest = max((stage.reduction for stage in anatomy.stages), default=0)
    if coarsest != recipe.output_stride:
        raise ModelError(
            f"{recipe.origin}: output_stride {recipe.output_stride} would leave {anatomy.model} with a "
            f"map at 1/{coarsest}; only networks that down-sample by convolution can be brought to it"
        )


def apply(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    input_size: Sequence[int] | None = None,
    example_input: object | None = None,
    allow_imports: Sequence[str] = (),
) -> nn.Module:
    """Insert a recipe's blocks into a model, in place; on any error the model is as it was.

    The blocks are the identity at init, every original key keeps its name and value, and each block
    takes the device, dtype and train/eval mode of its host. The global random state is not advanced.

    Args:
        model: As in :func:`inspect`; changed in place.
        recipe: A path, the name of a packaged recipe, or a mapping.
        input_size: As in :func:`inspect`.
        example_input: As in :func:`inspect`.
        allow_imports: As in :func:`plan`.

    Returns:
        The same model.

    Raises:
        RecipeError: As in :func:`plan`.
        ModelError: As in :func:`inspect`.
    """
    loaded = load_recipe(recipe, allow_imports=allow_imports)
    part, size, example = _operand(model, loaded, input_size, example_input)
    made, changes = _plan(part, loaded, size, example)
    order = 1 + max(
        (record.order for _, _, inserted in hosts(model) for record in inserted.records), default=-1
    )
    work = []
    # Parameters made in inference mode could never be trained.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.device("cpu"):
        for point in made.points:
            host = part.get_submodule(point.site.host)
            like = _representative(part, point.site.host)
            block = build_block(point).to(device=like.device, dtype=like.dtype)
            block.train(host.training)
            work.append((point.site, block, make_record(point, made, order)))
    splice(part, work)
    if made.source.output_stride is not None:
        dilate(part, changes, made.source.output_stride)
    return model


def remove(model: nn.Module) -> nn.Module:
    """Take every inserted block out, and every dilation back: the original model is there, exactly.

    Args:
        model: An operated model; changed in place. An original model stays as it is.

    Returns:
        The same model.
    """
    check_open(model)
    withdraw_all(model)
    undo_dilation(model)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run a model without its inserted blocks inside a ``with`` block.

    An ``output_stride`` that the recipe set stays: it changes the layers, not what is inserted.

    Args:
        model: An operated model.
    """
    check_operable(model)
    found: list[tuple[Inserted, bool]] = [(ins, ins.active) for _, _, ins in hosts(model)]
    for inserted, _ in found:
        inserted.active = False
    try:
        yield model
    finally:
        for inserted, was in found:
            inserted.active = was


def verify(
    model: nn.Module,
    *,
    input_size: Sequence[int] | None = None,
    example_input: object | None = None,
    gradient: bool = False,
) -> None:
    """Prove that every inserted block runs exactly once a forward and matters to the output.

    A meta copy of the model is run, with its hooks: the live model is not touched.

    Args:
        model: An operated model.
        input_size: As in :func:`inspect`; by default the size it was operated at.
        example_input: As in :func:`inspect`.
        gradient: Also run one real backward pass on a deep copy (twice the model's memory and its
            activations) and see that a gradient reaches every block.

    Raises:
        ModelError: Nothing is inserted, or the model does not run on such an input.
        VerifyError: A block does not run, runs more than once, or no output depends on it.
    """
    lost = lost_places(check_operable(model))
    if lost:
        raise VerifyError(
            f"{type(model).__name__}: the blocks at {', '.join(lost)} are gone: the modules that held "
            f"them were replaced (fused or reparametrised). Fuse first and operate after, or insert "
            f"at 'output' of the residual block"
        )
    require_operated(model)
    problems = []
    for within, blocks in _by_part(model).items():
        prefix = "" if within is None else f"{within}."
        part = model if within is None else _part(model, within)
        size, example = (None, None) if prefix else (input_size, example_input)
        if size is None and example is None:
            size = blocks[-1].record.input_size
        paths = tuple(row.fqn.removeprefix(prefix) for row in blocks)
        problems += [prefix + text for text in _problems(part, paths, size, example, gradient)]
    if problems:
        raise VerifyError(f"{type(model).__name__}: " + "; ".join(problems))


def _part(model: nn.Module, within: str) -> nn.Module:
    try:
        return model.get_submodule(within)
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__name__} has blocks that were put within {within!r} of a larger model, "
            f"which it has not: verify the larger model"
        ) from error


def _by_part(model: nn.Module) -> dict[str | None, list[Placed]]:
    """Every inserted block, by what its recipe was ``within``."""
    parts: dict[str | None, list[Placed]] = {}
    for row in placed(model):
        parts.setdefault(row.record.recipe.get("within"), []).append(row)
    return parts


def _problems(
    model: nn.Module,
    blocks: tuple[str, ...],
    input_size: Sequence[int] | None,
    example_input: object | None,
    gradient: bool,
) -> list[str]:
    """What :func:`verify` finds wrong with some of the blocks of a model."""
    twin = meta_copy(model, keep_inserted=True)
    traced = run_meta(twin, input_size, example_input, watch=blocks)
    problems = []
    dead = dead_blocks(twin, traced.trace)
    for fqn in blocks:
        times = traced.calls.get(fqn, 0)
        if times == 0:
            problems.append(f"{fqn} does not run: its host is no longer called, or lost its hook")
        elif times > 1:
            problems.append(f"{fqn} runs {times} times a forward")
        elif fqn in dead:
            problems.append(f"{fqn} runs, but no output of the model depends on it")
    if gradient and not problems:
        unreached = blocks_without_gradient(model, input_size, example_input)
        problems += [
            f"{fqn} runs, but no gradient reaches it" for fqn in unreached if fqn in blocks
        ]
    return problems


def _rehearse(model: nn.Module, made: Plan, example_input: object | None) -> None:
    """Operate on a meta copy first: each block must run once and leave shapes as they were."""
    twin = meta_copy(model)
    withdraw_all(twin)
    work = []
    prototypes: dict[str, nn.Module] = {}
    for point in made.points:
        key = repr((point.entry.block, point.feature.num_chs, point.site.layout.dims))
        if key not in prototypes:
            with torch.device("meta"):
                prototypes[key] = build_block(point)
        like = _representative(twin, point.site.host)
        block = copy.deepcopy(prototypes[key]).to(dtype=like.dtype)
        work.append((point.site, block, make_record(point, made, 0)))
    splice(twin, work)
    blocks = tuple(inserted_blocks(twin))
    twin.eval()
    try:
        traced = run_meta(twin, made.input_size, example_input, watch=blocks)
    except ModelError as error:
        raise ModelError(
            f"{made.model} does not run with the blocks of {made.source.origin} in place: {error}"
        ) from error
    for fqn in blocks:
        times = traced.calls.get(fqn, 0)
        if times != 1:
            host = fqn.rpartition(".nlsurgery.")[0]
            raise ModelError(
                f"{made.source.origin}: a block at {host} would run {times} times a forward, because "
                f"{made.model} calls the children of {host} itself; choose another place (see: "
                f"nlsurgery inspect)"
            )


def _representative(model: nn.Module, host: str) -> Tensor:
    """The parameter whose device and dtype a block at ``host`` takes: the nearest floating one."""
    path = host
    while True:
        module = model.get_submodule(path)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                return tensor
        if not path:
            return torch.empty(0)
        path = path.rpartition(".")[0]
