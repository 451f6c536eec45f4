"""Attention of bfloat16 on a CPU: as near to the formula as float32 logits, whatever the logits are."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from nlsurgery.blocks import NonLocal, affinity_chunks
from nlsurgery.blocks.affinity_fused import _mean_logit, _weighty_logit, fused_attend
from nlsurgery.blocks.affinity_softmax import softmax_attend


def tokens(batch: int = 2, count: int = 400, channels: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, count, channels, generator=generator) for _ in range(3))
    return q, k, v


def plain() -> tuple[Tensor, Tensor, Tensor]:
    return tokens()


def all_one_way() -> tuple[Tensor, Tensor, Tensor]:
    """Logits around 40 in every row: a large mean, little spread."""
    q, k, v = tokens()
    return q * 0.3 + 1.1, k * 0.3 + 1.1, v


def all_against() -> tuple[Tensor, Tensor, Tensor]:
    """Logits around -40: the largest is negative."""
    q, k, v = all_one_way()
    return -q, k, v


def some_rows_are_unlike() -> tuple[Tensor, Tensor, Tensor]:
    """Rows that each look at three keys of their own, with logits near 60."""
    q, k, v = tokens()
    for row in range(5, 400, 36):
        k[:, row : row + 3] += 8 * torch.nn.functional.normalize(q[:, row : row + 1], dim=-1)
        q[:, row] *= 4
    return q, k, v


def items_are_unlike() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = tokens()
    return q * torch.tensor([0.01, 3.0]).view(2, 1, 1), k, v


def empty_rows() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = tokens()
    q[:, ::3] = 0
    return q * 2, k, v


def one_key_weighs_nothing() -> tuple[Tensor, Tensor, Tensor]:
    """The first key's weight underflows in every row."""
    q, k, v = tokens()
    q[..., 0], k[..., 0] = 30, 0
    k[:, 0, 0] = -10
    return q, k, v


CASES = [
    plain,
    all_one_way,
    all_against,
    some_rows_are_unlike,
    items_are_unlike,
    empty_rows,
    one_key_weighs_nothing,
]


def distance(y: Tensor, exact: Tensor) -> float:
    y, exact = y.detach(), exact.detach()
    return float((y.double() - exact).norm() / exact.norm())


@pytest.fixture(params=[1 << 24, 1 << 16], ids=["one chunk", "chunks"])
def _chunks(monkeypatch, request):
    monkeypatch.setattr(affinity_chunks, "CHUNK_BYTES", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("form", ["fused", "chunked"])
@pytest.mark.parametrize("channels_first", [False, True], ids=["tokens", "channels"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_as_near_as_float32_logits(case, scale, channels_first, form):
    half = [t.bfloat16() for t in case()]
    if channels_first:
        half = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in half]
    exact = [t.double().requires_grad_() for t in half]
    half = [t.requires_grad_() for t in half]
    y = softmax_attend(*half, scale, form)
    z = softmax_attend(*exact, scale, "explicit")
    assert distance(y, z) < 3e-3
    upstream = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    given = torch.autograd.grad(y, half, upstream)
    for gradient, expected in zip(
        given, torch.autograd.grad(z, exact, upstream.double()), strict=True
    ):
        assert distance(gradient, expected) < 1e-2


@pytest.mark.parametrize("form", ["fused", "chunked"])
@pytest.mark.parametrize("spread", [0.3, 0.03])
@pytest.mark.parametrize(
    ("size", "bound"), [((2, 400), 6e-3), ((1, 200), 7e-3)], ids=["two maps", "one small map"]
)
def test_gradients_where_keys_are_alike(size, bound, spread, form):
    q, k, v = tokens(*size)
    half = [t.bfloat16() for t in (q * 0.3 + 1.1, k * spread + 1.1, v)]
    exact = [t.double().requires_grad_() for t in half]
    half = [t.requires_grad_() for t in half]
    upstream = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    given = torch.autograd.grad(softmax_attend(*half, 1.0, form), half, upstream)
    wanted = torch.autograd.grad(softmax_attend(*exact, 1.0, "explicit"), exact, upstream.double())
    for one, other in zip(given, wanted, strict=True):
        assert distance(one, other) < bound


def test_every_row_of_unlike_ones():
    q, k, v = (t.bfloat16() for t in some_rows_are_unlike())
    y = softmax_attend(q, k, v, 1.0, "fused").double()
    exact = softmax_attend(q.double(), k.double(), v.double(), 1.0, "explicit")
    assert ((y - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 2e-2


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_row_that_is_not_finite_spoils_no_other(bad):
    q, k, v = (t.bfloat16() for t in tokens())
    good = softmax_attend(q, k, v, 1.0, "fused")
    q[0, ::24] = bad
    y = softmax_attend(q, k, v, 1.0, "fused")
    rest = torch.ones(400, dtype=torch.bool)
    rest[::24] = False
    torch.testing.assert_close(y[:, rest], good[:, rest], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("head_size", "value_size"), [(5, 9), (40, 3), (64, 64)])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(200, 3), (5, 300), (1, 1), (130, 129)])
def test_any_sizes(num_queries, num_keys, head_size, value_size):
    generator = torch.Generator().manual_seed(0)
    counts = ((num_queries, head_size), (num_keys, head_size), (num_keys, value_size))
    half = [torch.randn(2, *count, generator=generator).bfloat16() for count in counts]
    exact = [t.double().requires_grad_() for t in half]
    half = [t.requires_grad_() for t in half]
    y = softmax_attend(*half, -0.4, "fused")
    z = softmax_attend(*exact, -0.4, "explicit")
    assert distance(y, z) < 3e-3
    upstream = torch.randn(z.shape, generator=generator).bfloat16()
    given = torch.autograd.grad(y, half, upstream)
    for one, other in zip(given, torch.autograd.grad(z, exact, upstream.double()), strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() <= 1e-2 * other.norm() + 1e-3  # of one key it is 0


def test_no_items_give_no_values():
    q = torch.zeros(0, 6, 4, dtype=torch.bfloat16, requires_grad=True)
    y = softmax_attend(q, q, q, 1.0, "fused")
    assert y.shape == (0, 6, 4)
    y.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("case", CASES)
def test_what_is_subtracted_is_near_the_logits_that_weigh(case):
    q, k, _ = case()
    logits = torch.bmm(q, k.transpose(1, 2))
    total = logits.logsumexp(-1, keepdim=True)
    shift = _weighty_logit(400, total, _mean_logit(q, k, 1.0))
    slack = 1e-3 * (1 + total.abs())
    assert (shift <= total + slack).all()
    assert (shift >= total - torch.tensor(400.0).log() - slack).all()
    if case is plain:
        weighed = (logits.softmax(-1) * logits).sum(-1, keepdim=True)
        assert (shift - weighed).square().mean().sqrt() < 0.2 * weighed.square().mean().sqrt()


def test_the_gradient_of_a_gradient():
    half = [t[:, :40].bfloat16() for t in plain()]
    exact = [t.double().requires_grad_() for t in half]
    half = [t.requires_grad_() for t in half]
    second = []
    for inputs, form in ((half, "fused"), (exact, "explicit")):
        y = softmax_attend(*inputs, 0.2, form)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for one, other in zip(*second, strict=True):
        assert distance(one, other) < 5e-2


@pytest.mark.parametrize("form", ["fused", "chunked"])
def test_memory_that_a_thread_keeps_serves_every_mode_and_no_two_threads(form):
    block = NonLocal(8, 32, implementation=form, zero_init=False).bfloat16().eval()
    x = torch.randn(1, 8, 40, 40).bfloat16()
    with torch.no_grad():
        expected = block(x)
    equal: list[bool] = []

    def repeat() -> None:
        with torch.inference_mode():
            equal.append(torch.equal(block(x), expected))
        y = block(x.clone().requires_grad_())
        y.sum().backward()
        equal.append(torch.equal(y, expected))
        equal.extend(torch.equal(block(x), expected) for _ in range(10))

    threads = [threading.Thread(target=repeat) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 36


@pytest.mark.parametrize("num_bytes", [1 << 24, 1 << 14], ids=["one chunk", "chunks"])
def test_either_layout_trains_alike(monkeypatch, num_bytes):
    monkeypatch.setattr(affinity_chunks, "CHUNK_BYTES", num_bytes)
    block = NonLocal(16, 8, implementation="fused", zero_init=False)
    half = NonLocal(16, 8, implementation="fused", zero_init=False).bfloat16()
    half.load_state_dict(block.state_dict())
    x = torch.randn(2, 16, 12, 13).bfloat16()
    results = []
    for kind, values in ((block.bfloat16().double(), x.double()), (half, x)):
        values = values.clone().requires_grad_()
        y = kind(values)
        y.square().sum().backward()
        results.append((y, values.grad))
    for exact, one in zip(*results, strict=True):
        assert distance(one, exact) < 1e-2


@pytest.mark.parametrize("shape", [(2, 3, 150, 16), (1, 1, 200, 16), (1, 4, 90, 8)], ids=str)
def test_several_heads_and_one_small_map(shape):
    generator = torch.Generator().manual_seed(2)
    half = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    exact = [t.detach().double().requires_grad_() for t in half]
    upstream = torch.randn(shape, generator=generator).bfloat16()
    y = fused_attend(*half, 0.5)
    q, k, v = exact
    expected = (q @ k.transpose(2, 3) * 0.5).softmax(-1) @ v
    assert distance(y, expected) < 3e-3
    found = torch.autograd.grad(y, half, upstream)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert distance(one, other) < 8e-3


@pytest.mark.parametrize("processor", ["mkl", "onednn", "level"])
@pytest.mark.parametrize("form", ["explicit", "fused", "chunked"])
@pytest.mark.parametrize(
    "size", [(1, 200, 32), (3, 300, 64), (9, 100, 32), (4, 196, 128), (1, 1600, 64)], ids=str
)
def test_the_gradient_of_keys_sums_to_nothing(request, processor, form, size):
    """Of inputs that have much in common it is multiplied in the gradient of their weight."""
    request.getfixturevalue(processor)
    batch, count, channels = size
    generator = torch.Generator().manual_seed(0)
    x = 1 + 0.3 * torch.randn(batch, count, 2 * channels, generator=generator)
    weights = torch.randn(3, 2 * channels, channels, generator=generator) / (2 * channels**0.5)
    upstream = torch.randn(batch, count, channels, generator=generator).bfloat16()
    half = [(x @ weight).bfloat16().requires_grad_() for weight in weights]
    exact = [t.detach().double().requires_grad_() for t in half]
    x = x.double().flatten(0, 1).t()
    of_keys = []
    for tokens_, form_ in ((half, form), (exact, "explicit")):
        y = softmax_attend(*tokens_, 1.0, form_)
        (dk,) = torch.autograd.grad(y, tokens_[1], upstream.to(y.dtype))
        of_keys.append(x @ dk.double().flatten(0, 1))
    assert distance(*of_keys) < 1.5e-2
