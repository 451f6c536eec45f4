"""apply, plan, remove, disabled and verify on toy networks."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nlsurgery
from nlsurgery.errors import ModelError, RecipeError, SelectorError, SurgeryError, VerifyError
from tests.blocks.cases import default_dtype
from tests.models import Residual, SharedActivation, TinyResNet, randomise_blocks, trained_looking


def recipe(*entries: dict[str, Any]) -> dict[str, Any]:
    block = {"type": "non_local"}
    return {"version": 1, "inserts": [{"block": block, **entry} for entry in entries]}


FIVE = recipe({"stage": "res3", "after": "all"}, {"stage": "res4", "after": [0, 1, 2]})


@pytest.fixture
def model() -> nn.Module:
    return trained_looking(TinyResNet()).eval()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 64, 64)


def attributes(model: nn.Module) -> dict[str, Any]:
    """Everything a module tree holds, tensors by identity."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                found[name, key] = {k: id(v) for k, v in value.items()}
            elif key.endswith("_hooks"):
                found[name, key] = list(value.values())
            else:
                found[name, key] = value
    return found


def test_apply_works_in_place_and_returns_the_model(model: nn.Module) -> None:
    assert nlsurgery.apply(model, FIVE) is model


def test_blocks_stand_where_the_recipe_says(model: nn.Module) -> None:
    nlsurgery.apply(model, FIVE)
    rows = nlsurgery.report(model).insertions
    assert [row.block for row in rows] == [
        "layer2.0",
        "layer2.1",
        "layer3.0",
        "layer3.1",
        "layer3.2",
    ]
    assert [row.num_chs for row in rows] == [32, 32, 64, 64, 64]
    assert rows[0].fqn == "layer2.0.nlsurgery.0"
    assert {row.layout for row in rows} == {"NCHW"}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("block", ["non_local", "self_attention"])
def test_output_is_the_same_to_the_last_bit(
    model: nn.Module, image: Tensor, training: bool, block: str
) -> None:
    model.train(training)
    twin = copy.deepcopy(model)
    nlsurgery.apply(model, recipe({"stage": "res4", "after": "all", "block": {"type": block}}))
    assert torch.equal(model(image), twin(image))
    for key, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_original_keys_and_values_stay_and_only_new_ones_are_missing(model: nn.Module) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    nlsurgery.apply(model, FIVE)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    result = model.load_state_dict(before, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == set(nlsurgery.report(model).new_keys)
    assert set(after) - set(before) == set(nlsurgery.report(model).new_keys)


def test_modules_keep_identity_class_and_index(model: nn.Module) -> None:
    block = model.layer3[1]
    nlsurgery.apply(model, FIVE)
    assert model.layer3[1] is block
    assert type(block) is Residual
    assert len(model.layer3) == 3


def test_plan_changes_nothing_and_equals_what_apply_does(model: nn.Module) -> None:
    before = attributes(model)
    plan = nlsurgery.plan(model, FIVE)
    assert attributes(model) == before
    nlsurgery.apply(model, FIVE)
    rows = nlsurgery.report(model).insertions
    assert [row.fqn for row in plan.insertions] == [row.fqn for row in rows]
    assert [row.num_params for row in plan.insertions] == [row.num_params for row in rows]
    assert plan.num_params == nlsurgery.report(model).num_params_added


def test_plan_counts_flops_as_the_formula_says(model: nn.Module) -> None:
    plan = nlsurgery.plan(model, recipe({"stage": "res4", "after": 0}), input_size=(64, 64))
    (row,) = plan.insertions
    c, inner, n = 64, 32, 4 * 4
    projections = 2 * 4 * n * c * inner
    products = 2 * 2 * n * n * inner
    assert row.num_positions == n
    assert row.flops == projections + products
    assert row.activation_bytes >= 4 * n * (c + 3 * inner)


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, partial(default_dtype, torch.float64)],
    ids=["no_grad", "inference_mode", "float64"],
)
def test_what_surgery_says_and_makes_does_not_depend_on_the_caller_s_mode(
    model: nn.Module, image: Tensor, mode: Any
) -> None:
    expected = nlsurgery.plan(model, FIVE)
    with mode():
        assert nlsurgery.plan(model, FIVE).to_dict() == expected.to_dict()
        nlsurgery.apply(model, FIVE)
        nlsurgery.verify(model, gradient=True)
    model.train()(image).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_blocks_are_made_where_their_hosts_are(model: nn.Module, image: Tensor) -> None:
    before = model(image)
    with torch.device("meta"):
        nlsurgery.apply(model, FIVE)
    assert torch.equal(model(image), before)


def test_remove_gives_the_original_back_exactly(model: nn.Module, image: Tensor) -> None:
    before, output = attributes(model), model(image)
    nlsurgery.apply(model, FIVE)
    assert nlsurgery.remove(model) is model
    assert attributes(model) == before
    assert torch.equal(model(image), output)


def test_disabled_runs_the_original(model: nn.Module, image: Tensor) -> None:
    output = model(image)
    nlsurgery.apply(model, FIVE)
    randomise_blocks(nlsurgery.inserted_blocks(model))
    changed = model(image)
    assert not torch.equal(changed, output)
    with nlsurgery.disabled(model) as inside:
        assert inside is model
        assert torch.equal(model(image), output)
    assert torch.equal(model(image), changed)


def test_gradients_reach_the_gates_in_the_first_step(model: nn.Module, image: Tensor) -> None:
    nlsurgery.apply(model, FIVE)
    model.train()
    model(image).square().sum().backward()
    for block in nlsurgery.inserted_blocks(model).values():
        assert block.gate.grad is not None
        assert block.gate.grad.abs().sum() > 0


def test_deepcopy_runs_its_own_blocks(model: nn.Module, image: Tensor) -> None:
    nlsurgery.apply(model, FIVE)
    output = model(image)
    twin = copy.deepcopy(model)
    randomise_blocks(nlsurgery.inserted_blocks(twin))
    assert not torch.equal(twin(image), output)
    assert torch.equal(model(image), output)


def test_pickle_keeps_blocks(model: nn.Module, image: Tensor) -> None:
    nlsurgery.apply(model, FIVE)
    randomise_blocks(nlsurgery.inserted_blocks(model))
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(image), model(image))
    assert nlsurgery.report(twin) == nlsurgery.report(model)


def test_second_recipe_adds_to_the_first(model: nn.Module, image: Tensor) -> None:
    nlsurgery.apply(model, recipe({"stage": "res3"}))
    nlsurgery.apply(model, recipe({"stage": "res4"}))
    assert [row.block for row in nlsurgery.report(model).insertions] == ["layer2.1", "layer3.2"]
    assert nlsurgery.inspect(model).stages == nlsurgery.inspect(nlsurgery.remove(model)).stages


def test_stack_puts_one_block_on_another(model: nn.Module, image: Tensor) -> None:
    output = model(image)
    entry = {"stage": "res4", "stack": True}
    nlsurgery.apply(model, recipe(entry, {**entry, "block": {"type": "self_attention"}}))
    rows = nlsurgery.report(model).insertions
    assert [row.fqn for row in rows] == ["layer3.2.nlsurgery.0", "layer3.2.nlsurgery.1"]
    assert torch.equal(model(image), output)
    nlsurgery.verify(model)


def test_global_random_state_is_not_advanced(model: nn.Module) -> None:
    state = torch.get_rng_state()
    nlsurgery.apply(model, FIVE)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_blocks_take_the_hosts_dtype_and_mode(model: nn.Module, dtype: torch.dtype) -> None:
    model.to(dtype).train()
    nlsurgery.apply(model, FIVE)
    for block in nlsurgery.inserted_blocks(model).values():
        assert block.training
        assert {p.dtype for p in block.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        pytest.param([{"stage": "res6"}], ["inserts[0].stage 'res6'", "res5", "layer4"], id="stage"),
        pytest.param([{"stage": "layr3"}], ["did you mean 'layer3'"], id="misspelt"),
        pytest.param([{"stage": "res3"}, {"stage": "res4", "after": [0, 3]}],
                     ["inserts[1].after 3", "3 blocks", "0 to 2"], id="index"),
        pytest.param([{"stage": "res4", "after": {"every": 4}}], ["matches nothing"], id="every"),
        pytest.param([{"stage": "res2", "after": "before_last"}], ["one block only"], id="before-last"),
        pytest.param([{"stage": "res4"}, {"stage": "layer3", "after": 2}],
                     ["inserts[1]", "inserts[0]", "stack: true"], id="twice"),
        pytest.param([{"stage": "res4", "at": "bn9"}], ["inserts[0].at 'bn9'", "'bn2'"], id="at"),
        pytest.param([{"stage": "res4", "at": "bn*"}], ["several", "bn1", "bn2"], id="glob"),
        pytest.param([{"stage": "fc"}], ["fc", "no feature map"], id="not-a-map"),
        pytest.param([{"stage": "res4", "block": {"type": "non_local", "use_scale": True,
                                                  "mode": "dot_product"}}],
                     ["inserts[0].block", "use_scale"], id="block-option"),
    ],
)  # fmt: skip
def test_bad_selector_is_one_error_and_changes_nothing(
    model: nn.Module, entries: list[dict[str, Any]], words: list[str]
) -> None:
    before = attributes(model)
    with pytest.raises(RecipeError) as caught:
        nlsurgery.apply(model, recipe(*entries))
    for word in words:
        assert word in str(caught.value)
    assert attributes(model) == before


def test_host_called_more_than_once_is_refused() -> None:
    model = SharedActivation()
    before = attributes(model)
    with pytest.raises(SelectorError, match="called 4 times"):
        nlsurgery.apply(model, recipe({"stage": "relu"}))
    assert attributes(model) == before


def test_place_that_holds_a_block_already_is_refused(model: nn.Module) -> None:
    nlsurgery.apply(model, FIVE)
    before = attributes(model)
    with pytest.raises(SelectorError, match="holds an inserted block already"):
        nlsurgery.apply(model, FIVE)
    assert attributes(model) == before


def test_error_in_the_middle_of_splicing_rolls_back(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nlsurgery import splice

    before = attributes(model)
    plan = nlsurgery.plan(model, FIVE)
    assert len(plan.insertions) == 5
    real, calls = splice.Inserted.add, []

    def failing(self: Any, block: nn.Module, record: Any, *place: Any) -> None:
        calls.append(record)
        if len(calls) == 8:  # five in the rehearsal, the third of the real ones
            raise MemoryError("no room")
        real(self, block, record, *place)

    monkeypatch.setattr(splice.Inserted, "add", failing)
    with pytest.raises(MemoryError):
        nlsurgery.apply(model, FIVE)
    assert attributes(model) == before


@pytest.mark.parametrize(
    ("wrap", "word"),
    [
        pytest.param(lambda m: torch.compile(m, backend="eager"), "_orig_mod", id="compiled"),
        pytest.param(lambda m: nn.DataParallel(m), "model.module", id="wrapped"),
        pytest.param(lambda m: "resnet50", "nn.Module", id="not-a-module"),
    ],
)
def test_wrapped_model_is_refused_with_the_way_out(model: nn.Module, wrap: Any, word: str) -> None:
    with pytest.raises(ModelError, match=word):
        nlsurgery.apply(wrap(model), FIVE)


class Holder(nn.Module):
    """A model whose network is a child of it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("wrap", "word"),
    [
        pytest.param(
            lambda m: Holder(torch.compile(m, backend="eager")), "net", id="compiled-child"
        ),
        pytest.param(lambda m: Holder(_compiled_in_place(m)), "net", id="compiled-in-place-child"),
        pytest.param(_compiled_in_place, "compile", id="compiled-in-place"),
        pytest.param(lambda m: Holder(nn.DataParallel(m)), "net", id="wrapped-child"),
        pytest.param(lambda m: nn.Sequential(nn.LazyConv2d(3, 1), m), "lazy", id="lazy"),
    ],
)
@pytest.mark.parametrize("act", [nlsurgery.inspect, nlsurgery.remove, nlsurgery.apply])
def test_model_that_would_not_see_its_blocks_is_refused(
    model: nn.Module, wrap: Any, word: str, act: Any
) -> None:
    wrapped = wrap(model)
    before = [list(vars(module)) for module in wrapped.modules()]
    with pytest.raises(ModelError, match=word):
        act(wrapped, FIVE) if act is nlsurgery.apply else act(wrapped)
    assert [list(vars(module)) for module in wrapped.modules()] == before


def test_model_compiled_after_the_surgery_is_still_reported_and_saved(
    model: nn.Module, tmp_path: Path
) -> None:
    operated = _compiled_in_place(nlsurgery.apply(model, FIVE))
    assert len(nlsurgery.report(operated).insertions) == 5
    nlsurgery.verify(operated)
    assert nlsurgery.save(operated, tmp_path / "a.safetensors").is_file()


@pytest.mark.parametrize(
    "size", ["x", 5, (3.5, 4), (0, 0), (2, 3, 4, 5, 6), (10**9, 10**9)], ids=str
)
def test_input_size_that_is_none_is_one_error(model: nn.Module, size: Any) -> None:
    with pytest.raises(ModelError, match="input_size must be"):
        nlsurgery.inspect(model, input_size=size)


def test_new_keys_of_a_shared_module_have_all_its_names(model: nn.Module) -> None:
    model.twin = model.get_submodule("layer3.0")
    original = set(model.state_dict())
    operated = nlsurgery.apply(model, recipe({"stage": "res4", "after": 0}))
    assert set(nlsurgery.report(operated).new_keys) == set(operated.state_dict()) - original
    assert any(key.startswith("twin.") for key in nlsurgery.report(operated).new_keys)


def test_model_that_does_not_run_asks_for_an_input() -> None:
    class Needy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.conv(x) * mask

    with pytest.raises(ModelError, match="example_input"):
        nlsurgery.inspect(Needy())
    assert nlsurgery.inspect(
        Needy(), example_input=(torch.ones(1, 3, 32, 32), torch.ones(()))
    ).stages


def test_every_error_is_a_surgery_error() -> None:
    for error in (ModelError, RecipeError, SelectorError, VerifyError):
        assert issubclass(error, SurgeryError)


def test_verify_passes_after_apply(model: nn.Module) -> None:
    nlsurgery.verify(nlsurgery.apply(model, FIVE))


def test_verify_notices_a_lost_hook(model: nn.Module) -> None:
    nlsurgery.apply(model, FIVE)
    model.layer3[1]._forward_hooks.clear()
    with pytest.raises(VerifyError, match=r"layer3\.1\.nlsurgery\.0 does not run"):
        nlsurgery.verify(model)


def test_verify_notices_a_block_that_runs_twice(model: nn.Module) -> None:
    nlsurgery.apply(model, recipe({"stage": "res4"}))
    model.layer4.insert(0, model.layer3[2])
    with pytest.raises(VerifyError, match="runs 2 times"):
        nlsurgery.verify(model)


def test_verify_notices_a_host_that_is_no_longer_called(model: nn.Module) -> None:
    nlsurgery.apply(model, recipe({"stage": "res4"}))
    model.layer3[2].forward = lambda x: x
    layer = model.layer3[2]
    model.layer3[2] = nn.Identity()
    model.spare = layer
    with pytest.raises(VerifyError, match="does not run"):
        nlsurgery.verify(model)


def test_verify_on_an_original_model_says_so(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="no inserted block"):
        nlsurgery.verify(model)


def test_block_inside_a_residual_block_survives_sync_batchnorm(
    model: nn.Module, image: Tensor
) -> None:
    nlsurgery.apply(model, recipe({"stage": "res4", "at": "bn2", "after": "all"}))
    randomise_blocks(nlsurgery.inserted_blocks(model))
    before = model(image)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    assert isinstance(converted.layer3[0].bn2, nn.SyncBatchNorm)
    torch.testing.assert_close(converted(image), before, rtol=1e-5, atol=1e-5)
    with nlsurgery.disabled(converted):
        assert (converted(image) - before).abs().max() > 1e-2
    nlsurgery.verify(converted)


def test_block_lost_with_its_host_is_an_error_at_the_next_forward(
    model: nn.Module, image: Tensor
) -> None:
    nlsurgery.apply(model, recipe({"stage": "res4", "at": "bn2"}))
    model.layer3[2].bn2 = nn.Identity()
    with pytest.raises(VerifyError, match="bn2"):
        model(image)


def test_users_hook_sees_the_output_after_the_block(model: nn.Module, image: Tensor) -> None:
    seen = []
    model.layer3[2].register_forward_hook(lambda m, args, output: seen.append(output))
    nlsurgery.apply(model, recipe({"stage": "res4"}))
    randomise_blocks(nlsurgery.inserted_blocks(model))
    model(image)
    assert len(seen) == 1
    inside = []
    model.layer4.register_forward_pre_hook(lambda m, args: inside.append(args[0]))
    model(image)
    assert torch.equal(seen[-1], inside[-1])


WITHIN = {
    "version": 1,
    "within": "net.layer2",
    "input_size": [16, 14, 14],
    "inserts": [{"stage": -1, "block": {"type": "non_local"}}],
}


def test_part_is_operated_on_by_itself(model: nn.Module, tmp_path: Path) -> None:
    channels = next(p for p in model.layer2.parameters()).shape[1]
    recipe = {**WITHIN, "input_size": [channels, 14, 14]}
    whole = Holder(copy.deepcopy(model))
    nlsurgery.apply(whole, recipe)
    (row,) = nlsurgery.report(whole).insertions
    assert row.fqn.startswith("net.layer2.")
    assert nlsurgery.plan(Holder(model), recipe).insertions[0].fqn == row.fqn
    nlsurgery.verify(whole, gradient=True)
    file = nlsurgery.save(whole, tmp_path / "a.safetensors")
    again = nlsurgery.load(Holder(copy.deepcopy(model)), file)
    assert nlsurgery.report(again).insertions == nlsurgery.report(whole).insertions
    inserts = [{"stage": "res4", "block": {"type": "non_local"}}]
    nlsurgery.apply(whole, {"version": 1, "inserts": inserts})
    nlsurgery.verify(whole)
    with pytest.raises(ModelError, match="of a larger model"):
        nlsurgery.verify(whole.net)
    nlsurgery.remove(whole)
    assert list(whole.net.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"within": "net.layer9"}, "did you mean 'net.layer"),
        ({"input_size": None}, "go together"),
        ({"output_stride": 8}, "output_stride is of a whole network"),
        ({"input_size": [16, 0, 14]}, "greater than 0"),
    ],
    ids=["no-such-module", "no-size", "output-stride", "zero"],
)
def test_bad_part_is_one_error(model: nn.Module, changes: dict[str, Any], word: str) -> None:
    recipe = {k: v for k, v in {**WITHIN, **changes}.items() if v is not None}
    with pytest.raises(nlsurgery.RecipeError, match=word):
        nlsurgery.apply(Holder(model), recipe)
