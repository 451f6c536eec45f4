"""TSM R50 with five non-local blocks in res3 and res4.

The frames of a clip lie in the batch here, so each block attends within one frame; the temporal shift
around it mixes the frames.
"""

_base_ = "mmaction::recognition/tsm/tsm_imagenet-pretrained-r50_8xb16-1x1x8-50e_kinetics400-rgb.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="nlsurgery.Surgery",
        model={{_base_.model.backbone}},
        recipe="res4_5blocks",
    )
)
custom_hooks = [dict(type="nlsurgery.GateHook", interval=500)]
