"""The original model with its checkpoint and a new head, and the surgery on it with its proof."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nlsurgery.checkpoint import load_tensors, read_state_dict
from nlsurgery.errors import CheckpointError, ModelError, VerifyError
from nlsurgery.finetune.config import DEMO, FinetuneConfig
from nlsurgery.integrations.demo import DEMO_MODEL, demo_state_dict
from nlsurgery.integrations.hub import create_model, find_model
from nlsurgery.reporting import is_inserted_key
from nlsurgery.surgery import apply, disabled

#: From a model to the tensors that a forward of it gives.
Outputs = Callable[[nn.Module], Sequence[Tensor]]


def build_network(config: FinetuneConfig, **sizes: int) -> tuple[nn.Module, frozenset[str]]:
    """Build the original model with its weights and a head for the data.

    A head of another size in the checkpoint is left out; every other key must fit.

    Args:
        config: The run.
        sizes: Of the head, as the library calls them: ``num_classes``, ``num_keypoints``.

    Returns:
        The model in eval mode, and the state_dict keys of its head.

    Raises:
        ModelError: Unknown model, or one without a head of a chosen size.
        CheckpointError: Unreadable, or of another model.
    """
    if config.pretrained and config.checkpoint is not None:
        raise CheckpointError("give either --checkpoint or --pretrained, not both")
    model = _create(config, sizes)
    head = _head_keys(config, model, sizes)
    if config.pretrained:
        library = create_model(config.model, pretrained=True).state_dict()
        load_checkpoint(model, library, "the library's checkpoint", head)
    if config.checkpoint is not None:
        tensors, origin = _read(config)
        load_checkpoint(model, tensors, origin, head)
    _resize(model, config)
    return model.eval(), head


def _create(config: FinetuneConfig, sizes: Mapping[str, int]) -> nn.Module:
    try:
        options: dict[str, Any] = dict(sizes)
        return create_model(config.model, **options)
    except TypeError as error:
        raise ModelError(
            f"model {config.model!r} takes no number of classes, so it cannot be fine-tuned as a "
            f"classifier ({error})"
        ) from error


def _head_keys(
    config: FinetuneConfig, model: nn.Module, sizes: Mapping[str, int]
) -> frozenset[str]:
    """The keys whose shape depends on the head's sizes: the head, whatever it is called."""
    larger = {name: size + 1 for name, size in sizes.items()}
    try:
        with torch.device("meta"):
            other = _create(config, larger).state_dict()
    except (RuntimeError, NotImplementedError):
        with torch.random.fork_rng(devices=[]):
            other = _create(config, larger).state_dict()
    own = model.state_dict()
    head = frozenset(key for key in own if own[key].shape != other[key].shape)
    if not head:
        raise ModelError(
            f"model {config.model!r} has no head that depends on the number of classes: it cannot be "
            f"fine-tuned as a classifier"
        )
    return head


def _read(config: FinetuneConfig) -> tuple[dict[str, Tensor], str]:
    if config.checkpoint != DEMO:
        return read_state_dict(str(config.checkpoint)), str(config.checkpoint)
    if find_model(config.model)[1] != DEMO_MODEL.rpartition("/")[2]:
        raise CheckpointError(
            f"--checkpoint {DEMO} is of {DEMO_MODEL}, not of {config.model}: give a checkpoint of it"
        )
    return demo_state_dict(), "the demo's weights"


def load_checkpoint(
    model: nn.Module, tensors: Mapping[str, Tensor], origin: str, head: Iterable[str]
) -> None:
    """Load an original model's checkpoint, less its head where that has another size.

    Args:
        model: The original model; untouched on an error.
        tensors: The checkpoint.
        origin: How errors name it.
        head: The keys of the head.

    Raises:
        CheckpointError: It is of another model, or of an operated one.
    """
    inserted = [key for key in tensors if is_inserted_key(key)]
    if inserted:
        raise CheckpointError(
            f"{origin} is of a model that was operated on already ({len(inserted)} inserted tensors, "
            f"such as {inserted[0]}): give the original's checkpoint, or --resume a run in its work dir"
        )
    own = model.state_dict()
    counters = {key: own[key] for key in own if key.endswith(".num_batches_tracked")}
    tensors = {**counters, **tensors}  # frozen norms and old checkpoints have no counters
    other_size = {
        key for key in head if key in tensors and _differ_in_one(tensors[key].shape, own[key].shape)
    }
    wanted = set(own) - other_size
    load_tensors(
        model,
        {key: value for key, value in tensors.items() if key not in other_size},
        origin,
        wanted,
    )


def _differ_in_one(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes differ in the size of one axis alone, as heads for other data do."""
    return len(one) == len(other) and sum(a != b for a, b in zip(one, other, strict=True)) == 1


def _resize(model: nn.Module, config: FinetuneConfig) -> None:
    """Prepare a timm transformer with a fixed input size for the run's."""
    resize: Any = getattr(model, "set_input_size", None)
    if config.image_size is None or not callable(resize):
        return
    try:
        resize(img_size=(config.image_size, config.image_size))
    except (ValueError, AssertionError, TypeError) as error:
        raise ModelError(
            f"{config.model} cannot take --image-size {config.image_size}: {error}"
        ) from error


def operate(
    model: nn.Module, config: FinetuneConfig, size: Sequence[int], outputs: Outputs
) -> float:
    """Insert the blocks and prove the identity on real data.

    Args:
        model: The original model in eval mode; changed in place.
        config: The run; its recipe is read.
        size: Input size without the batch.
        outputs: Runs a model on the first batch.

    Returns:
        The largest absolute difference of the outputs, 0.0.

    Raises:
        VerifyError: The operated model gives other outputs.
    """
    with torch.no_grad(), torch.backends.cudnn.flags(benchmark=False, deterministic=True):
        original = outputs(model)
        apply(model, config.recipe, input_size=size, allow_imports=config.allow_imports)
        operated = outputs(model)
        with disabled(model):
            inside = outputs(model)
    difference = max(largest_difference(original, operated), largest_difference(original, inside))
    if difference != 0:
        raise VerifyError(
            f"the operated {type(model).__name__} differs from the original by {difference:g} on the "
            f"first batch: a block of the recipe is not the identity at init"
        )
    return difference


def largest_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Largest absolute difference between two lists of tensors; inf where shapes or NaNs differ."""
    largest = 0.0
    if len(one) != len(other):
        return float("inf")
    for a, b in zip(one, other, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel() and not torch.equal(a, b):
            gap = float((a.double() - b.double()).abs().max())
            largest = max(largest, gap if gap == gap else float("inf"))
    return largest
