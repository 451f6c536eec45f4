"""A run from the original checkpoint to the scores after, and its continuation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import nlsurgery
from nlsurgery.errors import CheckpointError, DataError, RecipeError, SurgeryError
from nlsurgery.finetune import FinetuneConfig
from nlsurgery.finetune.checkpoints import STATE_FILE
from nlsurgery.finetune.classify import classification_job
from nlsurgery.integrations.hub import create_model
from tests.finetune.conftest import finetune, run_values


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    values = run_values(digits, tmp_path_factory.mktemp("run") / "work")
    values["pictures"] = 2
    steps: list[int] = []
    result, said = finetune(values, progress=lambda step, *rest: steps.append(step))
    return values, result, said, steps


def history(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "history.json").read_text())


def test_work_dir_holds_everything(finished: Any) -> None:
    _, result, said, steps = finished
    names = {path.name for path in result.work_dir.iterdir()}
    assert names == {
        "model.safetensors", "best.safetensors", "last.pth", "config.yaml", "train.log",
        "curves.png", "history.json", "attention",
    }  # fmt: skip
    assert result.max_difference == 0.0
    assert any("max |Δ| = 0" in line for line in said)
    assert any("non_local" in line for line in said)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert len(result.pictures) == 4
    assert all(path.stat().st_size > 10_000 for path in result.pictures)


def test_history_has_every_step_score_and_gate(finished: Any) -> None:
    _, result, _, _ = finished
    data = history(result.work_dir)
    assert [step["step"] for step in data["steps"]] == [1, 2, 3, 4, 5, 6]
    assert [score["epoch"] for score in data["scores"]] == [0, 1, 2]
    gates = {key for key in data["gates"][-1] if key != "step"}
    assert gates == {"layer2.0.nlsurgery.0", "layer3.0.nlsurgery.0"}
    assert data["gates"][-1]["layer3.0.nlsurgery.0"] > 0
    assert data["scores"][0] == result.before


def test_saved_model_scores_what_the_run_said(finished: Any) -> None:
    values, result, _, _ = finished
    model = nlsurgery.load(create_model(values["model"], num_classes=3), result.model_file).eval()
    job = classification_job(FinetuneConfig.make(**values))
    samples = [job.val[index] for index in range(len(job.val))]
    images = torch.stack([image for image, _ in samples])
    labels = torch.tensor([label for _, label in samples])
    with torch.no_grad():
        accuracy = 100 * (model(images).argmax(1) == labels).float().mean()
    assert accuracy.item() == pytest.approx(result.after["accuracy"], abs=1e-4)


def test_resume_without_a_state_starts_anew(finished: Any, values: dict[str, Any]) -> None:
    result, _ = finetune(values, resume=True)
    assert result.after == finished[1].after


def test_frozen_backbone_stays_as_it_was(values: dict[str, Any]) -> None:
    result, _ = finetune(values, freeze_backbone=True, epochs=1)
    torch.manual_seed(0)
    trained = nlsurgery.checkpoint.read_state_dict(result.model_file)
    torch.manual_seed(values.get("seed", 0))
    original = create_model(values["model"], num_classes=3).state_dict()
    key = "layer3.0.conv1.weight"
    assert torch.equal(trained[key], original[key])
    assert not torch.equal(trained["fc.weight"], original["fc.weight"])


def test_bf16_runs_on_cpu(values: dict[str, Any]) -> None:
    result, _ = finetune(values, amp="bf16", epochs=1)
    assert result.max_difference == 0.0


def test_original_checkpoint_with_another_classifier_is_taken(
    values: dict[str, Any], tmp_path: Path
) -> None:
    original = create_model(values["model"])
    torch.save(original.state_dict(), tmp_path / "a.pth")
    result, _ = finetune(values, checkpoint=str(tmp_path / "a.pth"), epochs=1, freeze_backbone=True)
    trained = nlsurgery.checkpoint.read_state_dict(result.model_file)
    assert torch.equal(
        trained["layer1.0.conv1.weight"], original.state_dict()["layer1.0.conv1.weight"]
    )


def not_an_image(root: Path) -> None:
    (root / "a" / "notes.txt").write_text("no image")


def truncated_header(root: Path) -> None:
    (root / "a" / "broken.png").write_bytes(b"\x89PNG\r\n")


def one_class(root: Path) -> None:
    for path in (root / "b").iterdir():
        path.unlink()
    (root / "b").rmdir()


def empty_class(root: Path) -> None:
    (root / "c").mkdir()


def uneven_halves(root: Path) -> None:
    (root / "train").mkdir()
    (root / "val").mkdir()
    (root / "a").rename(root / "train" / "a")
    (root / "b").rename(root / "val" / "b")
    for half, other in (("train", "x"), ("val", "y")):
        (root / half / other).mkdir()


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        pytest.param(not_an_image, r"notes\.txt is not an image", id="text"),
        pytest.param(truncated_header, r"broken\.png is not an image", id="broken"),
        pytest.param(one_class, "two at least", id="one-class"),
        pytest.param(empty_class, "c holds no file", id="empty-class"),
        pytest.param(uneven_halves, "same classes", id="uneven"),
    ],
)
def test_bad_data_is_one_error_before_anything_is_written(
    values: dict[str, Any], digits: Path, tmp_path: Path, damage: Any, word: str
) -> None:
    root = tmp_path / "data"
    for name, source in (("a", "digit0"), ("b", "digit1")):
        (root / name).mkdir(parents=True)
        for path in sorted((digits / source).iterdir())[:5]:
            (root / name / path.name).write_bytes(path.read_bytes())
    damage(root)
    with pytest.raises(DataError, match=word):
        finetune(values, data=str(root))
    assert not Path(values["work_dir"]).exists()


@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        pytest.param({"data": "/nowhere"}, DataError, "no such folder", id="no-data"),
        pytest.param(
            {"model": "timm/test_resnex"}, SurgeryError, "no model 'test_resnex'", id="model"
        ),
        pytest.param({"recipe": "res4_9blocks"}, RecipeError, "no recipe", id="recipe"),
        pytest.param({"recipe": "res4_5blocks"}, RecipeError, "inserts.*after 1", id="misfit"),
        pytest.param({"checkpoint": "/nowhere.pth"}, CheckpointError, "does not exist", id="ckpt"),
        pytest.param({"amp": "fp16"}, SurgeryError, "use --amp bf16", id="fp16-on-cpu"),
        pytest.param({"device": "cuda:99"}, SurgeryError, "--device cuda:99", id="device"),
    ],
)
def test_bad_choice_is_one_error_before_anything_is_written(
    values: dict[str, Any], changes: dict[str, Any], error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        finetune(values, **changes)
    assert not Path(values["work_dir"]).exists()


def test_checkpoint_of_another_model_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    torch.save(create_model("timm/mobilenetv3_small_050").state_dict(), tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match=r"b\.pth does not fit ResNet"):
        finetune(values, checkpoint=str(tmp_path / "b.pth"))
    assert not Path(values["work_dir"]).exists()


def test_value_out_of_range_is_named() -> None:
    with pytest.raises(SurgeryError, match="epochs"):
        FinetuneConfig.make(model="a", recipe="b", data="c", epochs=0)


def test_state_of_other_settings_or_cut_off_is_refused(
    finished: Any, values: dict[str, Any]
) -> None:
    done = finished[1].work_dir
    folder = Path(values["work_dir"])
    folder.mkdir()
    whole = (done / STATE_FILE).read_bytes()
    (folder / STATE_FILE).write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"lr = 0\.02, not 0\.5"):
        finetune(values, resume=True, lr=0.5)
    (folder / STATE_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cut off"):
        finetune(values, resume=True)
    assert [path.name for path in folder.iterdir()] == [STATE_FILE]
