"""What a fine-tuning run is: every choice in one frozen, checked object."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic import ValidationError as PydanticError

from nlsurgery.checkpoint import atomic_write
from nlsurgery.errors import DataError, SurgeryError

#: ``data`` and ``checkpoint`` of the run without arguments.
DEMO = "demo"
#: Where runs and the demo go when nothing is said.
DEFAULT_WORK_DIR, DEMO_WORK_DIR = "work_dirs/finetune", "work_dirs/demo"
CONFIG_FILE = "config.yaml"
#: What may differ between a run and its continuation without changing a number.
FREE_FIELDS = frozenset(
    {"num_workers", "device", "work_dir", "resume", "save_every", "shard"}
    | {"tensorboard", "data_download", "pictures"}
)


class FinetuneConfig(BaseModel):
    """A fine-tuning run.

    Attributes:
        task: ``classify`` (images, or clips where the files are videos) or ``detect`` (COCO json).
        model: ``timm/NAME``, ``torchvision/NAME`` or a bare name.
        checkpoint: A checkpoint of the original model, ``demo`` for the packaged weights, or None.
        pretrained: Download the library's own weights.
        recipe: Packaged name, path or mapping.
        allow_imports: Packages whose modules the recipe may import as block types.
        data: ``demo``, a folder of classes (or with ``train`` and ``val``), or a timm dataset name
            such as ``torch/cifar10``; for ``detect`` a folder with ``train`` and ``val`` images and
            ``annotations/train.json`` and ``val.json``.
        data_root: Root folder of a timm dataset.
        data_download: Let a timm dataset download itself.
        epochs: Passes over the training set.
        batch_size: Samples a step, of all processes together.
        accumulate: Steps whose gradients are added up before the weights change.
        lr: Peak learning rate of the backbone.
        inserted_lr_mult: Factor on ``lr`` for the inserted blocks.
        weight_decay: Of weights with two or more dimensions.
        optimizer: ``sgd`` (momentum 0.9, Nesterov) or ``adamw``.
        schedule: How the rate falls after the warm-up.
        lr_steps: Epochs at which ``step`` divides the rate by ten; 2/3 and 8/9 of all when empty.
        warmup: Share of all steps in which the rate rises linearly.
        clip_grad: Largest norm of all gradients together; no limit when None.
        ema: Decay of an exponential moving average of the weights, which is then what is scored and
            saved; None for none.
        early_stop: Stop after so many epochs without a better score; never when None.
        freeze_backbone: Train the inserted blocks and the classifier alone; frozen norms keep their
            statistics.
        amp: Mixed precision of the training steps; scores are computed in float32.
        augment: ``default`` is timm's, ``light`` crops only (no flips, no colour), ``none``.
        shard: Deal parameters, gradients and optimizer state out to the processes (FSDP).
        image_size: Height and width in pixels; the model's own when None.
        clip_frames: Frames a clip; the model's own when None.
        frame_stride: Frames of the video between two frames of a clip.
        val_share: Share of a folder without ``val`` that is held out.
        num_workers: Loader processes.
        seed: Of data order, augmentation and new parameters.
        device: ``cuda``, ``cpu``, or None for what there is.
        work_dir: Where results go.
        save_every: Steps between two saves inside an epoch; after each epoch alone when None.
        pictures: Draw the attention in so many validation images of different classes.
        tensorboard: Write TensorBoard files as well.
        resume: Go on from the work dir's last saved state.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    task: Literal["classify", "detect"] = "classify"
    model: str
    checkpoint: str | None = None
    pretrained: bool = False
    recipe: str | dict[str, Any]
    allow_imports: tuple[str, ...] = ()
    data: str
    data_root: str | None = None
    data_download: bool = False
    epochs: PositiveInt = 5
    batch_size: PositiveInt = 32
    accumulate: PositiveInt = 1
    lr: PositiveFloat = 0.01
    inserted_lr_mult: PositiveFloat = 1.0
    weight_decay: NonNegativeFloat = 1e-4
    optimizer: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    lr_steps: tuple[PositiveInt, ...] = ()
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    clip_grad: PositiveFloat | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    early_stop: PositiveInt | None = None
    freeze_backbone: bool = False
    amp: Literal["off", "bf16", "fp16"] = "off"
    shard: bool = False
    augment: Literal["default", "light", "none"] = "default"
    image_size: PositiveInt | None = None
    clip_frames: PositiveInt | None = None
    frame_stride: PositiveInt = 2
    val_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    num_workers: Annotated[int, Field(ge=0)] = 2
    seed: Annotated[int, Field(ge=0)] = 0
    device: str | None = None
    work_dir: str = DEFAULT_WORK_DIR
    save_every: PositiveInt | None = None
    pictures: Annotated[int, Field(ge=0)] = 2
    tensorboard: bool = False
    resume: bool = False

    @classmethod
    def make(cls, **values: Any) -> FinetuneConfig:
        """Check values, with this project's errors.

        Raises:
            SurgeryError: A value that is not allowed.
        """
        try:
            return cls(**values)
        except PydanticError as error:
            lines = [
                f"{'.'.join(map(str, item['loc']))}: {item['msg']}, but got {item['input']!r}"
                for item in error.errors(include_url=False)
            ]
            raise SurgeryError(f"fine-tuning configuration: {'; '.join(lines)}") from error

    def write(self, folder: Path) -> None:
        """Write the resolved configuration as YAML into ``folder``."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        with atomic_write(folder / CONFIG_FILE) as part:
            part.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> FinetuneConfig:
        """Read the configuration that a run left in its work dir.

        Raises:
            DataError: There is none, or it cannot be read.
        """
        path = folder / CONFIG_FILE
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is no readable run configuration: {error}") from error
        if not isinstance(data, dict):
            raise DataError(f"{path} is no run configuration: it must hold a mapping")
        return cls.make(**data)


def demo_values() -> dict[str, Any]:
    """The run without arguments: pretrained EfficientNet-Lite0 on 5,000 MNIST digits."""
    return {
        "model": "timm/tf_efficientnet_lite0",
        "checkpoint": DEMO,
        "recipe": "demo_efficientnet_lite0",
        "data": DEMO,
        "epochs": 2,
        "batch_size": 32,
        "lr": 0.01,
        "inserted_lr_mult": 2.0,
        "augment": "light",
        "image_size": 64,
        "num_workers": 0,
        "work_dir": DEMO_WORK_DIR,
    }
