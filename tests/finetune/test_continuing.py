"""A run that was cut short goes on to the numbers of one that was not, to the last bit."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nlsurgery.errors import CheckpointError
from nlsurgery.finetune import checkpoints
from nlsurgery.finetune.checkpoints import MODEL_FILE, STATE_FILE, read_state, write_state
from nlsurgery.finetune.history import History
from tests.finetune.conftest import finetune, saved

SCRIPT = """
import sys, yaml
from nlsurgery.finetune import FinetuneConfig, run
tell = lambda step, *rest: print("step", step, flush=True)
result = run(FinetuneConfig.make(**yaml.safe_load(sys.argv[1])), say=print, progress=tell)
print("stopped at", result.stopped_at)
"""


class KilledError(Exception):
    """Ends a run as abruptly as an exception can."""


def killed_at(step: int) -> Any:
    def progress(done: int, *rest: Any) -> None:
        if done == step:
            raise KilledError

    return progress


@pytest.mark.parametrize(
    ("changes", "killed", "start"),
    [
        pytest.param({}, 6, 5, id="mid-epoch"),
        pytest.param({"accumulate": 2, "model": "timm/test_convnext"}, 6, 5, id="mid-accumulation"),
        pytest.param({"ema": 0.8}, 3, 2, id="ema", marks=pytest.mark.slow),
        pytest.param(
            {"optimizer": "adamw", "lr": 1e-3, "clip_grad": 0.1, "schedule": "step"}, 5, 4,
            id="adamw-clip-step", marks=pytest.mark.slow,
        ),
        pytest.param({"amp": "bf16", "schedule": "constant"}, 2, 1, id="bf16", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_resume_inside_an_epoch(
    values: dict[str, Any], tmp_path: Path, changes: dict[str, Any], killed: int, start: int
) -> None:
    whole, _ = finetune(values, work_dir=str(tmp_path / "whole"), **changes)
    with pytest.raises(KilledError):
        finetune(values, save_every=1, progress=killed_at(killed), **changes)
    result, said = finetune(values, resume=True, **changes)
    assert any(f"going on after step {start}," in line for line in said)
    assert saved(result) == saved(whole)


def test_loader_processes_do_not_change_the_numbers(values: dict[str, Any], tmp_path: Path) -> None:
    one, _ = finetune(values, epochs=1, augment="default")
    two, _ = finetune(
        values, epochs=1, augment="default", num_workers=2, work_dir=str(tmp_path / "two")
    )
    assert saved(one) == saved(two)


def test_seeds_differ_between_epochs_and_runs(values: dict[str, Any], tmp_path: Path) -> None:
    first, _ = finetune(values, epochs=1)
    other, _ = finetune(values, epochs=1, seed=1, work_dir=str(tmp_path / "other"))
    assert saved(first)["steps"] != saved(other)["steps"]


def test_global_random_state_is_left_alone(values: dict[str, Any]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    finetune(values, epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_finished_run_resumes_to_itself(values: dict[str, Any]) -> None:
    first, _ = finetune(values, epochs=1)
    before = saved(first)
    again, _ = finetune(values, epochs=1, resume=True)
    assert saved(again) == before


def start_process(values: dict[str, Any], **limits: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, yaml.safe_dump(values)], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE, **limits,
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for read in process.stdout:
        if read.strip() == line:
            return
    pytest.fail(f"the process ended before {line!r}: {process.communicate()[1]}")


def test_sigterm_saves_and_ends_cleanly(values: dict[str, Any], tmp_path: Path) -> None:
    whole, _ = finetune(values, work_dir=str(tmp_path / "whole"))
    with start_process(values) as process:
        wait_for(process, "step 2")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stopped at" in out
    assert "stopped at None" not in out
    state = read_state(Path(values["work_dir"]), {})
    assert state is not None
    assert state["iter"] >= 2
    result, _ = finetune(values, resume=True)
    assert saved(result) == saved(whole)


def test_kill_9_in_the_middle_and_resume(values: dict[str, Any], tmp_path: Path) -> None:
    whole, _ = finetune(values, work_dir=str(tmp_path / "whole"))
    with start_process({**values, "save_every": 2}) as process:
        wait_for(process, "step 5")
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    result, _ = finetune(values, resume=True)
    assert saved(result) == saved(whole)
    assert not list(Path(values["work_dir"]).glob(".*.part"))


@pytest.mark.parametrize("from_end", [1, 2, 3, 4])
def test_killed_between_two_of_the_last_files_and_resumed(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_end: int
) -> None:
    """Every file is written by ``save`` or ``write_state``; the last ``from_end`` writes are lost."""
    writes: list[str] = []
    limit = 10_000

    def counting(write: Any) -> Any:
        def counted(what: Any, path: Path) -> Any:
            if len(writes) == limit:
                raise KilledError
            writes.append(path.name)
            return write(what, path)

        return counted

    for name in ("save", "write_state"):
        monkeypatch.setattr(checkpoints, name, counting(getattr(checkpoints, name)))
    whole, _ = finetune(values, work_dir=str(tmp_path / "whole"))
    limit = len(writes) - from_end
    assert {STATE_FILE, MODEL_FILE} <= set(writes[-4:])
    writes.clear()
    with pytest.raises(KilledError):
        finetune(values)
    limit = 10_000
    result, _ = finetune(values, resume=True)
    assert saved(result) == saved(whole)


@pytest.mark.slow
def test_full_disk_loses_nothing_saved(values: dict[str, Any], tmp_path: Path) -> None:
    """No file of the second process may grow past 100 kB: its first save fails half-way."""
    finetune(values, epochs=1)
    folder = Path(values["work_dir"])
    before = {name: (folder / name).read_bytes() for name in (STATE_FILE, MODEL_FILE)}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    with start_process(values, preexec_fn=limit) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"{STATE_FILE} cannot be written" in err
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert not list(folder.glob(".*.part"))


def test_state_with_code_in_it_is_refused(tmp_path: Path) -> None:
    torch.save({"fingerprint": {}, "model": KilledError()}, tmp_path / STATE_FILE)
    with pytest.raises(CheckpointError, match="UnpicklingError"):
        read_state(tmp_path, {})


def test_state_survives_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / STATE_FILE
    write_state({"a": torch.ones(3)}, path)
    with pytest.raises((AttributeError, TypeError, CheckpointError)):
        write_state({"a": lambda: None}, path)
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == [STATE_FILE]


@pytest.mark.parametrize(
    ("accuracies", "best", "stale"),
    [
        pytest.param([90, 50], 1, 0, id="before-does-not-count"),
        pytest.param([10, 50, 70, 60], 2, 1, id="one-stale"),
        pytest.param([10, 70, 70, 70], 1, 2, id="ties-are-stale"),
    ],
)
def test_best_epoch(accuracies: list[float], best: int, stale: int) -> None:
    rows = [{"epoch": float(epoch), "accuracy": float(a)} for epoch, a in enumerate(accuracies)]
    history = History(scores=rows)
    assert (history.best_epoch, history.stale_epochs) == (best, stale)
