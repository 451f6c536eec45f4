"""The non-local blocks that are compared: ours, the article's written plainly, mmcv's and timm's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nlsurgery.blocks import NonLocal

#: Of (channels, dims, mode, sub_sample, use_scale).
Build = Callable[..., nn.Module]
#: mmcv's concatenation forms (B, C, N, N): beyond this many bytes it is left out.
PAIR_LIMIT = 4 << 30
#: What is set to torch's default init: some peers begin with zeros or nearly so.
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class ArticleBlock(nn.Module):
    """The article's block as a plain rewrite: every pairwise tensor is formed.

    Args:
        channels: C; the inner channels are half of them.
        dims: Of space and time: 1, 2 or 3.
        mode: The pairwise function.
        sub_sample: Halve keys and values in height and width (a sequence: in length).
        use_scale: Divide logits of embedded Gaussian by the root of the inner channels.
    """

    def __init__(
        self,
        channels: int,
        dims: int,
        mode: str,
        sub_sample: bool = False,
        use_scale: bool = False,
    ) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.inner, self.mode = channels // 2, mode
        self.scale = self.inner**-0.5 if use_scale else 1.0
        self.g = conv(channels, self.inner, 1)
        self.theta, self.phi = (
            nn.Identity() if mode == "gaussian" else conv(channels, self.inner, 1) for _ in range(2)
        )
        if mode == "concatenation":
            self.concat_project = nn.Conv2d(2 * self.inner, 1, 1, bias=False)
        self.pool: nn.Module = nn.Identity()
        if sub_sample:
            sizes = (1, 2, 2) if dims == 3 else 2
            self.pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1](sizes)
        self.out = nn.Sequential(conv(self.inner, channels, 1), norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to the same."""
        theta = self.theta(x).flatten(2)
        phi, g = (self.pool(layer(x)).flatten(2) for layer in (self.phi, self.g))
        f = self.pairwise(theta, phi)
        y = torch.matmul(f, g.permute(0, 2, 1)).permute(0, 2, 1).contiguous()
        return self.out(y.view(x.shape[0], self.inner, *x.shape[2:])) + x

    def pairwise(self, theta: Tensor, phi: Tensor) -> Tensor:
        """Compute f / C(x), (B, N, M)."""
        if self.mode in ("gaussian", "embedded_gaussian"):
            logits = torch.matmul(theta.permute(0, 2, 1), phi)
            return (logits if self.scale == 1.0 else logits * self.scale).softmax(-1)
        if self.mode == "dot_product":
            return torch.matmul(theta.permute(0, 2, 1), phi) / phi.shape[2]
        # The broadcast of two scalars per pair; the published code concatenates 2C' channels.
        left, right = self.concat_project.weight.flatten().chunk(2)
        pair = (left @ theta).unsqueeze(2) + (right @ phi).unsqueeze(1)
        return torch.relu(pair) / phi.shape[2]


def ours(
    channels: int, dims: int, mode: str, sub_sample: bool = False, use_scale: bool = False
) -> nn.Module:
    return NonLocal(
        channels,
        dims=dims,
        mode=mode,
        sub_sample=sub_sample,
        use_scale=use_scale,
        zero_init=False,
    )


def compiled(build: Build) -> Build:
    return lambda *options: torch.compile(build(*options))  # type: ignore[return-value]


def mmcv_block(
    channels: int, dims: int, mode: str, sub_sample: bool = False, use_scale: bool = False
) -> nn.Module:
    from mmcv.cnn.bricks import NonLocal1d, NonLocal2d, NonLocal3d

    kind = (NonLocal1d, NonLocal2d, NonLocal3d)[dims - 1]
    norm = {"type": ("BN1d", "BN", "BN3d")[dims - 1]}
    return kind(channels, sub_sample=sub_sample, use_scale=use_scale, norm_cfg=norm, mode=mode)


def timm_block(
    channels: int, dims: int, mode: str, sub_sample: bool = False, use_scale: bool = False
) -> nn.Module:
    from timm.layers.non_local_attn import NonLocalAttn

    if dims != 2 or mode != "embedded_gaussian" or sub_sample:
        raise NotImplementedError("2-D softmax of all keys only")
    return NonLocalAttn(channels, rd_ratio=0.5, use_scale=use_scale)


BLOCKS: dict[str, Build] = {
    "nlsurgery": ours,
    "nlsurgery, compiled": compiled(ours),
    "article": ArticleBlock,
    "article, compiled": compiled(ArticleBlock),
    "mmcv-lite": mmcv_block,
    "timm": timm_block,
}


def prepared(
    name: str,
    shape: tuple[int, ...],
    mode: str,
    dtype: str,
    train: bool,
    device: str = "cpu",
    sub_sample: bool = False,
    use_scale: bool = False,
    pair_limit: int = PAIR_LIMIT,
) -> tuple[nn.Module, Tensor]:
    """Build a block with weights of torch's default init, and its input.

    Raises:
        ImportError: The peer is not installed.
        NotImplementedError: It has no such form, or would need too much memory.
    """
    pair_bytes = 4 * shape[0] * math.prod(shape[2:]) ** 2 * shape[1]
    if name == "mmcv-lite" and mode == "concatenation" and pair_bytes > pair_limit:
        raise NotImplementedError(f"one of its tensors would take {pair_bytes >> 20} MB")
    torch.manual_seed(0)
    block = BLOCKS[name](shape[1], len(shape) - 2, mode, sub_sample, use_scale)
    for module in block.modules():
        if isinstance(module, LAYERS):
            module.reset_parameters()
    kind = getattr(torch, dtype)
    block = block.to(device, kind).train(train)
    return block, torch.randn(shape, device=device, dtype=kind, requires_grad=train)
