import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import nlsurgery

Run = Callable[..., int]
Shown = pytest.CaptureFixture[str]

SIZE = ("--input-size", 64, 64)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A real photo, 451 by 300 pixels."""
    from skimage import data

    path = tmp_path / "cat.png"
    Image.fromarray(data.chelsea()).save(path)
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet18").state_dict(), path)
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_each_block_of_a_plain_checkpoint_and_a_recipe_is_drawn(
    photo: Path, plain: Path, tmp_path: Path, run: Run, capsys: Shown
) -> None:
    out = tmp_path / "pictures"
    words = ("attend", "resnet18", photo, "--recipe", "res4_1block", "--checkpoint", plain)
    assert run(*words, "--point", "220,150", "--out", out, *SIZE) == 0
    assert names_in(out) == ["cat-layer3.0.nlsurgery.0.png"]
    shown = capsys.readouterr()
    assert shown.out.strip() == str(out / "cat-layer3.0.nlsurgery.0.png")
    assert shown.err == ""
    with Image.open(out / "cat-layer3.0.nlsurgery.0.png") as picture:
        assert picture.width > 700


def test_saved_file_needs_no_recipe(photo: Path, tmp_path: Path, run: Run, capsys: Shown) -> None:
    saved = tmp_path / "saved.safetensors"
    model = nlsurgery.apply(timm.create_model("resnet18", num_classes=3), "selfattention_res4")
    nlsurgery.save(model, saved)
    out = tmp_path / "pictures"
    words = ("attend", "resnet18", photo, "--checkpoint", saved)
    assert run(*words, "--grid", 3, "--out", out, *SIZE, "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert len(result["points"]) == 9
    assert result["pictures"] == [str(out / "cat-layer3.0.nlsurgery.0.png")]
    assert result["skipped"] == {}


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that attend reads, of a model with 3 classes and its own input size."""
    from nlsurgery.finetune.checkpoints import MODEL_FILE
    from nlsurgery.finetune.config import FinetuneConfig

    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    config = FinetuneConfig.make(model="resnet18", recipe="res4_1block", data="x", image_size=96)
    config.write(folder)
    model = timm.create_model("resnet18", num_classes=3)
    nlsurgery.apply(model, config.recipe, input_size=(3, 96, 96))
    nlsurgery.save(model, folder / MODEL_FILE)
    return folder


def test_work_dir_needs_no_more_options(
    work_dir: Path, photo: Path, tmp_path: Path, run: Run, capsys: Shown
) -> None:
    out = tmp_path / "pictures"
    assert run("attend", work_dir, photo, "--out", out) == 0
    shown = capsys.readouterr()
    assert names_in(out) == ["cat-layer3.0.nlsurgery.0.png"]
    assert shown.err == ""


def test_work_dir_s_image_size_is_used(
    work_dir: Path, photo: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nlsurgery.viz import capture

    seen: list[tuple[int, ...]] = []
    original = capture.capture_attention

    def spy(model: torch.nn.Module, image: torch.Tensor, points: object) -> object:
        seen.append(tuple(image.shape))
        return original(model, image, points)  # type: ignore[arg-type]

    monkeypatch.setattr(capture, "capture_attention", spy)
    out = tmp_path / "pictures"
    assert run("attend", work_dir, photo, "--out", out) == 0
    assert run("attend", work_dir, photo, "--out", out, *SIZE) == 0
    assert seen == [(1, 3, 96, 96), (1, 3, 64, 64)]


def test_work_dir_excludes_a_recipe(work_dir: Path, photo: Path, run: Run, capsys: Shown) -> None:
    assert run("attend", work_dir, photo, "--recipe", "res4_1block") == 2
    assert "work dir" in capsys.readouterr().err


def test_folder_named_like_a_model_is_no_work_dir(
    photo: Path, plain: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    words = ("attend", "resnet18", photo, "--recipe", "res4_1block", "--checkpoint", plain)
    assert run(*words, "--out", "pictures", *SIZE) == 0


def test_random_weights_are_warned_of(photo: Path, tmp_path: Path, run: Run, capsys: Shown) -> None:
    words = ("attend", "resnet18", photo, "--recipe", "res4_1block", "--out", tmp_path / "out")
    assert run(*words, *SIZE) == 0
    assert "weights are random" in capsys.readouterr().err


def test_images_of_one_name_do_not_overwrite_each_other(
    photo: Path, plain: Path, tmp_path: Path, run: Run
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (80, 80)).save(other / "cat.png")
    out = tmp_path / "pictures"
    words = ("attend", "resnet18", photo, other / "cat.png", "--recipe", "res4_1block")
    assert run(*words, "--checkpoint", plain, "--out", out, *SIZE) == 0
    block = "layer3.0.nlsurgery.0"
    assert names_in(out) == [f"0-cat-{block}.png", f"1-cat-{block}.png"]


@pytest.mark.parametrize("point", ["1", "a,b", "-1,2", "1,2,3", "0,0,0,0", "nan,1", "inf,1"])
def test_bad_point_is_a_usage_error(point: str, photo: Path, run: Run, capsys: Shown) -> None:
    assert run("attend", "resnet18", photo, "--recipe", "res4_1block", f"--point={point}") == 2
    assert "must be x,y" in capsys.readouterr().err


def test_points_and_grid_exclude_each_other(photo: Path, run: Run, capsys: Shown) -> None:
    assert run("attend", "resnet18", photo, "--point", "0.5,0.5", "--grid", 2) == 2
    assert "not both" in capsys.readouterr().err


def video(folder: Path) -> Path:
    import av
    import numpy as np

    path = folder / "walk.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for step in range(12):
            pixels = np.full((64, 64, 3), 20 * step, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def test_clips_are_drawn_frame_by_frame(tmp_path: Path, run: Run, capsys: Shown) -> None:
    out = tmp_path / "pictures"
    words = ("attend", "torchvision/r3d_18", video(tmp_path), "--recipe", "res4_1block")
    size = ("--input-size", "3x8x48x64", "--point", "0.5,0.5,0.9")
    assert run(*words, *size, "--out", out, "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["points"] == [[0.5, 0.5, 0.9]]
    with Image.open(out / "walk-layer3.0.nlsurgery.0.png") as picture:
        # Two keys in time: two frames side by side.
        assert 2 < picture.width / picture.height < 3


def text_image(folder: Path) -> tuple[object, ...]:
    (folder / "text.png").write_text("no image")
    return "resnet18", folder / "text.png", "--recipe", "res4_1block"


def missing_image(folder: Path) -> tuple[object, ...]:
    return "resnet18", folder / "none.png", "--recipe", "res4_1block"


def no_recipe(folder: Path) -> tuple[object, ...]:
    return "resnet18", folder / "cat.png"


def far_point(folder: Path) -> tuple[object, ...]:
    return "resnet18", folder / "cat.png", "--recipe", "res4_1block", "--point", "2000,10"


def video_model(folder: Path) -> tuple[object, ...]:
    return "torchvision/r3d_18", folder / "cat.png", "--recipe", "res4_1block"


def video_for_images(folder: Path) -> tuple[object, ...]:
    return "resnet18", video(folder), "--recipe", "res4_1block"


def broken_video(folder: Path) -> tuple[object, ...]:
    (folder / "text.mp4").write_text("no video")
    return "torchvision/r3d_18", folder / "text.mp4", "--recipe", "res4_1block"


def no_work_dir(folder: Path) -> tuple[object, ...]:
    (folder / "empty").mkdir()
    return folder / "empty", folder / "cat.png"


def unsaved_run(folder: Path) -> tuple[object, ...]:
    from nlsurgery.finetune.config import FinetuneConfig

    config = FinetuneConfig.make(model="resnet18", recipe="res4_1block", data="x")
    (folder / "started").mkdir()
    config.write(folder / "started")
    return folder / "started", folder / "cat.png"


def inserted_alone(folder: Path) -> tuple[object, ...]:
    saved = folder / "alone.safetensors"
    model = nlsurgery.apply(timm.create_model("resnet18"), "res4_1block")
    nlsurgery.save(model, saved, inserted_only=True)
    return "resnet18", folder / "cat.png", "--checkpoint", saved


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (text_image, "text.png: cannot be read as an image"),
        (missing_image, "none.png: no such image file"),
        (no_recipe, "no inserted blocks to look at: give --recipe"),
        (far_point, "outside the part of the image"),
        (video_model, "takes video clips; give a video"),
        (video_for_images, "takes images, no videos"),
        (broken_video, "text.mp4 is no readable video"),
        (no_work_dir, "config.yaml is no readable run configuration"),
        (unsaved_run, "has saved no model yet"),
        (inserted_alone, "holds the inserted blocks alone"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_request_is_one_error_and_leaves_nothing(
    words: Callable[[Path], tuple[object, ...]],
    message: str,
    photo: Path,
    run: Run,
    capsys: Shown,
) -> None:
    given = words(photo.parent)
    out = photo.parent / "pictures"
    assert run("attend", *given, "--out", out) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert "unexpected" not in shown.err
    assert not out.exists()
