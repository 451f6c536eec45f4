"""The non-local block and self-attention against loops over positions, and their options."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from nlsurgery.blocks import NonLocal, SelfAttention, few
from nlsurgery.errors import BlockError

from .cases import BFLOAT16, MODES, feature_map, randomised
from .reference import attended, batch_norm, conv1x1, non_local, pairwise

EXACT = {"rtol": 1e-10, "atol": 1e-10}

FORMS = [
    pytest.param(
        dims,
        {"mode": mode, **pool, **scale},
        id="-".join(map(str, (mode, f"{dims}d", *pool.values(), *scale))),
    )
    for dims, mode, pool, scale in itertools.product(
        (1, 2, 3),
        MODES,
        (
            {},
            {"sub_sample": True, "pool_order": "after_conv"},
            {"sub_sample": True, "pool_order": "before_conv"},
        ),
        ({}, {"use_scale": True}),
    )
    if not (scale and mode in ("dot_product", "concatenation"))
]


@pytest.mark.usefixtures("positions")
@pytest.mark.parametrize(("dims", "options"), FORMS)
def test_matches_the_formula(dims, options):
    x = feature_map(dims)
    block = randomised(NonLocal(6, 4, dims=dims, **options).double()).eval()
    branch, attention = non_local(block, x)
    torch.testing.assert_close(block.attention(x), attention, **EXACT)
    expected = x + batch_norm(branch, block.bn, training=False)
    torch.testing.assert_close(block(x), expected, **EXACT)


CELLS = [(1, [3]), (2, [3, 2]), (2, [1, 3]), (2, [9, 1]), (3, [2, 2, 2]), (3, [1, 1, 2])]


@pytest.mark.usefixtures("positions")
@pytest.mark.parametrize("pool_order", ["after_conv", "before_conv"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dims", "cell"), CELLS, ids=str)
def test_keys_pooled_by_other_sizes_match_the_formula(dims, cell, mode, pool_order):
    x = feature_map(dims)
    options = {"mode": mode, "sub_sample": cell, "pool_order": pool_order}
    block = randomised(NonLocal(6, 4, dims=dims, **options).double()).eval()
    branch, attention = non_local(block, x)
    assert attention.shape[2] < attention.shape[1]
    torch.testing.assert_close(block.attention(x), attention, **EXACT)
    expected = x + batch_norm(branch, block.bn, training=False)
    torch.testing.assert_close(block(x), expected, **EXACT)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("sub_sample", [False, True, [2, 1, 2]], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_windows_of_a_clip_are_clips_of_their_own(mode, sub_sample, training, last):
    x = torch.randn(2, 6, 6, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if last:
        x = x.to(memory_format=torch.channels_last_3d)
    options = {"dims": 3, "mode": mode, "sub_sample": sub_sample}
    block = randomised(NonLocal(6, 4, **options, temporal_window=2).double()).train(training)
    whole = NonLocal(6, 4, **options).double()
    whole.load_state_dict(block.state_dict())
    parts = [non_local(whole, part) for part in x.split(2, dim=2)]
    branch = torch.cat([branch for branch, _ in parts], 2)
    expected = x + batch_norm(branch, block.bn, training=training)
    y = block(x)
    torch.testing.assert_close(y, expected, **EXACT)
    assert y.stride() == x.stride()
    rows = block.attention(x)
    for item in range(2):
        map_ = torch.block_diag(*[attention[item] for _, attention in parts])
        torch.testing.assert_close(rows[item], map_, **EXACT)
    queries = torch.tensor([71, 0, 30, 30])
    torch.testing.assert_close(block.attention(x, queries=queries), rows[:, queries], **EXACT)


def test_windows_train_as_their_own_clips_do():
    x = torch.randn(2, 6, 4, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block = randomised(NonLocal(6, 4, dims=3, temporal_window=2, norm="none").double())
    whole = NonLocal(6, 4, dims=3, norm="none").double()
    whole.load_state_dict(block.state_dict())
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    block(mine).square().sum().backward()
    torch.cat([whole(part) for part in theirs.split(2, dim=2)], 2).square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, **EXACT)
    for one, other in zip(block.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, **EXACT)


def test_no_clips_in_windows():
    block = NonLocal(6, dims=3, temporal_window=2).eval()
    assert block(torch.zeros(0, 6, 4, 3, 3)).shape == (0, 6, 4, 3, 3)


def test_a_clip_that_windows_do_not_divide_is_a_block_error():
    block = NonLocal(6, dims=3, temporal_window=4)
    for run in (block, block.attention):
        with pytest.raises(BlockError, match=r"temporal_window=4 must divide the frames.* 6"):
            run(torch.zeros(1, 6, 6, 2, 2))


@pytest.mark.parametrize("sub_sample", [[1, 2, 2], (1, 2, 2), True], ids=str)
def test_the_published_pool_has_one_name(sub_sample):
    assert NonLocal(6, dims=3, sub_sample=sub_sample).sub_sample is True
    assert NonLocal(6, dims=3, sub_sample=[1, 1, 1]).sub_sample is False


@pytest.mark.usefixtures("positions")
@pytest.mark.parametrize("mode", MODES)
def test_matches_the_formula_without_norm_and_bias(mode):
    x = feature_map(2)
    block = randomised(NonLocal(6, 4, mode=mode, norm="none", bias=False).double())
    assert all(m.bias is None for m in block.modules() if isinstance(m, nn.Conv2d))
    torch.testing.assert_close(block(x), x + non_local(block, x)[0], **EXACT)


def test_train_mode_normalises_by_the_batch():
    x = feature_map(2)
    block = randomised(NonLocal(6, 4).double()).train()
    branch, _ = non_local(block, x)
    expected = x + batch_norm(branch, block.bn, training=True)
    torch.testing.assert_close(block(x), expected, **EXACT)


@pytest.mark.parametrize("norm", ["ln", "gn"])
def test_other_norms_match_their_definition(norm):
    x = feature_map(2)
    block = randomised(NonLocal(6, 4, norm=norm).double())
    branch, _ = non_local(block, x)
    module = block.norm
    # gn: gcd(32, 6) = 2 groups of 3 channels, over space too; ln: all channels of one position.
    grouped = branch.reshape(2, 2, 3, 3, 4)
    axes, values = ((2, 3, 4), grouped) if norm == "gn" else ((1,), branch)
    mean, var = values.mean(axes, keepdim=True), values.var(axes, unbiased=False, keepdim=True)
    normed = ((values - mean) / torch.sqrt(var + module.eps)).reshape(branch.shape)
    expected = x + normed * module.weight.view(1, -1, 1, 1) + module.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(block(x), expected, **EXACT)


@pytest.mark.usefixtures("positions")
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_self_attention_matches_the_formula(dims):
    x = feature_map(dims)
    block = randomised(SelfAttention(6, 2, dims=dims).double())
    attention = pairwise(
        conv1x1(x, block.query), conv1x1(x, block.key), "embedded_gaussian", 1.0, None
    )
    torch.testing.assert_close(block.attention(x), attention, **EXACT)
    expected = x + block.gamma * attended(attention, conv1x1(x, block.value), x)
    torch.testing.assert_close(block(x), expected, **EXACT)


@pytest.mark.parametrize("mode", ["gaussian", "embedded_gaussian"])
def test_rows_of_softmax_maps_sum_to_one(mode):
    x = feature_map(2, dtype=torch.float32)
    rows = NonLocal(6, mode=mode, sub_sample=True).attention(x)
    assert rows.shape == (2, 12, 2)
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 12))


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("gaussian", {"g", "out", "bn"}),
        ("embedded_gaussian", {"theta", "phi", "g", "out", "bn"}),
        ("dot_product", {"theta", "phi", "g", "out", "bn"}),
        ("concatenation", {"theta", "phi", "g", "out", "bn", "concat_project"}),
    ],
)
def test_children_have_the_field_s_names(mode, names):
    assert {name for name, _ in NonLocal(6, mode=mode).named_children()} == names


def test_self_attention_children_have_the_field_s_names():
    keys = set(SelfAttention(8).state_dict())
    convs = {f"{n}.{p}" for n in ("query", "key", "value") for p in ("weight", "bias")}
    assert keys == convs | {"gamma"}


@pytest.mark.parametrize(("channels", "inner"), [(1, 1), (2, 1), (7, 3), (1024, 512)])
def test_inter_channels_default_to_half(channels, inner):
    assert NonLocal(channels).inter_channels == inner


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "dot_product", "use_scale": True}, "use_scale"),
        ({"mode": "concatenation", "use_scale": True}, "use_scale"),
        ({"mode": "softmax"}, "'embedded_gaussian'"),
        ({"norm": "batch"}, "'bn'"),
        ({"pool_order": "after"}, "'before_conv'"),
        ({"sub_sample": 2}, "2 positive sizes.*got 2"),
        ({"sub_sample": [1, 2, 2]}, "2 positive sizes"),
        ({"sub_sample": [0, 2]}, "2 positive sizes"),
        ({"sub_sample": [2.0, 2]}, "2 positive sizes"),
        ({"temporal_window": 4}, "temporal_window=4 is of clips.*dims=2"),
        ({"dims": 3, "temporal_window": 0}, "positive number of frames"),
        ({"dims": 3, "temporal_window": 3, "sub_sample": [2, 2, 2]}, "multiple of the 2 frames"),
        ({"dims": 4}, "dims must be 1, 2 or 3"),
        ({"inter_channels": 0}, "out_channels must be a positive int"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_wrong_options_are_block_errors(options, message):
    with pytest.raises(BlockError, match=message):
        NonLocal(6, **options)


@pytest.mark.parametrize("shape", [(2, 5, 3, 3), (6, 3, 3), (2, 6, 3), (2, 6, 2, 3, 3)])
@pytest.mark.parametrize("block", [NonLocal(6), SelfAttention(6)], ids=["non_local", "sagan"])
def test_wrong_input_is_a_block_error(block, shape):
    with pytest.raises(BlockError, match=r"expects \(B, 6, H, W\), got \("):
        block(torch.zeros(shape))


@pytest.mark.parametrize("norm", ["bn", "gn", "none"])
@pytest.mark.parametrize("mode", ["embedded_gaussian", "dot_product"])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_few_values_take_fewer_calls(monkeypatch, dims, dtype, mode, norm):
    def run(block, x):
        y = block(x)
        return [y, *torch.autograd.grad(y, [x, *block.parameters()], upstream)]

    block = NonLocal(64, dims=dims, mode=mode, norm=norm, zero_init=False, bias=norm != "none")
    block = randomised(block, std=0.1).to(dtype)
    x = torch.randn(2, 64, *(4, 3, 3)[:dims]).to(dtype).requires_grad_()
    upstream = torch.randn_like(x)
    seen = []
    monkeypatch.setattr(
        "nlsurgery.blocks.non_local.few_non_local",
        lambda *given: seen.append(few.few_non_local(*given)) or seen[-1],
    )
    found = run(block, x)
    assert len(seen) == 1
    assert seen[0] is found[0]
    monkeypatch.setattr(few, "FEW_VALUES", x.numel())
    other = run(block, x)
    assert len(seen) == 1
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for one, another in zip(found, other, strict=True):
        assert (one - another).norm() <= limit * another.norm() + limit


def test_few_values_of_what_has_to_be_called_are_not_taken(monkeypatch):
    block = NonLocal(8, zero_init=False)
    x = torch.randn(2, 8, 3, 3)
    plain = block(x)
    for name in ("theta", "phi", "g", "out"):
        hook = getattr(block, name).register_forward_hook(lambda *args: 2 * args[2])
        assert not torch.allclose(block(x), plain), name
        hook.remove()
    torch.testing.assert_close(block(x), plain)
    assert few.are_few(x)
    assert not few.are_few(x.to(memory_format=torch.channels_last))
    assert not few.are_few(x.half())
    assert not few.are_few(nn.Parameter(x))
    with torch.autocast("cpu"):
        assert not few.are_few(x)
        assert block(x).dtype == torch.float32
    given = x, (block.theta, block.phi, block.g), block.out, block.bn, block.mode, 1.0
    monkeypatch.setattr(few, "FEW_WEIGHTS", 3 * 4 * 8)
    assert few.few_non_local(*given) is not None
    monkeypatch.setattr(few, "FEW_WEIGHTS", 3 * 4 * 8 - 1)
    assert few.few_non_local(*given) is None
    torch.testing.assert_close(block(x), plain)


@pytest.mark.usefixtures("positions")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [(0,), (0, 4), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_maps_of_no_positions(monkeypatch, mode, batch, size, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = torch.randn(batch, 8, *size)
    block = NonLocal(8, dims=len(size), mode=mode, zero_init=False).eval()
    assert block(x).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_few_values_of_self_attention(monkeypatch, dims, dtype):
    seen = []
    monkeypatch.setattr(
        "nlsurgery.blocks.self_attention.few_attended",
        lambda *given: seen.append(few.few_attended(*given)) or seen[-1],
    )
    block = randomised(SelfAttention(64, dims=dims), std=0.1).to(dtype)
    x = torch.randn(2, 64, *(4, 3, 3)[:dims]).to(dtype).requires_grad_()
    upstream = torch.randn_like(x)
    found = []
    for values in (few.FEW_VALUES, x.numel()):
        monkeypatch.setattr(few, "FEW_VALUES", values)
        y = block(x)
        found.append([y, *torch.autograd.grad(y, [x, *block.parameters()], upstream)])
        assert [y is None for y in seen] == [False]
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for one, another in zip(*found, strict=True):
        assert (one - another).norm() <= limit * another.norm() + limit
    hook = block.value.register_forward_hook(lambda *args: 2 * args[2])
    monkeypatch.setattr(few, "FEW_VALUES", x.numel() + 1)
    assert not torch.allclose(block(x), found[0][0], rtol=0.05)
    assert seen[-1] is None
    hook.remove()
