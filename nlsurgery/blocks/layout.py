"""Layouts of feature maps, and the way to and from the (B, C, *spatial) that blocks take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from nlsurgery.blocks.geometry import to_map
from nlsurgery.errors import BlockError

Kind = Literal["NCHW", "NHWC", "NLC", "NCTHW", "NTHWC", "NCL"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a host lays out its output.

    Attributes:
        kind: The order of the axes; N is the batch here, L a sequence of tokens.
        num_prefix_tokens: Tokens before the grid's (class, register); only in ``NLC``.
        grid: The probed token grid, (H, W) or (T, H, W), row-major. ``None`` for ``NLC`` means a
            plain sequence, taken as one spatial dimension.
    """

    kind: Kind
    num_prefix_tokens: int = 0
    grid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise BlockError(
                f"layout must be one of {', '.join(get_args(Kind))}, got {self.kind!r}"
            )
        if self.num_prefix_tokens < 0 or (self.num_prefix_tokens and self.kind != "NLC"):
            raise BlockError(
                f"num_prefix_tokens must be 0, or positive with NLC; got {self.num_prefix_tokens} "
                f"with {self.kind}"
            )
        if self.grid is not None and (len(self.grid) not in (1, 2, 3) or min(self.grid) < 1):
            raise BlockError(f"grid must be 1 to 3 positive sizes, got {self.grid}")

    @property
    def dims(self) -> int:
        """Spatial dimensions a block at this place has: 1, 2 or 3."""
        if self.kind == "NLC":
            return len(self.grid) if self.grid is not None else 1
        return {"NCL": 1, "NCHW": 2, "NHWC": 2, "NCTHW": 3, "NTHWC": 3}[self.kind]


def token_grid(num_tokens: int, grid: tuple[int, ...]) -> tuple[int, ...]:
    """Recover the token grid at another input size from the probed one.

    The probed grid itself where its product fits, else the grid of the same aspect ratio; for
    (T, H, W) first with T as probed, then with all three scaled alike.

    Args:
        num_tokens: N, prefix tokens not counted.
        grid: The probed grid.

    Raises:
        BlockError: N is not the product of any such grid.
    """
    if num_tokens == math.prod(grid):
        return grid
    if len(grid) == 1:
        return (num_tokens,)
    for fixed in (grid[:-2], ()) if len(grid) == 3 else ((),):
        free = grid[len(fixed) :]
        unit = math.gcd(*free)
        base = tuple(size // unit for size in free)
        rest, remainder = divmod(num_tokens, math.prod(fixed) * math.prod(base))
        factor = round(rest ** (1 / len(free)))
        if remainder == 0 and factor > 0 and factor ** len(free) == rest:
            return (*fixed, *(size * factor for size in base))
    probed = "×".join(map(str, grid))
    raise BlockError(
        f"{num_tokens} tokens do not form a grid of the aspect ratio of {probed}, which was probed "
        "when the block was inserted; feed inputs of that aspect ratio, or insert the block with "
        "the input_size that will be used"
    )


@torch.fx.wrap
def to_channels_first(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """View a host's output as (B, C, *spatial).

    Args:
        x: The output, laid out as ``layout`` says.
        layout: Its layout.

    Returns:
        The view, and the prefix tokens (B, P, C), ``None`` where the layout has none.

    Raises:
        BlockError: The number of axes is wrong, or the tokens form no grid.
    """
    if x.dim() != len(layout.kind):
        raise BlockError(f"the host's layout is {layout.kind}, but its output is {tuple(x.shape)}")
    if layout.kind in ("NHWC", "NTHWC"):
        return x.movedim(-1, 1), None
    if layout.kind != "NLC":
        return x, None
    num_prefix = layout.num_prefix_tokens
    prefix, tokens = (x[:, :num_prefix], x[:, num_prefix:]) if num_prefix else (None, x)
    num_tokens = tokens.shape[1]
    grid = (num_tokens,) if layout.grid is None else token_grid(num_tokens, layout.grid)
    return to_map(tokens, grid), prefix


@torch.fx.wrap
def from_channels_first(y: Tensor, prefix: Tensor | None, layout: Layout, like: Tensor) -> Tensor:
    """Undo :func:`to_channels_first`.

    Args:
        y: (B, C, *spatial).
        prefix: The prefix tokens, which pass bit by bit.
        layout: The host's layout.
        like: The host's output, whose shape and order of strides the result has.
    """
    if layout.kind in ("NHWC", "NTHWC"):
        restored = y.movedim(1, -1)
    elif layout.kind == "NLC":
        restored = y.flatten(2).transpose(1, 2)
        if prefix is not None:
            restored = torch.cat((prefix, restored), dim=1)
    else:
        return y
    wanted = torch.empty_like(like, device="meta").stride()
    if restored.stride() == wanted:
        return restored
    return torch.empty_like(like, dtype=restored.dtype).copy_(restored)
