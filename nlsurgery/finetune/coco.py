"""Detection data in COCO's format: reading and checking it, and scoring by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from nlsurgery.errors import DataError
from nlsurgery.finetune.folders import check_image

_INSTALL = "pip install 'nlsurgery[detect]'"
_ANNOTATIONS = ("{part}.json", "instances_{part}2017.json", "person_keypoints_{part}2017.json")
_IMAGES = ("{part}", "{part}2017")


@dataclass(frozen=True, slots=True)
class CocoPart:
    """The training or validation half of a COCO folder.

    Attributes:
        file: The annotations.
        folder: The images.
        images: Their records.
        annotations: By image id.
        categories: Ids in label order; label 0 is the background.
        names: Of the categories.
    """

    file: Path
    folder: Path
    images: tuple[dict[str, Any], ...]
    annotations: dict[int, list[dict[str, Any]]]
    categories: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def num_keypoints(self) -> set[int]:
        """How many keypoints its objects have; several numbers where they differ."""
        rows = [row for rows in self.annotations.values() for row in rows]
        return {len(row.get("keypoints", ())) // 3 for row in rows}


def import_coco() -> Any:
    """Import pycocotools.

    Raises:
        DataError: It is not installed.
    """
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
        import pycocotools.mask
    except ImportError:
        raise DataError(
            f"--task detect needs pycocotools, which is not installed: {_INSTALL}"
        ) from None
    return pycocotools


@contextlib.contextmanager
def _quiet_coco() -> Iterator[None]:
    """Silence pycocotools: its printed tables, and its arrays of before numpy 2."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", message="__array__ implementation doesn't accept a copy")
        yield


def read_part(root: Path, part: str) -> CocoPart:
    """Read and check one half of a COCO folder: every annotation, every image's header.

    Args:
        root: The folder, with ``train``, ``val`` and ``annotations`` (or COCO's own names).
        part: ``train`` or ``val``.

    Raises:
        DataError: Something is missing or wrong; says what and where.
    """
    file = _first(root / "annotations", _ANNOTATIONS, part)
    folder = _first(root, _IMAGES, part)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        images = tuple(data["images"])
        categories = sorted(data["categories"], key=lambda row: row["id"])
        annotations: dict[int, list[dict[str, Any]]] = {row["id"]: [] for row in images}
        rows = data["annotations"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is no COCO annotation file (images, annotations, categories): {error!r}"
        ) from error
    ids = tuple(int(row["id"]) for row in categories)
    for place, row in enumerate(rows):
        _check_annotation(f"{file}: annotations[{place}]", row, annotations, ids)
        annotations[row["image_id"]].append(row)
    if not images or not ids:
        raise DataError(f"{file} has {len(images)} images and {len(ids)} categories")
    for record in images:
        path = folder / str(record.get("file_name"))
        if not path.is_file():
            raise DataError(f"{file} names {record.get('file_name')!r}, which is not in {folder}")
        check_image(path)
    names = tuple(str(row.get("name", row["id"])) for row in categories)
    return CocoPart(file, folder, images, annotations, ids, names)


def _first(folder: Path, patterns: Sequence[str], part: str) -> Path:
    names = [pattern.format(part=part) for pattern in patterns]
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise DataError(f"{folder} has none of {', '.join(names)}, which --task detect reads")


def _check_annotation(
    where: str, row: dict[str, Any], images: dict[int, Any], categories: Sequence[int]
) -> None:
    try:
        image, category, box = row["image_id"], row["category_id"], row["bbox"]
        sizes = [float(value) for value in box]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} needs image_id, category_id and bbox: {error!r}") from error
    if image not in images:
        raise DataError(f"{where} is of image {image!r}, which is not among the images")
    if category not in categories:
        raise DataError(f"{where} has category {category!r}, which is not among the categories")
    if len(sizes) != 4 or sizes[2] <= 0 or sizes[3] <= 0:
        raise DataError(f"{where}.bbox must be [x, y, width, height] with an area, but got {box!r}")


class CocoSamples(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images (3, H, W) in [0, 1] with torchvision's detection targets, by index.

    Args:
        part: The data.
        masks: Add masks.
        keypoints: Add keypoints.
        flip: Mirror half of the images.
    """

    def __init__(self, part: CocoPart, *, masks: bool, keypoints: bool, flip: bool) -> None:
        self.part = part
        self.masks = masks
        self.keypoints = keypoints
        self.flip = flip and not keypoints
        self.metainfo = {"classes": part.names}

    def __len__(self) -> int:
        return len(self.part.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        record = self.part.images[index]
        path = self.part.folder / record["file_name"]
        try:
            with Image.open(path) as file:
                image = np.array(file.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{path} cannot be decoded: {error}") from error
        pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        rows = [r for r in self.part.annotations[record["id"]] if not r.get("iscrowd")]
        target = self._target(record["id"], rows, (image.shape[0], image.shape[1]))
        if self.flip and random.random() < 0.5:
            pixels = pixels.flip(2)
            boxes = target["boxes"]
            target["boxes"] = torch.stack(
                (image.shape[1] - boxes[:, 2], boxes[:, 1], image.shape[1] - boxes[:, 0], boxes[:, 3]), 1
            )  # fmt: skip
            if self.masks:
                target["masks"] = target["masks"].flip(2)
        return pixels, target

    def _target(
        self, image_id: int, rows: list[dict[str, Any]], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = {
            "boxes": boxes,
            "labels": torch.tensor(
                [1 + self.part.categories.index(row["category_id"]) for row in rows],
                dtype=torch.int64,
            ),
            "image_id": torch.tensor(image_id),
        }
        if self.masks:
            decoded = [torch.from_numpy(_mask(row, size, self.part.file)) for row in rows]
            target["masks"] = (
                torch.stack(decoded) if decoded else torch.zeros((0, *size), dtype=torch.uint8)
            )
        if self.keypoints:
            points = [row["keypoints"] for row in rows if "keypoints" in row]
            if len(points) != len(rows):
                raise DataError(f"{self.part.file}: image {image_id} has boxes without keypoints")
            target["keypoints"] = torch.tensor(points, dtype=torch.float32).reshape(
                len(rows), -1, 3
            )
        return target


def _mask(row: dict[str, Any], size: tuple[int, int], file: Path) -> np.ndarray:
    """The mask (H, W) of one annotation, from polygons or run lengths."""
    coco = import_coco()
    segmentation = row.get("segmentation")
    if not segmentation:
        raise DataError(f"{file}: annotation {row.get('id')} has no segmentation for its mask")
    if isinstance(segmentation, list):
        encoded = coco.mask.merge(coco.mask.frPyObjects(segmentation, *size))
    elif isinstance(segmentation.get("counts"), list):
        encoded = coco.mask.frPyObjects(segmentation, *size)
    else:
        encoded = segmentation
    with _quiet_coco():
        mask: np.ndarray = coco.mask.decode(encoded)
    return mask


class CocoScores(BaseMetric):
    """COCO's average precision of boxes, and of masks and keypoints where the model has them.

    Args:
        part: The ground truth.
        kinds: Of ``bbox``, ``segm`` and ``keypoints``.
    """

    names = {"bbox": "box_AP", "segm": "mask_AP", "keypoints": "keypoint_AP"}  # noqa: RUF012

    def __init__(self, part: CocoPart, kinds: Sequence[str]) -> None:
        super().__init__(prefix="val")
        self.prefix = None  # the evaluator then reports the bare names
        self.part = part
        self.kinds = tuple(kinds)
        self.coco = import_coco()

    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Keep the detections of one batch in COCO's form."""
        _, targets = data_batch
        for target, found in zip(targets, data_samples, strict=True):
            rows = []
            boxes = found["boxes"].clone()
            boxes[:, 2:] -= boxes[:, :2]
            for place in range(len(boxes)):
                row = {
                    "image_id": int(target["image_id"]),
                    "category_id": self.part.categories[int(found["labels"][place]) - 1],
                    "bbox": boxes[place].tolist(),
                    "score": float(found["scores"][place]),
                }
                if "segm" in self.kinds:
                    mask = np.asfortranarray((found["masks"][place, 0] > 0.5).byte().numpy())
                    row["segmentation"] = self.coco.mask.encode(mask)
                if "keypoints" in self.kinds:
                    row["keypoints"] = found["keypoints"][place].flatten().tolist()
                rows.append(row)
            self.results.append(rows)

    def compute_metrics(self, results: list[list[dict[str, Any]]]) -> dict[str, float]:
        """Average precision in percent: over IoU 0.5 to 0.95, and at 0.5 for boxes."""
        found = [row for rows in results for row in rows]
        scores = {}
        with _quiet_coco():
            truth = self.coco.coco.COCO(str(self.part.file))
            truth.dataset.setdefault("info", {})
            guesses = truth.loadRes(found) if found else None
            for kind in self.kinds:
                values = self._evaluate(truth, guesses, kind)
                scores[self.names[kind]] = values[0]
                if kind == "bbox":
                    scores["box_AP50"] = values[1]
        return scores

    def _evaluate(self, truth: Any, guesses: Any, kind: str) -> list[float]:
        if guesses is None:
            return [0.0, 0.0]
        evaluation = self.coco.cocoeval.COCOeval(truth, guesses, kind)
        if kind == "keypoints":
            self._set_sigmas(evaluation)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return [100 * max(0.0, float(value)) for value in evaluation.stats[:2]]

    def _set_sigmas(self, evaluation: Any) -> None:
        """Give every keypoint the mean tolerance where they are not COCO's 17."""
        rows = [row for rows in self.part.annotations.values() for row in rows]
        number = len(rows[0]["keypoints"]) // 3 if rows else 17
        sigmas = evaluation.params.kpt_oks_sigmas
        if number != len(sigmas):
            evaluation.params.kpt_oks_sigmas = np.full(number, sigmas.mean())
