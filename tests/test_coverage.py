"""The coverage sweep: its samples, its resuming, and that a failure is one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.coverage_models import all_models, select  # noqa: E402
from benchmarks.coverage_table import failures, table  # noqa: E402


def sweep(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks/coverage.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_every_model_of_both_libraries_is_listed() -> None:
    import timm
    import torchvision

    names = {entry.spec for entry in all_models()}
    assert len(names) == len(timm.list_models()) + len(torchvision.models.list_models())


def test_tenth_is_drawn_by_the_seed_alone() -> None:
    entries = all_models()
    one, again, two = (select(entries, "tenth", seed) for seed in ("a", "a", "b"))
    assert one == again
    assert one != two
    assert 0.07 < len(one) / len(entries) < 0.13


def test_family_sample_takes_the_smallest_of_each() -> None:
    entries = all_models()
    chosen = select(entries, "family", params={"timm/resnet10t": 1, "timm/resnet18": 2})
    assert "timm/resnet10t" in {entry.spec for entry in chosen}
    assert len(chosen) == len({(entry.library, entry.family) for entry in entries})


ROW: dict[str, Any] = {
    "spec": "timm/resnet18", "level": "run", "layout": "NCHW", "plan": "yes", "plan_s": 0.1,
    "stages": [["stage1", "layer1", 64, 4, "NCHW", 2]], "recipes": ["res4_1block"], "hints": "yes",
    "identity": "yes", "keys": "yes", "backward": "no: VerifyError: dead", "deepcopy": "n/a (why)",
}  # fmt: skip


def test_a_column_that_does_not_hold_is_a_failure() -> None:
    assert failures(ROW) == ["backward: no: VerifyError: dead"]
    assert failures({**ROW, "backward": "yes"}) == []
    assert failures({"spec": "x", "error": "boom"}) == ["plan: boom"]


def test_table_counts_models_by_size() -> None:
    whole = {**ROW, "params": 20_000_000, "backward": "yes"}
    whole |= dict.fromkeys(("compile", "export", "fx", "features_only"), "yes")
    broken = {**whole, "spec": "timm/resnet34", "fx": "no: TraceError"}
    page = table([whole, broken, {**ROW, "params": 1}], {"timm": 10})
    assert "| 20 to 40 | 2 | 2 | 1 |" in page
    assert "| 0 to 20 | 1 | 0 | 0 |" in page
    assert "| **timm, every column** | 2 | 10 | 1 (50.0%) |" in page


def test_table_counts_what_was_run() -> None:
    page = table([ROW], {"timm": 10})
    assert "| timm, identity | 1 | 10 | 1 (100.0%) |" in page
    assert "| timm, backward | 1 | 10 | 0 (0.0%) |" in page
    assert "| timm, deepcopy | 0 | 10 | not run |" in page


@pytest.mark.slow
def test_sweep_runs_resumes_and_fails(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    first = sweep("--pattern", "timm/resnet10t", "--level", "run", "--rows", str(rows))
    assert first.returncode == 0, first.stdout + first.stderr
    assert "1 passed in" in first.stdout
    (row,) = map(json.loads, rows.read_text().splitlines())
    assert row["identity"] == row["backward"] == "yes"
    rows.write_text(json.dumps({**row, "identity": "no: broken"}) + "\n")
    second = sweep("--pattern", "timm/resnet10t", "--level", "run", "--rows", str(rows))
    assert second.returncode == 1
    assert "1 failed, 0 passed" in second.stdout
