"""Models by name: ``timm/NAME``, ``torchvision/NAME`` or a bare name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from nlsurgery.errors import ModelError, close_names


def create_model(
    spec: str, *, num_classes: int | None = None, pretrained: bool = False, **options: Any
) -> nn.Module:
    """Build a model of timm or torchvision by name.

    Args:
        spec: ``timm/NAME``, ``torchvision/NAME``, or a bare name, which is looked up in timm first.
        num_classes: Size of the classifier; the model's own when None.
        pretrained: Load the library's default weights (needs the network).
        options: Further arguments of the library's builder, such as ``num_keypoints``.

    Raises:
        ModelError: Neither library has a model of that name.
    """
    library, name = find_model(spec)
    if num_classes is not None:
        options["num_classes"] = num_classes
    if library == "timm":
        import timm

        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
        return model
    import torchvision

    detection = torchvision.models.list_models(module=torchvision.models.detection)
    segmentation = torchvision.models.list_models(module=torchvision.models.segmentation)
    if name in detection or name in segmentation:
        options["weights_backbone"] = None
    weights = "DEFAULT" if pretrained else None
    built: nn.Module = torchvision.models.get_model(name, weights=weights, **options)
    return built


def takes_argument(spec: str, name: str) -> bool:
    """Whether a torchvision model's builder has an argument of that name.

    Raises:
        ModelError: Neither library has a model of that name.
    """
    library, model = find_model(spec)
    if library != "torchvision":
        return False
    import torchvision

    return name in inspect.signature(torchvision.models.get_model_builder(model)).parameters


def find_model(spec: str) -> tuple[str, str]:
    """Split a model spec into (``"timm"`` or ``"torchvision"``, the library's own name).

    Raises:
        ModelError: Neither library has a model of that name.
    """
    library, _, name = spec.rpartition("/")
    if library not in ("", "timm", "torchvision"):
        raise ModelError(
            f"model {spec!r}: the part before '/' must be 'timm' or 'torchvision', but got {library!r}"
        )
    known: list[str] = []
    if library in ("", "timm"):
        import timm

        if timm.is_model(name):
            return "timm", name
        known += timm.list_models()
    if library in ("", "torchvision"):
        import torchvision

        names = torchvision.models.list_models()
        if name in names:
            return "torchvision", name
        known += names
    where = library or "timm or torchvision"
    raise ModelError(f"no model {name!r} in {where}{close_names(name, sorted(set(known)))}")
