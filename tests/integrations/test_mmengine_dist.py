"""Two gloo processes give the numbers of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nlsurgery.integrations.mm_checkpoints import allow_runner_checkpoints
from tests.integrations import mm_dist

ROOT = Path(__file__).parents[2]


def run(folder: Path, case: str) -> None:
    """Train in two processes."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "tests.integrations.mm_dist", str(folder), case]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def saved(folder: Path) -> dict[str, torch.Tensor]:
    allow_runner_checkpoints()
    state: dict[str, torch.Tensor] = torch.load(folder / "epoch_1.pth", weights_only=True)[
        "state_dict"
    ]
    return state


@pytest.mark.parametrize(
    "case",
    [
        "frozen_stages",
        pytest.param("freeze_backbone", marks=pytest.mark.slow),
        pytest.param("constructor", marks=pytest.mark.slow),
        pytest.param("plain", marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_the_numbers_of_one(tmp_path: Path, case: str) -> None:
    mm_dist.main(tmp_path / "one", case)
    run(tmp_path / "two", case)
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5, msg=key)
    gates = [
        v for k, v in two.items() if k.endswith(("nlsurgery.0.gamma", "nlsurgery.0.bn.weight"))
    ]
    assert len(gates) == 3
    assert all(gate.any() for gate in gates)


@pytest.mark.slow
def test_sharded_parameters_give_the_same_losses(tmp_path: Path) -> None:
    mm_dist.shard(tmp_path / "one")
    run(tmp_path / "two", "shard")
    one, two = (json.loads((tmp_path / n / "losses.json").read_text()) for n in ("one", "two"))
    assert len(set(one)) == 3
    assert two == pytest.approx(one, rel=1e-4)
