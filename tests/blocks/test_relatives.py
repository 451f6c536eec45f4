"""The relatives of the non-local block against loops over positions, in float64."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nlsurgery.blocks import (
    AsymmetricNonLocal,
    ChannelAttention,
    CompactGeneralizedNonLocal,
    ConvolutionalAttention,
    CrissCross,
    DisentangledNonLocal,
    DoubleAttention,
    DualAttention,
    EfficientAttention,
    EfficientChannelAttention,
    ExpectationMaximisation,
    GeneralizedAttention,
    GlobalContextAdd,
    GlobalContextMul,
    HardNonLocal,
    MultiHeadNonLocal,
    SqueezeExcitation,
    block_type,
)
from nlsurgery.errors import BlockError

from .cases import default_dtype, feature_map, randomised
from .reference import attended, batch_norm, conv1x1, dot, pairwise, pooled, rows, softmax

EXACT = {"rtol": 1e-10, "atol": 1e-10}
DIMS = pytest.mark.parametrize("dims", [1, 2, 3])


def made(kind, dims=2, **options):
    return randomised(kind(6, dims=dims, **options).double()).eval()


def like_map(values: list, x: Tensor) -> Tensor:
    """[b][position][channel] as (B, C, *spatial)."""
    y = torch.tensor(values, dtype=torch.float64).transpose(1, 2)
    return y.reshape(y.shape[0], -1, *x.shape[2:])


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def per_channel(x: Tensor) -> list:
    return x.flatten(2).tolist()


def projected(block, y: Tensor, x: Tensor) -> Tensor:
    return x + batch_norm(conv1x1(y, block.out), block.bn, training=False)


def vector(values: list[list[float]], x: Tensor) -> Tensor:
    """[b][channel] as (B, C, 1, …)."""
    return torch.tensor(values, dtype=torch.float64).view(len(values), -1, *[1] * (x.dim() - 2))


def squeezed(block, x: Tensor, reduce) -> Tensor:
    values = vector([[reduce(c) for c in item] for item in per_channel(x)], x)
    return conv1x1(conv1x1(values, block.fc1).clamp(min=0), block.fc2)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


@DIMS
def test_se(dims):
    x, block = feature_map(dims), made(SqueezeExcitation, dims, reduction=2)
    expected = x * torch.sigmoid(squeezed(block, x, mean))
    torch.testing.assert_close(block(x), x + block.gamma * (expected - x), **EXACT)


@DIMS
def test_eca(dims):
    x, block = feature_map(dims), made(EfficientChannelAttention, dims, kernel_size=3)
    w = block.conv.weight.flatten().tolist()
    scales = []
    for item in per_channel(x):
        m = [0.0, *map(mean, item), 0.0]
        scales.append([sigmoid(dot(w, m[c : c + 3])) for c in range(6)])
    expected = x * vector(scales, x)
    torch.testing.assert_close(block(x), x + block.gamma * (expected - x), **EXACT)


@pytest.mark.parametrize(("channels", "size"), [(64, 3), (256, 5), (512, 5), (1, 1)])
def test_eca_s_kernel_grows_with_the_channels(channels, size):
    assert EfficientChannelAttention(channels).conv.kernel_size == (size,)


@DIMS
def test_cbam(dims):
    x, block = feature_map(dims), made(ConvolutionalAttention, dims, reduction=2, kernel_size=3)
    y = x * torch.sigmoid(squeezed(block, x, mean) + squeezed(block, x, max))
    w, spatial = block.spatial.weight[0], x.shape[2:]
    expected = torch.empty_like(x)
    for b in range(x.shape[0]):
        for place in itertools.product(*map(range, spatial)):
            total = 0.0
            for step in itertools.product(*[range(3)] * dims):
                at = tuple(p + s - 1 for p, s in zip(place, step, strict=True))
                if all(0 <= p < size for p, size in zip(at, spatial, strict=True)):
                    values = y[(b, slice(None), *at)].tolist()
                    total += w[(0, *step)].item() * mean(values)
                    total += w[(1, *step)].item() * max(values)
            index = (b, slice(None), *place)
            expected[index] = y[index] * sigmoid(total)
    torch.testing.assert_close(block(x), x + block.gamma * (expected - x), **EXACT)


@pytest.mark.parametrize("kind", [GlobalContextAdd, GlobalContextMul])
@DIMS
def test_global_context(dims, kind):
    x, block = feature_map(dims), made(kind, dims, reduction=2)
    logits = conv1x1(x, block.conv_mask)
    context = []
    for item, mask in zip(per_channel(x), per_channel(logits), strict=True):
        weights = softmax(mask[0])
        context.append([dot(weights, channel) for channel in item])
    transform = block.channel_add_conv if kind is GlobalContextAdd else block.channel_mul_conv
    hidden = conv1x1(vector(context, x), transform[0])
    norm = transform[1]
    centred = hidden - hidden.mean(1, keepdim=True)
    var = (centred**2).mean(1, keepdim=True)
    hidden = centred / torch.sqrt(var + norm.eps) * norm.weight + norm.bias
    t = conv1x1(hidden.clamp(min=0), transform[3])
    blended = block.gamma * (x * torch.sigmoid(t) - x) if kind is GlobalContextMul else t
    torch.testing.assert_close(block(x), x + blended, **EXACT)


def channel_reference(x: Tensor) -> Tensor:
    result = []
    for item in per_channel(x):
        maps = []
        for c in item:
            energy = [dot(c, d) for d in item]
            maps.append(softmax([max(energy) - e for e in energy]))
        columns = list(zip(*item, strict=True))
        result.append([[dot(row, list(column)) for column in columns] for row in maps])
    return torch.tensor(result, dtype=torch.float64).view(x.shape)


@DIMS
def test_danet_channel(dims):
    x, block = feature_map(dims), made(ChannelAttention, dims)
    torch.testing.assert_close(block(x), x + block.gamma * channel_reference(x), **EXACT)


def test_danet_both():
    x, block = feature_map(2), made(DualAttention, reduction=2)
    position = block.position
    q, k = conv1x1(x, position.query), conv1x1(x, position.key)
    attention = pairwise(q, k, "embedded_gaussian", 1.0, None)
    expected = x + position.gamma * attended(attention, conv1x1(x, position.value), x)
    expected = expected + block.channel.gamma * channel_reference(x)
    torch.testing.assert_close(block(x), expected, **EXACT)


@pytest.mark.parametrize("recurrence", [1, 2])
def test_criss_cross(recurrence):
    x, block = feature_map(2), made(CrissCross, reduction=2, recurrence=recurrence)
    z = x
    for _ in range(recurrence):
        q, k, v = (conv1x1(z, c) for c in (block.query_conv, block.key_conv, block.value_conv))
        y = torch.empty_like(z)
        height, width = z.shape[2:]
        for b, h, w in itertools.product(range(z.shape[0]), range(height), range(width)):
            places = sorted({(h, j) for j in range(width)} | {(i, w) for i in range(height)})
            assert len(places) == height + width - 1
            query = q[b, :, h, w].tolist()
            weights = softmax([dot(query, k[b, :, i, j].tolist()) for i, j in places])
            y[b, :, h, w] = sum(
                a * v[b, :, i, j] for a, (i, j) in zip(weights, places, strict=True)
            )
        z = z + block.gamma * y
    torch.testing.assert_close(block(x), z, **EXACT)


def summary_reference(v, k, q, heads, x):
    """Per head: V softmax_positions(K)ᵀ softmax_channels(Q), as loops."""
    result = []
    size = v.shape[1] // heads
    for values, keys, queries in zip(*map(per_channel, (v, k, q)), strict=True):
        channels = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            weights = [softmax(row) for row in keys[part]]
            gathered = [[dot(c, w) for w in weights] for c in values[part]]
            columns = [softmax(list(column)) for column in zip(*queries[part], strict=True)]
            channels += [[dot(row, column) for column in columns] for row in gathered]
        result.append(channels)
    return torch.tensor(result, dtype=torch.float64).view(x.shape[0], -1, *x.shape[2:])


@DIMS
def test_double_attention(dims):
    x, block = feature_map(dims), made(DoubleAttention, dims, reduction=2)
    maps = (conv1x1(x, c) for c in (block.features, block.gather, block.distribute))
    torch.testing.assert_close(
        block(x), projected(block, summary_reference(*maps, 1, x), x), **EXACT
    )


@pytest.mark.parametrize("heads", [1, 3])
@DIMS
def test_efficient_attention(dims, heads):
    x, block = feature_map(dims), made(EfficientAttention, dims, reduction=1, heads=heads)
    maps = (conv1x1(x, c) for c in (block.g, block.phi, block.theta))
    expected = projected(block, summary_reference(*maps, heads, x), x)
    torch.testing.assert_close(block(x), expected, **EXACT)


def anchors(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Adaptive average pooling in loops: cell c of s covers floor(cL/s) to ceil((c+1)L/s)."""
    result = []
    for size in sizes:
        for cell in itertools.product(*[range(size)] * (x.dim() - 2)):
            window = [
                slice(c * n // size, -(-(c + 1) * n // size))
                for c, n in zip(cell, x.shape[2:], strict=True)
            ]
            result.append(x[(slice(None), slice(None), *window)].flatten(2).mean(2))
    return torch.stack(result, dim=2)


@DIMS
def test_asymmetric(dims):
    x, block = feature_map(dims), made(AsymmetricNonLocal, dims, sizes=(1, 2, 3))
    k, v = (anchors(conv1x1(x, c), (1, 2, 3)) for c in (block.phi, block.g))
    attention = pairwise(conv1x1(x, block.theta), k, "embedded_gaussian", 3**-0.5, None)
    torch.testing.assert_close(block.attention(x), attention, **EXACT)
    torch.testing.assert_close(block(x), projected(block, attended(attention, v, x), x), **EXACT)


def unit(columns: list[list[float]]) -> list[list[float]]:
    return [[v / max(1e-12, math.sqrt(dot(c, c))) for v in c] for c in columns]


def em_reference(block, x: Tensor) -> tuple[Tensor, list]:
    """Rounds of assignment and update, then reconstruction: the map, and the bases found."""
    tokens = rows(conv1x1(x, block.features))
    result, found = [], []
    for item in tokens:
        bases = block.bases.mu[0].T.tolist()
        for _ in range(block.bases.stages):
            assigned = [softmax([dot(t, m) for m in bases]) for t in item]
            totals = [math.fsum(a[n] for a in assigned) + 1e-6 for n in range(len(bases))]
            bases = unit(
                [
                    [
                        math.fsum(a[n] / total * t[c] for a, t in zip(assigned, item, strict=True))
                        for c in range(len(item[0]))
                    ]
                    for n, total in enumerate(totals)
                ]
            )
        found.append(bases)
        last = [softmax([dot(t, m) for m in bases]) for t in item]
        columns = [list(column) for column in zip(*bases, strict=True)]
        result.append([[max(0.0, dot(a, column)) for column in columns] for a in last])
    return like_map(result, x), found


@DIMS
def test_ema(dims):
    x, block = feature_map(dims), made(ExpectationMaximisation, dims, num_bases=3)
    y, _ = em_reference(block, x)
    before = block.bases.mu.clone()
    torch.testing.assert_close(block(x), projected(block, y, x), rtol=1e-9, atol=1e-9)
    assert torch.equal(block.bases.mu, before), "eval leaves the bases"


def test_ema_s_bases_follow_in_training():
    x, block = feature_map(2), made(ExpectationMaximisation, num_bases=3).train()
    _, found = em_reference(block, x)
    average = torch.tensor(found, dtype=torch.float64).mean(0).T
    expected = 0.9 * block.bases.mu[0] + 0.1 * average
    block(x)
    torch.testing.assert_close(block.bases.mu[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_ema_s_forward_runs_again_from_the_bases_it_had(use_reentrant):
    x, block = feature_map(2).requires_grad_(), made(ExpectationMaximisation, num_bases=3).train()
    for _ in range(2):
        other = copy.deepcopy(block)
        (wanted,) = torch.autograd.grad(other(x).square().sum(), x)
        x.grad = None
        checkpoint(block, x, use_reentrant=use_reentrant).square().sum().backward()
        assert torch.equal(x.grad, wanted)
        assert torch.equal(block.bases.mu, other.bases.mu)


def test_ema_learns_its_features():
    block = made(ExpectationMaximisation, num_bases=3)
    block(feature_map(2)).square().sum().backward()
    assert block.features.weight.grad.abs().sum() > 0


@DIMS
def test_disentangled(dims):
    x, block = feature_map(dims), made(DisentangledNonLocal, dims, temperature=0.5)
    q, k = conv1x1(x, block.theta), conv1x1(x, block.phi)
    axes = tuple(range(2, x.dim()))
    q, k = q - q.mean(axes, keepdim=True), k - k.mean(axes, keepdim=True)
    whitened = pairwise(q, k, "embedded_gaussian", 3**-0.5 / 0.5, None)
    torch.testing.assert_close(block.attention(x), whitened, **EXACT)
    unary = [softmax(item[0]) for item in per_channel(conv1x1(x, block.conv_mask))]
    total = whitened + torch.tensor(unary, dtype=torch.float64).unsqueeze(1)
    y = attended(total, conv1x1(x, block.g), x)
    torch.testing.assert_close(block(x), projected(block, y, x), **EXACT)


@pytest.mark.parametrize("groups", [1, 3])
@DIMS
def test_compact_generalized(dims, groups):
    x = feature_map(dims)
    block = made(CompactGeneralizedNonLocal, dims, reduction=1, groups=groups, norm="bn")
    q, k, v = (conv1x1(x, c) for c in (block.theta, block.phi, block.g))
    y, size = torch.empty_like(q), 6 // groups
    for b, group in itertools.product(range(x.shape[0]), range(groups)):
        part = slice(group * size, (group + 1) * size)
        keys, values = k[b, part].flatten().tolist(), v[b, part].flatten().tolist()
        y[b, part] = q[b, part] * (dot(keys, values) / len(keys))
    out = block.out
    parts = []
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        weight = out.weight.flatten(1)[part]
        parts.append(torch.einsum("oc,bc...->bo...", weight, y[:, part]))
    z = torch.cat(parts, 1) + out.bias.view(1, -1, *[1] * dims)
    expected = x + batch_norm(z, block.bn, training=False)
    torch.testing.assert_close(block(x), expected, **EXACT)


@pytest.mark.parametrize("sub_sample", [False, True], ids=["all", "sub"])
@DIMS
def test_multi_head(dims, sub_sample):
    x = feature_map(dims)
    block = made(MultiHeadNonLocal, dims, reduction=1, heads=3, sub_sample=sub_sample)
    late = pooled if sub_sample else (lambda t: t)
    q, k, v = conv1x1(x, block.theta), late(conv1x1(x, block.phi)), late(conv1x1(x, block.g))
    parts, maps = [], []
    for head in range(3):
        part = slice(2 * head, 2 * head + 2)
        maps.append(pairwise(q[:, part], k[:, part], "embedded_gaussian", 2**-0.5, None))
        parts.append(attended(maps[-1], v[:, part], x))
    torch.testing.assert_close(block.attention(x), sum(maps) / 3, **EXACT)
    torch.testing.assert_close(block(x), projected(block, torch.cat(parts, 1), x), **EXACT)


@pytest.mark.parametrize("top_k", [1, 3, 100])
@DIMS
def test_hard(dims, top_k):
    x, block = feature_map(dims), made(HardNonLocal, dims, top_k=top_k)
    q, k = conv1x1(x, block.theta), conv1x1(x, block.phi)
    soft = pairwise(q, k, "embedded_gaussian", 3**-0.5, None)
    hard = torch.zeros_like(soft)
    for b, i in itertools.product(*map(range, soft.shape[:2])):
        order = sorted(range(soft.shape[2]), key=lambda j, r=soft[b, i]: -r[j].item())
        chosen = order[:top_k]
        hard[b, i, chosen] = 1 / len(chosen)
    torch.testing.assert_close(block.attention(x), hard, **EXACT)
    y = attended(hard, conv1x1(x, block.g), x)
    torch.testing.assert_close(block(x), projected(block, y, x), **EXACT)


def test_hard_attention_passes_the_soft_gradient():
    soft = torch.rand(1, 3, 5, dtype=torch.float64, requires_grad=True)
    from nlsurgery.blocks.multi_head import top_k_map

    weights = torch.randn(1, 3, 5, dtype=torch.float64)
    (grad,) = torch.autograd.grad((top_k_map(soft, 2) * weights).sum(), soft)
    assert torch.equal(grad, weights)


def code(offset: int, size: int) -> list[float]:
    angles = [offset * 1000.0 ** (-i / (size // 2)) for i in range(size // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def four_terms(block, x: Tensor) -> tuple[Tensor, Tensor]:
    """The branch of generalized attention and its mean map, in loops."""
    stride, heads = block.kv_stride, block.heads
    size = x.shape[1] // heads
    on = [term == "1" for term in block.terms]
    places = list(itertools.product(*map(range, x.shape[2:])))
    anchors = [p for p in places if all(c % stride == 0 for c in p)]
    zero = torch.zeros_like(x)
    q = conv1x1(x, block.query) if on[0] or on[1] else zero
    k = conv1x1(x, block.key) if on[0] or on[2] else zero
    v = conv1x1(x, block.value)
    y, maps = torch.empty_like(x), torch.zeros(len(x), len(places), len(anchors)).double()
    for b, head, (n, i) in itertools.product(range(len(x)), range(heads), enumerate(places)):
        part = slice(head * size, (head + 1) * size)
        query, logits = q[(b, part, *i)], []
        for j in anchors:
            key, relative = k[(b, part, *j)], 0
            for axis in range(block.dims if on[1] or on[3] else 0):
                codes = torch.tensor(code(i[axis] - j[axis], block.code_size)).double()
                relative = relative + (block.offset[axis].weight @ codes)[part]
            total = 0.0
            if on[0]:
                total += dot(query.tolist(), key.tolist())
            if on[1]:
                total += dot(query.tolist(), relative.tolist())
            if on[2]:
                total += dot(block.content_bias[head].tolist(), key.tolist())
            if on[3]:
                total += dot(block.position_bias[head].tolist(), relative.tolist())
            logits.append(total / math.sqrt(size))
        weights = softmax(logits)
        maps[b, n] += torch.tensor(weights).double() / heads
        y[(b, part, *i)] = sum(w * v[(b, part, *j)] for w, j in zip(weights, anchors, strict=True))
    return conv1x1(y, block.proj), maps


@pytest.mark.parametrize("terms", ["1111", "0010", "1000", "0100", "0001"])
@pytest.mark.parametrize("dims", [2, 3])
def test_generalized(dims, terms):
    x = feature_map(dims)[:, :, :2]
    block = made(GeneralizedAttention, dims, heads=3, terms=terms)
    with default_dtype(torch.float64):
        branch, maps = four_terms(block, x)
    torch.testing.assert_close(block.attention(x), maps, **EXACT)
    torch.testing.assert_close(block(x), x + block.gamma * branch, **EXACT)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("multi_head", {"heads": 4}, "heads must divide the 3 inner channels"),
        ("hard", {"top_k": 0}, "top_k must be at least 1"),
        ("eca", {"kernel_size": 2}, "kernel_size must be odd"),
        ("cbam", {"kernel_size": 4}, "kernel_size must be odd"),
        ("danet", {"part": "all"}, "'position', 'channel', 'both'"),
        ("global_context", {"fusion": "add"}, "'channel_add', 'channel_mul'"),
        ("criss_cross", {"recurrence": 0}, "recurrence must be at least 1"),
        ("criss_cross", {"dims": 3}, "dims must be 2"),
        ("asymmetric", {"sizes": (0,)}, "sizes must be positive"),
        ("ema", {"momentum": 2.0}, "momentum within 0 and 1"),
        ("disentangled", {"temperature": 0.0}, "temperature must be positive"),
        ("generalized", {"heads": 3, "terms": "0000"}, "four of 0 and 1"),
        ("compact_generalized", {"groups": 2}, "heads must divide"),
        ("se", {"reduction": 0}, "reduction must be a positive number"),
    ],
)
def test_wrong_options_are_block_errors(name, options, message):
    with pytest.raises(BlockError, match=message):
        block_type(name).build(6, **{"dims": 2, **options})
