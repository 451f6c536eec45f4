"""One process of a distributed training; run by torchrun from test_mmengine_dist.py."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.registry import MODELS

from nlsurgery.finetune.distributed import leave
from tests.integrations.mm_models import backbone
from tests.integrations.mm_runs import loader, make_runner


def main(folder: Path, case: str) -> None:
    """Train one epoch and let rank 0 save the weights.

    Args:
        folder: The work_dir.
        case: What to train, see ``options``.
    """
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    wrapper: dict[str, Any] = {"type": "MMDistributedDataParallel", "device_ids": None}
    options: dict[str, Any] = {
        "launcher": "pytorch" if "RANK" in os.environ else "none",
        "model_wrapper_cfg": wrapper,
        "env_cfg": {"dist_cfg": {"backend": "gloo"}},
        "train_dataloader": {**loader(0, 64, shuffle=False), "batch_size": 8 // _world()},
        "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.05}},
        "default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 1}},
    }
    inner: dict[str, Any] = {"norm_eval": True}
    surgery: dict[str, Any] = {"norm_eval": True}
    if case == "frozen_stages":
        inner["frozen_stages"] = 2
    elif case == "freeze_backbone":
        surgery["freeze_backbone"] = True
    elif case == "constructor":
        options["optim_wrapper"].update(
            constructor="nlsurgery.OptimWrapperConstructor",
            paramwise_cfg={"freeze_backbone": True, "inserted_lr_mult": 2},
        )
    options["model"] = {
        "type": "toys.ToyClassifier",
        "backbone": backbone(inner=inner, **surgery),
    }
    make_runner(folder, **options).train()


def shard(folder: Path) -> None:
    """Take three steps with torch's ``fully_shard``, or unsharded in one process; save the losses."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MODELS.build({"type": "toys.ToyClassifier", "backbone": backbone()})
    model.init_weights()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for stage in (model.backbone.layer2, model.backbone.layer3):
            fully_shard(stage, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    losses = []
    for _ in range(3):
        loss = model(images, labels, mode="loss")["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if not dist.is_initialized() or dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "losses.json").write_text(json.dumps(losses))


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[2] == "shard":
        shard(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), sys.argv[2])
    if dist.is_initialized():
        # At the interpreter's end gloo's threads, which DDP still holds, now and then abort the process:
        # everything is written, so leave without it.
        dist.barrier()
        leave()
