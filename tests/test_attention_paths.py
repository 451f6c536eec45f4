"""The comparison of attention paths: each path computes the same, and the table names the fastest."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.attention_paths import FORMS, attend, main, page  # noqa: E402


@pytest.mark.parametrize("path", [*FORMS, "math", "flash"])
def test_every_path_on_a_cpu_computes_the_same(path):
    q, k, v = (torch.randn(2, 40, 16, dtype=torch.float64) for _ in range(3))
    expected = torch.softmax(q @ k.transpose(1, 2), -1) @ v
    torch.testing.assert_close(attend(path, q, k, v), expected, rtol=1e-10, atol=1e-10)


def test_it_measures_resumes_and_writes_a_table(tmp_path, capsys):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "table.md"
    sizes = ["--heads", "8", "--positions", "20", "--dtypes", "float32", "--rounds", "1"]
    common = ["--device", "cpu", "--rows", str(rows)]
    main([*common, *sizes])
    (forward, training) = map(json.loads, rows.read_text().splitlines())
    assert set(forward["seconds"]) == set(training["seconds"]) == {*FORMS, "math", "flash"}
    capsys.readouterr()
    main([*common, *sizes, "--out", str(out)])
    assert capsys.readouterr().out == "", "what is measured is not measured again"
    assert "| 8 | 20 | 1 | float32 | training |" in out.read_text()


def test_the_table_marks_the_fastest_and_what_was_refused():
    case = {"head": 512, "positions": 9, "batch": 1, "dtype": "float16", "pass": "forward"}
    row = case | {"device": "cpu", "seconds": {"explicit": 2e-3, "math": 1e-3}}
    line = page([row | {"megabytes": {"explicit": 3.0}}]).splitlines()[-1]
    assert line.endswith("| 2 (3 MB) | – | – | **1** | – | – | – |")
