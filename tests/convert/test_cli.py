"""``nlsurgery convert``: files in, files out, and everything that can be wrong with them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import typer
from safetensors.torch import load_file

import nlsurgery
from nlsurgery.checkpoint import read_state_dict
from nlsurgery.cli.command import join_sizes, reporting_errors
from nlsurgery.cli.convert import convert
from nlsurgery.convert.files import read_foreign
from tests.convert import peers
from tests.models import trained_looking

Run = Callable[..., int]
Shown = pytest.CaptureFixture[str]
NETWORK = "resnet10t"


@pytest.fixture
def run() -> Run:
    """Run the command with some words; returns the exit code."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(reporting_errors(convert))

    def call(*args: object) -> int:
        with pytest.raises(SystemExit) as ended:
            app(args=join_sizes([str(arg) for arg in args]))
        return int(ended.value.code or 0)

    return call


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """A trained-looking timm ResNet with a NonLocalAttn in every block."""
    torch.manual_seed(1)
    model = timm.create_model(NETWORK, num_classes=7, block_args={"attn_layer": "nl"})
    return trained_looking(model).double().eval()


@pytest.fixture
def checkpoint(network: torch.nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "in.pth"
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, path)
    return path


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.double().eval()(peers.numbers(1, 3, 64, 64, scale=1.0))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    entries = "".join(
        f"  - {{stage: layer{n}, after: 0, at: bn2, block: {{type: non_local, reduction: 8}}}}\n"
        for n in (1, 2, 3, 4)
    )
    path.write_text(f"version: 1\ninserts:\n{entries}", encoding="utf-8")
    return path


@pytest.mark.parametrize("given", [False, True], ids=["own places", "recipe"])
def test_into_a_model(
    given: bool, network: torch.nn.Module, checkpoint: Path, recipe: Path, tmp_path: Path, run: Run,
    capsys: Shown,
) -> None:  # fmt: skip
    out = tmp_path / "new" / "out.safetensors"
    extra = ("--recipe", recipe) if given else ()
    assert run(checkpoint, "--model", f"timm/{NETWORK}", *extra, "--out", out) == 0
    shown = capsys.readouterr().out
    assert "layer3.0.bn2.nlsurgery.0" in shown
    assert "timm -> nlsurgery: 4 blocks" in shown
    assert ", 0 left" in shown
    loaded = nlsurgery.load(timm.create_model(NETWORK, num_classes=7).double(), out)
    torch.testing.assert_close(outputs(loaded), outputs(network), rtol=1e-5, atol=1e-5)
    assert files_in(out.parent) == ["out.safetensors"]


def test_json_says_the_same(checkpoint: Path, tmp_path: Path, run: Run, capsys: Shown) -> None:
    out = tmp_path / "out.safetensors"
    assert run(checkpoint, "--from", "timm", "--out", out, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["source"] == "timm"
    assert len(shown["blocks"]) == 4
    keys = set(load_file(out))
    assert keys == {*shown["taken"], *(new for _, new in shown["renamed"]), *shown["added"]}
    model = timm.create_model(NETWORK, num_classes=7)
    nlsurgery.apply(model, shown["recipe"], input_size=(3, 64, 64))
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize("with_model", [True, False], ids=["model", "recipe in the file"])
def test_there_and_back(
    with_model: bool, network: torch.nn.Module, checkpoint: Path, tmp_path: Path, run: Run
) -> None:
    saved, back = tmp_path / "saved.safetensors", tmp_path / "back.pth"
    assert run(checkpoint, "--model", NETWORK, "--out", saved) == 0
    extra = ("--model", NETWORK) if with_model else ()
    assert run(saved, "--to", "timm", *extra, "--out", back) == 0
    state = read_state_dict(back)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(state[key].double(), value.double(), rtol=1e-5, atol=1e-6)


def test_blocks_with_different_options_need_the_model(
    tmp_path: Path, run: Run, capsys: Shown
) -> None:
    model = timm.create_model(NETWORK, num_classes=7)
    inserts = [
        {"stage": f"layer{n}", "block": {"type": "non_local", "mode": mode}}
        for n, mode in ((2, "embedded_gaussian"), (3, "dot_product"))
    ]
    nlsurgery.apply(model, {"version": 1, "inserts": inserts}, input_size=(3, 64, 64))
    saved = nlsurgery.save(model, tmp_path / "saved.safetensors")
    words = (saved, "--to", "mmaction2", "--out", tmp_path / "out.pth")
    assert run(*words) == 1
    assert "name its model with --model" in capsys.readouterr().err
    assert run(*words, "--model", NETWORK, "--json") == 0
    modes = [block["options"]["mode"] for block in json.loads(capsys.readouterr().out)["blocks"]]
    assert modes == ["embedded_gaussian", "dot_product"]


def test_caffe2_pickle_both_ways(tmp_path: Path, run: Run) -> None:
    blobs = {
        f"nonlocal_conv3_1_{k}": v.numpy() for k, v in peers.caffe2_state(8, 4, bn="bn").items()
    }
    blobs["lr"] = blobs["nonlocal_conv3_1_bn_s"][0]
    path, out, back = tmp_path / "in.pkl", tmp_path / "out.pth", tmp_path / "back.pkl"
    with path.open("wb") as file:
        pickle.dump({"blobs": blobs}, file, 2)
    assert run(path, "--out", out) == 0
    assert "layer2.1.nlsurgery.0.bn.running_var" in read_state_dict(out)
    words = ("--from", "nlsurgery", "--to", "caffe2", "--sub-sample", "--pool-order", "before_conv")
    assert run(out, *words, "--scale", "--out", back) == 0
    again = read_foreign(back)
    assert set(again) == set(blobs) - {"lr"}
    for key, value in again.items():
        torch.testing.assert_close(value, torch.from_numpy(blobs[key]), rtol=0, atol=0)


def test_pool_of_slowfast(tmp_path: Path, run: Run, capsys: Shown) -> None:
    path, back = tmp_path / "in.pth", tmp_path / "back.pth"
    block = peers.slowfast_state(8, 4, bn=True)
    torch.save({"model_state": {f"s4.pathway0_nonlocal6.{k}": v for k, v in block.items()}}, path)
    words = (path, "--mode", "dot_product", "--pool", 2, 2, 2)
    assert run(*words, "--no-sub-sample", "--out", tmp_path / "out.pth") == 2
    assert "not both" in capsys.readouterr().err
    assert run(*words, "--json", "--out", tmp_path / "out.pth") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["blocks"][0]["options"]["sub_sample"] == [2, 2, 2]
    assert shown["recipe"]["inserts"][0]["block"]["sub_sample"] == [2, 2, 2]
    assert not any("sub_sample" in note for note in shown["notes"])
    words = (*words[1:], "--from", "nlsurgery", "--to", "slowfast", "--pool-order", "before_conv")
    assert run(tmp_path / "out.pth", *words, "--json", "--out", back) == 0
    assert json.loads(capsys.readouterr().out)["blocks"][0]["options"]["pool_size"] == [2, 2, 2]
    again = {k.removeprefix("s4.pathway0_nonlocal6."): v for k, v in read_foreign(back).items()}
    for key, value in block.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=0)


def test_pickle_that_runs_code_is_refused(tmp_path: Path, run: Run, capsys: Shown) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "harm",))

    path = tmp_path / "in.pkl"
    with path.open("wb") as file:
        pickle.dump({"blobs": {"x_w": Harmful()}}, file, 2)
    assert run(path, "--out", tmp_path / "out.pth") == 1
    assert "is no pickle of arrays" in capsys.readouterr().err
    assert files_in(tmp_path) == ["in.pkl"]


def test_place(tmp_path: Path, run: Run, capsys: Shown) -> None:
    """A block whose prefix tells no place gets one from the command line."""
    model = trained_looking(timm.create_model(NETWORK, num_classes=7)).double()
    block = peers.alexhex7_state(128, 64, 2, "dot_product", sub_sample=True, bn=True)
    state = {**model.state_dict(), **{f"attend.{key}": value for key, value in block.items()}}
    path, out = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save(state, path)
    words = (path, "--model", NETWORK, "--mode", "dot_product", "--out", out)
    assert run(*words) == 1
    assert "--place attend=MODULE" in capsys.readouterr().err
    assert not out.exists()
    assert run(*words, "--place", "attend=layer2.0") == 0
    loaded = nlsurgery.load(timm.create_model(NETWORK, num_classes=7).double(), out)
    model.get_submodule("layer2.0").register_forward_hook(
        lambda module, args, y: peers.alexhex7(block, y, "dot_product")
    )
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--from", "tim"), "did you mean 'timm'"),
        (("--from", "slowfast"), "no block of the layout slowfast"),
        (("--to", "timm"), "in the layout timm already"),
        (("--model", "resnet18"), "does not fit ResNet"),
        (("--model", NETWORK, "--recipe", "res3_res4_10blocks"), "where the recipe puts none"),
        (("--mode", "dot_product"), "mode='dot_product' was asked for"),
        (("--place", "x=y"), "--place x: no such block"),
        (("--to", "mmcv", "--model", NETWORK), "--model goes with"),
    ],
    ids=["layout", "other layout", "same", "model", "recipe", "mode", "place", "model unused"],
)
def test_one_clear_error(
    words: tuple[str, ...], message: str, checkpoint: Path, tmp_path: Path, run: Run, capsys: Shown
) -> None:
    before = files_in(tmp_path)
    assert run(checkpoint, *words, "--out", tmp_path / "out.pth") == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert "unexpected" not in shown.err
    assert files_in(tmp_path) == before


def test_checkpoint_without_a_classifier(
    network: torch.nn.Module, tmp_path: Path, run: Run, capsys: Shown
) -> None:
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    path, out = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save(state, path)
    words = (path, "--model", f"timm/{NETWORK}", "--out", out)
    assert run(*words) == 1
    assert "--num-classes 0" in capsys.readouterr().err
    assert run(*words, "--num-classes", 0) == 0
    loaded = nlsurgery.load(timm.create_model(NETWORK, num_classes=0).double(), out)
    with torch.no_grad():
        features = network.forward_head(
            network.forward_features(peers.numbers(1, 3, 64, 64, scale=1.0)), pre_logits=True
        )
    torch.testing.assert_close(outputs(loaded), features, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("suffix", [".txt", ".pkl"])
def test_suffix_of_the_result(
    suffix: str, checkpoint: Path, tmp_path: Path, run: Run, capsys: Shown
) -> None:
    assert run(checkpoint, "--out", tmp_path / f"out{suffix}") == 1
    assert f"out{suffix}" in capsys.readouterr().err
    assert files_in(tmp_path) == ["in.pth"]


def test_input_is_kept_and_output_not_replaced(
    checkpoint: Path, tmp_path: Path, run: Run, capsys: Shown
) -> None:
    before = checkpoint.read_bytes()
    assert run(checkpoint, "--out", checkpoint, "--overwrite") == 1
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    assert run(checkpoint, "--out", out) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert run(checkpoint, "--out", out, "--overwrite") == 0
    assert load_file(out)
    assert checkpoint.read_bytes() == before


def test_recipe_needs_a_model(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    assert run(checkpoint, "--recipe", "res4_1block", "--out", tmp_path / "o.pth") == 2
