"""The exact forms: equal to the formula, to each other in gradients, and lean in memory."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

from nlsurgery.blocks import (
    NonLocal,
    SelfAttention,
    affinity_chunks,
    affinity_explicit,
    affinity_tiles,
    few,
    residual,
)
from nlsurgery.blocks.affinity import plain_attend
from nlsurgery.blocks.affinity_chunks import chunks
from nlsurgery.blocks.affinity_concat import _triangular_sums as triangular_sums
from nlsurgery.blocks.affinity_concat import concatenation_attend, running_sums
from nlsurgery.blocks.affinity_dot import dot_product_attend
from nlsurgery.blocks.affinity_softmax import softmax_attend
from nlsurgery.blocks.affinity_tiles import tiles
from nlsurgery.blocks.choose import choose_implementation
from nlsurgery.errors import BlockError

from .cases import feature_map, randomised
from .reference import batch_norm, non_local

FORMS = {
    "gaussian": ("explicit", "fused", "chunked"),
    "embedded_gaussian": ("explicit", "fused", "chunked"),
    "dot_product": ("explicit", "reassociated"),
    "concatenation": ("explicit", "sorted"),
}
PAIRS = [(mode, form) for mode, forms in FORMS.items() for form in forms]
FAST = [pair for pair in PAIRS if pair[1] != "explicit"]


@pytest.fixture
def tiny_chunks(monkeypatch):
    """Tiles of a few rows and keys, so that small inputs are cut."""
    monkeypatch.setattr(affinity_tiles, "TILE", 32 * 16)
    monkeypatch.setattr(affinity_tiles, "TILE_KEYS", 16)


@pytest.mark.usefixtures("tiny_chunks", "positions")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("sub_sample", [False, True], ids=["all", "sub"])
@pytest.mark.parametrize(("mode", "form"), PAIRS)
def test_every_form_matches_the_formula(mode, form, sub_sample, dims):
    x = feature_map(dims)
    block = NonLocal(6, 4, dims=dims, mode=mode, sub_sample=sub_sample, implementation=form)
    block = randomised(block.double()).eval()
    expected = x + batch_norm(non_local(block, x)[0], block.bn, training=False)
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


def attend(mode, form, q, k, v):
    if mode == "dot_product":
        return dot_product_attend(q, k, v, form)
    if mode == "concatenation":
        return concatenation_attend(q[..., 0], k[..., 0], v, form)
    return softmax_attend(q, k, v, 0.7, form)


def tokens(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("sizes", [(3, 150, 70), (2, 1, 9), (1, 9, 1), (0, 4, 4)], ids=str)
@pytest.mark.parametrize(("mode", "form"), FAST)
def test_values_and_gradients_equal_the_explicit_form_s(mode, form, sizes):
    batch, num_queries, num_keys = sizes
    q, k, v = (
        tokens(batch, num_queries, 5),
        tokens(batch, num_keys, 5, seed=1),
        tokens(batch, num_keys, 7, seed=2),
    )
    dy = tokens(batch, num_queries, 7, seed=3).detach()
    fast, slow = attend(mode, form, q, k, v), attend(mode, "explicit", q, k, v)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(y, (q, k, v), dy) for y in (fast, slow)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("mode", "form"), FAST)
def test_gradcheck(mode, form):
    q, k, v = tokens(2, 4, 3), tokens(2, 5, 3, seed=1), tokens(2, 5, 3, seed=2)
    assert torch.autograd.gradcheck(lambda *t: attend(mode, form, *t), (q, k, v))


def test_sorted_form_takes_ties_and_thresholds():
    """a_i + b_j is exactly 0 for some pairs: ReLU and its derivative are 0 there."""
    a = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 5.0]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[1.0, 1.0, 2.0, -5.0, 0.0]], dtype=torch.float64, requires_grad=True)
    v = tokens(1, 5, 3)
    fast, slow = (concatenation_attend(a, b, v, form) for form in ("sorted", "explicit"))
    torch.testing.assert_close(fast, slow)
    for one, other in zip(
        *(torch.autograd.grad(y.sum(), (a, b, v)) for y in (fast, slow)), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("length", [1, 63, 64, 130])
def test_running_sums_by_either_way(length):
    v = tokens(2, length, 3).detach()
    by_hand = [v[:, :n].sum(1) for n in range(length + 1)]
    for sums in (running_sums(v), triangular_sums(v)):
        torch.testing.assert_close(sums[:, : length + 1], torch.stack(by_hand, 1))


@pytest.mark.parametrize("num_bytes", [1, 4 * 64 * 10, 1 << 20])
@pytest.mark.parametrize(("batch", "num_queries", "num_keys"), [(3, 150, 10), (8, 7, 7), (0, 4, 4)])
def test_chunks_cover_every_row_once(monkeypatch, num_bytes, batch, num_queries, num_keys):
    monkeypatch.setattr(affinity_chunks, "CHUNK_BYTES", num_bytes)
    seen = torch.zeros(batch, num_queries, dtype=torch.int)
    for piece in chunks(batch, num_queries, num_keys):
        seen[piece] += 1
    assert bool((seen == 1).all())


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "sizes", [(3, 150, 70), (8, 7, 7), (1, 1, 500), (1, 500, 1), (0, 4, 4), (2, 0, 4), (2, 4, 0)]
)
def test_tiles_cover_every_logit_once(monkeypatch, sizes, device_type):
    monkeypatch.setattr(affinity_tiles, "TILE", 32 * 16)
    monkeypatch.setattr(affinity_tiles, "TILE_KEYS", 16)
    monkeypatch.setattr(affinity_chunks, "CHUNK_BYTES", 4 * 128 * 70)
    rows, columns = tiles(*sizes, device_type)
    seen = torch.zeros(sizes, dtype=torch.int)
    for row, column in itertools.product(rows, columns):
        seen[(*row, column)] += 1
    assert bool((seen == 1).all())


@pytest.mark.parametrize("num_bytes", [1 << 24, 8 * 64 * 70], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_the_explicit_form_of_many_logits(monkeypatch, dtype, scale, channels_first, num_bytes):
    monkeypatch.setattr(affinity_explicit, "OWN_LOGITS", 0)
    monkeypatch.setattr(affinity_explicit, "OWN_LOGITS_FORWARD", 0)
    monkeypatch.setattr(affinity_chunks, "CHUNK_BYTES", num_bytes)
    sizes = ((2, 90, 4), (2, 70, 4), (2, 70, 6))
    operands = [tokens(*size, seed=seed).detach() for seed, size in enumerate(sizes)]
    dy = tokens(2, 90, 6, seed=3).detach()
    if channels_first:
        operands = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in operands]
        dy = dy.transpose(1, 2).contiguous().transpose(1, 2)
    exact = [t.requires_grad_() for t in operands]
    rounded = [t.detach().to(dtype).requires_grad_() for t in operands]
    y = softmax_attend(*rounded, scale, "explicit")
    assert type(y.grad_fn).__name__ == "_ExplicitBackward"
    assert y.is_contiguous() != channels_first
    expected = plain_attend(*exact, scale)
    found = torch.autograd.grad(y, rounded, dy.to(dtype))
    wanted = torch.autograd.grad(expected, exact, dy)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3}[dtype]
    for one, other in zip((y, *found), (expected, *wanted), strict=True):
        assert one.dtype == dtype
        assert (one - other).norm() < tolerance * other.norm()
    with torch.no_grad():
        assert torch.equal(softmax_attend(*rounded, scale, "explicit"), y)


def test_the_explicit_form_of_many_logits_can_be_differentiated_again(monkeypatch):
    monkeypatch.setattr(affinity_explicit, "OWN_LOGITS", 0)
    operands = [tokens(1, 5, 3, seed=seed).double() for seed in range(3)]

    def attended(*operands):
        return softmax_attend(*operands, 0.7, "explicit")

    assert torch.autograd.gradcheck(attended, operands)
    assert torch.autograd.gradgradcheck(attended, operands)


def test_tiles_of_a_large_map_have_even_sides():
    rows, columns = tiles(1, 16700, 16700, "cpu")
    queries, keys = [i for _, i in rows], columns
    for sides, most in ((queries, 1024), (keys, 2048)):
        widths = [side.stop - side.start for side in sides]
        assert sum(widths) == 16700
        assert max(widths) <= most
        assert all(width % affinity_tiles.EVEN == 0 for width in widths[:-1])


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("readable", [("cpu",), ()], ids=["by need", "one tile a row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("first", [0.0, 25.0, -55.0, -200.0, 300.0])
@pytest.mark.parametrize("growth", [0.0, 40.0, 130.0, -130.0])
def test_logits_far_apart_stay_exact(monkeypatch, readable, dtype, first, growth):
    """Each tile's logits lie ``growth`` above those of the tile before."""
    monkeypatch.setattr(affinity_tiles, "READABLE", readable)
    monkeypatch.setattr(affinity_chunks, "CHUNK_BYTES", 4 * 16 * 70)
    q, k = tokens(2, 50, 4), tokens(2, 70, 4, seed=1)
    v, dy = tokens(2, 70, 6, seed=2), tokens(2, 50, 6, seed=3)
    with torch.no_grad():
        q[..., 0] = 1.0
        k[..., 0] = first + growth * (torch.arange(70) // 14)
    operands = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    exact = [t.detach().to(dtype).double().requires_grad_() for t in (q, k, v)]
    y, expected = (
        softmax_attend(*t, 1.0, form) for t, form in ((operands, "chunked"), (exact, "explicit"))
    )
    # A float32 logit of 820 is rounded by 3e-5.
    tolerance = 1e-10 if dtype == torch.float64 else 3e-4
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    found = torch.autograd.grad(y, operands, dy.detach().to(dtype))
    wanted = torch.autograd.grad(expected, exact, dy.detach().to(dtype).double())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(
    ("sub_sample", "dtype"),
    [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)],
    ids=["all", "sub", "all in bfloat16"],
)
@pytest.mark.parametrize("mode", FORMS)
def test_training_keeps_no_pairwise_tensor(mode, sub_sample, dtype):
    """What autograd saves is within inputs, outputs and projections, times 1.3."""
    block = NonLocal(16, 8, mode=mode, sub_sample=sub_sample).to(dtype)
    x = torch.randn(1, 16, 40, 40, dtype=dtype, requires_grad=True)
    kept: dict[int, int] = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = block(x)
    assert y.grad_fn is not None
    inputs_outputs, projections = 2 * x.nbytes, 4 * x.nbytes // 2
    # The largest holds queries, keys and values together, of half the channels each.
    assert max(kept.values()) <= 1.5 * x.nbytes
    assert sum(kept.values()) <= 1.3 * (inputs_outputs + projections)


@pytest.mark.usefixtures("mkl")
@pytest.mark.parametrize(
    ("head_size", "value_size", "side", "dtype", "fused"),
    [
        (512, 512, 36, torch.float32, False),
        (16, 16, 92, torch.float32, True),
        (8, 64, 36, torch.float32, False),
        (16, 16, 36, torch.bfloat16, True),
        (8, 64, 36, torch.bfloat16, True),
    ],
)
def test_auto_on_cpu_never_forms_the_pairwise_tensor(head_size, value_size, side, dtype, fused):
    """The fused form must take the flash path: its math path is N×M in disguise."""
    block = NonLocal(head_size * 2, head_size) if head_size == value_size else SelfAttention(64)
    x = torch.randn(1, block.in_channels, side, side, dtype=dtype)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        block.to(dtype)(x)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_attention_math" not in names
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in names) == fused


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
def test_clips_take_the_flash_path_and_equal_the_convolutions(channels_last, hooked):
    block = NonLocal(16, 8, dims=3, implementation="fused", zero_init=False).eval()
    explicit = NonLocal(16, 8, dims=3, implementation="explicit", zero_init=False).eval()
    explicit.load_state_dict(block.state_dict())
    if hooked:
        for module in (block.theta, block.phi, block.g, explicit.out):
            module.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 16, 3, 9, 11)
    if channels_last:
        x = x.to(memory_format=torch.channels_last_3d)
    with torch.profiler.profile() as profile, torch.no_grad():
        y = block(x)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, explicit(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_either_memory_format_takes_the_flash_path(memory_format):
    block = NonLocal(16, 8, implementation="fused").to(memory_format=memory_format)
    x = torch.randn(2, 16, 20, 20).to(memory_format=memory_format)
    with torch.profiler.profile() as profile:
        block(x)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names


@pytest.mark.usefixtures("positions")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("mode", "form"), [("embedded_gaussian", "auto"), *PAIRS])
def test_half_precisions_stay_within_their_rounding(mode, form, dtype):
    """Against float32 of the same (rounded) projections; logits have a spread of about 16."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 300, 64, generator=generator).mul(s).to(dtype) for s in (4, 0.5, 1))
    if form == "auto":
        form = choose_implementation(
            mode, num_queries=300, num_keys=300, head_size=64, value_size=64, dtype=dtype
        )
    low = attend(mode, form, q, k, v).float()
    exact = attend(mode, "explicit", q.double(), k.double(), v.double()).float()
    error = (low - exact).abs().max() / exact.abs().max()
    assert error < 2 * torch.finfo(dtype).eps


def test_fp16_sums_beyond_its_range_stay_finite():
    k = torch.full((1, 4096, 8), 10.0, dtype=torch.float16)
    y = dot_product_attend(k, k, k, "reassociated")
    torch.testing.assert_close(y, torch.full_like(y, 8000.0))


@pytest.mark.parametrize(("mode", "form"), FAST)
def test_forms_repeat_to_the_bit(mode, form):
    torch.manual_seed(0)
    block = NonLocal(16, 8, mode=mode, implementation=form)
    x = torch.randn(2, 16, 30, 30)

    def gradients():
        y = block(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(block.parameters()))]

    torch.use_deterministic_algorithms(True)
    try:
        for one, other in zip(gradients(), gradients(), strict=True):
            assert torch.equal(one, other)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        (m, f)
        for m, f in itertools.product(FORMS, ("fused", "chunked", "reassociated", "sorted"))
        if f not in FORMS[m]
    ],
)
def test_a_form_that_the_mode_lacks_is_an_error(mode, form):
    with pytest.raises(BlockError, match=rf"{form}.*{mode}.*'explicit'"):
        NonLocal(8, mode=mode, implementation=form)


@pytest.mark.usefixtures("mkl")
@pytest.mark.parametrize(
    ("mode", "num_keys", "head_size", "value_size", "expected"),
    [
        ("embedded_gaussian", 196, 512, 512, "explicit"),
        ("embedded_gaussian", 4096, 256, 256, "chunked"),
        ("embedded_gaussian", 4096, 512, 512, "chunked"),
        ("embedded_gaussian", 9000, 512, 512, "chunked"),
        ("embedded_gaussian", 9000, 128, 128, "fused"),
        ("embedded_gaussian", 784, 64, 64, "fused"),
        ("embedded_gaussian", 784, 64, 32, "chunked"),
        ("embedded_gaussian", 784, 128, 128, "explicit"),
        ("embedded_gaussian", 1100, 128, 128, "fused"),
        ("embedded_gaussian", 400, 64, 64, "explicit"),
        ("embedded_gaussian", 4096, 32, 256, "chunked"),
        ("gaussian", 4096, 512, 256, "chunked"),
        ("dot_product", 49, 512, 512, "explicit"),
        ("dot_product", 4096, 256, 256, "reassociated"),
        ("concatenation", 49, 256, 256, "explicit"),
        ("concatenation", 4096, 256, 256, "sorted"),
    ],
)
def test_the_choice_on_cpu_in_float32(mode, num_keys, head_size, value_size, expected):
    sizes = {"num_queries": num_keys, "num_keys": num_keys}
    sizes |= {"head_size": head_size, "value_size": value_size}
    assert choose_implementation(mode, **sizes) == expected


@pytest.mark.usefixtures("mkl")
def test_a_batch_of_maps_is_not_a_small_map():
    sizes = {"num_queries": 400, "num_keys": 400, "head_size": 32, "value_size": 32}
    assert choose_implementation("embedded_gaussian", batch=8, **sizes) == "fused"
    block = NonLocal(64)
    assert block.chosen_implementation((1, 64, 20, 20)) == "explicit"
    assert block.chosen_implementation((8, 64, 20, 20)) == "fused"


@pytest.mark.usefixtures("mkl")
@pytest.mark.parametrize("head_size", [64, 512])
@pytest.mark.parametrize(
    ("num_keys", "expected"), [(9000, "fused"), (196, "fused"), (49, "explicit")]
)
def test_the_choice_on_cpu_in_bfloat16(num_keys, head_size, expected):
    sizes = {"num_queries": num_keys, "num_keys": num_keys}
    sizes |= {"head_size": head_size, "value_size": head_size, "dtype": torch.bfloat16}
    assert choose_implementation("embedded_gaussian", **sizes) == expected


@pytest.mark.parametrize(
    ("dtype", "batch", "num_keys", "value_size", "expected"),
    [
        (torch.float32, 1, 440, 24, "explicit"),
        (torch.float32, 1, 441, 24, "sorted"),
        (torch.float32, 2, 361, 32, "explicit"),
        (torch.float32, 2, 363, 32, "sorted"),
        (torch.float32, 8, 324, 512, "explicit"),
        (torch.bfloat16, 1, 480, 24, "explicit"),
        (torch.bfloat16, 1, 481, 24, "sorted"),
        (torch.bfloat16, 8, 321, 24, "sorted"),
        (torch.bfloat16, 1, 784, 256, "explicit"),
        (torch.bfloat16, 1, 784, 255, "sorted"),
        (torch.bfloat16, 2, 784, 256, "sorted"),
        (torch.bfloat16, 1, 801, 256, "sorted"),
    ],
)
def test_the_choice_of_concatenation(dtype, batch, num_keys, value_size, expected):
    sizes = {"num_queries": num_keys, "num_keys": num_keys, "head_size": 1, "batch": batch}
    found = choose_implementation("concatenation", value_size=value_size, dtype=dtype, **sizes)
    assert found == expected


def test_the_choice_is_visible_on_the_block():
    block = NonLocal(16, mode="dot_product")
    assert block.chosen_implementation((1, 16, 2, 2)) == "explicit"
    assert block.chosen_implementation((1, 16, 50, 50)) == "reassociated"
    assert NonLocal(16, implementation="chunked").chosen_implementation((1, 16, 2, 2)) == "chunked"


def test_eval_folds_batch_norm_and_leaves_parameters(monkeypatch):
    monkeypatch.setattr(residual, "FOLDED_VALUES", 1)
    monkeypatch.setattr(few, "FEW_VALUES", 0)
    block = randomised(NonLocal(6, 4).double()).eval()
    before = {key: value.clone() for key, value in block.state_dict().items()}
    x = feature_map(2)
    with torch.profiler.profile() as profile:
        block(x)
    assert "aten::batch_norm" not in {event.key for event in profile.key_averages()}
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())
    calls: list[object] = []
    block.bn.register_forward_hook(lambda *args: calls.append(args))
    hooked = block(x)
    assert calls, "a hook on the norm must run"
    block.bn._forward_hooks.clear()
    torch.testing.assert_close(block(x), hooked, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("positions")
@pytest.mark.parametrize("child", ["theta", "phi", "g", "out"])
@pytest.mark.parametrize("mode", ["embedded_gaussian", "concatenation"])
def test_hooks_on_projections_run(mode, child):
    block = NonLocal(6, 4, mode=mode).double().eval()
    calls: list[object] = []
    getattr(block, child).register_forward_hook(lambda *args: calls.append(args))
    block(feature_map(2))
    assert calls


@pytest.mark.usefixtures("positions")
@pytest.mark.parametrize(("mode", "form"), FAST)
def test_gradients_can_be_differentiated_again(mode, form):
    torch.manual_seed(0)
    block = randomised(NonLocal(4, 3, mode=mode, implementation=form, norm="none").double())
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(block, (x,))


@pytest.mark.parametrize("mode", FORMS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_jit_traces_every_mode(mode, training):
    torch.manual_seed(0)
    block = randomised(NonLocal(8, 4, mode=mode)).train(training)
    x = torch.randn(2, 8, 20, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and says so
        traced = torch.jit.trace(block, x, check_trace=False)
    torch.testing.assert_close(traced(x), block(x), rtol=1e-4, atol=1e-5)
