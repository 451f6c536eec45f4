"""What a task brings to a run: its model, its data, how both meet, and what is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.evaluator import BaseMetric
from torch import Tensor, nn
from torch.utils.data import Dataset

from nlsurgery.finetune.config import FinetuneConfig
from nlsurgery.finetune.loading import Collate
from nlsurgery.finetune.model import Trained
from nlsurgery.viz.images import Picture


@dataclass(frozen=True, slots=True)
class Job:
    """A task made ready: everything that can be wrong with its input has been looked at.

    Attributes:
        network: The original model with its weights and its new head, in eval mode.
        head: The state_dict keys of the head, which trains even when the backbone is frozen.
        classes: Names in label order.
        train: Training samples by index.
        val: Validation samples by index.
        collate: Makes a batch of a list of samples.
        wrap: Makes the Runner's model of the operated one.
        metric: Makes the metric.
        score: Name of the score that counts; more is better.
        input_size: Of one sample, without the batch.
        outputs: Runs a model on a batch and returns the tensors to compare.
        view: The picture of a validation sample as the model sees it, None where there is none.
    """

    network: nn.Module
    head: frozenset[str]
    classes: tuple[str, ...]
    train: Dataset[Any]
    val: Dataset[Any]
    collate: Collate
    wrap: Callable[[nn.Module], Trained]
    metric: Callable[[], BaseMetric]
    score: str
    input_size: tuple[int, ...]
    outputs: Callable[[nn.Module, Any], Sequence[Tensor]]
    view: Callable[[int], tuple[Tensor, Picture, str]] | None


def make_job(config: FinetuneConfig) -> Job:
    """Read, check and build what a run needs. Writes nothing.

    Raises:
        SurgeryError: Bad model, checkpoint or data.
    """
    if config.task == "detect":
        from nlsurgery.finetune.detect import detection_job

        return detection_job(config)
    from nlsurgery.finetune.classify import classification_job

    return classification_job(config)
