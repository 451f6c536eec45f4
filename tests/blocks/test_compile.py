"""Blocks under torch.fx, torch.compile and torch.export compute what they compute eagerly."""

from __future__ import annotations

import copy
import io
import logging
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from nlsurgery.blocks import NonLocal, SelfAttention
from nlsurgery.blocks.affinity_operator import operator_attend
from nlsurgery.blocks.products import multiplies_bfloat16

from .cases import randomised
from .test_forms import PAIRS
from .test_identity import BLOCKS, RELATIVES, build

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


#: Each relative is traced by torch.fx always, and by the compilers in the slow run.
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] if name.split("-")[0] in RELATIVES else [])
    for name in BLOCKS
]


def random_block(name: str) -> nn.Module:
    return randomised(build(name), std=0.2).eval()


@pytest.mark.parametrize("name", BLOCKS)
def test_fx_symbolic_trace(name):
    block = random_block(name)
    traced = torch.fx.symbolic_trace(block)
    for size in ((5, 4), (7, 1)):
        x = torch.randn(2, 16, *size)
        torch.testing.assert_close(traced(x), block(x), rtol=0, atol=0)
    x = torch.randn(2, 16, 5, 4)
    other = copy.deepcopy(block).train()
    torch.testing.assert_close(traced.train()(x), other(x), rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph(name, training):
    block = random_block(name).train(training)
    eager = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=False)
    x = torch.randn(2, 16, 5, 4, requires_grad=True)
    y = compiled(x)
    eager_y = eager(x)
    torch.testing.assert_close(y, eager_y, **CLOSE)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(eager_y.square().sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_exports_with_dynamic_sizes(name):
    block = random_block(name)
    # From 4 on: a pooled size of 1 would be another graph.
    sizes = {2: torch.export.Dim("h", min=4, max=64), 3: torch.export.Dim("w", min=4, max=64)}
    program = torch.export.export(block, (torch.randn(2, 16, 6, 5),), dynamic_shapes=(sizes,))
    for size in ((6, 5), (9, 4)):
        x = torch.randn(2, 16, *size)
        torch.testing.assert_close(program.module()(x), block(x), **CLOSE)


def block_of_form(mode: str, form: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return randomised(NonLocal(8, 4, mode=mode, implementation=form, **options), std=0.3).eval()


@pytest.mark.parametrize(("mode", "form"), PAIRS)
def test_every_form_compiles_as_one_graph_of_any_size(mode, form):
    block = block_of_form(mode, form).train()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((6, 5), (8, 9)):
        x = torch.randn(2, 8, *size, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, block(x), **CLOSE)
        grads = [torch.autograd.grad(z.square().sum(), x)[0] for z in (y, block(x))]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sub_sample", [False, True], ids=["all", "sub"])
@pytest.mark.parametrize(("mode", "form"), PAIRS)
def test_every_form_exports_with_dynamic_sizes(mode, form, sub_sample):
    block = block_of_form(mode, form, sub_sample=sub_sample)
    sizes = {2: torch.export.Dim("h", min=4, max=512), 3: torch.export.Dim("w", min=4, max=512)}
    program = torch.export.export(block, (torch.randn(2, 8, 6, 5),), dynamic_shapes=(sizes,))
    for size in ((6, 5), (9, 4), (30, 40)):
        x = torch.randn(2, 8, *size)
        torch.testing.assert_close(program.module()(x), block(x), **CLOSE)


@pytest.mark.parametrize("mode", ["embedded_gaussian", "dot_product", "concatenation"])
def test_auto_exports_wide_blocks_with_dynamic_sizes(mode):
    """The choice by size must not fix the sizes of the graph."""
    block = randomised(NonLocal(256, mode=mode), std=0.05).eval()
    sizes = {2: torch.export.Dim("h", min=4, max=512), 3: torch.export.Dim("w", min=4, max=512)}
    program = torch.export.export(block, (torch.randn(1, 256, 6, 5),), dynamic_shapes=(sizes,))
    x = torch.randn(1, 256, 20, 20)
    torch.testing.assert_close(program.module()(x), block(x), rtol=1e-4, atol=1e-4)


ONNX_BLOCKS = [
    *(pytest.param(lambda m=m, f=f: block_of_form(m, f), id=f"{m}-{f}") for m, f in PAIRS),
    pytest.param(lambda: randomised(SelfAttention(8)).eval(), id="self_attention"),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("make", ONNX_BLOCKS)
def test_every_form_exports_to_onnx(make):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    block = make()
    sizes = {2: torch.export.Dim("h", min=4, max=64), 3: torch.export.Dim("w", min=4, max=64)}
    x = torch.randn(1, 8, 6, 5)
    program = torch.onnx.export(block, (x,), dynamo=True, dynamic_shapes=(sizes,), verbose=False)
    file = io.BytesIO()
    program.save(file)
    model = onnx.load_from_string(file.getvalue())
    for size in ((6, 5), (7, 9)):
        x = torch.randn(1, 8, *size)
        (y,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
        np.testing.assert_allclose(y, block(x).detach().numpy(), rtol=1e-4, atol=1e-4)


TOLD = hasattr(torch.compiler, "is_exporting")  # from torch 2.7 on


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("processor", ["mkl", "onednn"])
def test_compiled_attention_takes_its_form_when_it_runs(processor, dtype, backend, request):
    """For one size, and for any: torch's own would take up to 2.8 times as long."""
    request.getfixturevalue(processor)
    torch.manual_seed(0)
    block = randomised(NonLocal(32, norm="none"), std=0.2).to(dtype)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    names: list[str] = []
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-4
    for size in ((36, 33), (37, 34), (41, 35)):
        results = []
        x = torch.randn(2, 32, *size).to(dtype).requires_grad_()
        for module in (block, compiled):
            block.zero_grad()
            with torch.profiler.profile() as profile:
                y = module(x)
                (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
            results.append((y, gradient))
        names = [event.key for event in profile.key_averages()]
        assert ("nlsurgery::attention_backward" in names) == TOLD
        for eager, ours in zip(*results, strict=True):
            assert (ours - eager).float().norm() < tolerance * eager.float().norm()


@pytest.mark.skipif(
    not TOLD, reason="exported and compiled graphs are told apart from torch 2.7 on"
)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("processor", ["mkl", "onednn"])
def test_small_maps_are_left_to_the_compiler(processor, dtype, dynamic, request):
    request.getfixturevalue(processor)
    if processor == "onednn" and dtype == torch.bfloat16 and not multiplies_bfloat16():
        pytest.skip("oneDNN multiplies no bfloat16 without AVX-512")
    taken: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        targets = [str(node.target) for node in graph.graph.nodes]
        taken.append("operator" if any("nlsurgery" in t for t in targets) else "plain")
        return graph

    block = randomised(NonLocal(32, norm="none", use_scale=True), std=0.2).to(dtype)
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=dynamic)
    # As many keys as fused attention is not worth for, and as many as a map is not formed for.
    for size in ((8, 7), (9, 8), (40, 37), (9, 9)):
        x = torch.randn(2, 32, *size).to(dtype).requires_grad_()
        exact = copy.deepcopy(block).double()
        wide = x.detach().double().requires_grad_()
        results = []
        for module, inputs in ((compiled, x), (exact, wide)):
            y = module(inputs) - inputs
            results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
        limit = 1e-5 if dtype == torch.float32 else 2e-2
        for ours, other in zip(*results, strict=True):
            assert (ours.double() - other).norm() < limit * other.norm()
    # Of any size, there are as many graphs as forms.
    expected = ["plain", "operator"] if dynamic else ["plain", "plain", "operator", "plain"]
    assert taken == expected


@pytest.mark.parametrize("form", ["auto", "fused", "chunked"])
@pytest.mark.parametrize("spread", [1.0, 20.0])
@pytest.mark.parametrize(("channels", "side"), [(8, 6), (8, 26), (300, 12), (8, 0)])
@pytest.mark.parametrize("processor", ["mkl", "onednn"])
def test_the_operator_equals_the_formula(processor, channels, side, spread, form, request):
    request.getfixturevalue(processor)
    shape = (2, 1, side * side, channels)
    q, k, v, dy = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    k *= spread / channels**0.5

    def differentiated(function, dtype: torch.dtype) -> list[torch.Tensor]:
        needed = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        y = function(*needed)
        return [y, *torch.autograd.grad(y, needed, dy.to(dtype))]

    found = differentiated(lambda q, k, v: operator_attend(q, k, v, 0.9, form), torch.float32)
    plain = differentiated(
        lambda q, k, v: (0.9 * q @ k.transpose(-2, -1)).softmax(-1) @ v, torch.float64
    )
    for one, other in zip(found, plain, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= 5e-5 * other.norm()


@pytest.mark.parametrize("processor", ["mkl", "onednn"])
def test_the_operator_keeps_to_torch_s_rules(processor, request):
    request.getfixturevalue(processor)
    q, k, v = (torch.randn(2, 3, 12, 4, requires_grad=True) for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opcheck asks for gradients that are not there
        torch.library.opcheck(torch.ops.nlsurgery.attention.default, (q, k, v, 0.9, "auto"))


def test_an_exported_program_in_bfloat16_holds_no_operator_of_ours():
    block = NonLocal(16).bfloat16()
    program = torch.export.export(block, (torch.randn(2, 16, 6, 5).bfloat16(),))
    assert not [node for node in program.graph.nodes if "nlsurgery" in str(node.target)]
