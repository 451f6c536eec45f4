"""Which exact form computes a block: one pure function of shapes, dtype and device.

Every form gives the same numbers up to rounding. The thresholds are where the measured times of
``benchmarks/results/operators_cpu.md`` cross, bounded by memory: an N×M tensor is only ever kept
where it is at most twice the block's own projections, or small (:data:`SMALL_MAP`,
:data:`SMALL_MAPS`).
"""

from __future__ import annotations

import torch

from nlsurgery.blocks import products
from nlsurgery.blocks.affinity_dot import reassociation_pays
from nlsurgery.blocks.geometry import choice, is_compiled
from nlsurgery.errors import BlockError

#: Every value of the ``implementation`` option.
IMPLEMENTATIONS = ("auto", "explicit", "fused", "chunked", "reassociated", "sorted")
_FORMS = {
    "gaussian": ("explicit", "fused", "chunked"),
    "embedded_gaussian": ("explicit", "fused", "chunked"),
    "dot_product": ("explicit", "reassociated"),
    "concatenation": ("explicit", "sorted"),
}
#: Channels of a head up to which torch's fused attention is faster than tiles on a CPU in float32.
FUSED_CHANNELS = 128
#: In this precision backward of torch's fused attention takes several times as long as tiles on a CPU.
SLOWLY_FUSED = torch.float16
#: A float32 map of so many values in all (1 MB) is formed by plain operations on a CPU.
SMALL_MAPS = 1 << 18
#: Values of so many channels take longer to gather than to multiply, in bfloat16.
WIDE_VALUES = 256
#: Up to so many keys, a bfloat16 map on a CPU is formed by plain operations.
SMALL_MAP = 128
#: Logits of a batch item up to which items go together where each would go by oneDNN's products alone, by
#: whether they are bfloat16.
SMALL_ITEM = {False: 1 << 17, True: 1 << 19}
#: Multiplications in a map's logits from which on they go by oneDNN, one batch item at a time, by whether
#: there are several threads: items of a batch can go to one each.
ONEDNN_PRODUCT = {False: 1 << 23, True: 1 << 24}
#: The same where MKL's float32 products take as long, of keys of more than so many channels: what is
#: then left is the passes over the map.
LEVEL_PRODUCT, LEVEL_CHANNELS = 1 << 26, 64
#: What an exported graph is made with: a choice by size would fix the sizes of a dynamic one.
_TRACED = {
    "gaussian": "fused",
    "embedded_gaussian": "fused",
    "dot_product": "reassociated",
    "concatenation": "sorted",
}


def checked_implementation(implementation: str, mode: str) -> str:
    """Return ``implementation`` if ``mode`` has it.

    Raises:
        BlockError: It does not; the message lists the forms that it has.
    """
    choice(implementation, IMPLEMENTATIONS, name="implementation")
    if implementation != "auto" and implementation not in _FORMS[mode]:
        raise BlockError(
            f"implementation={implementation!r} does not exist for mode={mode!r}, which has "
            f"'auto', {', '.join(map(repr, _FORMS[mode]))}"
        )
    return implementation


def choose_implementation(
    mode: str,
    *,
    num_queries: int,
    num_keys: int,
    head_size: int,
    value_size: int,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device_type: str = "cpu",
) -> str:
    """Choose the form for a size.

    Args:
        mode: The pairwise function.
        num_queries: N.
        num_keys: M.
        head_size: Channels of queries and keys.
        value_size: Channels of values.
        batch: B.
        dtype: Of the projections.
        device_type: ``cpu``, ``cuda``, …

    Returns:
        One of :data:`IMPLEMENTATIONS`, never ``auto``. In an exported graph the form with the better
        growth, whatever the size.
    """
    choice(mode, tuple(_FORMS), name="mode")
    if torch.compiler.is_compiling() and not is_compiled():
        return _TRACED[mode]
    if mode == "dot_product":
        pays = reassociation_pays(num_queries, num_keys, head_size)
        return "reassociated" if pays else "explicit"
    if mode == "concatenation":
        crossover = 1024
        if device_type == "cpu":
            crossover = _sorted_from(batch * num_queries * num_keys, value_size, dtype)
        pays = num_queries * num_keys > crossover * (num_queries + num_keys)
        return "sorted" if pays else "explicit"
    if products.are_by_onednn(dtype, device_type):
        if products.halves(dtype):
            return _by_onednn(batch, num_queries, num_keys, head_size, value_size, dtype)
        if goes_by_onednn(num_queries * num_keys, head_size, dtype):
            return "chunked"
    if device_type == "cpu":
        if dtype == torch.bfloat16:
            # The others form float32 logits by float32 products, which only small maps do not notice.
            return "explicit" if num_keys <= SMALL_MAP else "fused"
        # Kept maps are faster than fused attention up to twice the size where MKL leaves AVX-512 idle.
        times = 2 if products.are_by_onednn(dtype, device_type) else 1
        if fits(num_keys, value_size, times) or batch * num_queries * num_keys <= SMALL_MAPS:
            return "explicit"
        # torch's fused attention falls back to an N×M tensor where the two sizes differ.
        fused = head_size == value_size and head_size <= FUSED_CHANNELS and dtype != SLOWLY_FUSED
        return "fused" if fused else "chunked"
    if torch.are_deterministic_algorithms_enabled():
        # The backward of memory-efficient attention adds atomically.
        return "explicit" if num_keys <= value_size else "chunked"
    return "fused"


def _sorted_from(weights: int, value_size: int, dtype: torch.dtype) -> int:
    """From which N·M / (N + M) on sorting takes less on a CPU than weights of that number in all."""
    narrow = dtype == torch.bfloat16
    if narrow and value_size >= WIDE_VALUES and weights <= 4 * SMALL_MAPS:
        return 400
    if weights <= SMALL_MAPS:
        return 240 if narrow else 220
    return min(200, max(160, value_size // 2))


def fits(num_keys: int, value_size: int, times: int = 1) -> bool:
    """Whether an N×M tensor may be kept: at most twice (so many times) the four projections, and few keys."""
    return num_keys <= times * min(1024, 8 * value_size)


def goes_by_onednn(logits: int, head_size: int, dtype: torch.dtype) -> bool:
    """Whether attention without a map takes less time by oneDNN, where it may, than torch's fused one.

    Args:
        logits: N·M of an item.
        head_size: Channels of keys.
        dtype: Of the projections.
    """
    large = head_size > LEVEL_CHANNELS and logits * head_size >= LEVEL_PRODUCT
    return large or products.halves(dtype)


def _by_onednn(
    batch: int,
    num_queries: int,
    num_keys: int,
    head_size: int,
    value_size: int,
    dtype: torch.dtype,
) -> str:
    narrow = dtype == torch.bfloat16
    small = num_queries * num_keys < SMALL_ITEM[narrow]
    # To keep a map saves backward a product, which weighs more where products take twice as long; in
    # bfloat16 the map weighs half as much as in float32.
    times = 1 if products.halves_float32() else 2
    limit = (4 if narrow else 2) * times * SMALL_MAPS
    small = small or fits(num_keys, value_size, times) or batch * num_queries * num_keys <= limit
    if not narrow:
        limit = ONEDNN_PRODUCT[products.takes_threads()]
        small = small and num_queries * num_keys * head_size < limit
    return "explicit" if small else "chunked"


def without_denormals(dtype: torch.dtype) -> str:
    """What takes the place of ``explicit`` on a CPU where weights are denormal numbers, by dtype."""
    fused = dtype == torch.bfloat16 and not products.are_by_onednn(dtype, "cpu")
    return "fused" if fused else "chunked"
