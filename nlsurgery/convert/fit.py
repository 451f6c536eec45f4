"""A converted checkpoint into an operated model: every value has a place, or is named as left."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from nlsurgery.checkpoint import load_tensors
from nlsurgery.convert.ours import UNTOLD
from nlsurgery.convert.pairwise import scale_logits, with_biases
from nlsurgery.convert.result import BlockSpec, Conversion, Left
from nlsurgery.errors import CheckpointError
from nlsurgery.reporting import inserted_blocks

#: Options that decide what a block computes and that its tensors do not tell.
_OPTIONS = tuple(name for options in UNTOLD.values() for name in options)


def options_of(block: nn.Module) -> dict[str, Any]:
    """The options of one of our blocks that its tensors do not tell."""
    return {name: getattr(block, name) for name in _OPTIONS if hasattr(block, name)}


def model_options(model: nn.Module) -> dict[str, dict[str, Any]]:
    """:func:`options_of` every inserted block, by path."""
    return {fqn: options_of(block) for fqn, block in inserted_blocks(model).items()}


def load_converted(model: nn.Module, conversion: Conversion, origin: str) -> Conversion:
    """Load a conversion into an operated model, or nothing at all.

    Exact folds are made where the model's blocks differ in form alone (a scale, biases of zero, the
    time axis of 1×k×k kernels); anything else that differs is an error.

    Args:
        model: Operated with a recipe that has a block wherever the conversion has one.
        conversion: To nlsurgery.
        origin: How errors name the checkpoint.

    Returns:
        The conversion as it was loaded; base keys that the model lacks are among its ``left``.

    Raises:
        CheckpointError: The blocks, their options, the keys or the shapes do not fit.
    """
    blocks = inserted_blocks(model)
    _check_places(conversion, set(blocks), origin)
    tensors = dict(conversion.tensors)
    notes = list(conversion.notes)
    for spec in conversion.blocks:
        _fit_block(tensors, spec, blocks[spec.place], origin)
    own = model.state_dict()
    inside = tuple(f"{spec.place}." for spec in conversion.blocks)
    left = list(conversion.left)
    for key in list(tensors):
        if key not in own and not key.startswith(inside):
            del tensors[key]
            old = conversion.origin.get(key)
            left.append(Left(old or key, f"{type(model).__name__} has no {key}"))
    if _fit_time(tensors, own):
        notes.append(
            "1×k×k kernels were fitted between 2-D and 3-D: the same function on single frames; a "
            "2-D block attends within each frame"
        )
    _check_head(own, tensors, origin)
    load_tensors(model, tensors, origin)
    names = {key: conversion.origin.get(key) for key in tensors}
    return replace(conversion, tensors=tensors, origin=names, left=tuple(left), notes=tuple(notes))


def _check_head(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], origin: str) -> None:
    """Say what to do where all that lacks is the classifier, as in a detector's checkpoint."""
    missing = [key for key in own if key not in tensors]
    heads = {key.rpartition(".")[0] for key in missing}
    if len(heads) == 1 and all(own[key].dim() <= 2 for key in missing):
        raise CheckpointError(
            f"{origin} has no classifier ({', '.join(missing)}): build the model without one, which "
            f"timm does with num_classes=0 (--num-classes 0)"
        )


def _check_places(conversion: Conversion, there: set[str], origin: str) -> None:
    here = {spec.place: spec for spec in conversion.blocks}
    for place, spec in here.items():
        if place not in there:
            known = ", ".join(sorted(there)[:6])
            raise CheckpointError(
                f"{origin}: its block {spec.name} belongs at {place}, where the recipe puts none (it "
                f"has {known}); leave --recipe out to place blocks as the checkpoint has them, or "
                f"say with --place {spec.name}=MODULE after which module it stands"
            )
    if missing := sorted(there - set(here)):
        raise CheckpointError(
            f"{origin} has no block for {', '.join(missing[:6])}, which the recipe inserts; use a "
            f"recipe with the checkpoint's blocks alone, or leave --recipe out"
        )


def _fit_block(tensors: dict[str, Tensor], spec: BlockSpec, block: nn.Module, origin: str) -> None:
    mine = options_of(block)
    for name in ("mode", "sub_sample", "pool_order", "recurrence", "temporal_window"):
        told = spec.options.get(name)
        is_told = told is not None or name == "temporal_window"
        if is_told and name in mine and mine[name] != told:
            raise CheckpointError(
                f"{origin}: block {spec.name} has {name}={told!r}, the recipe's block at "
                f"{spec.place} {mine[name]!r}, and no weights make the two equal; write "
                f"{name}: {json.dumps(told)} in the recipe, or leave --recipe out"
            )
    if spec.type != "non_local":
        return
    local = _local(tensors, spec.place)
    scaled = bool(spec.options.get("use_scale", False))
    if bool(mine["use_scale"]) != scaled:
        if "theta.weight" not in local:
            raise CheckpointError(
                f"{origin}: block {spec.name} is gaussian with use_scale={scaled}; write "
                f"use_scale: {str(scaled).lower()} in the recipe"
            )
        root = math.sqrt(local["theta.weight"].shape[0])
        local = scale_logits(local, 1 / root if scaled else root)
    if block.state_dict().keys() & {"g.bias"}:
        local = with_biases(local)
    tensors.update({f"{spec.place}.{name}": value for name, value in local.items()})


def _local(tensors: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    start = f"{place}."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def _fit_time(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Add or drop a time axis of size 1; whether any kernel needed it."""
    fitted = False
    for key, value in tensors.items():
        wanted = own[key].shape if key in own else value.shape
        if value.dim() == 5 and len(wanted) == 4 and value.shape[2] == 1:
            tensors[key], fitted = value.squeeze(2), True
        elif value.dim() == 4 and len(wanted) == 5 and wanted[2] == 1:
            tensors[key], fitted = value.unsqueeze(2), True
    return fitted
