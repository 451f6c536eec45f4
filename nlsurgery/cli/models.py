"""From what the user names on the command line to a model with its weights, and its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nlsurgery.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from nlsurgery.viz.images import View


def load_plain(
    model: str, checkpoint: Path | None, *, pretrained: bool, num_classes: int | None
) -> nn.Module:
    """Build a model by name and load a checkpoint of it, or keep its random weights.

    Raises:
        ModelError: No such model.
        CheckpointError: The checkpoint cannot be read, or is of another model.
    """
    from nlsurgery.checkpoint import load_tensors, read_state_dict
    from nlsurgery.integrations.hub import create_model

    tensors = None if checkpoint is None else read_state_dict(checkpoint)
    network = create_model(model, num_classes=num_classes, pretrained=pretrained)
    if tensors is not None:
        try:
            load_tensors(network, tensors, str(checkpoint))
        except CheckpointError as error:
            raise CheckpointError(f"{error}{_classifier_hint(network, tensors)}") from error
    return network


def _classifier_hint(network: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """Name the option to give where a checkpoint differs by the size of its classifier alone."""
    own = network.state_dict()
    if set(own) != set(tensors):
        return ""
    other = [key for key in own if own[key].shape != tensors[key].shape]
    if any(own[key].shape[1:] != tensors[key].shape[1:] for key in other):
        return ""
    sizes = {tensors[key].shape[0] for key in other}
    return f"; for its classifier give --num-classes {sizes.pop()}" if len(sizes) == 1 else ""


def load_operated(
    model: str,
    *,
    recipe: str | None,
    checkpoint: Path | None,
    pretrained: bool,
    num_classes: int | None,
) -> nn.Module:
    """Build an operated model from any of: a saved one, a plain checkpoint and a recipe, a recipe.

    Args:
        model: Its name.
        recipe: What to insert; may be left out where the checkpoint carries its recipe.
        checkpoint: Weights of the operated model, or of the plain one.
        pretrained: Download the library's weights of the plain one.
        num_classes: Size of the classifier, if not the model's own.

    Raises:
        SurgeryError: The pieces do not fit together; the message says which is missing.
    """
    import nlsurgery
    from nlsurgery.checkpoint import load_tensors, read_state_dict
    from nlsurgery.integrations.hub import create_model
    from nlsurgery.reporting import is_inserted_key

    tensors = {} if checkpoint is None else read_state_dict(checkpoint)
    inserted = [key for key in tensors if is_inserted_key(key)]
    if not inserted:
        if recipe is None:
            raise CheckpointError(
                f"{checkpoint or model} has no inserted blocks to look at: give --recipe NAME, or "
                "as --checkpoint a file that nlsurgery saved"
            )
        network = load_plain(model, checkpoint, pretrained=pretrained, num_classes=num_classes)
        return nlsurgery.apply(network, recipe)
    if len(inserted) == len(tensors) and not pretrained:
        raise CheckpointError(
            f"{checkpoint} holds the inserted blocks alone; give a file with the whole model, or "
            "--pretrained for the library's weights under them"
        )
    network = create_model(model, num_classes=num_classes, pretrained=pretrained)
    if recipe is None:
        return nlsurgery.load(network, str(checkpoint))
    nlsurgery.apply(network, recipe)
    load_tensors(network, tensors, str(checkpoint))
    return network


def view_of(model: nn.Module, photo: Image.Image, sizes: tuple[int, ...] | None) -> View:
    """The part of a photo that a model sees, at its input size and in its normalisation.

    Args:
        model: A timm or torchvision model; timm's data config tells size, mean and deviation.
        photo: An RGB image.
        sizes: (C, H, W) in place of the model's own input size.

    Raises:
        DataError: The model takes no RGB images.
    """
    from timm.data import resolve_data_config

    from nlsurgery.viz.images import view_image

    config = resolve_data_config({}, model=model)
    sizes = sizes or config["input_size"]
    channels, *size = sizes if len(sizes) > 2 else (3, *sizes)
    if channels != 3 or len(size) != 2:
        raise DataError(
            f"attention is drawn for RGB images, input size (3, H, W), but got {(channels, *size)}"
        )
    return view_image(photo, (size[0], size[1]), mean=config["mean"], std=config["std"])
