import pytest
import torch
from torch import Tensor, nn

from nlsurgery.blocks.layout import Layout
from nlsurgery.blocks.non_local import NonLocal
from nlsurgery.blocks.self_attention import SelfAttention
from nlsurgery.errors import DataError
from nlsurgery.viz import capture
from nlsurgery.viz.capture import capture_attention, grid_points
from nlsurgery.viz.figure import strongest_keys

import nlsurgery


class Backbone(nn.Module):
    """Two stages of a plain network: (B, 8, H/2, W/2), then (B, 16, H/4, W/4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.stage = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(torch.relu(self.stem(x))).mean((2, 3)))


def operated(**options: object) -> nn.Module:
    torch.manual_seed(0)
    recipe = {
        "version": 1,
        "inserts": [{"stage": "stage", "block": {"type": "non_local", **options}}],
    }
    model = nlsurgery.apply(Backbone(), recipe, input_size=(3, 32, 48))
    for parameter in nlsurgery.inserted_parameters(model):
        parameter.data = 0.3 * torch.randn(parameter.shape)
    return model.eval()
