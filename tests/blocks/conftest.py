"""Fixtures of the operators' tests: which processor they think they run on."""

from __future__ import annotations

import pytest

from nlsurgery.blocks import attend, few, products


@pytest.fixture
def mkl(monkeypatch):
    """A processor whose float32 and fused bfloat16 products are fastest by MKL."""
    monkeypatch.setattr(products, "is_onednn_faster", lambda: False)
    monkeypatch.setattr(products, "fuses_bfloat16", lambda: True)


@pytest.fixture
def onednn(monkeypatch):
    """A processor whose float32 and bfloat16 products are fastest by oneDNN."""
    monkeypatch.setattr(products, "is_onednn_faster", lambda: True)
    monkeypatch.setattr(products, "is_wide", lambda: True)
    monkeypatch.setattr(products, "fuses_bfloat16", lambda: False)


@pytest.fixture
def level(onednn, monkeypatch):
    """A processor whose bfloat16 products are fastest by oneDNN, and float32 ones as fast by MKL."""
    monkeypatch.setattr(products, "is_wide", lambda: False)


@pytest.fixture(params=["few values", "few positions", "any number"])
def positions(request, monkeypatch):
    """Small inputs as such, and as if they were of sizes for which less special functions are called."""
    if request.param != "few values":
        monkeypatch.setattr(few, "FEW_VALUES", 0)
    if request.param == "any number":
        monkeypatch.setattr(attend, "FEW_LOGITS", -1)
        monkeypatch.setattr(attend, "FEW_LOGITS_HALF", -1)
        monkeypatch.setattr(attend, "FEW_QUERIES", -1)
