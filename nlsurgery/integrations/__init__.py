"""Bridges to the libraries around: model hubs, the demo's packaged data, mmengine."""
