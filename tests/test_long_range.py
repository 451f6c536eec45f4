import json

import numpy as np
import pytest
import torch

from benchmarks.long_range import Size, data
from benchmarks.long_range_data import DIGIT, all_digits, corners, moves, normalised, own_digits
from benchmarks.long_range_models import (
    Backbone,
    build,
    parameters_of,
    recipe,
    register_plain_conv,
    train_mode,
)
from benchmarks.long_range_table import draw, page
from benchmarks.rows import read_rows
from nlsurgery.blocks import BLOCK_TYPES


def test_no_validation_digit_is_trained_on():
    assert not set(own_digits("train")) & set(own_digits("val"))
    assert len(own_digits("train")) + len(own_digits("val")) == 5000


def label_of(patch, split):
    images, digits = all_digits()
    own = own_digits(split)
    distance = np.abs(images[own].astype(int) - patch.astype(int)).sum((1, 2))
    assert distance.min() == 0
    return digits[own[distance.argmin()]]


@pytest.mark.parametrize("split", ["train", "val"])
def test_corners_hold_two_digits_of_the_split_and_the_label_says_whether_they_agree(split):
    found = corners(split, 20, seed=3, side=72, classes=4)
    assert found.labels.tolist() == [0, 1] * 10
    for image, label in zip(found.inputs[:, 0].numpy(), found.labels, strict=True):
        top, bottom = image[2 : 2 + DIGIT], image[-2 - DIGIT : -2]
        sides = [part[:, :36].any() for part in (top, bottom)]
        assert sides[0] != sides[1]
        patches = [
            part[:, 2 : 2 + DIGIT] if left else part[:, -2 - DIGIT : -2]
            for part, left in zip((top, bottom), sides, strict=True)
        ]
        first, second = (label_of(patch, split) for patch in patches)
        assert (first == second) == bool(label)


def test_moves_are_seen_in_the_outer_frames_only_and_go_where_the_label_says():
    found = moves("train", 20, seed=1, side=56, frames=5)
    assert found.inputs.shape == (20, 1, 5, 56, 56)
    for clip, label in zip(found.inputs[:, 0].int(), found.labels, strict=True):
        assert all(clip[t].unique().numel() == 1 for t in (1, 2, 3))
        columns = torch.arange(56.0)
        centres = []
        for t, ground in ((0, 0), (4, 90)):
            weight = (clip[t] - ground).clamp_min(0).sum(0).float()
            centres.append((weight * columns).sum() / weight.sum())
        assert (centres[1] > centres[0]) == bool(label)


def test_seeds_draw_other_examples_and_one_seed_the_same():
    size = Size(48, 8, 8, 1, 0)
    first, again = data("moves", "train", size, 1), data("moves", "train", size, 1)
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, data("moves", "train", size, 2).inputs)
    val = data("moves", "val", size, 1)
    assert torch.equal(val.inputs, data("moves", "val", size, 2).inputs)


@pytest.mark.parametrize("dims", [2, 3])
def test_convolutions_have_the_parameters_of_the_non_local_blocks(dims):
    wanted = 2 * parameters_of(40, None, dims) + 3 * parameters_of(112, None, dims)
    got = 0
    for insert in recipe("conv", dims)["inserts"]:
        channels = {"stages.0": 40, "stages.2": 112}[insert["stage"]]
        got += parameters_of(channels, insert["block"]["width"], dims)
    assert abs(got - wanted) <= 0.02 * wanted


@pytest.fixture
def _plain_conv():
    register_plain_conv()
    yield
    del BLOCK_TYPES["plain_conv"]


@pytest.mark.usefixtures("_plain_conv")
@pytest.mark.parametrize("variant", ["non_local", "conv", "se"])
@pytest.mark.parametrize("shape", [(1, 48, 48), (1, 2, 32, 32)], ids=["image", "clip"])
def test_every_variant_starts_as_the_backbone_and_trains_what_it_should(variant, shape):
    x = normalised(torch.randint(0, 255, (2, *shape), dtype=torch.uint8))
    torch.manual_seed(0)
    plain = Backbone(2).eval()
    torch.manual_seed(0)
    model = build(variant, True, x[:1]).eval()
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    train_mode(model, frozen=True)
    torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {"classifier.weight", "classifier.bias"} <= trained
    assert not trained & {name for name, _ in plain.named_parameters() if "classifier" not in name}
    assert len(trained) > 2
    running = dict(plain.named_buffers())
    assert all(torch.equal(b, running[n]) for n, b in model.named_buffers() if n in running)


def rows():
    size = {"name": "cpu", "side": 8, "train": 2, "val": 2, "epochs": 1, "classes": 3}
    common = {"task": "digits", "frozen": True, "lr": 0.1, "size": size, "device": "cpu"}
    common |= {"threads": 1, "seconds": 2.0}
    for variant, scores in (("none", (0.5, 0.52)), ("non_local", (0.8, 0.9))):
        for seed, score in enumerate(scores):
            yield common | {"variant": variant, "seed": seed, "accuracy": score, "added": 1234}


def test_page_and_plot_give_mean_and_deviation(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    read = read_rows(file)
    text = page(read)
    assert "| digits | frozen | nothing | 51.0 ± 1.4 | 2 |" in text
    assert "| digits | frozen | 5 non-local | 85.0 ± 7.1 | 2 | 1,234 |" in text
    draw(read, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
