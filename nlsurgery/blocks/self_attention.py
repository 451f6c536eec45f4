"""Self-attention with a learned γ (SAGAN, Zhang et al. 2018, arXiv 1805.08318)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nlsurgery.blocks.affinity import apply_map, softmax_map
from nlsurgery.blocks.geometry import checked_input, pointwise, reduced, to_map, to_tokens
from nlsurgery.blocks.registration import register
from nlsurgery.blocks.residual import add_branch, finite

for _name in ("add_branch", "apply_map", "checked_input", "finite"):
    torch.fx.wrap(_name)
for _name in ("softmax_map", "to_map", "to_tokens"):
    torch.fx.wrap(_name)


class SelfAttention(nn.Module):
    """γ · Σ_j softmax_j(q_i · k_j) v_j + x, with γ = 0 at init and no scale on the logits.

    Children: ``query``, ``key`` (C → C // reduction), ``value`` (C → C), and the scalar ``gamma``.
    """

    def __init__(self, in_channels: int, reduction: float = 8, *, dims: int = 2) -> None:
        """Build the block.

        Args:
            in_channels: C of the host's output.
            reduction: Queries and keys have C // reduction channels, at least 1.
            dims: Spatial dimensions of the input: 1, 2 or 3.

        Raises:
            BlockError: An option that is not allowed.
        """
        super().__init__()
        self.in_channels, self.dims = in_channels, dims
        inner = reduced(in_channels, reduction)
        self.query = pointwise(in_channels, inner, dims)
        self.key = pointwise(in_channels, inner, dims)
        self.value = pointwise(in_channels, in_channels, dims)
        self.gamma = nn.Parameter(torch.zeros(1))

    @property
    def gate(self) -> nn.Parameter:
        """γ, (1,)."""
        return self.gamma

    def reset_parameters(self) -> None:
        """Restore the init: torch's default for the projections, γ = 0."""
        for module in (self.query, self.key, self.value):
            module.reset_parameters()  # type: ignore[operator]
        nn.init.zeros_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        """Add γ times the attended values.

        Args:
            x: (B, C, *spatial).

        Returns:
            The same shape, dtype and memory format.

        Raises:
            BlockError: ``x`` has another number of channels or dimensions.
        """
        x = checked_input(x, self.in_channels, self.dims)
        y = to_map(apply_map(self._attention(x), to_tokens(self.value(x))), x)
        return add_branch(x, self.gamma * finite(y))

    def attention(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """The map softmax_j(q_i · k_j).

        Args:
            x: (B, C, *spatial).
            queries: (Q,) positions i in 0..N-1 to compute rows for, all N by default.

        Returns:
            (B, N, N), or (B, Q, N); rows sum to 1.
        """
        return self._attention(checked_input(x, self.in_channels, self.dims), queries)

    def _attention(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        q = to_tokens(self.query(x))
        if queries is not None:
            q = q[:, queries]
        return softmax_map(q, to_tokens(self.key(x)), 1.0)


@register("self_attention", source="Zhang et al., Self-Attention GANs, 2018")
def build_self_attention(in_channels: int, *, dims: int, reduction: float = 8) -> SelfAttention:
    """Build a :class:`SelfAttention` from the options of a recipe.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions of the host's output.
        reduction: Queries and keys have C // reduction channels.
    """
    return SelfAttention(in_channels, reduction, dims=dims)
