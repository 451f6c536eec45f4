"""The benchmark at random shapes: a seed names them, and lines are resumed and counted as they should be."""

from __future__ import annotations

import json
import math
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.peers import ArticleBlock, prepared  # noqa: E402
from benchmarks.random_shapes import MODES, cases, main, page, ratio  # noqa: E402


def test_a_seed_names_the_shapes_and_all_options_are_drawn():
    drawn = list(cases(3, 200, list(MODES), (30, 2500)))
    assert drawn == list(cases(3, 200, list(MODES), (30, 2500)))
    assert drawn != list(cases(4, 200, list(MODES), (30, 2500)))
    assert {case["mode"] for case in drawn} == set(MODES)
    assert {len(case["shape"]) for case in drawn} == {3, 4, 5}
    for option in ("sub_sample", "use_scale", "channels_last"):
        assert {case[option] for case in drawn} == {True, False}


@pytest.mark.parametrize(
    ("mode", "dims", "sub_sample"), list(product(MODES, (1, 2, 3), (False, True)))
)
def test_the_plain_rewrite_and_ours_compute_the_same(mode, dims, sub_sample):
    shape = (2, 8, *(6, 4, 4)[:dims])
    scaled = mode == "embedded_gaussian"
    options = (shape, mode, "float64", False, "cpu", sub_sample, scaled)
    (plain, x), (block, _) = prepared("article", *options), prepared("nlsurgery", *options)
    assert isinstance(plain, ArticleBlock)
    block.load_state_dict(
        {
            key.replace("out.0.", "out.").replace("out.1.", "bn."): value
            for key, value in plain.state_dict().items()
        }
    )
    torch.testing.assert_close(block(x), plain(x), rtol=1e-10, atol=1e-10)


def test_it_measures_and_resumes(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    options = ["--count", "1", "--positions", "4", "9", "--dtypes", "float32", "--rows", str(rows)]
    main(options)
    (forward, training) = map(json.loads, rows.read_text().splitlines())
    assert forward["shape"] == training["shape"]
    assert {forward["pass"], training["pass"]} == {"forward", "training"}
    capsys.readouterr()
    main(options)
    assert capsys.readouterr().out == "", "what is measured is not measured again"


def test_a_second_figure_is_shown_and_not_counted():
    case = {"shape": [1, 8, 3], "mode": "gaussian", "sub_sample": True, "use_scale": False}
    case |= {"seed": 7, "channels_last": False, "dtype": "float32", "pass": "forward", "threads": 1}
    slow = case | {"seconds": {"nlsurgery": 2.0, "article": 1.0, "mmcv-lite": 3.0}}
    fast = case | {"shape": [1, 8, 4], "seconds": {"nlsurgery": 1.0, "article": 2.0}}
    again = case | {"again": True, "seconds": {"nlsurgery": 1.0, "article": 0.9}}
    alone = case | {"shape": [1, 8, 5], "seconds": {"nlsurgery": 1.0}}
    assert ratio(slow) == 0.5
    assert ratio(alone) is None
    lines = page([slow, fast, again, alone]).splitlines()
    assert any("--seed 7`" in line for line in lines)
    assert "| float32 | forward | softmax | 1 | 2 | 0.50 | 0.50 | 0.50 | 1.25 | 1 |" in lines
    assert (
        lines[-1]
        == "| 1×8×3 | gaussian | yes |  |  | float32 | forward | 1 | 2e+03 | 0.50 | 0.90 |"
    )
    assert math.isclose(ratio(again), 0.9)
