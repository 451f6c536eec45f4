"""Attention made visible: record it during a forward, draw it over the image."""
