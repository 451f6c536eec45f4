"""Expectation-maximisation attention: K bases in place of N keys (EMANet, Li et al., ICCV 2019)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlsurgery.blocks.affinity import accumulator, without_autocast
from nlsurgery.blocks.base import ProjectedBlock
from nlsurgery.blocks.geometry import is_eager, pointwise, reduced, to_map, to_tokens
from nlsurgery.blocks.registration import register
from nlsurgery.errors import BlockError

for _name in ("to_map", "to_tokens"):
    torch.fx.wrap(_name)

Norm = Literal["bn", "ln", "gn", "none"]


class Bases(nn.Module):
    """The bases, and the rebuilding of tokens from those that a batch moves them to.

    Buffer ``mu``: (1, C', K), unit columns.
    """

    mu: Tensor
    #: ``mu`` as the last forward found it, for gradient checkpointing to run that again.
    before: Tensor | None = None

    def __init__(self, channels: int, num_bases: int, stages: int, momentum: float) -> None:
        super().__init__()
        if num_bases < 1 or stages < 1 or not 0 <= momentum <= 1:
            raise BlockError(
                "ema: num_bases and stages must be at least 1 and momentum within 0 and 1, got "
                f"{num_bases}, {stages} and {momentum}"
            )
        self.stages, self.momentum = stages, momentum
        self.register_buffer("mu", torch.empty(1, channels, num_bases))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bases anew: N(0, 2/K), then unit columns."""
        nn.init.normal_(self.mu, std=(2 / self.mu.shape[2]) ** 0.5)
        with torch.no_grad():
            self.mu.copy_(F.normalize(self.mu, dim=1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Rebuild (B, N, C') from the bases, then ReLU."""
        return _rebuilt(self, tokens)


class ExpectationMaximisation(ProjectedBlock):
    """``stages`` rounds of soft assignment to bases and their update, then reconstruction.

    Children: ``features`` (C → C'), ``bases``, ``out`` and the norm. In train mode ``bases.mu``
    follows the bases found in a batch by a moving average, as published: the one block here with
    a state besides its norm's. ``momentum=1`` freezes it. Gradient checkpointing moves it once.

    Differs from the paper: bases are constants for the gradient, the last assignment is not, so
    that ``features`` learns; bases that are not finite leave ``mu`` as it was.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        dims: int = 2,
        reduction: float = 1,
        num_bases: int = 64,
        stages: int = 3,
        momentum: float = 0.9,
        norm: str = "bn",
    ) -> None:
        inner = reduced(in_channels, reduction)
        super().__init__(in_channels, inner, dims, norm)
        self.features = pointwise(in_channels, inner, dims)
        self.bases = Bases(inner, num_bases, stages, momentum)

    def attended(self, x: Tensor) -> Tensor:
        """Each position rebuilt from the bases."""
        return to_map(self.bases(to_tokens(self.features(x))), x.shape[2:])


@torch.fx.wrap
def _rebuilt(bases: Bases, tokens: Tensor) -> Tensor:
    with without_autocast(tokens):
        wide = tokens.to(accumulator(tokens.dtype))
        follows = bases.training and bases.momentum < 1 and wide.shape[0] > 0
        mu = bases.mu
        if follows and is_eager():
            if bases.before is not None and _runs_again():
                mu, follows = bases.before, False
            else:
                bases.before = mu.clone()
        start = mu.to(wide.dtype).expand(wide.shape[0], -1, -1)
        found = find_bases(wide.detach(), start, bases.stages)
        y = torch.relu((wide @ found).softmax(-1) @ found.transpose(1, 2))
        if follows:
            _follow(bases, found)
    return y.to(tokens.dtype)


def _runs_again() -> bool:
    """Whether a backward runs, which runs a forward again under gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


@torch.no_grad()
def find_bases(tokens: Tensor, bases: Tensor, stages: int) -> Tensor:
    """Alternate assignment and update (Eqs. 10 to 13).

    Args:
        tokens: (B, N, C').
        bases: (B, C', K), unit columns.
        stages: How often.

    Returns:
        (B, C', K), unit columns.
    """
    for _ in range(stages):
        assigned = (tokens @ bases).softmax(-1)
        assigned = assigned / (assigned.sum(1, keepdim=True) + 1e-6)
        bases = F.normalize(tokens.transpose(1, 2) @ assigned, dim=1)
    return bases


@torch.no_grad()
def _follow(bases: Bases, found: Tensor) -> None:
    mean = found.mean(0, keepdim=True).to(bases.mu.dtype)
    moved = bases.mu * bases.momentum + mean * (1 - bases.momentum)
    bases.mu.copy_(torch.where(torch.isfinite(moved).all(), moved, bases.mu))


@register("ema", source="Li et al., Expectation-Maximization Attention, ICCV 2019")
def build_ema(
    in_channels: int,
    *,
    dims: int,
    reduction: float = 1,
    num_bases: int = 64,
    stages: int = 3,
    momentum: float = 0.9,
    norm: Norm = "bn",
) -> ExpectationMaximisation:
    """Build expectation-maximisation attention.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions.
        reduction: C' = C // reduction.
        num_bases: K.
        stages: Rounds of assignment and update.
        momentum: How much of the running bases stays in a training step, 0 to 1.
        norm: The normalisation after ``out``.
    """
    return ExpectationMaximisation(
        in_channels,
        dims=dims,
        reduction=reduction,
        num_bases=num_bases,
        stages=stages,
        momentum=momentum,
        norm=norm,
    )
