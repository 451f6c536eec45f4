"""Clips whose frames attend within windows: the video article's code did so at res3, by four frames."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nlsurgery.errors import BlockError


def num_windows(x: Tensor, frames: int) -> int:
    """How many windows of so many frames a clip (B, C, T, H, W) has.

    Raises:
        BlockError: The last one would be shorter.
    """
    if x.shape[2] % frames:
        raise BlockError(
            f"temporal_window={frames} must divide the frames that reach the block, which are "
            f"{x.shape[2]}; choose another window, or clips of another length"
        )
    return x.shape[2] // frames


@torch.fx.wrap
def to_windows(x: Tensor, frames: int) -> Tensor:
    """(B, C, T, H, W) to (B · windows, C, frames, H, W), a view of a channels-last clip.

    Raises:
        BlockError: ``frames`` does not divide T.
    """
    windows = torch.unflatten(x, 2, (num_windows(x, frames), frames))
    return windows.movedim(2, 1).flatten(0, 1)


@torch.fx.wrap
def from_windows(windows: Tensor, x: Tensor) -> Tensor:
    """(B · windows, C', frames, H, W) to (B, C', T, H, W), a view of channels-last windows.

    Args:
        windows: Of the clips ``x``.
        x: (B, C, T, H, W), for its sizes.
    """
    clips = torch.unflatten(windows, 0, (x.shape[0], x.shape[2] // windows.shape[2]))
    return clips.movedim(1, 2).flatten(2, 3)


def windowed_map(
    x: Tensor, frames: int, queries: Tensor | None, attention: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The map of a whole clip: 0 between windows.

    Args:
        x: (B, C, T, H, W).
        frames: Of a window.
        queries: (Q,) positions of the clip, all N by default.
        attention: (a window, positions in it) -> (B, positions, keys of the window).

    Returns:
        (B, Q, M), M the keys of all windows.

    Raises:
        BlockError: ``frames`` does not divide T.
    """
    count, size = num_windows(x, frames), frames * x.shape[3] * x.shape[4]
    if queries is None:
        queries = torch.arange(count * size, device=x.device)
    parts = []
    for index, window in enumerate(torch.split(x, frames, dim=2)):
        inside = (queries // size == index).nonzero().squeeze(1)
        rows = attention(window, queries[inside] - index * size)
        part = rows.new_zeros(rows.shape[0], queries.shape[0], rows.shape[2])
        parts.append(part.index_copy(1, inside, rows))
    return torch.cat(parts, 2)
