"""The packaged weights and digits, and identity on the real checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import nlsurgery
from nlsurgery.errors import CheckpointError, DataError
from nlsurgery.integrations import demo


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return demo.demo_model()


@pytest.fixture(scope="module")
def photos(original: nn.Module) -> Tensor:
    transform = create_transform(**resolve_model_data_config(original), is_training=False)
    names = ["china.jpg", "flower.jpg"]
    images = [Image.open(demo.demo_photo(name)).convert("RGB") for name in names]
    images += [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
    return torch.stack([transform(image) for image in images])


def test_packaged_weights_are_the_ones_that_know_a_palace(
    original: nn.Module, photos: Tensor
) -> None:
    assert int(original(photos[:1]).argmax()) == 698  # "palace" of ImageNet


@pytest.mark.parametrize("recipe", ["demo_efficientnet_lite0", "selfattention_res4"])
@pytest.mark.parametrize("batch", [1, 4], ids=["batch1", "batch4"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
def test_logits_on_photos_are_equal_to_the_last_bit(
    original: nn.Module, photos: Tensor, recipe: str, batch: int, training: bool, amp: bool
) -> None:
    before = copy.deepcopy(original).train(training)
    after = nlsurgery.apply(copy.deepcopy(original).train(training), recipe)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        assert torch.equal(after(photos[:batch]), before(photos[:batch]))


@pytest.mark.parametrize("inserted_only", [False, True], ids=["whole", "inserted"])
def test_round_trip_keeps_every_bit(
    original: nn.Module, photos: Tensor, tmp_path: Path, inserted_only: bool
) -> None:
    operated = nlsurgery.apply(copy.deepcopy(original), "demo_efficientnet_lite0")
    path = nlsurgery.save(operated, tmp_path / "a.safetensors", inserted_only=inserted_only)
    back = nlsurgery.load(copy.deepcopy(original), path)
    with torch.no_grad():
        assert torch.equal(back(photos), original(photos))
    state = back.state_dict()
    assert all(torch.equal(state[key], value) for key, value in operated.state_dict().items())


def test_new_classifier_keeps_the_rest(original: nn.Module) -> None:
    small = demo.demo_model(10).state_dict()
    for key, value in original.state_dict().items():
        if not key.startswith("classifier."):
            assert torch.equal(small[key], value), key
    assert small["classifier.weight"].shape[0] == 10


def test_digits_are_the_five_thousand() -> None:
    images, labels = demo.demo_digits()
    assert images.shape == (5000, 28, 28)
    assert [int((labels == digit).sum()) for digit in range(10)] == [500] * 10


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (demo.demo_digits, DataError),
        (demo.demo_state_dict, CheckpointError),
        (demo.demo_photo, DataError),
    ],
    ids=["digits", "weights", "photo"],
)
def test_missing_package_says_what_to_install(
    function: object, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(error, match=r"pip install 'nlsurgery\[demo\]'"):
        function()  # type: ignore[operator]
