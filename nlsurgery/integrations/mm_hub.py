"""Models of timm and torchvision as OpenMMLab backbones and classifiers, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel, BaseModule, initialize
from torch import Tensor, nn

from nlsurgery.blocks.layout import Layout, to_channels_first
from nlsurgery.errors import DataError, ModelError
from nlsurgery.integrations.hub import create_model, find_model
from nlsurgery.registry import MODELS
from nlsurgery.stages import Stage
from nlsurgery.surgery import inspect

#: Where a stage's output waits, on the module that made it, for the end of the forward.
_KEPT = "_nlsurgery_stage_output"

_LAYOUTS = {kind: Layout(kind) for kind in ("NCHW", "NHWC", "NCTHW", "NTHWC")}  # type: ignore[arg-type]


def build_hub_model(config: Mapping[str, Any]) -> nn.Module:
    """Build a backbone, or with ``num_classes`` a whole classifier.

    Args:
        config: ``name`` and the options of :class:`HubBackbone` or :class:`HubClassifier`.

    Raises:
        ModelError: No such model, or one that cannot be used so.
    """
    kind = HubClassifier if config.get("num_classes") is not None else HubBackbone
    try:
        built: nn.Module = kind(**config)
    except TypeError as error:
        raise ModelError(f"model {config['name']!r}: {error}") from error
    return built


class _Hub(nn.Module):
    """What both kinds share: the library's weights stay, and its plain checkpoints load."""

    model: nn.Module

    def init_weights(self) -> None:
        """Run the initialisers of ``init_cfg`` alone: the library has initialised its model."""
        configs: Any = self.init_cfg
        if configs and not getattr(self, "is_init", False):
            initialize(self, configs)
        self.is_init = True

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        _rename_plain_keys(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[no-untyped-call]


def _rename_plain_keys(module: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Give the keys of the library's own checkpoints the names they have here.

    They lack ``model.``, and timm flattens names where it returns features: ``stages.0`` is ``stages_0``.
    """
    own = {name.partition(".")[2].replace(".", "_"): name for name in module.state_dict()}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key[len(prefix) :]
        target = own.get(name.replace(".", "_"))
        if target is not None and f"{prefix}{target}" not in state_dict:
            state_dict[f"{prefix}{target}"] = state_dict.pop(key)


@MODELS.register_module()  # type: ignore[untyped-decorator]
class HubBackbone(_Hub, BaseModule):  # type: ignore[misc]
    """A timm or torchvision model that returns a tuple of feature maps, one per stage asked for.

    Weights that the library has loaded survive ``init_weights``; its plain checkpoints load through
    ``init_cfg=dict(type='Pretrained', ...)``.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] = (-1,),
        *,
        pretrained: bool = False,
        init_cfg: Any = None,
    ) -> None:
        """Build the model without its classifier.

        Args:
            name: ``timm/NAME``, ``torchvision/NAME``, or a bare name.
            out_indices: Which stages to return: as timm's ``features_only`` counts them, or for
                torchvision as ``nlsurgery inspect`` lists them, from 0.
            pretrained: Load the library's default weights (needs the network).
            init_cfg: mmengine's initialisers.

        Raises:
            ModelError: No such model or stage, or a model whose stages are no maps.
        """
        super().__init__(init_cfg)
        library, bare = find_model(name)
        self.name, self.out_indices = name, tuple(out_indices)
        self._stages: tuple[tuple[str, str], ...] = ()
        if library == "timm":
            self.model = _timm_features(bare, self.out_indices, pretrained)
            self._nhwc = str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")
        else:
            self.model = create_model(name, pretrained=pretrained)
            self._stages = _keep_stages(self.model, name, self.out_indices)
            self._nhwc = False

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the stages' outputs.

        Args:
            x: (B, 3, H, W), or (B, 3, T, H, W) for video models.

        Returns:
            For each of ``out_indices``: (B, C, H', W') or (B, C, T', H', W').
        """
        out = self.model(x)
        if not self._stages:
            return tuple(f.permute(0, 3, 1, 2) if self._nhwc else f for f in out)
        maps = []
        for path, layout in self._stages:
            kept = self.model.get_submodule(path).__dict__.pop(_KEPT)
            maps.append(to_channels_first(kept, _LAYOUTS[layout])[0])
        return tuple(maps)


def _timm_features(name: str, out_indices: tuple[int, ...], pretrained: bool) -> nn.Module:
    import timm

    try:
        made: nn.Module = timm.create_model(
            name, features_only=True, out_indices=out_indices, pretrained=pretrained
        )
    except (RuntimeError, AssertionError, IndexError, AttributeError) as error:
        raise ModelError(
            f"timm/{name} gives no feature maps at out_indices={out_indices} ({error}); ask for other "
            f"indices, or build it with mmpretrain.TIMMBackbone"
        ) from error
    return made


def _keep_output(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook: keep a stage's output, blocks included, until the end of the forward."""
    module.__dict__[_KEPT] = output


def _keep_stages(
    model: nn.Module, name: str, out_indices: tuple[int, ...]
) -> tuple[tuple[str, str], ...]:
    """Hook the last block of each stage asked for, and take out everything after the last one.

    What has no way to the result would get no gradients, which DistributedDataParallel refuses.
    """
    anatomy = inspect(model)
    stages = anatomy.stages
    if not out_indices or any(not -len(stages) <= i < len(stages) for i in out_indices):
        raise ModelError(
            f"{name} has {len(stages)} stages ({', '.join(s.name for s in stages)}), counted from 0; "
            f"but got out_indices={out_indices}"
        )
    chosen = [stages[index] for index in out_indices]
    for stage in chosen:
        if stage.layout not in _LAYOUTS:
            raise ModelError(
                f"{name}: {stage.name} is {stage.layout}, no feature map; take the model from timm"
            )
        model.get_submodule(_end(stage)).register_forward_hook(_keep_output)
    calls = [call.fqn for call in anatomy.tree.trace.calls]
    last = max(calls.index(_end(stage)) for stage in chosen)
    _cut(model, calls[last], calls[last + 1 :])
    return tuple((_end(stage), stage.layout) for stage in chosen)


def _end(stage: Stage) -> str:
    return stage.blocks[-1] if stage.blocks else stage.fqn


def _cut(model: nn.Module, last: str, later: Iterable[str]) -> None:
    """Put an identity in the place of every module called after ``last`` and outside of it."""
    gone: list[str] = []
    for fqn in later:
        if any(fqn.startswith(f"{above}.") for above in (last, *gone)):
            continue
        parent, _, child = fqn.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
        gone.append(fqn)


@MODELS.register_module()  # type: ignore[untyped-decorator]
class HubClassifier(_Hub, BaseModel):  # type: ignore[misc]
    """A whole timm or torchvision classifier that the Runner trains with cross-entropy."""

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        pretrained: bool = False,
        label_smoothing: float = 0.0,
        data_preprocessor: Any = None,
        init_cfg: Any = None,
    ) -> None:
        """Build the model.

        Args:
            name: ``timm/NAME``, ``torchvision/NAME``, or a bare name.
            num_classes: Size of the classifier.
            pretrained: Load the library's default weights (needs the network).
            label_smoothing: Of the cross-entropy, in [0, 1].
            data_preprocessor: mmengine's.
            init_cfg: mmengine's initialisers.

        Raises:
            ModelError: No such model.
        """
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.name, self.label_smoothing = name, label_smoothing
        self.model = create_model(name, num_classes=num_classes, pretrained=pretrained)

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters of the classifier, which train on where the backbone is frozen."""
        getter = getattr(self.model, "get_classifier", None)
        if getter is not None:
            found = getter()
            heads = list(found) if isinstance(found, tuple | list) else [found]
        else:
            heads = [m for m in self.model.modules() if isinstance(m, nn.Linear)][-1:]
        return [p for head in heads if isinstance(head, nn.Module) for p in head.parameters()]

    def forward(
        self, inputs: Any, data_samples: Any = None, mode: str = "tensor"
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Tensor]]:
        """Run as mmengine's loops do.

        Args:
            inputs: (B, 3, H, W) or a list of (3, H, W), floating.
            data_samples: The labels: (B,) integers, a list of them, or of samples with ``gt_label``.
            mode: ``tensor`` for logits (B, num_classes), ``loss`` for ``{'loss': ...}``, ``predict``
                for a list of dicts with ``pred_score``, ``pred_label`` and, if known, ``gt_label``.

        Raises:
            DataError: The loss is asked for without labels, or ``mode`` is none of these.
        """
        images = torch.stack(list(inputs)) if isinstance(inputs, list | tuple) else inputs
        logits: Tensor = self.model(images)
        if mode == "tensor":
            return logits
        labels = None if data_samples is None else _labels(data_samples, logits.device)
        if mode == "loss":
            if labels is None:
                raise DataError(f"{self.name}: mode='loss' needs labels, but got none")
            return {"loss": F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)}
        if mode != "predict":
            raise DataError(f"{self.name}: mode must be tensor, loss or predict, but got {mode!r}")
        scores = logits.softmax(-1)
        predictions = [
            {"pred_score": score, "pred_label": score.argmax(-1, keepdim=True)} for score in scores
        ]
        for prediction, label in zip(
            predictions, labels if labels is not None else (), strict=False
        ):
            prediction["gt_label"] = label.reshape(1)
        return predictions


def _labels(samples: Any, device: torch.device) -> Tensor:
    if isinstance(samples, Tensor):
        return samples.to(device)
    values = [getattr(sample, "gt_label", sample) for sample in samples]
    return torch.stack([torch.as_tensor(value).reshape(()) for value in values]).to(device)
