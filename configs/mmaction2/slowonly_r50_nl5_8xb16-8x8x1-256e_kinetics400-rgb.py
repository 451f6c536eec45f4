"""SlowOnly R50 8x8 with five space-time non-local blocks in res3 and res4.

Blocks in three dimensions, keys pooled 1x2x2, as arXiv 1711.07971 has them.
"""

_base_ = "mmaction::recognition/slowonly/slowonly_r50_8xb16-8x8x1-256e_kinetics400-rgb.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="nlsurgery.Surgery",
        model={{_base_.model.backbone}},
        recipe="res4_5blocks",
        input_size=(3, 8, 224, 224),
    )
)
custom_hooks = [dict(type="nlsurgery.GateHook", interval=500)]
