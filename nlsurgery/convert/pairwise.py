"""What the layouts of non-local blocks share: options read off shapes, and exact foldings.

All folds keep the function: a factor on the logits goes into θ (weight and bias), a bias before a
BatchNorm into its running mean, another epsilon into its running variance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nlsurgery.blocks.geometry import pool_option, pool_sizes
from nlsurgery.convert.layout import Choices, Converted, OurBlock, State, cannot_hold, require_shape
from nlsurgery.errors import BlockError, CheckpointError

#: Epsilon of our BatchNorm.
BN_EPS = 1e-5
CONVS = ("theta", "phi", "g", "out")
_STATISTICS = ("weight", "bias", "running_mean", "running_var")


def read_block(
    state: State,
    origin: Mapping[str, str],
    choices: Choices,
    where: str,
    *,
    sub_sample: bool | Sequence[int],
    pool_order: str,
    use_scale: bool,
    temporal_window: int | None = None,
) -> Converted:
    """Build our non-local block from tensors that already have our names.

    Args:
        state: Tensors by our local names; keys of ``origin``.
        origin: Our local name -> the foreign one.
        choices: What the keys do not tell; ``mode`` and ``bn_eps`` are used here.
        where: How errors name the block.
        sub_sample: Whether it pools, or by how many along each axis.
        pool_order: Where.
        use_scale: Whether softmax logits are divided by √(head size).
        temporal_window: Frames that attend to each other, ``None`` for all.

    Raises:
        CheckpointError: Tensors are missing, or do not fit each other or the choices.
    """
    mode = _mode(state, choices.mode, where)
    channels, inner, dims = _check_shapes(state, mode, where)
    tensors = dict(state)
    bias = any(f"{name}.bias" in state for name in CONVS)
    if bias:
        for name in CONVS:
            if f"{name}.weight" in state and f"{name}.bias" not in state:
                tensors[f"{name}.bias"] = state[f"{name}.weight"].new_zeros(
                    state[f"{name}.weight"].shape[0]
                )
    norm = _complete_norm(tensors, channels, where)
    if norm == "bn" and choices.bn_eps is not None:
        tensors["bn.running_var"] = tensors["bn.running_var"] + (choices.bn_eps - BN_EPS)
    pool = told_pool(sub_sample, dims, where)
    options: dict[str, Any] = {"mode": mode, "inter_channels": inner, "sub_sample": pool}
    if pool:
        options["pool_order"] = pool_order
    if temporal_window:
        options["temporal_window"] = temporal_window
    if mode in ("gaussian", "embedded_gaussian"):
        options["use_scale"] = use_scale
    options |= {"norm": norm, "bias": bias}
    return Converted(tensors, dict(origin), options, channels, dims, "non_local")


def told_pool(sub_sample: bool | Sequence[int], dims: int, where: str) -> bool | list[int]:
    """``sub_sample`` in one way: ``True`` for the published sizes.

    Raises:
        CheckpointError: It does not fit a block of so many dimensions.
    """
    try:
        return pool_option(pool_sizes(sub_sample, dims), dims)
    except BlockError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _mode(state: State, asked: str | None, where: str) -> str:
    if "concat_project.weight" in state:
        seen = ("concatenation",)
    elif "theta.weight" in state:
        seen = ("embedded_gaussian", "dot_product")  # type: ignore[assignment]
    else:
        seen = ("gaussian",)
    if asked is not None and asked not in seen:
        raise CheckpointError(
            f"{where}: mode {asked!r} was asked for, but the block's keys are those of "
            f"{' or '.join(seen)}"
        )
    return asked or seen[0]


def _check_shapes(state: State, mode: str, where: str) -> tuple[int, int, int]:
    weight = state.get("g.weight")
    if weight is None or weight.dim() not in (3, 4, 5):
        raise CheckpointError(
            f"{where}: g must be a 1×1 convolution of 1 to 3 dimensions, but is "
            f"{None if weight is None else tuple(weight.shape)}"
        )
    inner, channels, ones = weight.shape[0], weight.shape[1], (1,) * (weight.dim() - 2)
    wanted = {"g": (inner, channels, *ones), "out": (channels, inner, *ones)}
    if mode != "gaussian":
        wanted |= {"theta": wanted["g"], "phi": wanted["g"]}
    if mode == "concatenation":
        wanted["concat_project"] = (1, 2 * inner, 1, 1)
    for name, shape in wanted.items():
        require_shape(state, f"{name}.weight", shape, where)
        if f"{name}.bias" in state:
            require_shape(state, f"{name}.bias", shape[:1], where)
    return channels, inner, len(ones)


def _complete_norm(tensors: dict[str, Tensor], channels: int, where: str) -> str:
    if not any(key.startswith("bn.") for key in tensors):
        return "none"
    for name in _STATISTICS:
        require_shape(tensors, f"bn.{name}", (channels,), where)
    tensors.setdefault("bn.num_batches_tracked", torch.zeros((), dtype=torch.long))
    return "bn"


def scale_logits(tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Multiply θ, and so every logit of an embedded mode, by a factor."""
    scaled = dict(tensors)
    for key in ("theta.weight", "theta.bias"):
        if key in scaled:
            scaled[key] = (scaled[key].double() * factor).to(scaled[key].dtype)
    return scaled


def fold_out_bias(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move the bias of ``out`` into the BatchNorm after it: running_mean − bias."""
    folded = dict(tensors)
    bias = folded.pop("out.bias", None)
    if bias is not None:
        folded["bn.running_mean"] = folded["bn.running_mean"] - bias
    return folded


def with_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the zero biases that a block without them is equal to."""
    full = dict(tensors)
    for name in CONVS:
        weight = full.get(f"{name}.weight")
        if weight is not None:
            full.setdefault(f"{name}.bias", weight.new_zeros(weight.shape[0]))
    return full


def require_plain(
    block: OurBlock,
    layout: str,
    *,
    pool_order: str,
    modes: tuple[str, ...],
    dims: tuple[int, ...],
    any_pool: bool = False,
    windows: tuple[int, ...] = (),
) -> tuple[int, int, int]:
    """Check that another project's non-local block can compute what ours does.

    Args:
        block: Ours.
        layout: The other project, for errors.
        pool_order: Where that project pools; ``""`` where it does not.
        modes: The pairwise functions it has.
        dims: Its dimensions.
        any_pool: Whether it pools by any size.
        windows: The temporal windows it has.

    Returns:
        (C, C', dims).

    Raises:
        CheckpointError: It cannot.
    """
    options = block.options
    mode = options["mode"]
    channels, inner, found = _check_shapes(block.tensors, mode, block.where)
    if mode not in modes:
        raise cannot_hold(layout, block.where, f"mode {mode!r}", f"it has {', '.join(modes)}")
    if found not in dims:
        names = " or ".join(f"{d}-D" for d in dims)
        raise cannot_hold(layout, block.where, f"a {found}-D block", f"its blocks are {names}")
    if options["sub_sample"] and options["pool_order"] != pool_order:
        way_out = f"it pools {pool_order}" if pool_order else "it does not pool"
        raise cannot_hold(layout, block.where, f"a pool {options['pool_order']}", way_out)
    if not any_pool and options["sub_sample"] not in (True, False):
        sizes = "×".join(map(str, options["sub_sample"]))
        raise cannot_hold(layout, block.where, f"a pool of {sizes}", "it pools by 2 over space")
    window = options["temporal_window"]
    if window is not None and window not in windows:
        way_out = f"it has windows of {', '.join(map(str, windows))}" if windows else "it has none"
        raise cannot_hold(layout, block.where, f"temporal_window={window}", way_out)
    if any(key.split(".")[0] in ("ln", "gn") for key in block.tensors):
        raise cannot_hold(
            layout, block.where, "a layer or group norm", "its blocks end in a BatchNorm or nothing"
        )
    return channels, inner, found


def logit_factor(options: Mapping[str, Any], inner: int, layout: str, where: str) -> float:
    """The factor on our logits, for a project that cannot scale ``gaussian``.

    Raises:
        CheckpointError: A scaled ``gaussian`` block: it has no θ to take the factor.
    """
    if not options.get("use_scale", False):
        return 1.0
    if options["mode"] == "gaussian":
        raise cannot_hold(
            layout, where, "a scaled gaussian block", "its logits are x·x without a factor"
        )
    return 1 / math.sqrt(inner)
