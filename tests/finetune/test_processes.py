"""Two processes, as torchrun starts them, give the numbers of one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from nlsurgery.checkpoint import read_state_dict
from nlsurgery.errors import DataError, SurgeryError
from nlsurgery.finetune.distributed import choose_device
from nlsurgery.finetune.loading import EpochSampler
from tests.finetune.conftest import finetune

SCRIPT = """
import pathlib, sys, yaml
from nlsurgery.finetune import FinetuneConfig, run
from nlsurgery.finetune.distributed import leave
config = FinetuneConfig.make(**yaml.safe_load(sys.argv[1]))
run(config)
if config.shard:
    leave()
tasks = pathlib.Path("/proc/self/task")
names = [(task / "comm").read_text() for task in tasks.iterdir()] if tasks.exists() else []
assert not [name for name in names if "gloo" in name], names
"""

NORM = """
import copy, sys, torch
from torch import distributed, nn
from nlsurgery.finetune.shared_norm import shared_statistics
distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).double()
alone = copy.deepcopy(model)
x, weights = torch.randn(8, 3, 6, 6).double(), torch.randn(8, 4, 4, 4).double()
(alone(x) * weights).mean().backward()
with shared_statistics(torch.device("cpu")):
    several = nn.parallel.DistributedDataParallel(model)
    (several(x[rank::2]) * weights[rank::2]).mean().backward()
pairs = [(a.grad, b.grad) for a, b in zip(model.parameters(), alone.parameters())]
pairs += [(a.double(), b.double()) for a, b in zip(model.buffers(), alone.buffers())]
torch.save([float((a - b).abs().max()) for a, b in pairs], f"{sys.argv[1]}/{rank}.pt")
distributed.destroy_process_group()
"""


def start_two(script: str, argument: str) -> None:
    """Run a script in two processes with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, argument], stderr=subprocess.PIPE, text=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "sharded"])
@pytest.mark.parametrize(
    "model", ["timm/test_resnet", pytest.param("timm/test_convnext", marks=pytest.mark.slow)]
)
def test_two_processes_give_the_numbers_of_one(
    values: dict[str, Any], tmp_path: Path, model: str, shard: bool
) -> None:
    changes: dict[str, Any] = {"model": model, "lr": 1e-3, "image_size": 64, "augment": "default"}
    if shard:
        changes |= {"optimizer": "adamw", "clip_grad": 1.0, "ema": 0.5, "pictures": 1}
    one, _ = finetune(values, **changes)
    folder = tmp_path / "two"
    both = {**values, **changes, "work_dir": str(folder), "shard": shard}
    start_two(SCRIPT, yaml.safe_dump(both))
    two = json.loads((folder / "history.json").read_text())
    alone = json.loads((one.work_dir / "history.json").read_text())
    assert len(two["steps"]) == 6
    for ours, theirs in zip(two["steps"], alone["steps"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    for ours, theirs in zip(two["scores"], alone["scores"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


STOPPED = """
import os, signal, sys, yaml
from nlsurgery.finetune import FinetuneConfig, run
from nlsurgery.finetune.distributed import leave
config = FinetuneConfig.make(**yaml.safe_load(sys.argv[1]))
def stop(step, steps, shown):
    if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
assert run(config, progress=stop).stopped_at == 3
leave()
"""


def test_a_sharded_run_goes_on_in_any_number_of_processes(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """SIGTERM comes between two steps whose gradients are added up, to one of the two processes."""
    changes = {**values, "optimizer": "adamw", "lr": 1e-3, "ema": 0.5, "accumulate": 2}
    expected, _ = finetune(changes)
    folders = [tmp_path / "two", tmp_path / "one"]
    both = {**changes, "work_dir": str(folders[0]), "shard": True}
    start_two(STOPPED, yaml.safe_dump(both))
    state = torch.load(folders[0] / "last.pth", weights_only=True)
    shapes = {key: value.shape for key, value in state["model"].items()}
    assert {key: grad.shape for key, grad in state["grads"].items()}.items() <= shapes.items()
    assert state["grads"]
    shutil.copytree(folders[0], folders[1])
    start_two(SCRIPT, yaml.safe_dump({**both, "resume": True}))
    finetune(changes, work_dir=str(folders[1]), resume=True)
    for folder in folders:
        close = {"rel": 2e-3, "abs": 2e-4}
        ours, theirs = (
            json.loads((where / "history.json").read_text())
            for where in (folder, expected.work_dir)
        )
        assert [step["loss"] for step in ours["steps"]] == pytest.approx(
            [step["loss"] for step in theirs["steps"]], **close
        )
        for name in ("model.safetensors", "best.safetensors"):
            weights = read_state_dict(folder / name)
            for key, value in read_state_dict(expected.work_dir / name).items():
                torch.testing.assert_close(weights[key], value, rtol=2e-2, atol=2e-3)


def test_sharding_one_process_is_an_error(values: dict[str, Any]) -> None:
    with pytest.raises(SurgeryError, match=r"--shard .* there is one: start it with torchrun"):
        finetune(values, shard=True)
    assert not Path(values["work_dir"]).exists()


def test_shared_norm_is_batch_norm_over_all_processes(tmp_path: Path) -> None:
    start_two(NORM, str(tmp_path))
    for rank in range(2):
        differences = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert max(differences) < 1e-14


def test_batch_norm_alone_is_untouched() -> None:
    from nlsurgery.finetune.shared_norm import shared_statistics

    x = torch.randn(4, 3, 5, 5)
    expected = F.batch_norm(x, None, None, training=True)
    with shared_statistics(torch.device("cpu")):
        assert torch.equal(F.batch_norm(x, None, None, training=True), expected)


def test_every_step_holds_the_same_samples_for_any_number_of_processes() -> None:
    whole = EpochSampler(21, 4, seed=3)
    whole.set_epoch(2)
    steps = [{i for _, i in list(whole)[k : k + 4]} for k in range(0, 20, 4)]
    parts = []
    for rank in range(2):
        part = EpochSampler(21, 4, seed=3)
        part.rank, part.world_size = rank, 2
        part.set_epoch(2)
        parts.append([index for _, index in part])
        assert len(part) == len(parts[-1])
    dealt = [{*parts[0][k : k + 2], *parts[1][k : k + 2]} for k in range(0, 10, 2)]
    assert dealt == steps
    assert len(set.union(*steps)) == 20


def test_sampler_skips_what_is_done_once() -> None:
    sampler = EpochSampler(12, 4, seed=0)
    whole = list(sampler)
    sampler.skip = 2
    assert list(sampler) == whole[8:]
    assert list(sampler) == whole
    sampler.set_epoch(1)
    assert [i for _, i in sampler] != [i for _, i in whole]


def test_batch_must_be_dealt_out_evenly(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nlsurgery.finetune import FinetuneConfig, loading
    from nlsurgery.finetune.classify import classification_job

    config = FinetuneConfig.make(**{**values, "batch_size": 15})
    job = classification_job(config)
    monkeypatch.setattr(loading, "get_dist_info", lambda: (0, 2))
    with pytest.raises(DataError, match=r"--batch-size 15 .* multiple of the 2 processes"):
        loading.make_loaders(config, job.train, job.val, job.collate)


@pytest.mark.parametrize("name", ["cuda:99", "nonsense"])
def test_missing_device_is_an_error(name: str) -> None:
    with pytest.raises(SurgeryError, match=f"--device .*{name}"):
        choose_device(name, None)


def test_a_half_written_grammar_of_the_formatter_is_waited_for(monkeypatch):
    from nlsurgery import finetune

    tries = []

    def import_module(name):
        tries.append(name)
        if len(tries) < 3:
            raise EOFError("Ran out of input")

    monkeypatch.setattr(finetune, "import_module", import_module)
    monkeypatch.setattr(finetune.time, "sleep", lambda seconds: None)
    finetune._import_formatter()
    assert tries == ["yapf"] * 3
