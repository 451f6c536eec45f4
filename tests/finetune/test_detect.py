"""Detection on COCO data: reading, checking, targets, scores, and a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nlsurgery
from nlsurgery.errors import DataError, ModelError
from nlsurgery.finetune.coco import CocoSamples, CocoScores, read_part
from nlsurgery.integrations.hub import create_model
from tests.finetune.conftest import finetune, run_values

SIZE = 64


def write_coco(root: Path, num_images: int = 4) -> None:
    """Bright squares and rectangles on dark pictures, with polygons and two keypoints each."""
    (root / "annotations").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        (root / part).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(num_images):
            picture = rng.integers(0, 40, (SIZE, SIZE, 3), dtype=np.uint8)
            x, y = (int(v) for v in rng.integers(4, 20, 2))
            width, height = (24, 24) if index % 2 else (36, 16)
            picture[y : y + height, x : x + width] = 220
            Image.fromarray(picture).save(root / part / f"{index}.png")
            images.append(
                {"id": 100 + index, "file_name": f"{index}.png", "width": SIZE, "height": SIZE}
            )
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            annotations.append(
                {
                    "id": index + 1, "image_id": 100 + index, "category_id": 7 if index % 2 else 3,
                    "bbox": [x, y, width, height], "area": width * height, "iscrowd": 0,
                    "segmentation": [corners], "num_keypoints": 2,
                    "keypoints": [x, y, 2, x + width, y + height, 2],
                }
            )  # fmt: skip
        categories = [{"id": 7, "name": "square"}, {"id": 3, "name": "bar"}]
        data = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"{part}.json").write_text(json.dumps(data))


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    write_coco(tmp_path / "coco")
    return tmp_path / "coco"


def test_targets_are_what_the_file_says(coco: Path) -> None:
    part = read_part(coco, "train")
    assert part.names == ("bar", "square")
    samples = CocoSamples(part, masks=True, keypoints=True, flip=True)
    image, target = samples[1]
    row = part.annotations[101][0]
    x, y, width, height = row["bbox"]
    assert image.shape == (3, SIZE, SIZE)
    assert target["boxes"].tolist() == [[x, y, x + width, y + height]]
    assert target["labels"].tolist() == [2]
    assert target["keypoints"].shape == (1, 2, 3)
    assert int(target["masks"].sum()) == width * height
    assert bool((image[:, target["masks"][0].bool()] > 0.8).all())


def test_mirrored_boxes_and_masks_stay_on_their_objects(coco: Path) -> None:
    import random

    samples = CocoSamples(read_part(coco, "train"), masks=True, keypoints=False, flip=True)
    seen = set()
    for seed in range(8):
        random.seed(seed)
        image, target = samples[0]
        left, top, right, bottom = (int(v) for v in target["boxes"][0])
        assert bool((image[:, top:bottom, left:right] > 0.8).all())
        assert bool((image[:, target["masks"][0].bool()] > 0.8).all())
        seen.add(left)
    assert len(seen) == 2


def break_json(root: Path) -> None:
    (root / "annotations" / "val.json").write_text("{")


def unknown_category(root: Path) -> None:
    edit(root, lambda data: data["annotations"][2].update(category_id=99))


def flat_box(root: Path) -> None:
    edit(root, lambda data: data["annotations"][1].update(bbox=[1, 2, 0, 4]))


def stray_image(root: Path) -> None:
    edit(root, lambda data: data["annotations"][0].update(image_id=5))


def missing_image(root: Path) -> None:
    (root / "train" / "2.png").unlink()


def no_image(root: Path) -> None:
    (root / "train" / "2.png").write_text("text")


def no_annotations(root: Path) -> None:
    (root / "annotations" / "train.json").unlink()


def edit(root: Path, change: Any) -> None:
    path = root / "annotations" / "train.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        pytest.param(break_json, r"val\.json is no COCO annotation file", id="json"),
        pytest.param(unknown_category, r"annotations\[2\] has category 99", id="category"),
        pytest.param(flat_box, r"annotations\[1\]\.bbox must be", id="box"),
        pytest.param(stray_image, r"annotations\[0\] is of image 5", id="stray"),
        pytest.param(missing_image, r"names '2\.png', which is not in", id="missing"),
        pytest.param(no_image, r"2\.png is not an image", id="text"),
        pytest.param(no_annotations, r"annotations has none of train\.json", id="none"),
    ],
)
def test_bad_data_is_one_error_before_anything_is_written(
    coco: Path, values: dict[str, Any], damage: Any, word: str
) -> None:
    damage(coco)
    with pytest.raises(DataError, match=word):
        finetune(
            values, task="detect", data=str(coco), model="fasterrcnn_mobilenet_v3_large_320_fpn"
        )
    assert not Path(values["work_dir"]).exists()


def drop_keypoints(root: Path) -> None:
    def drop(data: Any) -> None:
        for row in data["annotations"]:
            del row["keypoints"]

    edit(root, drop)


def more_keypoints(root: Path) -> None:
    edit(root, lambda data: data["annotations"][0]["keypoints"].extend([1, 1, 2]))


@pytest.mark.parametrize("damage", [drop_keypoints, more_keypoints])
def test_keypoints_that_a_model_cannot_learn_are_one_error(
    coco: Path, values: dict[str, Any], damage: Any
) -> None:
    damage(coco)
    with pytest.raises(DataError, match=r"same number of keypoints .* got [02], [23]"):
        finetune(values, task="detect", model="keypointrcnn_resnet50_fpn", data=str(coco))
    assert not Path(values["work_dir"]).exists()


def test_classifier_is_refused(coco: Path, values: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="torchvision's detectors"):
        finetune(values, task="detect", data=str(coco))


@pytest.mark.parametrize(
    ("shift", "expected"), [pytest.param(0.0, 100.0, id="exact"), pytest.param(40.0, 0.0, id="far")]
)
def test_scores_of_known_detections(coco: Path, shift: float, expected: float) -> None:
    part = read_part(coco, "val")
    samples = CocoSamples(part, masks=True, keypoints=True, flip=False)
    metric = CocoScores(part, ["bbox", "segm", "keypoints"])
    for index in range(len(samples)):
        image, target = samples[index]
        found = {
            "boxes": target["boxes"] + shift,
            "labels": target["labels"],
            "scores": torch.ones(1),
            "masks": (
                target["masks"][:, None] if shift == 0 else 1 - target["masks"][:, None]
            ).float(),
            "keypoints": target["keypoints"] + shift,
        }
        metric.process(([image], [target]), [found])
    scores = metric.compute_metrics(metric.results)
    assert scores == pytest.approx(
        {"box_AP": expected, "box_AP50": expected, "mask_AP": expected, "keypoint_AP": expected}
    )


def test_no_detection_scores_nothing(coco: Path) -> None:
    part = read_part(coco, "val")
    assert CocoScores(part, ["bbox"]).compute_metrics([[], []]) == {"box_AP": 0.0, "box_AP50": 0.0}


RECIPE = {
    "version": 1,
    "inserts": [{"stage": "res4", "after": "last", "block": {"type": "non_local"}}],
}


@pytest.mark.parametrize(
    "model", ["fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn"]
)
@pytest.mark.slow
def test_detector_trains_and_resumes(coco: Path, tmp_path: Path, model: str) -> None:
    values = {
        **run_values(coco, tmp_path / "work"), "task": "detect", "model": model, "recipe": RECIPE,
        "batch_size": 2, "image_size": 64, "epochs": 1, "lr": 1e-3, "augment": "default",
    }  # fmt: skip
    whole, _ = finetune(values, work_dir=str(tmp_path / "whole"))
    assert whole.max_difference == 0
    assert set(whole.after) >= {"box_AP", "box_AP50"}

    def kill(step: int, *rest: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(values, save_every=1, progress=kill)
    again, _ = finetune(values, resume=True)
    assert again.after == whole.after
    trained = nlsurgery.load(create_model(model, num_classes=3), again.model_file)
    assert any(block.gate.abs().max() > 0 for block in nlsurgery.inserted_blocks(trained).values())


@pytest.mark.slow
def test_mask_model_learns_squares_from_a_checkpoint(coco: Path, tmp_path: Path) -> None:
    """Four pictures learnt by heart: the loss falls, the norms stay as they were."""
    torch.manual_seed(0)
    original = create_model("maskrcnn_resnet50_fpn", num_classes=91)
    torch.save(original.state_dict(), tmp_path / "original.pth")
    values = {
        **run_values(coco, tmp_path / "work"), "task": "detect", "model": "maskrcnn_resnet50_fpn",
        "recipe": RECIPE, "batch_size": 2, "image_size": 64, "epochs": 4, "lr": 2e-3,
        "checkpoint": str(tmp_path / "original.pth"), "clip_grad": 5.0,
    }  # fmt: skip
    result, _ = finetune(values)
    steps = json.loads((result.work_dir / "history.json").read_text())["steps"]
    assert sum(row["loss"] for row in steps[-3:]) < sum(row["loss"] for row in steps[:3])
    assert "mask_AP" in result.after
    trained = nlsurgery.checkpoint.read_state_dict(result.model_file)
    key = "backbone.body.layer3.0.bn1.running_mean"
    assert torch.equal(trained[key], original.state_dict()[key])


@pytest.mark.slow
def test_keypoint_head_is_operated_on_and_gets_the_data_s_keypoints(
    coco: Path, tmp_path: Path
) -> None:
    """COCO's 17 keypoints in the checkpoint, two in the data; the recipe's blocks sit in the head."""
    torch.manual_seed(0)
    model = "keypointrcnn_resnet50_fpn"
    torch.save(create_model(model).state_dict(), tmp_path / "original.pth")
    values = {
        **run_values(coco, tmp_path / "work"), "task": "detect", "model": model, "epochs": 1,
        "recipe": "keypoint_head_4blocks", "batch_size": 2, "image_size": 64, "lr": 1e-3,
        "checkpoint": str(tmp_path / "original.pth"),
    }  # fmt: skip
    result, _ = finetune(values)
    assert result.max_difference == 0
    assert "keypoint_AP" in result.after
    trained = nlsurgery.load(create_model(model, num_classes=3, num_keypoints=2), result.model_file)
    blocks = nlsurgery.inserted_blocks(trained)
    assert len(blocks) == 4
    assert all(name.startswith("roi_heads.keypoint_head.") for name in blocks)
    assert any(block.gate.abs().max() > 0 for block in blocks.values())
