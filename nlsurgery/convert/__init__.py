"""Checkpoints of other projects to nlsurgery's names and back: pure functions on state_dicts.

    conversion = convert_state(torch.load("nonlocal.pth"), "mmcv")

One file per foreign layout; :data:`LAYOUTS` lists them.
"""

from __future__ import annotations

from nlsurgery.convert.core import convert_state
from nlsurgery.convert.layout import BlockKind, Choices, Layout
from nlsurgery.convert.registry import LAYOUTS, OURS, detect, layout_named
from nlsurgery.convert.result import BlockSpec, Conversion, Left, recipe_of

__all__ = [
    "LAYOUTS",
    "OURS",
    "BlockKind",
    "BlockSpec",
    "Choices",
    "Conversion",
    "Layout",
    "Left",
    "convert_state",
    "detect",
    "layout_named",
    "recipe_of",
]
