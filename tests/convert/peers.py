"""What other projects' blocks compute, written from their formulas on plain tensors.

Each function takes a state_dict in that project's names and x (B, C, *spatial); each ``*_state``
makes one with random weights and the statistics of a trained BatchNorm. All in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

State = dict[str, Tensor]


def numbers(*shape: int, seed: int = 0, scale: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * math.prod(shape) + len(shape))
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def fill(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    """Random values by key; variances and norm weights positive, as after training."""
    state: State = {}
    for index, (key, shape) in enumerate(shapes.items()):
        value = numbers(*shape, seed=seed + 1000 * index)
        name = key.rsplit(".", 1)[-1]
        if name in ("running_var", "bn_riv"):
            value = 0.3 + 3 * value.abs()
        elif name == "num_batches_tracked":
            value = torch.tensor(4321)
        state[key] = value
    return state


def bn_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")
    }
    return {**shapes, f"{name}.num_batches_tracked": ()}


def linear(
    state: State, name: str, x: Tensor, weight: str = "weight", bias: str = "bias"
) -> Tensor:
    """A 1×1 convolution as a matrix product over channels: (B, C, N) -> (B, O, N)."""
    joint = "_" if f"{name}_{weight}" in state else "."
    y = torch.einsum("oc,bcn->bon", state[f"{name}{joint}{weight}"].flatten(1), x)
    offset = state.get(f"{name}{joint}{bias}")
    return y if offset is None else y + offset[:, None]


def norm(z: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (z - mean[:, None]) / torch.sqrt(var[:, None] + eps) * weight[:, None] + bias[:, None]


def batch_norm(state: State, name: str, z: Tensor, eps: float = 1e-5) -> Tensor:
    parts = (state[f"{name}.{p}"] for p in ("weight", "bias", "running_mean", "running_var"))
    return norm(z, *parts, eps)


def halve(x: Tensor) -> Tensor:
    """Max over 2, 2×2 or 1×2×2 cells; a last odd row or column is dropped."""
    return cells(x, (1, 2, 2)[2 - x.dim() :])


def cells(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Max over cells of so many along each axis; what is left over is dropped."""
    for axis, size in enumerate(sizes, 2):
        count = x.shape[axis] // size
        x = x.narrow(axis, 0, size * count).unflatten(axis, (count, size)).amax(axis + 1)
    return x


def aggregate(q: Tensor, k: Tensor, v: Tensor, mode: str, scale: float = 1.0) -> Tensor:
    """Σ_j f(q_i, k_j) v_j / C over (B, C, N) maps; ``concat`` takes the scalars a_i and b_j."""
    if mode == "concatenation":
        f = torch.relu(q.transpose(1, 2) + k) / k.shape[2]
    else:
        f = torch.einsum("bci,bcj->bij", q, k) * scale
        f = f / k.shape[2] if mode == "dot_product" else f.softmax(2)
    return torch.einsum("bij,bcj->bci", f, v)


def alexhex7_state(
    channels: int, inner: int, dims: int, mode: str, *, sub_sample: bool, bn: bool, seed: int = 0
) -> State:
    ones = (1,) * dims
    g, phi = ("g.0", "phi.0") if sub_sample else ("g", "phi")
    names = [g] if mode == "gaussian" else [g, "theta", phi]
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        shapes |= {f"{name}.weight": (inner, channels, *ones), f"{name}.bias": (inner,)}
    out = "W.0" if bn else "W"
    shapes |= {f"{out}.weight": (channels, inner, *ones), f"{out}.bias": (channels,)}
    if bn:
        shapes |= bn_shapes("W.1", channels)
    if mode == "concatenation":
        shapes["concat_project.0.weight"] = (1, 2 * inner, 1, 1)
    return fill(shapes, seed)


def alexhex7(state: State, x: Tensor, mode: str) -> Tensor:
    sub_sample, bn = "g.0.weight" in state, "W.1.weight" in state
    maps = {"x": x}
    for name in ("theta", "phi", "phi.0", "g", "g.0"):
        if f"{name}.weight" in state:
            maps[name[:3]] = linear(state, name, x.flatten(2)).unflatten(2, x.shape[2:])
    k = x if mode == "gaussian" else maps["phi"]
    v = maps["g"] if "g" in maps else maps["g.0"]
    if sub_sample:
        k, v = halve(k), halve(v)
    q = (x if mode == "gaussian" else maps["the"]).flatten(2)
    k = k.flatten(2)
    if mode == "concatenation":
        w = state["concat_project.0.weight"].flatten()
        half = len(w) // 2
        q = torch.einsum("c,bcn->bn", w[:half], q)[:, None]
        k = torch.einsum("c,bcn->bn", w[half:], k)[:, None]
    y = aggregate(q, k, v.flatten(2), mode)
    z = linear(state, "W.0" if bn else "W", y)
    if bn:
        z = batch_norm(state, "W.1", z)
    return x + z.view_as(x)


def mmcv_state(
    channels: int, inner: int, dims: int, mode: str, *, sub_sample: bool, bn: bool, seed: int = 0
) -> State:
    """As mmcv's ConvModule names them: a convolution before a norm has no bias."""
    plain = alexhex7_state(channels, inner, dims, mode, sub_sample=sub_sample, bn=False, seed=seed)
    state = {}
    for key, value in plain.items():
        part, name = key.rsplit(".", 1)
        part = {"W": "conv_out", "concat_project.0": "concat_project"}.get(part, part)
        if not (bn and key == "W.bias"):
            state[f"{part}.conv.{name}"] = value
    return state | (fill(bn_shapes("conv_out.bn", channels), seed + 7) if bn else {})


def mmcv(state: State, x: Tensor, mode: str, use_scale: bool = True) -> Tensor:
    other: State = {}
    for key, value in state.items():
        name = key.replace(".conv.", ".").replace("concat_project.", "concat_project.0.")
        if name.startswith("conv_out.bn."):
            name = name.replace("conv_out.bn.", "W.1.")
        elif name.startswith("conv_out."):
            name = name.replace("conv_out.", "W.0." if "conv_out.bn.weight" in state else "W.")
        other[name] = value
    if mode == "embedded_gaussian" and use_scale:
        root = math.sqrt(state["theta.conv.weight"].shape[0])
        for name in ("theta.weight", "theta.bias"):
            other[name] = other[name] / root
    return alexhex7(other, x, mode)


def slowfast_state(
    channels: int, inner: int, *, bn: bool, name: str = "bn", seed: int = 0
) -> State:
    shapes: dict[str, tuple[int, ...]] = {}
    for part in ("conv_theta", "conv_phi", "conv_g"):
        shapes |= {f"{part}.weight": (inner, channels, 1, 1, 1), f"{part}.bias": (inner,)}
    shapes |= {"conv_out.weight": (channels, inner, 1, 1, 1), "conv_out.bias": (channels,)}
    return fill({**shapes, **(bn_shapes(name, channels) if bn else {})}, seed)


def slowfast(
    state: State, x: Tensor, instantiation: str, pool: tuple[int, ...] | None, eps: float = 1e-5
) -> Tensor:
    """θ of x, φ and g of the pooled x; softmax logits times C'^-½, else divided by the keys."""
    keys = (cells(x, pool) if pool else x).flatten(2)
    q = linear(state, "conv_theta", x.flatten(2))
    k, v = linear(state, "conv_phi", keys), linear(state, "conv_g", keys)
    mode = "embedded_gaussian" if instantiation == "softmax" else "dot_product"
    z = linear(
        state, "conv_out", aggregate(q, k, v, mode, q.shape[1] ** -0.5 if mode[0] == "e" else 1)
    )
    for name in ("bn", "norm"):
        if f"{name}.weight" in state:
            z = batch_norm(state, name, z, eps)
    return x + z.view_as(x)


def caffe2_state(channels: int, inner: int, *, bn: str, seed: int = 0) -> State:
    """``bn``: ``"bn"``, ``"affine"`` (a frozen scale and shift) or ``"none"``."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in ("theta", "phi", "g"):
        shapes |= {f"{part}_w": (inner, channels, 1, 1, 1), f"{part}_b": (inner,)}
    shapes |= {"out_w": (channels, inner, 1, 1, 1), "out_b": (channels,)}
    if bn != "none":
        shapes |= {"bn_s": (channels,), "bn_b": (channels,)}
    if bn == "bn":
        shapes |= {"bn_rm": (channels,), "bn_riv": (channels,)}
    return fill(shapes, seed)


def caffe2_groups(state: State, x: Tensor, frames: int, **options: bool) -> Tensor:
    """``add_nonlocal_group``: groups of frames are clips of their own."""
    parts = [caffe2(state, part, **options) for part in x.split(frames, dim=2)]
    return torch.cat(parts, 2)


def caffe2(state: State, x: Tensor, *, softmax: bool, scale: bool, pool: bool) -> Tensor:
    keys = (halve(x) if pool else x).flatten(2)
    q = linear(state, "theta", x.flatten(2), "w", "b")
    k, v = linear(state, "phi", keys, "w", "b"), linear(state, "g", keys, "w", "b")
    factor = q.shape[1] ** -0.5 if scale and softmax else 1.0
    y = aggregate(q, k, v, "embedded_gaussian" if softmax else "dot_product", factor)
    z = linear(state, "out", y, "w", "b")
    if "bn_rm" in state:
        z = norm(z, *(state[f"bn_{part}"] for part in ("s", "b", "rm", "riv")), 1e-5)
    elif "bn_s" in state:
        z = z * state["bn_s"][:, None] + state["bn_b"][:, None]
    return x + z.view_as(x)


def timm_nl_state(channels: int, inner: int, seed: int = 0) -> State:
    shapes: dict[str, tuple[int, ...]] = {}
    for part in ("t", "p", "g"):
        shapes |= {f"{part}.weight": (inner, channels, 1, 1), f"{part}.bias": (inner,)}
    shapes |= {"z.weight": (channels, inner, 1, 1), "z.bias": (channels,)}
    return fill({**shapes, **bn_shapes("norm", channels)}, seed)


def timm_nl(state: State, x: Tensor, use_scale: bool = True) -> Tensor:
    flat = x.flatten(2)
    q, k, v = (linear(state, name, flat) for name in ("t", "p", "g"))
    y = aggregate(q, k, v, "embedded_gaussian", x.shape[1] ** -0.5 if use_scale else 1.0)
    return x + batch_norm(state, "norm", linear(state, "z", y)).view_as(x)


def bottleneck(first: State, context: Tensor, eps: float) -> Tensor:
    """Two layers with a layer norm between; ``first`` has conv1, ln and conv2 by plain names."""
    h = linear(first, "a", context).squeeze(2)
    mean = h.mean(1, keepdim=True)
    var = ((h - mean) ** 2).mean(1, keepdim=True)
    h = (h - mean) / torch.sqrt(var + eps) * first["n.weight"].flatten() + first["n.bias"].flatten()
    return linear(first, "b", torch.relu(h)[:, :, None])


def context_state(
    channels: int, hidden: int, *, fusion: str, attend: bool, style: str, seed: int = 0
) -> State:
    """GCNet's (``style="mmcv"``) or timm's global context; ``fusion`` is ``add`` or ``mul``."""
    if style == "mmcv":
        mask, head = "conv_mask", f"channel_{fusion}_conv"
        parts = {"a": f"{head}.0", "n": f"{head}.1", "b": f"{head}.3"}
    else:
        mask, head = "conv_attn", f"mlp_{'add' if fusion == 'add' else 'scale'}"
        parts = {"a": f"{head}.fc1", "n": f"{head}.norm", "b": f"{head}.fc2"}
    ln = (hidden, 1, 1) if style == "mmcv" else (hidden,)
    shapes: dict[str, tuple[int, ...]] = {
        f"{parts['a']}.weight": (hidden, channels, 1, 1),
        f"{parts['a']}.bias": (hidden,),
        f"{parts['n']}.weight": ln,
        f"{parts['n']}.bias": ln,
        f"{parts['b']}.weight": (channels, hidden, 1, 1),
        f"{parts['b']}.bias": (channels,),
    }
    if attend:
        shapes |= {f"{mask}.weight": (1, channels, 1, 1), f"{mask}.bias": (1,)}
    state = fill(shapes, seed)
    # A small spread before the layer norm: there its epsilon matters.
    for name in ("weight", "bias"):
        state[f"{parts['a']}.{name}"] *= 0.02
    return state


def global_context(state: State, x: Tensor, style: str) -> Tensor:
    mask = "conv_mask" if style == "mmcv" else "conv_attn"
    names = {"add": "channel_add_conv", "mul": "channel_mul_conv"}
    if style == "timm":
        names = {"add": "mlp_add", "mul": "mlp_scale"}
    tail = {"a": "0", "n": "1", "b": "3"}
    if style == "timm":
        tail = {"a": "fc1", "n": "norm", "b": "fc2"}
    flat = x.flatten(2)
    if f"{mask}.weight" in state:
        weights = linear(state, mask, flat).softmax(2)
    else:
        weights = torch.full_like(flat[:, :1], 1 / flat.shape[2])
    context = (flat * weights).sum(2, keepdim=True)
    for fusion, head in names.items():
        if f"{head}.{tail['a']}.weight" not in state:
            continue
        parts = {
            f"{short}.{name}": state[f"{head}.{long}.{name}"]
            for short, long in tail.items()
            for name in ("weight", "bias")
        }
        t = bottleneck(parts, context, 1e-5 if style == "mmcv" else 1e-6)
        flat = flat + t if fusion == "add" else flat * torch.sigmoid(t)
    return flat.view_as(x)


def qkv_state(channels: int, inner: int, seed: int = 0) -> State:
    shapes: dict[str, tuple[int, ...]] = {"gamma": (1,)}
    for part, width in (("query", inner), ("key", inner), ("value", channels)):
        shapes |= {f"{part}_conv.weight": (width, channels, 1, 1), f"{part}_conv.bias": (width,)}
    return fill(shapes, seed)


def self_attention(state: State, x: Tensor) -> Tensor:
    """SAGAN's layer, and DANet's position module."""
    q, k, v = (linear(state, f"{part}_conv", x.flatten(2)) for part in ("query", "key", "value"))
    return x + state["gamma"] * aggregate(q, k, v, "embedded_gaussian").view_as(x)


def channel_attention(state: State, x: Tensor) -> Tensor:
    """DANet's channel module: softmax over max − E of E = X Xᵀ."""
    flat = x.flatten(2)
    energy = torch.einsum("bcn,bdn->bcd", flat, flat)
    weights = (energy.amax(2, keepdim=True) - energy).softmax(2)
    return x + state["gamma"] * torch.einsum("bcd,bdn->bcn", weights, flat).view_as(x)


def criss_cross(state: State, x: Tensor, recurrence: int) -> Tensor:
    """Each position over its own column and row, itself once; position by position."""
    for _ in range(recurrence):
        q, k, v = (
            linear(state, f"{part}_conv", x.flatten(2)).unflatten(2, x.shape[2:])
            for part in ("query", "key", "value")
        )
        height, width = x.shape[2:]
        y = torch.zeros_like(v)
        for i in range(height):
            for j in range(width):
                cross = [(a, j) for a in range(height) if a != i] + [(i, b) for b in range(width)]
                logits = torch.stack([(q[:, :, i, j] * k[:, :, a, b]).sum(1) for a, b in cross])
                values = torch.stack([v[:, :, a, b] for a, b in cross])
                y[:, :, i, j] = (logits.softmax(0)[:, :, None] * values).sum(0)
        x = x + state["gamma"] * y
    return x
