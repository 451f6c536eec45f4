"""One case per foreign block: a state_dict, what the peer computes with it, and an input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from nlsurgery.convert import Choices
from tests.convert import peers

MODES = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
SIZES = {1: (9,), 2: (6, 5), 3: (3, 4, 5)}


@dataclass(frozen=True)
class Case:
    name: str
    layout: str
    state: peers.State
    peer: Callable[[peers.State, Tensor], Tensor]
    size: tuple[int, ...]
    channels: int = 8
    choices: Choices = field(default_factory=Choices)
    prefix: str = "x.block"

    def keyed(self, prefix: str | None = None) -> peers.State:
        """The state under a prefix, as it stands in a checkpoint."""
        start = self.prefix if prefix is None else prefix
        joint = "" if not start else "_" if self.layout == "caffe2" else "."
        return {f"{start}{joint}{key}": value for key, value in self.state.items()}


def _pairwise(layout: str) -> list[Case]:
    made = []
    for dims, size in SIZES.items():
        for mode in MODES:
            for sub_sample, bn in ((True, True), (False, False), (True, False), (False, True)):
                make = peers.alexhex7_state if layout == "alexhex7" else peers.mmcv_state
                run = peers.alexhex7 if layout == "alexhex7" else peers.mmcv
                state = make(8, 4, dims, mode, sub_sample=sub_sample, bn=bn)
                name = f"{layout}-{dims}d-{mode}-{'pool' if sub_sample else 'full'}-{'bn' if bn else 'plain'}"
                peer = _with_mode(run, mode)
                made.append(
                    Case(name, layout, state, peer, size, choices=Choices(mode=_told(mode)))
                )
    return made


def _told(mode: str) -> str | None:
    return mode if mode == "dot_product" else None


def _with_mode(run: Any, *args: Any, **options: Any) -> Callable[[peers.State, Tensor], Tensor]:
    return lambda state, x: run(state, x, *args, **options)


def _video() -> list[Case]:
    made = []
    for kind, mode in (("softmax", None), ("dot_product", "dot_product")):
        for pool in (True, False):
            for norm in ("bn", "norm", "none"):
                state = peers.slowfast_state(8, 4, bn=norm != "none", name=norm)
                peer = _with_mode(peers.slowfast, kind, (1, 2, 2) if pool else None)
                choices = Choices(mode=mode, sub_sample=None if pool else False)
                name = f"slowfast-{kind}-{'pool' if pool else 'full'}-{norm}"
                made.append(Case(name, "slowfast", state, peer, SIZES[3], choices=choices))
            for norm in ("bn", "affine", "none"):
                for scale in (True, False):
                    state = peers.caffe2_state(8, 4, bn=norm)
                    softmax = kind == "softmax"
                    peer = _with_mode(peers.caffe2, softmax=softmax, scale=scale, pool=pool)
                    choices = Choices(
                        mode=mode,
                        use_scale=None if scale else False,
                        sub_sample=None if pool else False,
                    )
                    name = f"caffe2-{kind}-{'pool' if pool else 'full'}-{norm}-{scale}"
                    made.append(
                        Case(
                            name,
                            "caffe2",
                            state,
                            peer,
                            SIZES[3],
                            choices=choices,
                            prefix="nonlocal_conv4_3",
                        )
                    )
    return made


def _res3() -> list[Case]:
    """caffe2's blocks at res3: windows of four frames where BatchNorm is frozen."""
    made = []
    flags = {"softmax": True, "scale": True, "pool": True}
    told = Choices(temporal_window=0)
    for name, bn, window, choices in (
        ("frozen", "affine", 4, Choices()),
        ("bn", "bn", None, Choices()),
        ("frozen-all-frames", "affine", None, told),
    ):
        state = peers.caffe2_state(8, 4, bn=bn)
        peer = _with_mode(peers.caffe2, **flags)
        if window is not None:
            peer = _with_mode(peers.caffe2_groups, window, **flags)
        case = Case(f"caffe2-res3-{name}", "caffe2", state, peer, (8, 4, 5), choices=choices)
        made.append(replace(case, prefix="nonlocal_conv3_1"))
    return made


def _rest() -> list[Case]:
    size = SIZES[2]
    made = [
        Case("timm-nl", "timm", peers.timm_nl_state(16, 8), peers.timm_nl, size, 16),
        Case(
            "timm-nl-unscaled",
            "timm",
            peers.timm_nl_state(16, 8),
            _with_mode(peers.timm_nl, use_scale=False),
            size,
            16,
            Choices(use_scale=False),
        ),
        Case(
            "mmcv-unscaled",
            "mmcv",
            peers.mmcv_state(8, 4, 2, "embedded_gaussian", sub_sample=False, bn=True),
            _with_mode(peers.mmcv, "embedded_gaussian", use_scale=False),
            size,
            choices=Choices(use_scale=False),
        ),
        Case(
            "slowfast-eps",
            "slowfast",
            peers.slowfast_state(8, 4, bn=True),
            _with_mode(peers.slowfast, "softmax", (1, 2, 2), eps=1e-3),
            SIZES[3],
            choices=Choices(bn_eps=1e-3),
        ),
        Case(
            "slowfast-dot_product-2x2x2",
            "slowfast",
            peers.slowfast_state(8, 4, bn=True),
            _with_mode(peers.slowfast, "dot_product", (2, 2, 2)),
            (5, 4, 6),
            choices=Choices(mode="dot_product", sub_sample=(2, 2, 2)),
        ),
        *_res3(),
        Case("sagan", "sagan", peers.qkv_state(8, 3), peers.self_attention, size),
        Case("danet-pam", "danet", peers.qkv_state(8, 1), peers.self_attention, size),
        Case("danet-cam", "danet", peers.fill({"gamma": (1,)}), peers.channel_attention, size),
        Case("ccnet", "ccnet", peers.qkv_state(8, 2), _with_mode(peers.criss_cross, 2), size),
        Case(
            "ccnet-3",
            "ccnet",
            peers.qkv_state(8, 2),
            _with_mode(peers.criss_cross, 3),
            size,
            choices=Choices(recurrence=3),
        ),
    ]
    for style, layout in (("mmcv", "mmcv"), ("timm", "timm")):
        for fusion in ("add", "mul"):
            for attend in (True, False):
                state = peers.context_state(8, 3, fusion=fusion, attend=attend, style=style)
                name = f"{layout}-context-{fusion}-{'att' if attend else 'avg'}"
                peer = _with_mode(peers.global_context, style)
                made.append(Case(name, layout, state, peer, size))
    return made


CASES = [*_pairwise("alexhex7"), *_pairwise("mmcv"), *_video(), *_rest()]
