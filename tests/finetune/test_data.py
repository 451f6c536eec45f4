"""What data a run takes: folders, splits, timm's datasets, and what is wrong with others."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nlsurgery.errors import CheckpointError, DataError, ModelError
from nlsurgery.finetune import FinetuneConfig
from nlsurgery.finetune.classify import read_parts
from nlsurgery.finetune.folders import hold_out, list_split
from nlsurgery.finetune.images import Part, Samples
from nlsurgery.finetune.loading import SeededSamples
from nlsurgery.finetune.network import build_network, load_checkpoint
from nlsurgery.integrations.demo import demo_digits
from nlsurgery.integrations.hub import create_model
from tests.finetune.conftest import finetune


def write_images(folder: Path, number: int) -> None:
    folder.mkdir(parents=True)
    for index in range(number):
        Image.new("L", (20, 16), 10 * index).save(folder / f"{index}.png")


def test_train_and_val_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    for part, number in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            write_images(tmp_path / part / name, number)
    classes, train, val = list_split(tmp_path, 0.5)
    assert classes == ("cat", "dog")
    assert [label for _, label in train] == [0, 0, 0, 1, 1, 1]
    assert all("val" in path.parts for path, _ in val)
    assert len(val) == 4


def test_held_out_share_is_the_same_every_time_and_of_every_class() -> None:
    files = [(Path(f"{label}/{index}.png"), label) for label in range(3) for index in range(10)]
    train, val = hold_out(files, 0.2)
    assert hold_out(files, 0.2) == (train, val)
    assert sorted(train + val) == sorted(files)
    assert [sum(1 for _, label in val if label == k) for k in range(3)] == [2, 2, 2]


def train_alone(root: Path) -> None:
    (root / "val").rename(root / "other")


def other_class(root: Path) -> None:
    (root / "val" / "dog").rename(root / "val" / "wolf")


def empty(root: Path) -> None:
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        pytest.param(train_alone, "has train/ but no val/", id="no-val"),
        pytest.param(
            other_class, r"'dog' is in train/ only, 'wolf' is in val/ only", id="mismatch"
        ),
        pytest.param(empty, "two at least, but has none", id="empty"),
    ],
)
def test_bad_halves_are_named(tmp_path: Path, damage: Any, word: str) -> None:
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            write_images(tmp_path / part / name, 2)
    damage(tmp_path)
    with pytest.raises(DataError, match=word):
        list_split(tmp_path, 0.5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_image_cut_off_after_its_header_is_named(
    tmp_path: Path, values: dict[str, Any], num_workers: int
) -> None:
    for name in ("cat", "dog"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for index in range(10):
            noise = np.random.default_rng(index).integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{index}.png")
    victim = list_split(tmp_path / "data", 0.2)[1][0][0]
    victim.write_bytes(victim.read_bytes()[:400])
    with pytest.raises(DataError) as caught:
        finetune(values, data=str(tmp_path / "data"), num_workers=num_workers)
    assert str(caught.value).startswith(f"{victim} cannot be decoded")


def write_mnist(root: Path) -> None:
    """The digits as the files that torchvision's MNIST reads."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = demo_digits()
    order = np.random.default_rng(0).permutation(len(images))
    for name, chosen in (("train", order[:64]), ("t10k", order[64:96])):
        pixels = images[chosen].tobytes()
        head = struct.pack(">IIII", 2051, len(chosen), 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + pixels)
        head = struct.pack(">II", 2049, len(chosen))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(
            head + labels[chosen].astype("u1").tobytes()
        )


def test_timm_dataset_is_found_by_its_name(tmp_path: Path, values: dict[str, Any]) -> None:
    write_mnist(tmp_path)
    result, _ = finetune(values, data="torch/mnist", data_root=str(tmp_path), epochs=1)
    assert result.after["epoch"] == 1
    config = FinetuneConfig.make(**{**values, "data": "torch/mnist", "data_root": str(tmp_path)})
    classes, train, val, videos = read_parts(config)
    assert (len(classes), train.num_samples, val.num_samples, videos) == (10, 64, 32, False)
    assert train.item(0)[0].mode == "RGB"


@pytest.mark.parametrize(
    ("data", "word"),
    [
        pytest.param("torch/mnist", "--data-download", id="not-there"),
        pytest.param("torch/nonsense", "timm dataset 'torch/nonsense'", id="unknown"),
        pytest.param("nonsense", "no such folder, and no timm dataset", id="no-prefix"),
    ],
)
def test_missing_timm_dataset_is_one_error(
    tmp_path: Path, values: dict[str, Any], data: str, word: str
) -> None:
    with pytest.raises(DataError, match=word):
        finetune(values, data=data, data_root=str(tmp_path))


def test_work_dir_below_a_file_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"--work-dir .*file is a file"):
        finetune(values, work_dir=str(tmp_path / "file" / "work"))


def test_unwritable_work_dir_is_refused(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(DataError, match=r"cannot be written to: .*Permission denied"):
        finetune(values)
    assert not Path(values["work_dir"]).exists()


def test_augmentation_follows_from_seed_epoch_and_index() -> None:
    def random_pixels(image: Any) -> torch.Tensor:
        return torch.rand(2) + float(np.random.rand())

    samples = Samples(Part(3, lambda index: (None, index)), random_pixels, ("a", "b", "c"))
    first, other_seed = SeededSamples(samples, 1), SeededSamples(samples, 2)
    assert torch.equal(first[0, 2][0], first[0, 2][0])
    values = [first[0, 2][0], first[1, 2][0], first[0, 1][0], other_seed[0, 2][0]]
    assert len({tuple(value.tolist()) for value in values}) == 4


@pytest.mark.parametrize(
    "name", ["timm/test_resnet", "timm/test_vit", "timm/test_efficientnet", "torchvision/squeezenet1_1",
             "torchvision/vgg11", "torchvision/mobilenet_v3_small"],
)  # fmt: skip
def test_head_is_found_by_its_shape_and_the_rest_is_loaded(name: str) -> None:
    original = create_model(name, num_classes=7).state_dict()
    config = FinetuneConfig.make(model=name, recipe="x", data="x")
    network, head = build_network(config, num_classes=3)
    assert 1 <= len(head) <= 2
    load_checkpoint(network, original, "a file", head)
    state = network.state_dict()
    assert all(torch.equal(state[key], original[key]) for key in state if key not in head)
    assert all(state[key].shape[0] == 3 for key in head)


def test_head_of_the_same_size_is_kept() -> None:
    original = create_model("timm/test_resnet", num_classes=3).state_dict()
    config = FinetuneConfig.make(model="timm/test_resnet", recipe="x", data="x")
    network, head = build_network(config, num_classes=3)
    load_checkpoint(network, original, "a file", head)
    assert torch.equal(network.state_dict()["fc.weight"], original["fc.weight"])


def test_operated_checkpoint_is_told_from_an_original() -> None:
    network = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="operated on already"):
        load_checkpoint(network, {"layer1.0.nlsurgery.0.g.weight": torch.ones(1)}, "a.pth", ())


def test_checkpoint_with_a_wider_head_input_is_refused() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    tensors = {**network.state_dict(), "1.weight": torch.ones(5, 6), "1.bias": torch.ones(5)}
    with pytest.raises(CheckpointError, match="other shapes"):
        load_checkpoint(network, tensors, "a.pth", {"1.weight", "1.bias"})


def test_demo_weights_are_of_one_model(values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="is of timm/tf_efficientnet_lite0"):
        finetune(values, checkpoint="demo")


def test_fixed_size_model_takes_another_size_only_where_it_can(values: dict[str, Any]) -> None:
    recipe = {
        "version": 1,
        "inserts": [{"stage": "-1", "after": [1], "block": {"type": "self_attention"}}],
    }
    result, _ = finetune(values, model="timm/test_vit", recipe=recipe, image_size=64, epochs=1)
    assert result.max_difference == 0
    with pytest.raises(ModelError, match=r"cannot take --image-size 50|does not run"):
        finetune(values, model="timm/test_vit", recipe=recipe, image_size=50)
