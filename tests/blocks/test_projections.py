"""Several 1×1 convolutions of one input, computed together or not, are the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from nlsurgery.blocks import NonLocal, residual
from nlsurgery.blocks.geometry import CONVS
from nlsurgery.blocks.projection import is_small_product
from nlsurgery.blocks.residual import project_together

from .cases import BFLOAT16, MODES, feature_map, needs_bfloat16, randomised
from .test_identity import RELATIVES, build

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture(autouse=True)
def _small_maps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual, "MANY_POSITIONS", 1)
    monkeypatch.setattr(residual, "MANY_POSITIONS_BFLOAT16", 1)
    monkeypatch.setattr("nlsurgery.blocks.projection.FEW_PRODUCTS", {})
    monkeypatch.setattr("nlsurgery.blocks.projection.FEW_PRODUCTS_LAST", {})
    monkeypatch.setattr("nlsurgery.blocks.projection.JOINED_PRODUCTS", 0)
    monkeypatch.setattr("nlsurgery.blocks.projection.CONVOLVED_WEIGHTS", 0)


def layers(dims: int, biases: tuple[bool, ...] = (True, True, True)) -> list[nn.Module]:
    torch.manual_seed(0)
    sizes = (6, 6, 10)
    return [
        CONVS[dims](8, size, kernel_size=1, bias=bias)
        for size, bias in zip(sizes, biases, strict=True)
    ]


def operators_of(x: Tensor, projections: list[nn.Module]) -> dict[str, int]:
    with torch.profiler.profile() as profile, torch.no_grad():
        project_together(x, *projections)
    return {event.key: event.count for event in profile.key_averages()}


def count_of_convolutions(x: Tensor, projections: list[nn.Module]) -> int:
    counts = operators_of(x, projections)
    return counts.get("aten::convolution", 0) or counts.get("aten::linear", 0)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_together_as_one_by_one(dims: int, batch: int, last: bool) -> None:
    projections = layers(dims)
    x = torch.randn(batch, 8, *(3, 4, 5)[:dims])
    if last and dims > 1:
        x = x.contiguous(memory_format=FORMATS[dims + 2])
    results = []
    for compute in (
        lambda x: project_together(x, *projections),
        lambda x: tuple(projection(x) for projection in projections),
    ):
        given = x.clone().requires_grad_()
        outputs = compute(given)
        sum((i + 1) * y.square().sum() for i, y in enumerate(outputs)).backward()
        weights = [p.grad for projection in projections for p in projection.parameters()]
        for projection in projections:
            projection.zero_grad()
        results.append([*outputs, given.grad, *weights])
    assert len(results[0]) == len(results[1]) == 3 + 1 + 6
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_one_convolution_reads_the_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_of_convolutions(torch.randn(1, 8, 5, 5), layers(2)) == 1
    half = [m.bfloat16() for m in layers(2)]
    x = torch.randn(2, 8, 5, 5)
    assert count_of_convolutions(x.bfloat16(), half) == 1
    assert count_of_convolutions(x, layers(2)) == 3
    monkeypatch.setattr(residual, "MANY_POSITIONS", 26)
    assert count_of_convolutions(x[:1], layers(2)) == 3
    assert count_of_convolutions(x.bfloat16(), half) == 1
    monkeypatch.setattr(residual, "MANY_POSITIONS_BFLOAT16", 51)
    assert count_of_convolutions(x.bfloat16(), half) == 3


def test_weights_larger_than_the_input_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    projections = layers(2)
    size = sum(projection.weight.numel() for projection in projections)
    few, many = torch.randn(1, 8, 1, 7), torch.randn(1, 8, 1, 8)
    assert count_of_convolutions(few, projections) == 1
    monkeypatch.setattr(residual, "MANY_WEIGHTS", size - 1)
    assert count_of_convolutions(few, projections) == 3
    assert count_of_convolutions(many, projections) == 1
    monkeypatch.setattr(residual, "MANY_WEIGHTS", size)
    assert count_of_convolutions(few, projections) == 1


@pytest.mark.parametrize("change", ["hook", "mixed-biases", "kernel", "subclass"])
def test_projections_that_are_not_plain_are_called(change: str) -> None:
    biases = (True, False, True) if change == "mixed-biases" else (False,) * 3
    projections = layers(2, biases)
    if change == "hook":
        projections[1].register_forward_hook(lambda module, inputs, output: output * 2)
    elif change == "kernel":
        projections[1] = nn.Conv2d(8, 6, 3, padding=1)
    elif change == "subclass":
        projections[1] = type("Doubled", (nn.Conv2d,), {"forward": lambda self, x: 2 * x[:, :6]})(
            8, 6, 1
        )
    x = torch.randn(1, 8, 5, 5)
    for ours, projection in zip(project_together(x, *projections), projections, strict=True):
        torch.testing.assert_close(ours, projection(x))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_small_results_come_from_one_convolution(
    monkeypatch: pytest.MonkeyPatch, batch: int, threads: int
) -> None:
    monkeypatch.setattr("nlsurgery.blocks.projection.CONVOLVED_WEIGHTS", 8 * 22)
    monkeypatch.setattr(residual, "MANY_POSITIONS", 1 << 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = torch.randn(batch, 8, 5, 5)
    together = threads == 2 or batch == 16
    assert count_of_convolutions(x, layers(2)) == (1 if together else 3)
    monkeypatch.setattr("nlsurgery.blocks.projection.CONVOLVED_RESULTS", batch * 25 * 22 - 1)
    assert count_of_convolutions(x, layers(2)) == 3


@needs_bfloat16
@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("batch", [1, 2])
def test_bfloat16_weights_are_joined_up_to_a_size(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    x = torch.randn(batch, 8, 5, 5).bfloat16()
    modules = [module.bfloat16() for module in layers(2)]
    monkeypatch.setattr("nlsurgery.blocks.projection.JOINED_PRODUCTS", x.numel() * 22 + 1)
    found = project_together(x, *modules)
    assert all(y._base is found[0]._base is not None for y in found)
    for y, module in zip(found, modules, strict=True):
        torch.testing.assert_close(y, module(x), rtol=1e-2, atol=1e-2)
    monkeypatch.setattr("nlsurgery.blocks.projection.JOINED_PRODUCTS", x.numel() * 22)
    monkeypatch.setattr(residual, "MANY_POSITIONS_BFLOAT16", 1 << 20)
    assert count_of_convolutions(x, modules) == 3


@needs_bfloat16
@pytest.mark.usefixtures("onednn")
def test_bfloat16_items_of_few_positions_are_convolved_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(4, 8, 2, 3).bfloat16()
    modules = [module.bfloat16() for module in layers(2)]
    monkeypatch.setattr("nlsurgery.blocks.projection.JOINED_PRODUCTS", 1 << 27)
    # Up to so many positions: 6 times 5 is less than 4 times 8, 6 times 6 is more.
    for factor, count in ((5, 1), (6, 0)):
        factors = dict.fromkeys((False, True), factor)
        monkeypatch.setattr("nlsurgery.blocks.projection.JOINED_POSITIONS", factors)
        assert count_of_convolutions(x, modules) == count
    monkeypatch.setattr("nlsurgery.blocks.projection.JOINED_RESULTS", 4 * 6 * 22 - 1)
    monkeypatch.setattr(residual, "MANY_POSITIONS_BFLOAT16", 1 << 20)
    assert count_of_convolutions(x, modules) == 3


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("form", ["fused", "chunked"])
@pytest.mark.parametrize("channels", [8, 32])
def test_the_norm_gets_a_gradient_that_lies_as_its_input_does(
    last: bool, form: str, channels: int
) -> None:
    block = NonLocal(channels, zero_init=False, implementation=form)
    order = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, channels, 32, 33).to(memory_format=order)
    seen: list[Tensor] = []
    block.bn.register_forward_pre_hook(lambda _module, inputs: seen.extend(inputs))
    block.bn.register_full_backward_hook(lambda _module, _inputs, outputs: seen.extend(outputs))
    block(x).sum().backward()
    assert seen[0].stride() == seen[1].stride()


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dims", "last"), [(1, False), (2, False), (3, False), (2, True), (3, True)]
)
def test_small_projections_are_products(
    monkeypatch: pytest.MonkeyPatch, dims: int, last: bool, bias: bool, dtype: torch.dtype
) -> None:
    name = "FEW_PRODUCTS_LAST" if last else "FEW_PRODUCTS"
    monkeypatch.setattr(f"nlsurgery.blocks.projection.{name}", {dtype: 1 << 20})
    modules = [m.to(dtype) for m in layers(dims, (bias,) * 3)]
    x = torch.randn(2, 8, *{1: (25,), 2: (5, 5), 3: (2, 5, 5)}[dims]).to(dtype)
    if last:
        x = x.contiguous(memory_format=FORMATS[dims + 2])
    x.requires_grad_()
    assert is_small_product(x, modules[0].weight)
    for by_onednn in (True, False):
        taken = lambda x, found=by_onednn: found  # noqa: E731
        monkeypatch.setattr("nlsurgery.blocks.projection.torch_takes_onednn", taken)
        # Without oneDNN torch's convolution of two dimensions is that product.
        count = int(dims == 2 and dtype == torch.float32 and not by_onednn)
        assert operators_of(x.detach(), modules).get("aten::convolution", 0) == count
    parameters = [x, *(p for m in modules for p in m.parameters())]
    found = project_together(x, *modules)
    given = [torch.randn_like(y) for y in found]
    found = [*found, *torch.autograd.grad(found, parameters, given)]
    exact = copy.deepcopy(modules)
    wide = x.detach().double().requires_grad_()
    made = [m.double()(wide) for m in exact]
    parameters = [wide, *(p for m in exact for p in m.parameters())]
    expected = [*made, *torch.autograd.grad(made, parameters, [dy.double() for dy in given])]
    # Views of one result, each with its channels as far apart as those of x.
    assert all(y._base is found[0]._base is not None for y in found[:3])
    assert all(y.stride(1) == (1 if last else x.shape[2:].numel()) for y in found[:3])
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape) == (dtype, other.shape)
        assert (one.double() - other).norm() < (
            1e-6 if dtype == torch.float32 else 6e-3
        ) * other.norm()
    monkeypatch.setattr("nlsurgery.blocks.projection.JOINED_WEIGHTS", {dtype: 1})
    apart = project_together(x, *modules)
    assert not any(
        y.untyped_storage().data_ptr() == apart[0].untyped_storage().data_ptr() for y in apart[1:]
    )
    for one, other in zip(apart, made, strict=True):
        assert (one.double() - other).norm() < (
            1e-6 if one.dtype == x.dtype == torch.float32 else 6e-3
        ) * other.norm()
    # Not larger ones, nor under autocast, nor what lies otherwise, nor what has to be called.
    assert not is_small_product(x.repeat(1000, *[1] * (dims + 1)), modules[0].weight)
    with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else torch.float16):
        assert not is_small_product(x, modules[0].weight)
    assert not is_small_product(x[..., ::2], modules[0].weight)
    hooked = modules[0]
    hooked.register_forward_hook(lambda *_: torch.zeros(()))
    assert residual.project(hooked, x).shape == ()


class Adapted(nn.Module):
    """A layer and a low-rank map of the same input beside it, as fine-tuning by adapters has it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        if isinstance(base, nn.Linear):
            self.down = nn.Linear(base.in_features, 1, bias=False)
            self.up = nn.Linear(1, base.out_features, bias=False)
        else:
            self.down = type(base)(base.in_channels, 1, 1, bias=False)
            self.up = type(base)(1, base.out_channels, 1, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Module:
        """The same as one layer."""
        layer = copy.deepcopy(self.base)
        with torch.no_grad():
            product = self.up.weight.flatten(1) @ self.down.weight.flatten(1)
            layer.weight += product.view_as(layer.weight)
        return layer


def check_adapters(block: nn.Module, x: Tensor) -> None:
    """A low-rank map beside one 1×1 convolution or linear layer after the other acts as if it were merged."""
    for path, layer in list(block.named_modules()):
        if not isinstance(layer, (nn.Linear, *CONVS.values())):
            continue
        if getattr(layer, "groups", 1) > 1 or max(layer.weight.shape[2:], default=1) > 1:
            continue
        adapter = randomised(Adapted(layer).double())
        found = []
        for module in (adapter, adapter.merged()):
            other = copy.deepcopy(block)
            host, _, name = path.rpartition(".")
            other.get_submodule(host)._modules[name] = module
            found.append(other(x))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
        found[0].sum().backward()
        assert adapter.up.weight.grad is not None


@pytest.mark.parametrize("sub_sample", [False, True], ids=["all", "sub"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_adapters_in_place_of_projections_act(mode, dims, sub_sample):
    block = NonLocal(6, dims=dims, mode=mode, sub_sample=sub_sample)
    check_adapters(randomised(block).double().eval(), feature_map(dims))


@pytest.mark.parametrize("name", RELATIVES)
def test_adapters_in_the_relatives_act(name):
    block = randomised(build(name), std=0.3).double().eval()
    check_adapters(block, torch.randn(2, 16, 6, 5, dtype=torch.float64))
