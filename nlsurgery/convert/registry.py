"""The known layouts, and which of them a checkpoint is in."""

from __future__ import annotations

from collections.abc import Iterable

from nlsurgery.convert import alexhex7, caffe2, ccnet, danet, mmcv, sagan, slowfast, timm_layers
from nlsurgery.convert.layout import Layout
from nlsurgery.convert.ours import find_ours
from nlsurgery.errors import CheckpointError, close_names

#: Our own layout's name.
OURS = "nlsurgery"
LAYOUTS: tuple[Layout, ...] = (
    alexhex7.LAYOUT,
    mmcv.LAYOUT,
    mmcv.MMACTION,
    slowfast.LAYOUT,
    caffe2.LAYOUT,
    timm_layers.LAYOUT,
    sagan.LAYOUT,
    danet.LAYOUT,
    ccnet.LAYOUT,
)
_BY_NAME = {name: layout for layout in LAYOUTS for name in (layout.name, *layout.aliases)}


def layout_named(name: str) -> Layout:
    """Look up a layout by its name or an alias of it.

    Raises:
        CheckpointError: There is none.
    """
    if name not in _BY_NAME:
        hint = close_names(name, [*_BY_NAME, OURS])
        known = ", ".join(layout.name for layout in LAYOUTS)
        raise CheckpointError(f"no layout {name!r}{hint}; there are: {OURS}, {known}")
    return _BY_NAME[name]


def detect(keys: Iterable[str]) -> str:
    """Name the layout of a checkpoint from its keys.

    Args:
        keys: All keys of its state_dict.

    Raises:
        CheckpointError: No layout's blocks are among them, or those of several.
    """
    names = frozenset(keys)
    fitting = [layout for layout in LAYOUTS if layout.tells(names) and layout.blocks(names)]
    if len(fitting) == 1:
        return fitting[0].name
    if fitting:
        found = " and ".join(layout.name for layout in fitting)
        example = fitting[0].blocks(names)[0].prefix or "(no prefix)"
        raise CheckpointError(
            f"the blocks in the checkpoint (such as {example}) can be of {found}, which share their "
            f"names: say which one with --from {fitting[0].name}"
        )
    if find_ours(names):
        return OURS
    known = ", ".join(layout.name for layout in LAYOUTS)
    shown = ", ".join(sorted(names)[:3]) or "nothing"
    raise CheckpointError(
        f"no block of a known layout is in the checkpoint (it has {shown}, ...); known are {known}"
    )
