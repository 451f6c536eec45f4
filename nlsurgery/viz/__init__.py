"""Attention made visible: record it during a forward, draw it over the image."""

from nlsurgery.viz.capture import capture_attention
from nlsurgery.viz.figure import attention_figure

__all__ = ["attention_figure", "capture_attention"]
