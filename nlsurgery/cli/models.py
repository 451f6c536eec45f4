"""From what the user names on the command line to a model with its weights, and its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nlsurgery.errors import CheckpointError, DataError, ModelError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from nlsurgery.finetune.config import FinetuneConfig
    from nlsurgery.viz.images import View


def load_plain(
    model: str, checkpoint: Path | None, *, pretrained: bool, num_classes: int | None
) -> nn.Module:
    """Build a model by name and load a checkpoint of it, or keep its random weights.

    Args:
        model: Its name.
        checkpoint: A checkpoint of the original model.
        pretrained: Download the library's weights.
        num_classes: Size of the classifier; the checkpoint's when None.

    Raises:
        ModelError: No such model.
        CheckpointError: The checkpoint cannot be read, or is of another model.
    """
    from nlsurgery.checkpoint import load_tensors, read_state_dict

    if checkpoint is None:
        return _build(model, {}, pretrained=pretrained, num_classes=num_classes)
    tensors = read_state_dict(checkpoint)
    network = _build(model, tensors, pretrained=pretrained, num_classes=num_classes)
    load_tensors(network, tensors, str(checkpoint))
    return network


def _build(
    model: str, tensors: Mapping[str, Tensor], *, pretrained: bool, num_classes: int | None
) -> nn.Module:
    """Build a model by name, with the classifier size of a checkpoint if none is given."""
    from nlsurgery.integrations.hub import create_model

    network = create_model(model, num_classes=num_classes, pretrained=pretrained)
    found = classifier_size(network, tensors)
    if num_classes is not None or found is None:
        return network
    return create_model(model, num_classes=found, pretrained=pretrained)


def classifier_size(network: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
    """The number of classes of a checkpoint, where its classifier alone has another size.

    Args:
        network: The model with a classifier of its own size.
        tensors: The checkpoint; keys that the model lacks do not matter.

    Returns:
        The size, None where nothing differs or more than the number of classes does.
    """
    own = network.state_dict()
    other = [key for key in own if key in tensors and own[key].shape != tensors[key].shape]
    sizes = {tensors[key].shape[:1] for key in other}
    rests_fit = all(own[key].shape[1:] == tensors[key].shape[1:] for key in other)
    if len(sizes) != 1 or not rests_fit:
        return None
    (size,) = sizes
    return size[0] if size else None


def load_operated(
    model: str,
    *,
    recipe: str | None,
    checkpoint: Path | None,
    pretrained: bool,
    num_classes: int | None,
    allow_imports: Sequence[str] = (),
) -> nn.Module:
    """Build an operated model from any of: a saved one, a plain checkpoint and a recipe, a recipe.

    Args:
        model: Its name.
        recipe: What to insert; may be left out where the checkpoint carries its recipe.
        checkpoint: Weights of the operated model, or of the plain one.
        pretrained: Download the library's weights of the plain one.
        num_classes: Size of the classifier; the checkpoint's when None.
        allow_imports: Packages whose modules the recipe may import as block types.

    Raises:
        SurgeryError: The pieces do not fit together; the message says which is missing.
    """
    import nlsurgery
    from nlsurgery.checkpoint import load_tensors, read_state_dict
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
        return nlsurgery.apply(network, recipe, allow_imports=allow_imports)
    if len(inserted) == len(tensors) and not pretrained:
        raise CheckpointError(
            f"{checkpoint} holds the inserted blocks alone; give a file with the whole model, or "
            "--pretrained for the library's weights under them"
        )
    network = _build(model, tensors, pretrained=pretrained, num_classes=num_classes)
    if recipe is None:
        return nlsurgery.load(network, str(checkpoint), allow_imports=allow_imports)
    nlsurgery.apply(network, recipe, allow_imports=allow_imports)
    load_tensors(network, tensors, str(checkpoint))
    return network


def is_work_dir(target: str) -> bool:
    """Whether a word means a folder rather than a model's name; a model of that name goes first."""
    from nlsurgery.integrations.hub import find_model

    if not Path(target).is_dir():
        return False
    try:
        find_model(target)
    except ModelError:
        return True
    return False


def read_work_dir(folder: Path) -> tuple[FinetuneConfig, Path]:
    """Find the model that a fine-tuning run left.

    Args:
        folder: Its work dir.

    Returns:
        The run's configuration, and the file of its operated model.

    Raises:
        DataError: The folder is no work dir.
        CheckpointError: The run has saved no model yet.
    """
    from nlsurgery.finetune.checkpoints import MODEL_FILE
    from nlsurgery.finetune.config import FinetuneConfig

    config = FinetuneConfig.read(folder)
    file = folder / MODEL_FILE
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist: the run in {folder} has saved no model yet")
    return config, file


def check_readable(files: Sequence[Path]) -> None:
    """Look into images and videos before a model is built.

    Raises:
        DataError: One cannot be read.
    """
    from nlsurgery.finetune.clips import count_frames
    from nlsurgery.finetune.folders import VIDEO_SUFFIXES
    from nlsurgery.viz.images import read_image

    for path in files:
        (count_frames if path.suffix.lower() in VIDEO_SUFFIXES else read_image)(path)


def views_of(
    model: nn.Module, files: Sequence[Path], config: FinetuneConfig, sizes: tuple[int, ...] | None
) -> list[View]:
    """The parts of images, or of videos, that a model sees, at its input size and in its normalisation.

    Args:
        model: An operated model.
        files: Images, or videos for a model that takes clips.
        config: ``model``, ``image_size``, ``clip_frames`` and ``frame_stride`` are read.
        sizes: (H, W), (C, H, W) or (C, T, H, W) in place of the model's own input size.

    Raises:
        DataError: A file cannot be read, or is not what the model takes.
    """
    from nlsurgery.finetune.folders import VIDEO_SUFFIXES
    from nlsurgery.viz.capture import takes_clips
    from nlsurgery.viz.images import read_image

    clips = takes_clips(model)
    suffixes = ", ".join(sorted(VIDEO_SUFFIXES))
    taken = f"video clips; give a video ({suffixes})" if clips else "images, no videos"
    for path in files:
        if clips != (path.suffix.lower() in VIDEO_SUFFIXES):
            raise DataError(f"{path}: {config.model} takes {taken}")
    if clips:
        return [clip_view_of(model, path, config, sizes) for path in files]
    if sizes is None and config.image_size is not None:
        sizes = (config.image_size, config.image_size)
    return [view_of(model, read_image(path), sizes) for path in files]


def clip_view_of(
    model: nn.Module, path: Path, config: FinetuneConfig, sizes: tuple[int, ...] | None
) -> View:
    """The clip in the middle of a video, as a video model of torchvision sees it.

    Args:
        model: The model.
        path: A video file.
        config: ``model``, ``image_size``, ``clip_frames`` and ``frame_stride`` are read.
        sizes: (H, W), (C, H, W) or (C, T, H, W) in place of the model's own.

    Raises:
        DataError: The file cannot be decoded, or the model is no video model of torchvision.
    """
    from PIL import Image

    from nlsurgery.finetune.clips import (
        ClipTransform,
        Video,
        clip_indices,
        clip_transforms,
        count_frames,
    )
    from nlsurgery.viz.images import view_clip

    transform = clip_transforms(config, model)[1]
    assert isinstance(transform, ClipTransform)
    *rest, height, width = sizes or transform.crop
    length = rest[-1] if len(rest) == 2 else transform.length
    video = Video(path, count_frames(path))
    pixels = video.read(clip_indices(video.num_frames, length, transform.stride, 0.5))
    frames = [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in pixels]
    return view_clip(
        frames,
        (height, width),
        mean=transform.mean,
        std=transform.std,
        crop=transform.crop[0] / transform.resize,
    )


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
