"""Whole state_dicts from one layout to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nlsurgery.convert.inward import to_ours
from nlsurgery.convert.layout import Choices, State
from nlsurgery.convert.outward import from_ours
from nlsurgery.convert.registry import OURS, detect, layout_named
from nlsurgery.convert.request import Options, Request
from nlsurgery.convert.result import Conversion, Left
from nlsurgery.errors import CheckpointError


def convert_state(
    state: State,
    source: str = "auto",
    target: str = OURS,
    *,
    choices: Choices | None = None,
    places: Mapping[str, str] | None = None,
    options: Options | None = None,
) -> Conversion:
    """Convert a state_dict, blocks and backbone; nothing of the input is changed.

    Args:
        state: Tensors by key.
        source: A layout's name, ``nlsurgery``, or ``auto`` to tell by the keys.
        target: A layout's name or ``nlsurgery``.
        choices: What the keys do not tell.
        places: Block prefix in the source -> where it goes: to nlsurgery the module it stands
            after, otherwise the block's prefix in the result.
        options: What our blocks are built with, by path (``layer3.1.nlsurgery.0``), where that is
            known: from nlsurgery what they were built with, to nlsurgery what they will be.

    Raises:
        CheckpointError: The layout is unknown or not clear, the tensors do not fit it, or the target
            cannot hold a block.
    """
    asked = Choices() if choices is None else choices
    name = detect(state) if source == "auto" else source
    name = name if name == OURS else layout_named(name).name
    goal = target if target == OURS else layout_named(target).name
    if name == goal:
        raise CheckpointError(f"the checkpoint is in the layout {name} already")
    if name != OURS and goal != OURS:
        middle = convert_state(state, name, OURS, choices=asked, places=places, options=options)
        built = {spec.place: spec.options for spec in middle.blocks}
        return _joined(middle, convert_state(middle.tensors, OURS, goal, options=built))
    foreign = layout_named(name if goal == OURS else goal)
    request = Request(state, foreign, asked, places or {}, options or {})
    return to_ours(request) if goal == OURS else from_ours(request)


def _joined(first: Conversion, second: Conversion) -> Conversion:
    """Two conversions in a row as one."""
    origin = {
        new: None if middle is None else first.origin[middle]
        for new, middle in second.origin.items()
    }
    names = {spec.place: spec.name for spec in first.blocks}
    blocks = tuple(replace(spec, name=names.get(spec.name, spec.name)) for spec in second.blocks)
    later = [Left(first.origin[row.key] or row.key, row.reason) for row in second.left]
    left = [row for row in later if row.key not in first.added]
    return Conversion(
        first.source,
        second.target,
        second.tensors,
        origin,
        (*first.left, *left),
        blocks,
        (*first.notes, *second.notes),
    )
