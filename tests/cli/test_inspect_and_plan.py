import json
from collections.abc import Callable

import pytest
import timm

import nlsurgery

Run = Callable[..., int]


def test_inspect_shows_every_stage_under_its_names(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", "timm/resnet18", "--input-size", 64, 96) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if "layer" in line]
    assert [row[0] for row in rows] == ["stage1", "stage2", "stage3", "stage4"]
    assert "res4," in rows[2]
    assert "4x6" in rows[2]
    assert "256" in rows[2]


def test_inspect_json_is_the_anatomy(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "resnet18", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    expected = nlsurgery.inspect(timm.create_model("resnet18")).to_dict()
    assert shown == json.loads(json.dumps(expected))
    assert [stage["num_chs"] for stage in shown["stages"]] == [64, 128, 256, 512]


def test_plan_json_is_the_plan(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "resnet18", "res4_1block", "--input-size", "3", "64", "64", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    model = timm.create_model("resnet18")
    expected = nlsurgery.plan(model, "res4_1block", input_size=(3, 64, 64)).to_dict()
    assert shown == json.loads(json.dumps(expected))
    assert shown["input_size"] == [3, 64, 64]


def test_plan_table_has_each_block_and_the_total(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", "torchvision/resnet50", "res4_5blocks") == 0
    lines = capsys.readouterr().out.splitlines()
    places = [line.split()[0] for line in lines if ".nlsurgery." in line]
    hosts = ("layer2.1", "layer2.3", "layer3.1", "layer3.3", "layer3.5")
    assert places == [f"{host}.nlsurgery.0" for host in hosts]
    # C = 512, C' = 256: θ, φ, g: 3(512·256 + 256), out: 256·512 + 512, BN: 2·512.
    assert all("526,592" in line for line in lines if "layer2." in line)
    (total,) = [line for line in lines if line.strip().startswith("total (5)")]
    assert f"{2 * 526_592 + 3 * 2_101_760:,}" in total


def test_plan_of_a_video_model_takes_frames(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "torchvision/r3d_18", "res4_1block", "--input-size", 3, 8, 64, 64, "--json")
    assert run(*words) == 0
    (row,) = json.loads(capsys.readouterr().out)["insertions"]
    assert row["feature_size"] == [2, 8, 8]
    assert row["layout"] == "NCTHW"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("res4_5block", "did you mean 'res4_5blocks'"),
        ("res3_res4_10blocks", None),
    ],
    ids=["misspelt", "good"],
)
def test_plan_refuses_an_unknown_recipe(
    recipe: str, message: str | None, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run("plan", "resnet50", recipe)
    shown = capsys.readouterr()
    if message is None:
        assert (code, shown.err) == (0, "")
    else:
        assert (code, shown.out) == (1, "")
        assert message in shown.err


def test_recipes_lists_each_with_its_source(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes") == 0
    shown = capsys.readouterr().out
    for name in nlsurgery.list_recipes():
        source = nlsurgery.load_recipe(name).source
        assert name in shown.splitlines()
        assert source
        assert source in shown
    assert "res3 after 1, 3; res4 after 1, 3, 5" in shown


def test_recipes_json_can_be_read_back(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [item.pop("name") for item in shown] == list(nlsurgery.list_recipes())
    for item, name in zip(shown, nlsurgery.list_recipes(), strict=True):
        assert nlsurgery.load_recipe(item).inserts == nlsurgery.load_recipe(name).inserts
