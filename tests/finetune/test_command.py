"""``nlsurgery finetune`` as it is typed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from nlsurgery.cli.app import main
from nlsurgery.cli.finetune import complete, parse_epochs
from nlsurgery.finetune import FinetuneConfig
from nlsurgery.finetune.config import CONFIG_FILE, demo_values


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["finetune", *map(str, words)])
    return int(ended.value.code or 0)


@pytest.fixture
def words(values: dict[str, Any], tmp_path: Path) -> list[object]:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values["recipe"]))
    return [
        "--model", values["model"], "--recipe", recipe, "--data", values["data"], "--epochs", 1,
        "--batch-size", 16, "--image-size", 48, "--num-workers", 0, "--device", "cpu",
        "--augment", "light", "--work-dir", values["work_dir"],
    ]  # fmt: skip


def test_run_prints_table_proof_scores_and_where_things_are(
    words: list[object], values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words) == 0
    out = capsys.readouterr().out
    for part in (
        "non_local", "max |Δ| = 0", "validation before the first step", "step 3/3", "left 0:00:0",
        "validation after epoch 1", "curves.png", "model.safetensors",
    ):  # fmt: skip
        assert part in out
    config = FinetuneConfig.read(Path(values["work_dir"]))
    assert (config.epochs, config.augment, config.seed) == (1, "light", 0)


def test_resume_reads_the_work_dir_s_own_settings(
    words: list[object], values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words) == 0
    assert call("--resume", "--work-dir", values["work_dir"]) == 0
    assert "going on after step 3" in capsys.readouterr().out


def test_dry_run_writes_nothing(
    words: list[object], values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "memory:" in out
    assert "time:" in out
    assert not Path(values["work_dir"]).exists()


def test_bad_data_is_one_line_on_stderr(
    words: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / "bad" / name).mkdir(parents=True)
        for index in range(3):
            (tmp_path / "bad" / name / f"{index}.jpg").write_text("no image")
    assert call(*words, "--data", tmp_path / "bad") == 1
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert "is not an image" in shown.err


def test_nothing_given_is_the_demo() -> None:
    assert complete({}) == demo_values()
    assert complete({"epochs": 1}) == {**demo_values(), "epochs": 1}
    FinetuneConfig.make(**demo_values())


def test_data_alone_goes_with_the_demo_s_model() -> None:
    made = complete({"data": "photos"})
    assert (made["model"], made["checkpoint"], made["data"]) == (
        "timm/tf_efficientnet_lite0", "demo", "photos",
    )  # fmt: skip
    assert FinetuneConfig.make(**made).image_size is None


@pytest.mark.parametrize(
    ("given", "word"),
    [
        pytest.param({"model": "resnet50"}, "--recipe and --data", id="model-alone"),
        pytest.param({"checkpoint": "a.pth"}, "--checkpoint needs --model", id="checkpoint-alone"),
        pytest.param({"task": "detect"}, "--task needs --model", id="task-alone"),
    ],
)
def test_incomplete_choice_names_what_is_missing(given: dict[str, Any], word: str) -> None:
    with pytest.raises(typer.BadParameter, match=word):
        complete(given)


def test_resume_alone_finds_the_run_started_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert complete({"resume": True})["data"] == "demo"
    for age, (folder, model) in enumerate((("demo", "a"), ("finetune", "b"))):
        path = tmp_path / "work_dirs" / folder
        path.mkdir(parents=True)
        FinetuneConfig.make(model=model, recipe="x", data="y").write(path)
        os.utime(path / CONFIG_FILE, (1000 + age, 1000 + age))
    made = complete({"resume": True})
    assert (made["model"], made["work_dir"]) == ("b", "work_dirs/finetune")


def test_resume_without_a_run_is_the_demo_s(tmp_path: Path) -> None:
    made = complete({"resume": True, "work_dir": str(tmp_path)})
    assert made == {**demo_values(), "resume": True, "work_dir": str(tmp_path)}
    (tmp_path / CONFIG_FILE).write_text("model: 3\nrecipe: x\n")
    from nlsurgery.errors import SurgeryError

    with pytest.raises(SurgeryError, match=r"model: .*; data: Field required"):
        complete({"resume": True, "work_dir": str(tmp_path)})


@pytest.mark.parametrize(("text", "epochs"), [("8,11", (8, 11)), ("3", (3,)), (None, None)])
def test_lr_steps_are_read(text: str | None, epochs: tuple[int, ...] | None) -> None:
    assert parse_epochs(text) == epochs


@pytest.mark.parametrize("text", ["", "a", "3,2", "0,1", "2,2", "-1"])
def test_bad_lr_steps_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="rising epochs"):
        parse_epochs(text)


@pytest.mark.parametrize("words", [["--help"], ["--epochs", "0"]])
def test_help_and_usage_errors_load_no_torch(words: list[str]) -> None:
    script = (
        "import sys; from nlsurgery.cli.app import main\n"
        "try: main(['finetune', *sys.argv[1:]])\n"
        "except SystemExit: print('torch' in sys.modules, 'mmengine' in sys.modules)"
    )
    command = [sys.executable, "-c", script, *words]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("False False")


@pytest.mark.slow
def test_demo_reaches_its_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--work-dir", tmp_path / "demo") == 0
    out = capsys.readouterr().out
    assert "max |Δ| = 0" in out
    last = next(line for line in out.splitlines() if line.startswith("validation accuracy"))
    assert float(last.split("->")[1].split()[0]) > 95
    assert len(list((tmp_path / "demo" / "attention").glob("*.png"))) == 8


@pytest.mark.parametrize(("processes", "sharded"), [("1", False), ("2", True)])
def test_resume_shards_where_there_is_something_to_shard_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: str, sharded: bool
) -> None:
    FinetuneConfig.make(**demo_values(), shard=True).write(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", processes)
    made = complete({"resume": True, "work_dir": str(tmp_path)})
    assert made["shard"] is sharded
