"""Blocks under torch.fx, torch.compile and torch.export compute what they compute eagerly."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from nlsurgery.blocks import NonLocal, SelfAttention, affinity_operator
from nlsurgery.blocks.affinity import plain_attend
from nlsurgery.blocks.affinity_operator import operator_attend
from nlsurgery.blocks.affinity_row_gradients import row_gradients
from nlsurgery.blocks.products import multiplies_bfloat16

from .cases import BFLOAT16, needs_bfloat16, randomised
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


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_one_graph_of_torch_s_compiler_is_for_any_size(name):
    block = random_block(name)
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for size in ((6, 5), (9, 13)):
        x = torch.randn(2, 16, *size, requires_grad=True)
        y, expected = compiled(x), block(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(z.square().sum(), x)[0] for z in (y, expected)]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


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
@pytest.mark.parametrize("processor", ["mkl", "onednn", "level"])
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
@pytest.mark.parametrize("processor", ["mkl", "onednn", "level"])
def test_small_maps_are_left_to_the_compiler(processor, dtype, dynamic, request):
    request.getfixturevalue(processor)
    if processor != "mkl" and dtype == torch.bfloat16 and not multiplies_bfloat16():
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
@pytest.mark.parametrize("processor", ["mkl", "onednn", "level"])
@pytest.mark.parametrize("across", [False, True], ids=["rows", "columns"])
def test_the_operator_equals_the_formula(processor, across, channels, side, spread, form, request):
    request.getfixturevalue(processor)
    shape = (2, side * side, channels)
    q, k, v, dy = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    k *= spread / channels**0.5
    if across:
        q, k, v = (t.mT.contiguous().mT for t in (q, k, v))

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


@pytest.mark.usefixtures("onednn")
@needs_bfloat16
@pytest.mark.parametrize("grids", [None, ((6, 8), (6, 8))], ids=["any", "places"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_operator_keeps_a_map(monkeypatch, batch, grids):
    formed: list[int] = []
    monkeypatch.setattr(
        affinity_operator, "row_gradients", lambda *a: formed.append(len(a[7])) or row_gradients(*a)
    )
    made = [torch.randn(batch, 48, 16, dtype=torch.bfloat16) for _ in range(4)]
    q, k, v, dy = made
    if grids is not None:
        k = q
    found, expected = [], []
    for function, dtype, to in (
        (partial(operator_attend, form="explicit", keep=True, grids=grids), q.dtype, found),
        (plain_attend, torch.float64, expected),
    ):
        needed = [t.to(dtype).detach().requires_grad_() for t in (q, k, v)]
        y = function(*needed, scale=0.5)
        to += [y, *torch.autograd.grad(y, needed, dy.to(dtype))]
    assert formed == [batch]
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() < 1e-2 * other.norm()


def checked(operator: object, *arguments: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opcheck asks for gradients that are not there
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("across", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("processor", ["mkl", "onednn", "level"])
def test_the_operator_keeps_to_torch_s_rules(processor, across, request):
    request.getfixturevalue(processor)
    operator = torch.ops.nlsurgery.attention.default
    q, k, v = (torch.randn(2, 12, 4, requires_grad=True) for _ in range(3))
    checked(operator, q, k, v, 0.9, "auto", False, [across] * 3, [])


@pytest.mark.usefixtures("onednn")
@needs_bfloat16
def test_the_operator_keeps_to_torch_s_rules_with_a_map():
    operator = torch.ops.nlsurgery.attention.default
    made = (torch.randn(2, 12, 4).bfloat16().requires_grad_() for _ in range(3))
    checked(operator, *made, 0.9, "explicit", True, [True, False, True], [3, 4, 3, 4])


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("shape", [(2, 6, 10), (20, 6)], ids=["columns", "rows"])
def test_the_operator_of_projections_keeps_to_torch_s_rules(shape):
    x = torch.randn(shape, requires_grad=True)
    weights = [torch.randn(n, 6, requires_grad=True) for n in (4, 3)]
    biases = [torch.randn(3, requires_grad=True)]
    checked(torch.ops.nlsurgery.pointwise.default, x, weights, biases, [False, True], 0.7)


@pytest.mark.usefixtures("onednn")
@pytest.mark.skipif(not TOLD, reason="graphs are told apart from torch 2.7 on")
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
def test_compiled_projections_are_one_operator(monkeypatch, dtype, bias, last):
    monkeypatch.setattr("nlsurgery.blocks.projection.MANY_PRODUCTS", 0)
    monkeypatch.setattr("nlsurgery.blocks.projection.MANY_ITEM_PRODUCTS", 0)
    monkeypatch.setattr("nlsurgery.blocks.projection.torch_takes_onednn", lambda _: False)
    always = {True: 0, False: 0}
    monkeypatch.setattr("nlsurgery.blocks.affinity_explicit.GRAPH_LOGITS", always)
    # A scale that is no power of two: a factor of the product in bfloat16.
    block = NonLocal(32, 12, use_scale=True, bias=bias, norm="none", zero_init=False)
    block = randomised(block, std=0.2).to(dtype)
    x = torch.randn(2, 32, 24, 23).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(block, fullgraph=True, backend=backend)(x)
    # In bfloat16 torch convolves attended values that lie channels last, as its input does, as fast.
    expected = 1 if last and dtype == torch.bfloat16 else 2
    assert sum("pointwise" in target for target in graphs) == expected
    compiled = torch.compile(block, fullgraph=True, backend="inductor")
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    for needs_input in (True, False):
        results = []
        for module in (block, compiled):
            given = x.detach().requires_grad_(needs_input)
            y = module(given)
            # The bias of the keys changes no weight: its gradient is what rounding leaves.
            needed = [p for name, p in block.named_parameters() if name != "phi.bias"]
            needed += [given] if needs_input else []
            results.append((y - x, *torch.autograd.grad(y, needed, x)))
        for eager, ours in zip(*results, strict=True):
            assert (ours - eager).float().norm() < limit * eager.float().norm()


def test_an_exported_program_in_bfloat16_holds_no_operator_of_ours():
    block = NonLocal(16).bfloat16()
    program = torch.export.export(block, (torch.randn(2, 16, 6, 5).bfloat16(),))
    assert not [node for node in program.graph.nodes if "nlsurgery" in str(node.target)]
