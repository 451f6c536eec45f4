"""Reading recipes: what is accepted, and one clear error for what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

import nlsurgery
from nlsurgery.errors import RecipeError
from nlsurgery.recipe import list_recipes, load_recipe

ENTRY = {"stage": "res4", "block": {"type": "non_local"}}


@pytest.mark.parametrize("name", list_recipes())
def test_packaged_recipe_is_valid_and_says_where_it_comes_from(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.source
    assert recipe.inserts


@pytest.mark.parametrize(
    "spelling", ["res4_5blocks", "res4_5blocks.yaml", "recipes/res4_5blocks.yaml"]
)
def test_packaged_recipe_is_found_from_any_folder(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(spelling).name == "res4_5blocks"


def test_a_file_of_that_name_wins_over_the_packaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "res4_5blocks.yaml").write_text(
        "version: 1\nsource: mine\ninserts: [{stage: res2, block: {type: self_attention}}]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipes/res4_5blocks.yaml").source == "mine"


def test_a_recipe_survives_the_way_to_plain_data_and_back() -> None:
    recipe = load_recipe("res4_5blocks")
    again = load_recipe(recipe.to_mapping())
    assert again.inserts == recipe.inserts
    assert again.source == recipe.source


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        pytest.param({"inserts": [ENTRY]}, ["version", "missing"], id="no-version"),
        pytest.param({"version": 2, "inserts": [ENTRY]}, ["version", "1", "2"], id="version-2"),
        pytest.param({"version": 1, "inserts": []}, ["inserts", "at least 1"], id="no-inserts"),
        pytest.param({"version": 1}, ["inserts", "missing"], id="inserts-missing"),
        pytest.param(
            {"version": 1, "insert": [ENTRY]},
            ["insert ", "did you mean 'inserts'"],
            id="misspelt-top",
        ),
        pytest.param(
            {"version": 1, "inserts": [{**ENTRY, "aftr": "all"}]},
            ["inserts[0].aftr", "did you mean 'after'"],
            id="misspelt-entry",
        ),
        pytest.param(
            {"version": 1, "inserts": [ENTRY, {**ENTRY, "after": "first"}]},
            ["inserts[1].after", "before_last", "'first'"],
            id="after",
        ),
        pytest.param(
            {"version": 1, "inserts": [{**ENTRY, "after": {"every": 0}}]},
            ["inserts[0].after", "every"],
            id="every-zero",
        ),
        pytest.param(
            {"version": 1, "inserts": [{"stage": "res4", "block": {"type": "nonlocal"}}]},
            ["inserts[0].block.type", "did you mean 'non_local'"],
            id="type",
        ),
        pytest.param(
            {"version": 1, "inserts": [{"stage": "res4", "block": {}}]},
            ["inserts[0].block.type", "missing"],
            id="no-type",
        ),
        pytest.param(
            {
                "version": 1,
                "inserts": [{"stage": "res4", "block": {"type": "non_local", "mod": 1}}],
            },
            ["inserts[0].block", "mod", "did you mean 'mode'"],
            id="option",
        ),
        pytest.param(
            {
                "version": 1,
                "inserts": [{"stage": "res4", "block": {"type": "non_local", "mode": "x"}}],
            },
            ["inserts[0].block", "mode", "embedded_gaussian", "'x'"],
            id="option-value",
        ),
    ],
)
def test_error_names_the_place_and_what_is_allowed(
    mapping: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(mapping)
    for word in words:
        assert word in str(caught.value)


def bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 12):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(bomb(), ["aliases expand"], id="bomb"),
        pytest.param("&a [*a]", ["refers to itself"], id="self-alias"),
        pytest.param(
            "!!python/object/apply:os.system ['true']", ["not safe YAML"], id="python-tag"
        ),
        pytest.param("version: 1\nversion: 1\n", ["'version'", "twice", "line 2"], id="twice"),
        pytest.param("version: [", ["not safe YAML"], id="syntax"),
        pytest.param("", ["must hold a mapping", "nothing"], id="empty"),
        pytest.param("- 1\n", ["must hold a mapping", "list"], id="list"),
        pytest.param("[" * 5000, ["nested too deeply"], id="deep"),
    ],
)
def test_bad_file_is_one_error_that_names_it(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    for word in ["bad.yaml", *words]:
        assert word in str(caught.value)


def test_binary_file_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "image.yaml"
    path.write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(RecipeError, match="no UTF-8 text"):
        load_recipe(path)


def test_unknown_name_offers_close_ones() -> None:
    with pytest.raises(RecipeError, match="did you mean 'res4_5blocks'"):
        load_recipe("res4_5block")


def test_public_names_are_all_there() -> None:
    for name in nlsurgery.__all__:
        assert getattr(nlsurgery, name) is not None, name
