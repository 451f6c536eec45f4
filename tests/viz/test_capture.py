from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nlsurgery
from nlsurgery.errors import DataError
from nlsurgery.viz import capture
from nlsurgery.viz.capture import capture_attention, grid_points


class Backbone(nn.Module):
    """One stage of two blocks on (B, 8, H/4, W/4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.stage = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.stage(self.stem(x))).mean((2, 3))


def operated(model: nn.Module, stage: str, after: Any, **block: Any) -> nn.Module:
    torch.manual_seed(0)
    recipe = {"version": 1, "inserts": [{"stage": stage, "after": after, "block": block}]}
    nlsurgery.apply(model, recipe, input_size=(3, 32, 48))
    for parameter in nlsurgery.inserted_parameters(model):
        parameter.data = 0.3 * torch.randn(parameter.shape)
    return model


def toy(**block: Any) -> nn.Module:
    return operated(Backbone(), "stage", "all", **({"type": "non_local", "norm": "none"} | block))


def inputs_of(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """What each inserted block is given, read off independently of the module under test."""
    seen: dict[str, Tensor] = {}
    for fqn, block in nlsurgery.inserted_blocks(model).items():
        block.register_forward_pre_hook(lambda _, args, fqn=fqn: seen.update({fqn: args[0]}))
    with torch.no_grad():
        model.eval()(image)
    return seen


@pytest.fixture
def image() -> Tensor:
    return torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", ["gaussian", "embedded_gaussian", "dot_product", "concatenation"])
@pytest.mark.parametrize("sub_sample", [False, True], ids=["whole", "pooled"])
def test_weights_are_the_rows_of_the_block_s_map(
    mode: str, sub_sample: bool, image: Tensor
) -> None:
    model = toy(mode=mode, sub_sample=sub_sample)
    points = [(0.99, 0.01), (0.5, 0.5)]
    captured = capture_attention(model, image, points)
    assert [item.fqn for item in captured.rows] == list(nlsurgery.inserted_blocks(model))
    seen = inputs_of(model, image)
    for rows in captured.rows:
        assert rows.query_size == (8, 12)
        assert rows.key_size == ((4, 6) if sub_sample else (8, 12))
        assert rows.queries == ((0, 11), (4, 6))
        whole = model.get_submodule(rows.fqn).attention(seen[rows.fqn])[0]
        for index, (row, column) in enumerate(rows.queries):
            torch.testing.assert_close(rows.weights[index].flatten(), whole[row * 12 + column])


def test_model_stays_as_it_was(image: Tensor) -> None:
    model = toy()
    model.train()
    model.get_submodule("stage").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    capture_attention(model, image, [(0.5, 0.5)])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def test_block_without_attention_is_skipped_with_the_reason(image: Tensor) -> None:
    model = toy()
    first, second = nlsurgery.inserted_blocks(model)
    owner = model.get_submodule(first.rpartition(".")[0])
    owner._modules["0"] = nn.Identity()
    captured = capture_attention(model, image, [(0.5, 0.5)])
    assert [item.fqn for item in captured.rows] == [second]
    assert [(item.fqn, item.reason) for item in captured.skipped] == [
        (first, "Identity has no attention map")
    ]


class WholeMapOnly(nn.Module):
    """A block of somebody else, whose attention takes no queries."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def attention(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        return (tokens.transpose(1, 2) @ tokens).softmax(-1)


def test_block_with_a_whole_map_only_is_read_too(image: Tensor) -> None:
    model = toy()
    first, _ = nlsurgery.inserted_blocks(model)
    model.get_submodule(first.rpartition(".")[0])._modules["0"] = WholeMapOnly()
    rows = capture_attention(model, image, [(0.2, 0.6)]).rows[0]
    assert rows.fqn == first
    whole = WholeMapOnly().attention(inputs_of(model, image)[first])[0]
    torch.testing.assert_close(rows.weights.flatten(), whole[4 * 12 + 2])


def test_whole_map_that_is_too_large_is_skipped(
    image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy()
    first, second = nlsurgery.inserted_blocks(model)
    model.get_submodule(first.rpartition(".")[0])._modules["0"] = WholeMapOnly()
    monkeypatch.setattr(capture, "MAX_MAP_BYTES", 96 * 96 * 4 - 1)
    captured = capture_attention(model, image, [(0.5, 0.5)])
    assert [item.fqn for item in captured.rows] == [second]
    assert "whole map would take" in captured.skipped[0].reason


def test_tokens_of_a_vit_lie_on_their_grid() -> None:
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=(32, 48), num_classes=0, depth=2, global_pool="avg"
    )
    model = operated(model, "blocks", 0, type="self_attention")
    image = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    tokens: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda *call: tokens.append(call[2]), prepend=True)
    (rows,) = capture_attention(model, image, [(0.9, 0.6)]).rows
    assert (rows.query_size, rows.key_size, rows.queries) == ((2, 3), (2, 3), ((1, 2),))
    # The class token is no place in the image: tokens 1 to 6 are the 2×3 grid.
    block = model.get_submodule(rows.fqn)
    patches = tokens[0][:, 1:].transpose(1, 2).reshape(1, -1, 2, 3)
    torch.testing.assert_close(rows.weights.flatten(), block.attention(patches)[0, 5])


@pytest.mark.parametrize("sub_sample", [False, True], ids=["whole", "pooled"])
def test_rows_of_a_clip_are_those_of_the_block_s_map(sub_sample: bool) -> None:
    import torchvision

    model = torchvision.models.video.r3d_18()
    block = {"type": "non_local", "norm": "none", "sub_sample": sub_sample}
    insert = {"stage": "res3", "after": "last", "block": block}
    nlsurgery.apply(model, {"version": 1, "inserts": [insert]}, input_size=(3, 6, 32, 48))
    clip = torch.randn(1, 3, 6, 32, 48, generator=torch.Generator().manual_seed(1))
    (rows,) = capture_attention(model, clip, [(0.99, 0.3, 0.9), (0.5, 0.5)]).rows
    assert rows.query_size == (3, 8, 12)
    assert rows.key_size == ((3, 4, 6) if sub_sample else (3, 8, 12))
    assert rows.queries == ((2, 2, 11), (1, 4, 6))
    whole = model.get_submodule(rows.fqn).attention(inputs_of(model, clip)[rows.fqn])[0]
    for index, (time, row, column) in enumerate(rows.queries):
        expected = whole[(time * 8 + row) * 12 + column]
        torch.testing.assert_close(rows.weights[index].flatten(), expected)


def test_keys_of_pooled_windows_lie_on_the_clip_s_grid() -> None:
    import torchvision

    model = torchvision.models.video.r3d_18()
    block = {"type": "non_local", "sub_sample": [2, 2, 3], "temporal_window": 2}
    insert = {"stage": "res3", "after": "last", "block": block}
    nlsurgery.apply(model, {"version": 1, "inserts": [insert]}, input_size=(3, 8, 32, 48))
    clip = torch.randn(1, 3, 8, 32, 48, generator=torch.Generator().manual_seed(1))
    (rows,) = capture_attention(model, clip, [(0.99, 0.3, 0.9), (0.5, 0.5, 0.1)]).rows
    assert (rows.query_size, rows.key_size, rows.key_stride) == ((4, 8, 12), (2, 4, 4), (2, 2, 3))
    in_windows = rows.weights.sum((2, 3))
    torch.testing.assert_close(in_windows, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_image_for_a_video_model_is_refused() -> None:
    import torchvision

    model = torchvision.models.video.r3d_18()
    nlsurgery.apply(model, "res4_1block", input_size=(3, 4, 32, 32))
    with pytest.raises(DataError, match=r"takes clips .* but got one of the images"):
        capture_attention(model, torch.zeros(1, 3, 32, 32), [(0.5, 0.5)])


def test_clip_for_an_image_model_is_refused() -> None:
    with pytest.raises(DataError, match=r"takes images .* but got one of the clips"):
        capture_attention(toy(), torch.zeros(1, 3, 4, 32, 48), [(0.5, 0.5)])


@pytest.mark.parametrize("shape", [(3, 32, 48), (2, 3, 32, 48), (2, 3, 4, 32, 48)])
def test_anything_but_one_image_or_clip_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="one image"):
        capture_attention(Backbone(), torch.zeros(shape), [(0.5, 0.5)])


def test_model_without_blocks_is_refused(image: Tensor) -> None:
    with pytest.raises(DataError, match="no inserted block"):
        capture_attention(Backbone(), image, [(0.5, 0.5)])


@pytest.mark.parametrize(
    ("keys", "size", "stride"),
    [
        (96, (8, 12), (1, 1)),
        (24, (8, 12), (2, 2)),
        (9, (7, 7), (2, 2)),
        (6, (1, 12), (1, 2)),
        (95, (8, 12), None),
        (120, (5, 8, 12), (1, 2, 2)),
        (96, (1, 8, 12), (1, 1, 1)),
    ],
    ids=["whole", "pooled", "odd", "one-line", "no-grid", "clip-pooled", "clip-whole"],
)
def test_key_stride(keys: int, size: tuple[int, ...], stride: tuple[int, ...] | None) -> None:
    assert capture._key_stride(keys, size, None) == stride


def test_grid_points_are_row_by_row() -> None:
    assert grid_points(2) == ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))
