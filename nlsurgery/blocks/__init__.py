"""The operators: every block maps (B, C, *spatial) to the same shape and is the identity at init.

Importing this package registers every block type.
"""

from nlsurgery.blocks.layout import Layout, from_channels_first, to_channels_first
from nlsurgery.blocks.non_local import NonLocal
from nlsurgery.blocks.registration import BLOCK_TYPES, BlockType, block_type, register
from nlsurgery.blocks.self_attention import SelfAttention

__all__ = [
    "BLOCK_TYPES",
    "BlockType",
    "Layout",
    "NonLocal",
    "SelfAttention",
    "block_type",
    "from_channels_first",
    "register",
    "to_channels_first",
]
