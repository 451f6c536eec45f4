"""Fixtures of the operators' tests: which processor they think they run on."""

from __future__ import annotations

import pytest

from nlsurgery.blocks import attend, products


@pytest.fixture
def mkl(monkeypatch):
    """A processor whose float32 and fused bfloat16 products are fastest by MKL."""
    monkeypatch.setattr(products, "is_onednn_faster", lambda: False)
    monkeypatch.setattr(products, "fuses_bfloat16", lambda: True)


@pytest.fixture
def onednn(monkeypatch):
    """A processor whose float32 and bfloat16 products are fastest by oneDNN."""
    monkeypatch.setattr(products, "is_onednn_faster", lambda: True)
    monkeypatch.setattr(products, "fuses_bfloat16", lambda: False)


@pytest.fixture(params=["few positions", "any number"])
def positions(request, monkeypatch):
    """Small inputs as such, and as if they were of a size for which the general functions are called."""
    if request.param == "any number":
        monkeypatch.setattr(attend, "FEW_LOGITS", -1)
        monkeypatch.setattr(attend, "FEW_QUERIES", -1)
