"""From what the user names on the command line to a model with its weights, and its inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nlsurgery.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from nlsurgery.viz.images import View


def load_plain(
    model: str, checkpoint: Path | None, *, pretrained: bool, num_classes: int | None
) -> nn.Module:
    """Build a model by name and load a checkpoint of it, or keep its random weights.

    Raises:
        ModelError: No such model.
        CheckpointError: The checkpoint cannot be read, or is of another model.
    """
    from nlsurgery.checkpoint import load_state_dict, read_state_dict
    from nlsurgery.integrations.hub import create_model

    state = None if checkpoint is None else read_state_dict(checkpoint)
    network = create_model(model, num_classes=num_classes, pretrained=pretrained)
    if state is not None:
        load_state_dict(network, state)
    return network


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
    from nlsurgery.checkpoint import load_state_dict, read_state_dict
    from nlsurgery.integrations.hub import create_model

    state = None if checkpoint is None else read_state_dict(checkpoint)
    operated = state is not None and any(".nlsurgery." in f".{key}" for key in state)
    if recipe is None and not operated:
        raise CheckpointError(
            f"{model} has no inserted blocks to look at: give --recipe NAME, or as --checkpoint a "
            "file that nlsurgery saved"
        )
    network = create_model(model, num_classes=num_classes, pretrained=pretrained)
    if state is not None and operated and recipe is None:
        assert checkpoint is not None
        nlsurgery.load(network, checkpoint)
    elif state is not None and operated:
        nlsurgery.apply(network, recipe)
        load_state_dict(network, state)
    else:
        if state is not None:
            load_state_dict(network, state)
        nlsurgery.apply(network, recipe)
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
