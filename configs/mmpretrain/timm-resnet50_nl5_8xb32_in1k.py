"""ResNet-50 of timm with the five non-local blocks of arXiv 1711.07971, fine-tuned on ImageNet.

timm's pretrained weights stay, the blocks start as the identity and learn ten times faster.
"""

_base_ = [
    "mmpretrain::_base_/datasets/imagenet_bs32.py",
    "mmpretrain::_base_/schedules/imagenet_bs256.py",
    "mmpretrain::_base_/default_runtime.py",
]

model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="nlsurgery.Surgery",
        model=dict(type="TIMMBackbone", model_name="resnet50", pretrained=True),
        recipe="res4_5blocks",
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=1000,
        in_channels=2048,
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
        topk=(1, 5),
    ),
)

optim_wrapper = dict(
    _delete_=True,
    optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=1e-4),
    constructor="nlsurgery.OptimWrapperConstructor",
    paramwise_cfg=dict(inserted_lr_mult=10),
)
custom_hooks = [
    dict(type="nlsurgery.GateHook", interval=500),
    dict(type="nlsurgery.AttentionHook", interval=5000),
]
