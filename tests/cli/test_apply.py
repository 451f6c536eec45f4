import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import nlsurgery

Run = Callable[..., int]
Shown = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A ResNet-18 for 7 classes with BatchNorm statistics of its own, and its file."""
    torch.manual_seed(3)
    model = timm.create_model("resnet18", num_classes=7)
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
    path = tmp_path_factory.mktemp("checkpoint") / "resnet18.pth"
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, path)
    return path, model.eval()


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_operated_file_computes_the_same_to_the_last_bit(
    checkpoint: tuple[Path, nn.Module], tmp_path: Path, run: Run, capsys: Shown
) -> None:
    path, original = checkpoint
    out = tmp_path / "new" / "operated.safetensors"
    words = ("apply", "resnet18", "res4_1block", "--checkpoint", path, "--out", out)
    assert run(*words) == 0
    assert "layer3.0.nlsurgery.0" in capsys.readouterr().out
    loaded = nlsurgery.load(timm.create_model("resnet18", num_classes=7), out).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), original(x), rtol=0, atol=0)
    state = loaded.state_dict()
    for key, value in original.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0)
    assert files_in(out.parent) == ["operated.safetensors"]


def test_json_is_the_report(
    checkpoint: tuple[Path, nn.Module], tmp_path: Path, run: Run, capsys: Shown
) -> None:
    out = tmp_path / "o.safetensors"
    words = ("apply", "resnet18", "selfattention_res4", "--checkpoint", checkpoint[0], "--out", out)
    assert run(*words, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    model = nlsurgery.load(timm.create_model("resnet18", num_classes=7), out)
    expected = json.loads(json.dumps(nlsurgery.report(model).to_dict()))
    assert shown == {"out": str(out), **expected}


def test_inserted_only_keeps_nothing_else(
    checkpoint: tuple[Path, nn.Module], tmp_path: Path, run: Run
) -> None:
    from safetensors import safe_open

    out = tmp_path / "o.safetensors"
    words = ("apply", "resnet18", "res4_1block", "--checkpoint", checkpoint[0], "--out", out)
    assert run(*words, "--inserted-only") == 0
    with safe_open(out, framework="pt") as file:
        keys = set(file.keys())
    assert keys
    assert all(key.startswith("layer3.0.nlsurgery.0.") for key in keys)


def test_classifier_size_is_the_checkpoint_s(
    checkpoint: tuple[Path, nn.Module], tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "o.safetensors"
    words = ("apply", "resnet18", "res4_1block", "--checkpoint", checkpoint[0], "--out", out)
    assert run(*words) == 0
    nlsurgery.load(timm.create_model("resnet18", num_classes=7), out)


def cut_file(folder: Path) -> Path:
    path = folder / "cut.pth"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    return path


def text_file(folder: Path) -> Path:
    path = folder / "text.safetensors"
    path.write_text("no checkpoint")
    return path


def other_model(folder: Path) -> Path:
    path = folder / "other.pth"
    torch.save(timm.create_model("resnet34").state_dict(), path)
    return path


def harmful_file(folder: Path) -> Path:
    path = folder / "harmful.pth"
    torch.save({"state_dict": Path("x"), "run": print}, path)
    return path


def missing_file(folder: Path) -> Path:
    return folder / "none.pth"


@pytest.mark.parametrize(
    "make", [cut_file, text_file, other_model, harmful_file, missing_file], ids=lambda f: f.__name__
)
def test_bad_checkpoint_leaves_nothing(
    make: Callable[[Path], Path], tmp_path: Path, run: Run, capsys: Shown
) -> None:
    path = make(tmp_path)
    before = files_in(tmp_path)
    words = ("apply", "resnet18", "res4_1block", "--checkpoint", path)
    assert run(*words, "--out", tmp_path / "out" / "o.safetensors") == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert str(path) in shown.err
    assert "Traceback" not in shown.err
    assert "unexpected" not in shown.err
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("link", [False, True], ids=["itself", "link"])
def test_input_is_never_overwritten(
    link: bool, checkpoint: tuple[Path, nn.Module], tmp_path: Path, run: Run, capsys: Shown
) -> None:
    path, _ = checkpoint
    before = path.read_bytes()
    out = path
    if link:
        out = tmp_path / "link.pth"
        out.symlink_to(path)
    words = ("apply", "resnet18", "res4_1block", "--checkpoint", path, "--out", out)
    assert run(*words, "--overwrite") == 1
    assert "is the input checkpoint" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_other_file_is_replaced_only_on_request(
    checkpoint: tuple[Path, nn.Module], tmp_path: Path, run: Run, capsys: Shown
) -> None:
    out = tmp_path / "o.safetensors"
    out.write_text("mine")
    words = ("apply", "resnet18", "res4_1block", "--checkpoint", checkpoint[0], "--out", out)
    assert run(*words) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert run(*words, "--overwrite") == 0
    nlsurgery.load(timm.create_model("resnet18", num_classes=7), out)


def test_failing_write_keeps_the_old_file(
    checkpoint: tuple[Path, nn.Module],
    tmp_path: Path,
    run: Run,
    capsys: Shown,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import nlsurgery.checkpoint

    def fill_disk(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nlsurgery.checkpoint, "save_file", fill_disk)
    out = tmp_path / "o.safetensors"
    out.write_text("old")
    words = ("apply", "resnet18", "res4_1block", "--checkpoint", checkpoint[0], "--out", out)
    assert run(*words, "--overwrite") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert out.read_text() == "old"
    assert files_in(tmp_path) == ["o.safetensors"]


@pytest.mark.parametrize(
    "extra", [(), ("--checkpoint", "a.pth", "--pretrained")], ids=["no", "two"]
)
def test_one_source_of_weights_is_asked_for(
    extra: tuple[str, ...], tmp_path: Path, run: Run, capsys: Shown
) -> None:
    out = tmp_path / "o.safetensors"
    assert run("apply", "resnet18", "res4_1block", "--out", out, *extra) == 2
    assert "--checkpoint" in capsys.readouterr().err
