"""oneDNN's products, and the forms on processors where they are the fastest."""

from __future__ import annotations

import itertools
import math
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nlsurgery.blocks import (
    NonLocal,
    affinity_explicit,
    affinity_row_gradients,
    affinity_rows,
    affinity_softmax,
    products,
)
from nlsurgery.blocks.affinity_explicit import explicit_attend
from nlsurgery.blocks.affinity_rows import logits_at_places, row_attend
from nlsurgery.blocks.affinity_softmax import has_denormal_weights, softmax_attend
from nlsurgery.blocks.attend import attend
from nlsurgery.blocks.choose import choose_implementation, without_denormals
from nlsurgery.blocks.geometry import CHANNELS_LAST, pool_keys, pool_sizes
from nlsurgery.blocks.products import apart, exponentials, factors, product, product_and

from .cases import BFLOAT16, needs_bfloat16

FLOAT32 = torch.float32

LAYOUTS = ("rows", "columns", "rows apart", "columns apart", "neither")


def matrix(rows: int, columns: int, layout: str) -> Tensor:
    """Random values (rows, columns) that lie in memory as ``layout`` says."""
    shape = {
        "rows": (rows, columns),
        "columns": (columns, rows),
        "rows apart": (rows, columns + 7),
        "columns apart": (columns, rows + 7),
        "neither": (rows, 2 * columns),
    }[layout]
    values = torch.randn(shape)
    if layout == "neither":
        return values[:, ::2]
    if layout.startswith("columns"):
        return values[:, :rows].t()
    return values[:, :columns]


@pytest.mark.parametrize(("first", "second"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_products_of_every_layout(first, second):
    a, b = matrix(70, 33, first), matrix(50, 33, second)
    bias, other = torch.randn(50), torch.randn(70, 50)
    plain = a.double() @ b.double().t()
    for found, expected in (
        (product(a, b), plain),
        (product(a, b, bias), plain + bias),
        (product_and("add", other, a, b), plain + other),
        (product_and("mul", other, a, b, bias), (plain + bias) * other),
    ):
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@needs_bfloat16
@pytest.mark.parametrize(("first", "second"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_bfloat16_products_of_every_layout(first, second):
    a, b = (matrix(n, 33, layout).bfloat16() for n, layout in ((70, first), (50, second)))
    bias, other = torch.randn(50) - 40, torch.rand(70, 50).bfloat16()
    plain = a.double() @ b.double().t()
    made = product_and("mul", other, a, b), exponentials(a, b, bias)
    expected = plain * other.double(), (plain + bias).exp()
    for found, exact, absolute in zip(made, expected, (1e-5, 0.0), strict=True):
        assert found.is_contiguous()
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact, rtol=2**-8 + 1e-4, atol=absolute)
    torch.testing.assert_close(product(a, b).double(), plain, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_exponentials_of_all_that_is_well_below_1(dtype):
    x = torch.linspace(-86.0, -17.0, 4000)
    nothing = torch.zeros(1, 8, dtype=dtype), torch.zeros(4000, 8, dtype=dtype)
    found = exponentials(*nothing, x)[0].double()
    error = (found / x.double().exp() - 1).abs().max()
    assert error < (1e-6 if dtype == torch.float32 else 2**-8 + 1e-6)
    assert not exponentials(nothing[0], nothing[1][:3], torch.tensor([-90.0, -200.0, -1e9])).any()


@pytest.mark.parametrize("last", [True, False], ids=["tokens", "channels"])
@pytest.mark.parametrize("scale", [1.0, 0.125, 0.3, -0.7])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_factors_of_scaled_logits(dtype, scale, last):
    layout = "rows" if last else "columns"
    q, k = (matrix(n, 33, layout).to(dtype) for n in (40, 50))
    queries, keys = factors(q, k, scale)
    found = queries.double() @ keys.double().t()
    expected = scale * (q.double() @ k.double().t())
    assert (found - expected).norm() < 2**-15 * expected.norm()
    assert queries.stride(1 if last else 0) == 1
    assert keys.stride(1 if last else 0) == 1


@pytest.mark.parametrize(
    ("maker", "capability", "expected"),
    [
        ("vendor_id : AuthenticAMD", "AVX512", True),
        ("vendor_id : AuthenticAMD", "AVX2", False),
        ("vendor_id : GenuineIntel", "AVX512", False),
        ("Intel64 Family 6 Model 143 Stepping 8, GenuineIntel", "AVX512", False),
    ],
)
def test_the_processor_decides(monkeypatch, maker, capability, expected):
    monkeypatch.setattr(products, "_processor", lambda: maker)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.is_onednn_faster.__wrapped__() == expected


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("faster", [True, False])
def test_bfloat16_is_fused_unless_onednn_multiplies_it(monkeypatch, faster, has):
    monkeypatch.setattr(products, "is_onednn_faster", lambda: faster)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: True)
    assert products.fuses_bfloat16.__wrapped__() == (not (faster and has))


def test_bfloat16_is_fused_where_onednn_does_not_multiply_it(monkeypatch):
    def fails(*_):
        raise RuntimeError("no primitive")

    monkeypatch.setattr(products, "is_onednn_faster", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(products, "exponentials", fails)
    probe = products.multiplies_bfloat16.__wrapped__
    monkeypatch.setattr(products, "multiplies_bfloat16", probe)
    assert products.fuses_bfloat16.__wrapped__()


@needs_bfloat16
def test_what_onednn_multiplies_can_be_asked_among_fake_tensors():
    with FakeTensorMode():
        assert products.multiplies_bfloat16.__wrapped__()


@needs_bfloat16
@pytest.mark.filterwarnings("ignore")
def test_a_recorded_block_may_be_the_first_to_ask_whether_bfloat16_is_multiplied(
    onednn, monkeypatch
):
    found = []

    def probe() -> bool:
        found.append(products.multiplies_bfloat16.__wrapped__())
        return found[-1]

    monkeypatch.setattr(products, "fuses_bfloat16", lambda: not probe())
    block = NonLocal(16, zero_init=False).bfloat16().eval()
    x, other = torch.randn(2, 1, 16, 8, 8).bfloat16()
    traced = torch.jit.trace(block, x)
    assert found
    assert all(found)
    torch.testing.assert_close(traced(other), block(other), rtol=2e-2, atol=2e-2)


def test_the_processor_is_read_from_this_machine():
    assert products._processor()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n", True),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n", False),
        ("AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD", True),
        ("AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", False),
        ("vendor_id\t: CentaurHauls\ncpu family\t: 27\n", False),
        ("vendor_id\t: AuthenticAMD", False),
        ("", False),
    ],
)
def test_the_family_tells_how_many_bits_are_computed_at_a_time(monkeypatch, name, expected):
    monkeypatch.setattr(products, "_processor", lambda: name)
    assert products.is_wide.__wrapped__() == expected


@pytest.mark.usefixtures("onednn")
def test_onednn_turned_off_is_not_used():
    assert products.are_by_onednn(torch.float32, "cpu")
    assert products.are_by_onednn(torch.bfloat16, "cpu")
    assert not products.are_by_onednn(torch.float64, "cpu")
    assert not products.are_by_onednn(torch.float32, "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the way torch asks for the state of other devices
        with torch.backends.mkldnn.flags(enabled=False):
            assert not products.are_by_onednn(torch.float32, "cpu")
            assert not products.are_by_onednn(torch.bfloat16, "cpu")
            assert without_denormals(torch.bfloat16) == "fused"
    assert products.are_by_onednn(torch.float32, "cpu")


@pytest.mark.parametrize(
    ("processor", "dtype", "batch", "num_keys", "size", "expected"),
    [
        ("onednn", torch.float32, 1, 784, 64, "chunked"),
        ("onednn", torch.float32, 8, 784, 256, "chunked"),
        ("onednn", torch.float32, 8, 196, 128, "explicit"),
        ("onednn", torch.float32, 8, 196, 512, "chunked"),
        ("onednn", torch.float32, 1, 3136, 64, "chunked"),
        ("onednn", torch.float32, 1, 720, 8, "explicit"),
        ("onednn", torch.float32, 1, 729, 8, "chunked"),
        ("onednn", torch.float64, 1, 9000, 64, "fused"),
        ("onednn", torch.float16, 1, 9000, 64, "chunked"),
        ("onednn", torch.bfloat16, 1, 49, 64, "explicit"),
        ("onednn", torch.bfloat16, 1, 784, 64, "explicit"),
        ("onednn", torch.bfloat16, 8, 784, 256, "explicit"),
        ("onednn", torch.bfloat16, 8, 784, 64, "chunked"),
        ("onednn", torch.float32, 64, 196, 16, "explicit"),
        ("onednn", torch.float32, 64, 324, 16, "explicit"),
        ("onednn", torch.float32, 64, 400, 16, "chunked"),
        ("onednn", torch.bfloat16, 64, 576, 16, "explicit"),
        ("onednn", torch.bfloat16, 64, 729, 16, "chunked"),
        ("onednn", torch.bfloat16, 1, 3136, 128, "chunked"),
        ("level", torch.float32, 1, 784, 64, "explicit"),
        ("level", torch.float32, 1, 1040, 56, "fused"),
        ("level", torch.float32, 8, 196, 512, "explicit"),
        ("level", torch.float32, 8, 784, 256, "chunked"),
        ("level", torch.float32, 1, 3136, 64, "fused"),
        ("level", torch.float32, 1, 3136, 128, "chunked"),
        ("level", torch.float16, 1, 1040, 56, "chunked"),
        ("mkl", torch.float16, 1, 1040, 56, "chunked"),
        ("level", torch.bfloat16, 4, 1044, 80, "explicit"),
        ("level", torch.bfloat16, 1, 1320, 40, "explicit"),
        ("level", torch.bfloat16, 2, 1368, 32, "chunked"),
        ("level", torch.bfloat16, 1, 3136, 128, "chunked"),
    ],
)
def test_the_choice(request, processor, dtype, batch, num_keys, size, expected):
    request.getfixturevalue(processor)
    sizes = {"num_queries": num_keys, "num_keys": num_keys, "head_size": size, "value_size": size}
    found = choose_implementation("embedded_gaussian", batch=batch, dtype=dtype, **sizes)
    assert found == expected


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize(("threads", "expected"), [(1, "chunked"), (2, "explicit")])
def test_items_go_to_a_thread_each(monkeypatch, threads, expected):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    sizes = {"num_queries": 784, "num_keys": 196, "head_size": 64, "value_size": 64}
    assert choose_implementation("embedded_gaussian", batch=4, **sizes) == expected


def test_bfloat16_is_fused_where_that_multiplies_it(monkeypatch, onednn):
    monkeypatch.setattr(products, "fuses_bfloat16", lambda: True)
    sizes = {"num_queries": 784, "num_keys": 784, "head_size": 64, "value_size": 64}
    assert choose_implementation("gaussian", dtype=torch.bfloat16, **sizes) == "fused"
    assert without_denormals(torch.bfloat16) == "fused"


@pytest.mark.usefixtures("onednn")
def test_denormal_weights_do_not_matter():
    q, k = 20 * torch.randn(1, 600, 16), torch.randn(1, 600, 16)
    assert not has_denormal_weights(q, k, 1.0)
    assert without_denormals(torch.bfloat16) == "chunked"


@pytest.fixture
def small(monkeypatch):
    """Rows and tiles of a few logits, so that small inputs are cut."""
    monkeypatch.setattr(affinity_row_gradients, "ROWS", {True: 0, False: 0})
    monkeypatch.setattr(affinity_row_gradients, "MANY_ROWS", 0)
    monkeypatch.setattr(affinity_row_gradients, "TILE_QUERIES", 64)
    monkeypatch.setattr(affinity_row_gradients, "TILE_KEYS", 64)
    monkeypatch.setattr(affinity_explicit, "OWN_LOGITS_BFLOAT16", 0)


def operands(*sizes: int, spread: float, channels_first: bool = True) -> list[Tensor]:
    """Queries, keys, values and the result's gradient, of (B, N, M, C', V)."""
    batch, num_queries, num_keys, head, values = sizes
    shapes = (num_queries, head), (num_keys, head), (num_keys, values), (num_queries, values)
    made = [torch.randn(batch, count, channels) for count, channels in shapes]
    made[1] *= spread / head**0.5
    if channels_first:
        made = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in made]
    return made


def reference(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, scale: float) -> list[Tensor]:
    return gradients(
        lambda q, k, v, s: (s * q @ k.transpose(1, 2)).softmax(-1) @ v,
        *(t.double() for t in (q, k, v, dy)),
        scale,
    )


def gradients(form, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, scale: float) -> list[Tensor]:
    needed = [t.detach().requires_grad_() for t in (q, k, v)]
    y = form(*needed, scale)
    return [y, *torch.autograd.grad(y, needed, dy)]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.usefixtures("onednn", "small")
@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("sizes", [(2, 150, 150, 24, 24), (1, 300, 75, 16, 40)], ids=str)
@pytest.mark.parametrize(("spread", "scale"), [(0.1, 1.0), (1.0, 0.3), (8.0, 1.0), (60.0, 1.0)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 2e-5),
        (torch.float16, 2e-3),
        pytest.param(torch.bfloat16, 4.5e-3, marks=needs_bfloat16),
    ],
)
@pytest.mark.parametrize("keep", [True, False])
def test_rows_equal_the_formula(keep, dtype, tolerance, spread, scale, sizes, channels_first):
    made = [t.to(dtype) for t in operands(*sizes, spread=spread, channels_first=channels_first)]
    found = gradients(partial(row_attend, keep=keep), *made, scale)
    for one, other in zip(found, reference(*made, scale), strict=True):
        assert one.shape == other.shape
        assert one.dtype == dtype
        assert error(one, other) < tolerance
    if dtype == torch.bfloat16:
        assert error(found[0], reference(*made, scale)[0]) < 3e-3
    with torch.no_grad():
        alone = row_attend(*made[:3], scale, keep=keep)
    assert torch.equal(alone, found[0])
    if not keep:
        assert torch.equal(alone, softmax_attend(*made[:3], scale, "chunked"))


@needs_bfloat16
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0, 60.0])
@pytest.mark.parametrize("few", [0, 1 << 30], ids=["in chunks", "by few calls"])
@pytest.mark.parametrize("item", [0, 1 << 30], ids=["item by item", "all at once"])
@pytest.mark.parametrize(
    ("processor", "narrow"),
    [("onednn", 0), ("onednn", 16), ("level", 0)],
    ids=["two products", "one product", "one, by MKL"],
)
@pytest.mark.parametrize("num_keys", [75, 80], ids=["elsewhere", "in place"])
def test_a_bfloat16_map_is_kept_and_exact(
    monkeypatch, request, processor, narrow, item, few, spread, num_keys
):
    request.getfixturevalue(processor)
    monkeypatch.setattr(affinity_explicit, "NARROW", narrow)
    monkeypatch.setattr(affinity_explicit, "NARROW_FEW", narrow)
    monkeypatch.setattr(affinity_explicit, "NARROW_ITEM", 0)
    monkeypatch.setattr(affinity_explicit, "FEW_LOGITS", few)
    monkeypatch.setattr(affinity_explicit, "ITEM_LOGITS", item)
    monkeypatch.setattr(
        affinity_explicit, "ITEM_LOGITS_FORWARD", dict.fromkeys((False, True), item)
    )
    made = [t.bfloat16() for t in operands(3, 150, num_keys, 16, 40, spread=spread)]
    found = gradients(explicit_attend, *made, 0.7)
    expected = reference(*made, 0.7)
    assert error(found[0], expected[0]) < 3e-3
    assert max(error(a, b) for a, b in zip(found, expected, strict=True)) < 1.2e-2
    with torch.no_grad():
        alone = explicit_attend(*made[:3], 0.7)
    assert torch.equal(alone, found[0])


@pytest.mark.parametrize(("processor", "expected"), [("onednn", False), ("level", True)])
def test_items_of_many_multiplications_go_by_themselves(request, processor, expected):
    request.getfixturevalue(processor)
    assert affinity_explicit.is_large_item(4, 300 * 300, 200, False) == expected
    assert not affinity_explicit.is_large_item(4, 300 * 300, 100, False)
    assert not affinity_explicit.is_large_item(4, 300 * 300, 200, True)
    assert not affinity_explicit.is_large_item(4, 300 * 300, 200, False, is_far=True)


@needs_bfloat16
@pytest.mark.usefixtures("onednn", "small")
@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("far", [(), (0,), (2,)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.3])
@pytest.mark.parametrize("places", [False, True])
def test_items_go_together_where_their_logits_are_near(
    monkeypatch, places, scale, far, channels_first
):
    made = operands(3, 80, 80, 16, 24, spread=1.0, channels_first=channels_first)
    q, k, v, dy = (t.bfloat16() for t in made)
    if places:
        k = q
    for item in far:
        # A row whose largest logit is that of no key near by.
        q[item, 3] *= 200
        k[item, 7] = q[item, 3]
    grids = ((8, 10), (8, 10)) if places else None
    alone: list[int] = []
    plain = affinity_rows._Item.attend
    monkeypatch.setattr(affinity_rows._Item, "attend", lambda *a: alone.append(1) or plain(*a))
    with torch.no_grad():
        y = row_attend(q, k, v, scale, keep=True, grids=grids)
    assert len(alone) == (3 if far or scale == 0.3 else 0)
    assert error(y, reference(q, k, v, dy, scale)[0]) < 3e-3
    needed = [t.detach().requires_grad_() for t in (q, k, v)]
    assert torch.equal(y, row_attend(*needed, scale, keep=True, grids=grids))


def counted(monkeypatch, owner, name: str) -> list[Tensor]:
    """The last arguments of calls to a function, which is still called."""
    taken: list[Tensor] = []
    plain = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a: taken.append(a[-1]) or plain(*a))
    return taken


@needs_bfloat16
@pytest.mark.usefixtures("onednn", "small")
@pytest.mark.parametrize("keep", [True, False])
def test_a_kept_map_is_not_formed_again(monkeypatch, keep):
    forward = counted(monkeypatch, affinity_rows, "exponentials")
    backward = counted(monkeypatch, affinity_row_gradients, "exponentials")
    made = [t.bfloat16() for t in operands(2, 100, 90, 16, 16, spread=1.0)]
    gradients(lambda *a: row_attend(*a, keep=keep), *made, 1.0)
    # Of two items: one piece of all queries, or two.
    assert (len(forward), len(backward)) == ((2, 0) if keep else (4, 4))


@needs_bfloat16
@pytest.mark.usefixtures("onednn", "small")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    ("far", "num_far", "told", "again"),
    [(100, 0, 0, 0), (100, 3, 0, 3), (100, 50, 1, 0), (1e4, 50, 1, 50)],
    ids=["none", "a few", "many", "very far"],
)
def test_rows_that_are_spread_widely(monkeypatch, far, num_far, told, again, keep, batch):
    q, k, v, dy = operands(batch, 128, 100, 16, 16, spread=1.0)
    q[0, :num_far] *= far
    made = [t.bfloat16() for t in (q, k, v, dy)]
    peaks = counted(monkeypatch, affinity_rows._Item, "_above_peak")
    passes = counted(monkeypatch, affinity_rows._Item, "_passes")
    found = gradients(lambda *a: row_attend(*a, keep=keep), *made, 1.0)
    assert bool(peaks) == bool(told)
    # Of rows as far away as the last some can still be told.
    assert 0.5 * again <= sum(taken.shape[0] for taken in passes) <= again
    # Keys' gradients are sums of queries, of which those far away are the largest, times what should be 0.
    limits = (3e-3, 5e-3, 5e-3, 5e-3) if far < 1e3 else (3e-3, 1e-2, 1.0, 1e-2)
    for one, other, limit in zip(found, reference(*made, 1.0), limits, strict=True):
        assert error(one, other) < limit


@needs_bfloat16
@pytest.mark.usefixtures("onednn", "small")
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("many", [0, 1 << 30], ids=["channels first", "as they lie"])
@pytest.mark.parametrize("last", [True, False], ids=["tokens", "channels"])
def test_every_layout(monkeypatch, last, many, keep):
    monkeypatch.setattr(products, "MANY_TOKENS", many)
    made = [t.bfloat16() for t in operands(3, 150, 75, 16, 40, spread=2.0, channels_first=not last)]
    found = gradients(lambda *a: row_attend(*a, keep=keep), *made, 0.7)
    for one, other, limit in zip(
        found, reference(*made, 0.7), (3e-3, 5e-3, 5e-3, 5e-3), strict=True
    ):
        assert error(one, other) < limit


@pytest.mark.parametrize("last", [True, False], ids=["tokens", "channels"])
@pytest.mark.parametrize(
    "spatial", [(9,), (8,), (8, 6), (7, 5), (3, 1), (3, 3), (2, 5, 4), (3, 4, 7), (1, 1)], ids=str
)
def test_which_key_lies_where_a_query_does(spatial, last):
    pool = pool_sizes(True, len(spatial))
    key_sizes = pool_keys(torch.zeros(1, 1, *spatial), pool).shape[2:]
    # Numbers of keys, and their negatives against queries of two channels, of which one is 0.
    number = torch.arange(key_sizes.numel()).bfloat16()
    k = torch.stack([number, -number], 0 if not last else 1)
    k = k if last else k.t()
    q = torch.tensor([[1.0, 0.0]]).repeat(math.prod(spatial), 1).bfloat16()
    q = q if last else q.t().contiguous().t()
    of_each = logits_at_places(q, k, (spatial, key_sizes)).view(1, 1, *spatial).float()
    # The largest and the smallest number among what is pooled into a key are both that key's.
    expected = number.view(1, 1, *key_sizes).float()
    assert torch.equal(pool_keys(of_each, pool), expected)
    assert torch.equal(-pool_keys(-of_each, pool), expected)
    negative = logits_at_places(q.flip(1), k, (spatial, key_sizes)).view(1, 1, *spatial)
    assert torch.equal(negative.float(), -of_each)


@needs_bfloat16
@pytest.mark.usefixtures("onednn", "small")
@pytest.mark.parametrize("implementation", ["explicit", "chunked"])
@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
@pytest.mark.parametrize("sub_sample", [True, False])
@pytest.mark.parametrize("spatial", [(300,), (17, 18), (3, 11, 10)], ids=str)
def test_vectors_times_themselves(monkeypatch, spatial, sub_sample, last, implementation):
    monkeypatch.setattr(affinity_explicit, "ITEM_LOGITS", 0)
    # Logits of around 100, spread by a few, and 5 more with themselves.
    dims, pool = len(spatial), pool_sizes(True, len(spatial))
    shared = 0.5 * torch.randn(2, 400, *[1] * dims)
    x = torch.randn(2, 400, *spatial).mul(0.12).add(shared).bfloat16()
    if last and dims > 1:
        x = x.to(memory_format=CHANNELS_LAST[dims + 2])
    pooled = pool_keys(x, pool) if sub_sample else x
    v = torch.randn_like(pooled[:, :24])
    dy = torch.randn_like(x[:, :24])
    peaks = counted(monkeypatch, affinity_rows._Item, "_above_peak")
    passes = counted(monkeypatch, affinity_rows._Item, "_passes")
    tried = counted(monkeypatch, affinity_rows, "exponentials")

    def branch(x: Tensor, form: str) -> list[Tensor]:
        x = x.detach().requires_grad_()
        values = v.to(x.dtype).requires_grad_()
        y = attend(x, pool_keys(x, pool) if sub_sample else x, values, "gaussian", 1.0, form)
        return [y, *torch.autograd.grad(y, (x, values), dy.to(x.dtype))]

    found = branch(x, implementation)
    assert tried
    assert not peaks
    assert sum(taken.shape[0] for taken in passes) < 0.05 * 2 * x[0, 0].numel()
    for one, other in zip(found, branch(x.double(), "explicit"), strict=True):
        assert error(one, other) < (3.5e-3 if one is found[0] else 1e-2)


FORMS = {
    "rows": row_attend,
    "rows kept": partial(row_attend, keep=True),
    "together": explicit_attend,
}


@needs_bfloat16
@pytest.mark.usefixtures("onednn", "small")
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_keys_that_have_much_in_common(form):
    q, k, v, dy = operands(2, 150, 140, 24, 24, spread=1.0)
    made = [t.bfloat16() for t in (q * 0.3 + 1.1, k * 0.3 + 1.1, v, dy)]
    found = gradients(FORMS[form], *made, 1.0)
    for one, other in zip(found, reference(*made, 1.0), strict=True):
        assert error(one, other) < 1e-2


@pytest.mark.usefixtures("onednn", "small")
@pytest.mark.parametrize("offset", [-300.0, -70.0, 0.0, 70.0, 300.0])
def test_logits_far_from_zero_stay_exact(offset):
    q, k, v, dy = operands(1, 130, 140, 8, 8, spread=1.0)
    q[..., 0], k[..., 0] = 1.0, offset
    found = gradients(lambda *a: softmax_attend(*a, "chunked"), q, k, v, dy, 1.0)
    # Float32 logits of 300 are off by 2e-5, and so is a row's sum of weights, which keys of 300 multiply.
    tolerances = 2e-4, 5e-3, 2e-4, 2e-4
    expected = reference(q, k, v, dy, 1.0)
    for one, other, tolerance in zip(found, expected, tolerances, strict=True):
        assert error(one, other) < tolerance


@pytest.mark.usefixtures("onednn")
def test_nothing_in_nothing_out():
    q, k, v = torch.randn(0, 5, 4), torch.randn(0, 7, 4), torch.randn(0, 7, 3)
    found = gradients(lambda *a: softmax_attend(*a, "chunked"), q, k, v, torch.randn(0, 5, 3), 1.0)
    assert [t.shape for t in found] == [(0, 5, 3), (0, 5, 4), (0, 7, 4), (0, 7, 3)]


@pytest.mark.usefixtures("onednn")
def test_gradients_can_be_differentiated_again():
    def penalty(form, x: Tensor, block: NonLocal) -> list[Tensor]:
        block.implementation = form
        (grad,) = torch.autograd.grad(block(x).pow(2).sum(), x, create_graph=True)
        return list(torch.autograd.grad(grad.pow(2).sum(), [block.theta.weight, block.g.weight]))

    block = NonLocal(8, 4, zero_init=False)
    x = torch.randn(1, 8, 12, 12, requires_grad=True)
    for one, other in zip(penalty("chunked", x, block), penalty("explicit", x, block), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


@pytest.mark.usefixtures("onednn", "small")
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_block_takes_them_and_is_the_identity(monkeypatch, dtype, training):
    monkeypatch.setattr("nlsurgery.blocks.choose.SMALL_MAPS", 0)
    block = NonLocal(32).to(dtype).train(training)
    x = torch.randn(1, 32, 28, 28, dtype=dtype, requires_grad=True)
    assert block.chosen_implementation(x.shape, dtype=dtype) == "chunked"
    y = block(x)
    assert torch.equal(y, x)
    y.sum().backward()
    assert block.bn.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("small", [0, 1 << 30], ids=["rows", "fused"])
@pytest.mark.parametrize("processor", ["onednn", "level"])
def test_several_heads(monkeypatch, request, processor, small, dtype):
    request.getfixturevalue(processor)
    taken: list[int] = []
    monkeypatch.setattr("nlsurgery.blocks.affinity_operator.SMALL_PRODUCT", small)
    monkeypatch.setattr(
        affinity_softmax, "row_attend", lambda *a: taken.append(1) or row_attend(*a)
    )
    made = [torch.randn(2, 3, 40, 8) for _ in range(3)] + [torch.randn(2, 3, 40, 8)]
    q, k, v, dy = (t.to(dtype) for t in made)
    found = gradients(affinity_softmax.heads_attend, q, k, v, dy, 0.6)
    by_rows = small == 0 and (processor == "onednn" or dtype == torch.bfloat16)
    assert bool(taken) == by_rows
    expected = gradients(
        lambda q, k, v, s: (s * q @ k.transpose(2, 3)).softmax(-1) @ v,
        *(t.double() for t in (q, k, v, dy)),
        0.6,
    )
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert error(one, other) < (1.2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_parts_of_a_wider_tensor_are_copied_as_they_lie():
    whole = torch.randn(2, 7, 12)
    assert apart(whole) is whole
    assert apart(whole.mT.contiguous().mT).stride() == (84, 1, 7)
    for part in (whole[..., 4:8], whole.mT.contiguous().mT[..., 4:8]):
        copied = apart(part)
        assert torch.equal(copied, part)
        assert copied.stride() in ((28, 4, 1), (28, 1, 7))
        assert (copied.stride(1) == 1) == (part.stride(1) == 1)
    single = whole[..., 3:4]
    assert torch.equal(apart(single), single)
