"""Independent references: the published formulas as loops over positions, in float64 lists."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def conv1x1(x: Tensor, conv: nn.Module) -> Tensor:
    """A 1×1 convolution as Σ_c over (B, C, *spatial), without torch's convolution."""
    weight = conv.weight.flatten(1)
    y = torch.einsum("oc,bc...->bo...", weight, x)
    if conv.bias is not None:
        y = y + conv.bias.view(1, -1, *[1] * (x.dim() - 2))
    return y


def pooled(x: Tensor, cell: Sequence[int] | None = None) -> Tensor:
    """Max over cells, of 2 in space (not over time in 3-D) by default, odd rests dropped, in loops."""
    spatial = x.shape[2:]
    if cell is None:
        cell = [1 if len(spatial) == 3 and i == 0 else 2 for i in range(len(spatial))]
    steps = [min(step, size) for step, size in zip(cell, spatial, strict=True)]
    sizes = [s // step for s, step in zip(spatial, steps, strict=True)]
    result = x.new_empty(*x.shape[:2], *sizes)
    for place in itertools.product(*map(range, sizes)):
        window = [slice(p * s, p * s + s) for p, s in zip(place, steps, strict=True)]
        result[(..., *place)] = x[(..., *window)].flatten(2).amax(-1)
    return result


def rows(x: Tensor) -> list[list[list[float]]]:
    """(B, C, *spatial) as nested lists [b][position][channel]."""
    return x.flatten(2).transpose(1, 2).tolist()


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def pairwise(q: Tensor, k: Tensor, mode: str, scale: float, weight: Tensor | None) -> Tensor:
    """f(x_i, x_j) / C(x) by loops over i and j: (B, N, M) float64."""
    result = []
    for queries, keys in zip(rows(q), rows(k), strict=True):
        table = []
        for q_i in queries:
            if mode in ("gaussian", "embedded_gaussian"):
                row = softmax([scale * dot(q_i, k_j) for k_j in keys])
            elif mode == "dot_product":
                row = [dot(q_i, k_j) / len(keys) for k_j in keys]
            else:
                w = weight.flatten().tolist()
                row = [max(0.0, dot(w, q_i + k_j)) / len(keys) for k_j in keys]
            table.append(row)
        result.append(table)
    return torch.tensor(result, dtype=torch.float64)


def attended(attention: Tensor, v: Tensor, like: Tensor) -> Tensor:
    """Σ_j A_ij v_j by loops: (B, C', *spatial of like)."""
    result = []
    for table, values in zip(attention.tolist(), rows(v), strict=True):
        columns = list(zip(*values, strict=True))
        result.append([[dot(row, list(column)) for column in columns] for row in table])
    y = torch.tensor(result, dtype=torch.float64).transpose(1, 2)
    return y.reshape(y.shape[0], y.shape[1], *like.shape[2:])


def non_local(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The block's branch before its norm, and its map, from the block's parameters."""
    sub, before = block.sub_sample, block.pool_order == "before_conv"
    smaller = functools.partial(pooled, cell=sub if isinstance(sub, list) else None)
    source = smaller(x) if sub and before else x
    late = smaller if sub and not before else (lambda t: t)
    if block.mode == "gaussian":
        q, k = x, smaller(x) if sub else x
    else:
        q, k = conv1x1(x, block.theta), late(conv1x1(source, block.phi))
    v = late(conv1x1(source, block.g))
    scale = 1 / math.sqrt(q.shape[1]) if block.use_scale else 1.0
    weight = block.concat_project.weight if block.mode == "concatenation" else None
    attention = pairwise(q, k, block.mode, scale, weight)
    return conv1x1(attended(attention, v, x), block.out), attention


def batch_norm(x: Tensor, bn: nn.Module, *, training: bool) -> Tensor:
    """BatchNorm over (B, C, *spatial) from its definition."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    axes = [0, *range(2, x.dim())]
    mean = x.mean(axes) if training else bn.running_mean
    var = x.var(axes, unbiased=False) if training else bn.running_var
    centred = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + bn.eps)
    return centred * bn.weight.view(shape) + bn.bias.view(shape)
