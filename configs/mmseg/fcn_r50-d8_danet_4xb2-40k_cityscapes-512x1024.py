"""FCN R50-D8 with the position and channel attention of arXiv 1809.02983 after res5.

The backbone keeps 1/8 of the input size: res4 and res5 are dilated.
"""

_base_ = "mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="nlsurgery.Surgery",
        model={{_base_.model.backbone}},
        recipe="danet_res5",
    )
)
optim_wrapper = dict(
    constructor="nlsurgery.OptimWrapperConstructor", paramwise_cfg=dict(inserted_lr_mult=10)
)
custom_hooks = [dict(type="nlsurgery.GateHook", interval=500)]
