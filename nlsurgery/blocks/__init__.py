"""The operators: every block maps (B, C, *spatial) to the same shape and is the identity at init.

Importing this package registers every block type.
"""

from importlib import import_module
from pkgutil import iter_modules

from nlsurgery.blocks.channel_attention import (
    ConvolutionalAttention,
    EfficientChannelAttention,
    SqueezeExcitation,
)
from nlsurgery.blocks.choose import choose_implementation
from nlsurgery.blocks.compact_generalized import CompactGeneralizedNonLocal
from nlsurgery.blocks.criss_cross import CrissCross
from nlsurgery.blocks.disentangled import DisentangledNonLocal
from nlsurgery.blocks.dual_attention import ChannelAttention, DualAttention
from nlsurgery.blocks.expectation_maximisation import ExpectationMaximisation
from nlsurgery.blocks.foreign import GammaBlend, build_foreign, import_foreign
from nlsurgery.blocks.generalized import GeneralizedAttention
from nlsurgery.blocks.global_context import GlobalContextAdd, GlobalContextMul
from nlsurgery.blocks.layout import Layout, from_channels_first, to_channels_first
from nlsurgery.blocks.linear_attention import DoubleAttention, EfficientAttention
from nlsurgery.blocks.multi_head import HardNonLocal, MultiHeadNonLocal
from nlsurgery.blocks.non_local import NonLocal
from nlsurgery.blocks.pyramid import AsymmetricNonLocal
from nlsurgery.blocks.registration import BLOCK_TYPES, BlockType, block_type, register
from nlsurgery.blocks.self_attention import SelfAttention

__all__ = [
    "BLOCK_TYPES",
    "AsymmetricNonLocal",
    "BlockType",
    "ChannelAttention",
    "CompactGeneralizedNonLocal",
    "ConvolutionalAttention",
    "CrissCross",
    "DisentangledNonLocal",
    "DoubleAttention",
    "DualAttention",
    "EfficientAttention",
    "EfficientChannelAttention",
    "ExpectationMaximisation",
    "GammaBlend",
    "GeneralizedAttention",
    "GlobalContextAdd",
    "GlobalContextMul",
    "HardNonLocal",
    "Layout",
    "MultiHeadNonLocal",
    "NonLocal",
    "SelfAttention",
    "SqueezeExcitation",
    "block_type",
    "build_foreign",
    "choose_implementation",
    "from_channels_first",
    "import_foreign",
    "register",
    "to_channels_first",
]

# Every file here registers what is in it, those above or not.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
