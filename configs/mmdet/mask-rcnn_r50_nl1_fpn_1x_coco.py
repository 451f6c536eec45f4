"""Mask R-CNN R50-FPN with one non-local block before the last residual block of res4.

The setting of arXiv 1711.07971, Table 5: box/mask AP 38.0/34.6 -> 39.0/35.5.
"""

_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="nlsurgery.Surgery",
        model={{_base_.model.backbone}},
        recipe="res4_1block",
        # The paper's COCO models have no normalisation in the block.
        norm_eval=True,
    )
)
custom_hooks = [dict(type="nlsurgery.GateHook", interval=500)]
