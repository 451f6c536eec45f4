"""Self-attention with a learned γ (SAGAN, Zhang et al. 2018, arXiv 1805.08318)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from nlsurgery.blocks.affinity import softmax_map
from nlsurgery.blocks.attend import attend, laid_out
from nlsurgery.blocks.choose import checked_implementation
from nlsurgery.blocks.few import are_few, few_attended
from nlsurgery.blocks.geometry import checked_input, pointwise, reduced, to_tokens
from nlsurgery.blocks.registration import register
from nlsurgery.blocks.residual import add_gated, project_together

for _name in ("add_gated", "attend", "checked_input", "laid_out", "project_together"):
    torch.fx.wrap(_name)
for _name in ("softmax_map", "to_tokens"):
    torch.fx.wrap(_name)

Implementation = Literal["auto", "explicit", "fused", "chunked"]
_MODE = "embedded_gaussian"


class SelfAttention(nn.Module):
    """γ · Σ_j softmax_j(q_i · k_j) v_j + x, with γ = 0 at init and no scale on the logits.

    Children: ``query``, ``key`` (C → C // reduction), ``value`` (C → C), and the scalar ``gamma``.
    """

    def __init__(
        self,
        in_channels: int,
        reduction: float = 8,
        *,
        dims: int = 2,
        implementation: str = "auto",
    ) -> None:
        """Build the block.

        Args:
            in_channels: C of the host's output.
            reduction: Queries and keys have C // reduction channels, at least 1.
            dims: Spatial dimensions of the input: 1, 2 or 3.
            implementation: The exact form: ``auto``, ``explicit``, ``fused`` or ``chunked``.

        Raises:
            BlockError: An option that is not allowed.
        """
        super().__init__()
        self.in_channels, self.dims = in_channels, dims
        self.implementation = checked_implementation(implementation, _MODE)
        inner = reduced(in_channels, reduction)
        self._sizes = inner, in_channels
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
        if self.implementation == "auto" and are_few(x):
            y = few_attended(x, (self.query, self.key, self.value), _MODE, 1.0)
            if y is not None:
                return add_gated(x, y, self.gamma)
        source = laid_out(x, _MODE, self._sizes, None, self.implementation)
        q, k, v = project_together(source, self.query, self.key, self.value)
        y = attend(q, k, v, _MODE, 1.0, self.implementation)
        return add_gated(x, y, self.gamma)

    def attention(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """The map softmax_j(q_i · k_j).

        Args:
            x: (B, C, *spatial).
            queries: (Q,) positions i in 0..N-1 to compute rows for, all N by default.

        Returns:
            (B, N, N), or (B, Q, N); rows sum to 1.
        """
        x = checked_input(x, self.in_channels, self.dims)
        q = to_tokens(self.query(x))
        if queries is not None:
            q = q[:, queries]
        return softmax_map(q, to_tokens(self.key(x)), 1.0)


@register("self_attention", source="Zhang et al., Self-Attention GANs, 2018")
def build_self_attention(
    in_channels: int,
    *,
    dims: int,
    reduction: float = 8,
    implementation: Implementation = "auto",
) -> SelfAttention:
    """Build a :class:`SelfAttention` from the options of a recipe.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions of the host's output.
        reduction: Queries and keys have C // reduction channels.
        implementation: The exact form that computes it.
    """
    return SelfAttention(in_channels, reduction, dims=dims, implementation=implementation)
