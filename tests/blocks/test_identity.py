"""Every block is the identity at init, to the last bit, whatever the input looks like."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from nlsurgery.blocks import BLOCK_TYPES, NonLocal, SelfAttention, block_type
from nlsurgery.errors import BlockError

from .cases import MODES, randomised

RELATIVES = {
    "se": {},
    "eca": {},
    "cbam": {},
    "global_context": {"reduction": 4},
    "danet": {},
    "criss_cross": {},
    "double_attention": {},
    "efficient_attention": {"heads": 2},
    "asymmetric": {},
    "ema": {"num_bases": 8},
    "disentangled": {},
    "compact_generalized": {"groups": 2},
    "multi_head": {"heads": 2, "sub_sample": True},
    "hard": {},
    "generalized": {"heads": 4},
    "timm": {"name": "se"},
}
BLOCKS = {
    **{f"{mode}-bn": (NonLocal, {"mode": mode}) for mode in MODES},
    **{f"{mode}-none": (NonLocal, {"mode": mode, "norm": "none"}) for mode in MODES},
    "sub_sample": (NonLocal, {"sub_sample": True}),
    "before_conv": (NonLocal, {"sub_sample": True, "pool_order": "before_conv"}),
    "ln": (NonLocal, {"norm": "ln"}),
    "gn": (NonLocal, {"norm": "gn"}),
    "scaled": (NonLocal, {"use_scale": True}),
    "self_attention": (SelfAttention, {}),
    **{name: (block_type(name).build, options) for name, options in RELATIVES.items()},
    "danet-channel": (block_type("danet").build, {"part": "channel"}),
    "global_context-mul": (block_type("global_context").build, {"fusion": "channel_mul"}),
}
#: Blocks that exist for images only.
IMAGES_ONLY = ("criss_cross", "timm")
SPATIAL = {1: (5,), 2: (5, 4), 3: (2, 5, 4)}


def test_every_block_type_is_tested_here():
    assert set(BLOCK_TYPES) <= {"non_local", "self_attention", *RELATIVES}


def build(name: str, *, dims: int = 2) -> nn.Module:
    torch.manual_seed(0)
    kind, options = BLOCKS[name]
    return kind(16, dims=dims, **options)


def assert_identity(block: nn.Module, x: Tensor) -> None:
    """Bit-equal, and the same dtype, shape and strides."""
    y = block(x)
    assert y is not x
    assert (y.dtype, y.shape, y.stride()) == (x.dtype, x.shape, x.stride())
    assert torch.equal(y, x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", BLOCKS)
def test_identity(name, dims, training):
    if dims != 2 and name in IMAGES_ONLY:
        with pytest.raises(BlockError, match="dims must be 2"):
            build(name, dims=dims)
        return
    x = torch.randn(2, 16, *SPATIAL[dims])
    assert_identity(build(name, dims=dims).train(training), x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_identity_in_channels_last(name, training):
    block = build(name).train(training)
    assert_identity(block, torch.randn(2, 16, 5, 4).to(memory_format=torch.channels_last))
    block.to(memory_format=torch.channels_last)
    assert_identity(block, torch.randn(2, 16, 5, 4))
    assert_identity(block, torch.randn(2, 5, 4, 16).permute(0, 3, 1, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, None], ids=["fp32-input", "low-input"])
@pytest.mark.parametrize("name", BLOCKS)
def test_identity_under_autocast(name, given, dtype):
    x = torch.randn(2, 16, 5, 4).to(given or dtype)
    with torch.autocast("cpu", dtype=dtype):
        assert_identity(build(name), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_autocast_on_maps_that_are_not_small(name, dtype):
    # Of more keys than a map is formed for: the other forms have requirements of their own.
    assert_autocast_is_close(name, (40, 33), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("norm", ["bn", "ln", "gn", "none"])
def test_identity_in_windows(norm, last, dtype):
    x = torch.randn(2, 16, 6, 5, 4).to(dtype)
    if last:
        x = x.to(memory_format=torch.channels_last_3d)
    for sub_sample in (False, [2, 2, 2]):
        block = NonLocal(16, dims=3, norm=norm, temporal_window=2, sub_sample=sub_sample).to(dtype)
        assert_identity(block, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spatial", [(30,), (2, 4, 5), (2, 24, 27)], ids=str)
@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in IMAGES_ONLY])
def test_autocast_on_sequences_and_clips(name, spatial, dtype):
    # torch's CPU pools of clips give float32 there, whatever they are given.
    assert_autocast_is_close(name, spatial, dtype)


def assert_autocast_is_close(name: str, spatial: tuple[int, ...], dtype: torch.dtype) -> None:
    """Forward within rounding of float32, backward finite."""
    block = randomised(build(name, dims=len(spatial)), std=0.2).eval()
    x = torch.randn(1, 16, *spatial, requires_grad=True)
    exact = block(x) - x
    with torch.autocast("cpu", dtype=dtype):
        y = block(x) - x
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    if name == "hard":  # which keys are taken depends on rounding
        return
    assert (y - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_identity_in_other_dtypes(name, dtype):
    assert_identity(build(name).to(dtype), torch.randn(2, 16, 5, 4).to(dtype))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "shape", [(1, 16, 1, 1), (1, 16, 1, 3), (0, 16, 4, 4), (2, 16, 1, 1)], ids=str
)
@pytest.mark.parametrize("name", BLOCKS)
def test_identity_of_the_smallest_inputs(name, shape, training):
    assert_identity(build(name).train(training), torch.randn(shape))


@pytest.mark.parametrize("norm", ["bn", "none"])
def test_one_value_per_channel_leaves_running_statistics(norm):
    block = randomised(NonLocal(16, norm=norm)).train()
    before = copy.deepcopy(block.state_dict())
    block(torch.randn(1, 16, 1, 1))
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_zero_gate_lets_no_overflow_through(name, dtype):
    block = build(name)
    block = randomised_branch(block).to(dtype)
    x = torch.randn(2, 16, 5, 4)
    x = (x / x.abs().max() * torch.finfo(dtype).max).to(dtype)
    assert_identity(block.eval(), x)


def randomised_branch(block: nn.Module) -> nn.Module:
    """Large weights in the projections, the gate left at zero."""
    zero = {id(parameter) for parameter in block.parameters() if not parameter.any()}
    with torch.no_grad():
        for module in block.children():
            if hasattr(module, "weight") and id(module.weight) not in zero:
                module.weight.copy_(torch.randn(module.weight.shape))
    return block


def test_unscaled_logits_of_512_channels_in_fp16_stay_finite():
    block = NonLocal(512, 512, norm="none").half()
    with torch.no_grad():
        for conv in (block.theta, block.phi):
            conv.weight.copy_(torch.eye(512).mul(30).view(512, 512, 1, 1))
    x = torch.full((1, 512, 2, 2), 16.0, dtype=torch.float16)
    attention = block.attention(x)
    assert torch.isfinite(attention).all()
    torch.testing.assert_close(attention, torch.full((1, 4, 4), 0.25))


@pytest.mark.parametrize("name", BLOCKS)
def test_reset_parameters_restores_the_identity(name):
    block = randomised(build(name))
    x = torch.randn(2, 16, 5, 4)
    assert not torch.equal(block(x), x)
    block.reset_parameters()
    assert_identity(block, x)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_gate_is_a_zero_parameter_with_a_gradient(name):
    block = build(name).train()
    gate = block.gate
    assert any(gate is parameter for parameter in block.parameters())
    assert not gate.any()
    block(torch.randn(2, 16, 5, 4)).square().sum().backward()
    assert gate.grad.abs().sum() > 0


@pytest.mark.parametrize("norm", ["bn", "ln", "gn", "none"])
def test_without_zero_init_the_block_acts(norm):
    block = NonLocal(16, norm=norm, zero_init=False)
    x = torch.randn(2, 16, 5, 4)
    assert not torch.equal(block(x), x)


@pytest.mark.parametrize("name", BLOCKS)
def test_forward_draws_no_random_numbers(name):
    block = build(name).train()
    before = torch.get_rng_state()
    block(torch.ones(2, 16, 5, 4))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
@pytest.mark.parametrize("name", BLOCKS)
def test_copies_compute_the_same(name, copier):
    block = randomised(build(name)).eval()
    x = torch.randn(2, 16, 5, 4)
    assert torch.equal(copier(block)(x), block(x))
