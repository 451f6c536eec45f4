"""Attention of bfloat16 on a CPU: as near to the formula as float32 logits, whatever the logits are."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from nlsurgery.blocks import NonLocal, affinity_softmax
from nlsurgery.blocks.affinity_softmax import FEW_ROWS, _Logits, softmax_attend


@pytest.fixture(autouse=True, params=[0, 1 << 62], ids=["rounded", "float32"])
def _product(monkeypatch, request):
    """Small inputs take the product that large maps take, and the one that small maps take."""
    monkeypatch.setattr(affinity_softmax, "FEW_PRODUCTS", request.param)
    monkeypatch.setattr(affinity_softmax, "KEPT_BYTES", request.param)


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
    """Rows that the few do not contain: each looks at three keys of its own, with logits near 60."""
    q, k, v = tokens()
    for row in range(5, 400, 36):
        assert row % (400 // FEW_ROWS) != 0
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


@pytest.mark.parametrize("channels_first", [False, True], ids=["tokens", "channels"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_as_near_as_float32_logits(case, scale, channels_first):
    half = [t.bfloat16() for t in case()]
    if channels_first:
        half = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in half]
    exact = [t.double().requires_grad_() for t in half]
    half = [t.requires_grad_() for t in half]
    y = softmax_attend(*half, scale, "chunked")
    z = softmax_attend(*exact, scale, "explicit")
    assert distance(y, z) < 3e-3
    upstream = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    given = torch.autograd.grad(y, half, upstream)
    for gradient, expected in zip(
        given, torch.autograd.grad(z, exact, upstream.double()), strict=True
    ):
        assert distance(gradient, expected) < 1e-2


def test_every_row_of_unlike_ones():
    q, k, v = (t.bfloat16() for t in some_rows_are_unlike())
    y = softmax_attend(q, k, v, 1.0, "chunked").double()
    exact = softmax_attend(q.double(), k.double(), v.double(), 1.0, "explicit")
    assert ((y - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 2e-2


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_row_that_is_not_finite_spoils_no_other(bad):
    q, k, v = (t.bfloat16() for t in tokens())
    good = softmax_attend(q, k, v, 1.0, "chunked")
    q[0, ::24] = bad
    y = softmax_attend(q, k, v, 1.0, "chunked")
    rest = torch.ones(400, dtype=torch.bool)
    rest[::24] = False
    torch.testing.assert_close(y[:, rest], good[:, rest], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("_product", [0], indirect=True)
def test_the_guess_is_near_the_largest_logits_of_like_keys():
    q, k, _ = (t.bfloat16() for t in plain())
    guess = _Logits(q, k, 1.0).guess()
    top = torch.bmm(q.float(), k.float().transpose(1, 2)).amax(-1, keepdim=True)
    assert guess is not None
    assert (top - guess.float()).square().mean().sqrt() < 0.5 * top.square().mean().sqrt()
    assert _Logits(0.01 * q, k, 1.0).guess() is None


def test_memory_that_a_thread_keeps_serves_every_mode_and_no_two_threads():
    block = NonLocal(8, 32, implementation="chunked", zero_init=False).bfloat16().eval()
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
