"""SlowFast: ``s{n}.pathway0_nonlocal{i}``; 5-D, the pool before the conv, softmax always scaled."""

from __future__ import annotations

import math
import re

from torch import Tensor

from nlsurgery.blocks.geometry import pool_sizes
from nlsurgery.convert import pairwise
from nlsurgery.convert.base_names import slowfast_from_ours, slowfast_to_ours
from nlsurgery.convert.layout import BlockKind, Choices, Converted, Layout, OurBlock, State
from nlsurgery.errors import CheckpointError

NAME = "slowfast"
MODES = ("embedded_gaussian", "dot_product")
_BN = "weight|bias|running_mean|running_var|num_batches_tracked"
_PATTERN = re.compile(
    rf"(?P<prefix>(?:.*\.)?)(?P<local>conv_(?:theta|phi|g|out)\.(?:weight|bias)"
    rf"|(?:bn|norm)\.(?:{_BN}))"
)


def to_ours(state: State, choices: Choices, where: str) -> Converted:
    """Convert one ``Nonlocal``; how it pools (1×2×2 in most of its recipes) is not in the keys."""
    origin = {_our_name(key): key for key in state}
    if len(origin) != len(state):
        raise CheckpointError(f"{where}: the block has both 'bn' and 'norm'")
    tensors = {new: state[old] for new, old in origin.items()}
    return read_video_block(tensors, origin, choices, where, use_scale=True)


def read_video_block(
    tensors: dict[str, Tensor],
    origin: dict[str, str],
    choices: Choices,
    where: str,
    *,
    use_scale: bool,
    temporal_window: int | None = None,
) -> Converted:
    """Build our block from one of Facebook's video projects, pooled unless ``choices`` say not."""
    if tensors["g.weight"].dim() != 5:
        raise CheckpointError(
            f"{where}: g must be a 5-D kernel, but is {tuple(tensors['g.weight'].shape)}"
        )
    return pairwise.read_block(
        tensors,
        origin,
        choices,
        where,
        sub_sample=True if choices.sub_sample is None else choices.sub_sample,
        pool_order="before_conv",
        use_scale=use_scale,
        temporal_window=temporal_window,
    )


def _our_name(key: str) -> str:
    return re.sub(r"^norm\.", "bn.", key.removeprefix("conv_"))


def from_ours(block: OurBlock) -> Converted:
    """Convert one of our 3-D blocks; an unscaled softmax gets √C' into θ."""
    channels, inner, _ = pairwise.require_plain(
        block, NAME, pool_order="before_conv", modes=MODES, dims=(3,), any_pool=True
    )
    options = block.options
    pool = pool_sizes(options["sub_sample"], 3)
    softmax = options["mode"] == "embedded_gaussian"
    factor = 1.0 if not softmax or options["use_scale"] else math.sqrt(inner)
    tensors = pairwise.with_biases(pairwise.scale_logits(block.tensors, factor))
    names = {key if key.startswith("bn.") else f"conv_{key}": key for key in tensors}
    origin = {new: old for new, old in names.items() if old in block.tensors}
    needs = {
        "dim": channels,
        "dim_inner": inner,
        "pool_size": pool and list(pool),
        "instantiation": "softmax" if softmax else "dot_product",
        "norm_type": "batchnorm" if "bn.weight" in tensors else "none",
    }
    renamed = {new: tensors[old] for new, old in names.items()}
    return Converted(renamed, origin, needs, channels, 3, "non_local")


def _accepts(local: frozenset[str]) -> bool:
    return {"conv_theta.weight", "conv_phi.weight", "conv_g.weight", "conv_out.weight"} <= local


def _host(prefix: str, keys: frozenset[str]) -> str | None:
    match = re.fullmatch(r"s(\d)\.pathway0_nonlocal(\d+)", prefix)
    return f"layer{int(match[1]) - 1}.{match[2]}" if match else None


def _name_at(host: str) -> str | None:
    match = re.fullmatch(r"layer(\d)\.(\d+)", host)
    return f"s{int(match[1]) + 1}.pathway0_nonlocal{match[2]}" if match else None


LAYOUT = Layout(
    NAME,
    "facebookresearch/SlowFast",
    (
        BlockKind(
            "Nonlocal",
            _PATTERN,
            _accepts,
            to_ours,
            from_ours,
            _host,
            _name_at,
            ("non_local",),
            choices=("mode", "sub_sample", "bn_eps"),
        ),
    ),
    slowfast_to_ours,
    slowfast_from_ours,
    wrapper="model_state",
)
