"""What holds on every device: run as it stands on a CPU, and on a GPU by ``pytest -m gpu``."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models import resnet18

import nlsurgery
from nlsurgery.blocks import NonLocal, SelfAttention, affinity_fused
from nlsurgery.blocks.multi_head import MultiHeadNonLocal

from .blocks.cases import MODES, randomised

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
#: Every way of torch's fused attention but the one that forms the N×M tensor.
LEAN = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
]
FORMS = [
    ("embedded_gaussian", "explicit"),
    ("embedded_gaussian", "fused"),
    ("embedded_gaussian", "chunked"),
    ("gaussian", "fused"),
    ("dot_product", "explicit"),
    ("dot_product", "reassociated"),
    ("concatenation", "explicit"),
    ("concatenation", "sorted"),
]
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """float32 products in float32: TensorFloat-32 rounds to ten bits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def relative(y: Tensor, exact: Tensor) -> float:
    """The distance in norm, as a share of the exact result's."""
    return float((y.detach().cpu().double() - exact.detach()).norm() / exact.detach().norm())


def with_gradients(block: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of input and parameters for a fixed upstream gradient."""
    x = x.clone().requires_grad_()
    y = block(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    parameters = [p for p in block.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y, [x, *parameters], upstream)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("mode", "form"), FORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_form_equals_the_formula_and_its_gradients(device, mode, form, layout):
    block = randomised(NonLocal(24, 20, mode=mode, norm="none"), std=0.2)
    x = torch.randn(2, 24, 9, 11)
    block.implementation = "explicit"
    exact = with_gradients(copy.deepcopy(block).double(), x.double())
    block.implementation = form
    found = with_gradients(block.to(device), x.to(device).contiguous(memory_format=layout))
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_halves_stay_within_their_rounding(device, mode, dtype):
    block = randomised(NonLocal(32, mode=mode, norm="none"), std=0.1).to(dtype)
    x = torch.randn(2, 32, 12, 12).to(dtype)
    exact = copy.deepcopy(block).double()(x.double()) - x.double()
    found = block.to(device)(x.to(device)).cpu().double() - x.double()
    assert relative(found, exact) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("device", DEVICES)
def test_logits_beyond_float16_stay_finite_and_the_identity(device):
    block = NonLocal(1024, 512).to(device)
    for projection in (block.theta, block.phi):
        nn.init.constant_(projection.weight, 1.0)
    x = torch.full((1, 1024, 4, 4), 8.0, device=device)
    with torch.autocast(device, dtype=torch.float16):
        y = block(x)
    assert torch.equal(y, x)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("channels", [16, 20, 72])
@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("cpu", NonLocal),
        ("cpu", MultiHeadNonLocal),
        # On a CPU torch has none for values of another size than the keys': those are chunked.
        *(
            pytest.param("cuda", kind, marks=pytest.mark.gpu)
            for kind in (NonLocal, MultiHeadNonLocal, SelfAttention)
        ),
    ],
)
def test_fused_attention_never_forms_the_pairwise_tensor(device, kind, channels, dims):
    options = {"heads": 2} if kind is MultiHeadNonLocal else {"implementation": "fused"}
    block = kind(channels, dims=dims, **options).to(device)
    x = torch.randn(2, channels, *(9, 8, 2)[:dims], device=device)
    with sdpa_kernel(LEAN):
        block(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize("shape", [(2, 1, 30, 5), (1, 3, 7, 12)], ids=str)
def test_padded_channels_change_nothing(monkeypatch, shape):
    q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    plain = affinity_fused.fused_attend(q, k, v[..., :4], 0.7)
    monkeypatch.setitem(affinity_fused.ALIGNED, "cpu", 8)
    padded = affinity_fused.fused_attend(q, k, v[..., :4], 0.7)
    assert padded.shape == plain.shape
    torch.testing.assert_close(padded, plain, rtol=1e-12, atol=1e-12)
    taken = affinity_fused._fusable(v.transpose(1, 2)[..., 1:])
    assert taken.shape[3] % 8 == 0
    assert not any(place % 8 for place in (taken.storage_offset(), *taken.stride()[:3]))


def test_a_plan_counts_no_padding():
    assert affinity_fused._fusable(torch.empty(1, 1, 5, 20, device="meta")).shape[3] == 20


def backbone(name: str) -> tuple[nn.Module, str | dict[str, object]]:
    """A real architecture and a recipe for it."""
    if name == "resnet18":
        return resnet18(), "res4_1block"
    block = {"type": "non_local"}
    inserts = [
        {"stage": -1 if name.startswith("vit") else "res4", "after": "before_last", "block": block}
    ]
    return timm.create_model(name), {"version": 1, "inserts": inserts}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
@pytest.mark.parametrize("device", DEVICES)
def test_surgery_is_the_identity_on_the_device_of_the_model(device, name, precision):
    model, recipe = backbone(name)
    model = model.to(device).eval()
    x = torch.randn(2, 3, 224, 224, device=device)
    keys = {key: value.clone() for key, value in model.state_dict().items()}

    def run() -> Tensor:
        enabled = precision != "float32"
        dtype = getattr(torch, precision) if enabled else torch.bfloat16
        with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            return model(x)

    before = run()
    nlsurgery.apply(model, recipe)
    assert torch.equal(run(), before)
    assert {p.device.type for p in nlsurgery.inserted_parameters(model)} == {device}
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in keys.items())


@pytest.mark.parametrize("device", DEVICES)
def test_operated_models_are_saved_and_loaded_across_devices(device, tmp_path):
    model = nlsurgery.apply(resnet18().to(device), "res4_1block")
    nlsurgery.save(model, tmp_path / "model.safetensors")
    back = nlsurgery.load(resnet18().to(device), tmp_path / "model.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)
        assert back.state_dict()[key].device.type == device


@pytest.mark.parametrize("device", DEVICES)
def test_training_takes_no_pairwise_memory(device):
    block = NonLocal(32, 16).to(device)
    side = 64
    x = torch.randn(1, 32, side, side, device=device, requires_grad=True)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = block(x)
    assert sum(kept.values()) < 5 * x.nbytes
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y.backward(x.detach())
        assert torch.cuda.max_memory_allocated() - before < 4 * math.prod((side**2, side**2)) / 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_blocks_compute_the_same(device, mode):
    torch._dynamo.reset()
    block = randomised(NonLocal(16, mode=mode, norm="none"), std=0.2).to(device)
    x = torch.randn(2, 16, 10, 12, device=device)
    compiled = torch.compile(block, fullgraph=True)
    for one, other in zip(with_gradients(compiled, x), with_gradients(block, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
