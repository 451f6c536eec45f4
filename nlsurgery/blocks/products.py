"""Matrix products by oneDNN on CPUs where torch's own leave instructions idle.

torch multiplies float32 matrices on a CPU by MKL, which leaves AVX-512 idle on other makers' processors;
oneDNN, which comes with torch, uses it. On one core of an AMD Zen 5 its products take 0.4 to 0.5 of the time,
on one of a Zen 4, which computes 512 bits in two halves, 0.9 to 0.95; in bfloat16 less than half on both.
"""

from __future__ import annotations

import math
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from nlsurgery.blocks.affinity import accumulator

#: What /proc/cpuinfo or Python calls the maker of a processor for which MKL uses all there is.
MKL_MAKER = "GenuineIntel"
#: A maker's processors of so high a family on (Zen 5) compute 512 bits at a time; earlier ones 256.
WIDE_MAKER, WIDE_FAMILY = "AuthenticAMD", 26
#: Tokens from which on it pays to lay out a first factor's channels side by side.
MANY_TOKENS = 1 << 10
#: The natural logarithm of 2.
LOG_2 = math.log(2)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def are_by_onednn(dtype: torch.dtype, device_type: str) -> bool:
    """Whether products in ``dtype`` may go by oneDNN: where it is no slower, and not turned off.

    A compiled graph keeps to the answer.
    """
    known = device_type == "cpu" and accumulator(dtype) == torch.float32
    if not (known and is_onednn_faster() and torch.backends.mkldnn.enabled):
        return False
    return dtype != torch.bfloat16 or not fuses_bfloat16()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def halves_float32() -> bool:
    """Whether oneDNN's float32 products take half the time of MKL's, not nearly as long.

    A compiled graph keeps to the answer.
    """
    return is_onednn_faster() and is_wide()


def halves(dtype: torch.dtype) -> bool:
    """Whether products in a ``dtype`` that may go by oneDNN take half the time of MKL's so."""
    return dtype == torch.bfloat16 or halves_float32()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def takes_threads() -> bool:
    """Whether there are several threads; a compiled graph keeps to how many there were."""
    return torch.get_num_threads() > 1


@lru_cache(maxsize=1)
def is_onednn_faster() -> bool:
    """Whether this processor has AVX-512, and MKL makes no use of it: bfloat16 is then twice as fast."""
    both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    if not both or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and MKL_MAKER not in _processor()


@lru_cache(maxsize=1)
def is_wide() -> bool:
    """Whether this processor computes 512 bits at a time, not 256 twice.

    Told by its name, not measured: a run repeated on it takes the same forms.
    """
    name = _processor()
    family = re.search(r"family\s*:?\s*(\d+)", name, re.IGNORECASE)
    return WIDE_MAKER in name and family is not None and int(family[1]) >= WIDE_FAMILY


@lru_cache(maxsize=1)
def fuses_bfloat16() -> bool:
    """Whether torch's fused attention multiplies bfloat16 as fast as oneDNN does.

    It does so by MKL, which on other makers' processors converts to float32, at a quarter of the speed.
    """
    has = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return not (is_onednn_faster() and has is not None and has() and multiplies_bfloat16())


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Whether oneDNN's products take bfloat16: not without AVX-512, or where it is told to leave that out."""
    # In a thread of its own: the first to ask may be recorded, or work with fake tensors.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_try_bfloat16).result()


def _try_bfloat16() -> bool:
    few = torch.ones(1, 8, dtype=torch.bfloat16, device="cpu")
    bias = torch.zeros(1, device="cpu")
    try:
        return bool(product_and("mul", exponentials(few, few, bias), few, few).isfinite())
    except RuntimeError:
        return False


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """A bᵀ + bias, by oneDNN.

    Args:
        a: (N, K) float32 or bfloat16.
        b: (M, K).
        bias: (M,), contiguous.

    Returns:
        (N, M), contiguous.
    """
    if bias is None and a.dtype == torch.bfloat16:
        # By oneDNN as well, of any strides.
        return torch.mm(a, b.t())
    return _linear(a, b, bias, "none")


def exponentials(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """exp(a bᵀ + bias) of float32 sums, for what is well below 1: it is less by a share of as much as itself.

    oneDNN knows no exponential, but the sigmoid: that of x is exp(x) / (1 + exp(x)).

    Args:
        a: (N, K) float32 or bfloat16.
        b: (M, K).
        bias: (M,) float32, contiguous.

    Returns:
        (N, M), contiguous; 0 for what is below 1.2e-38.
    """
    return _linear(a, b, bias, "sigmoid")


def product_and(
    operation: str, other: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None
) -> Tensor:
    """(a bᵀ + bias) + other, or times other, by oneDNN.

    Args:
        operation: ``add`` or ``mul``.
        other: (N, M), contiguous.
        a: (N, K) float32 or bfloat16.
        b: (M, K).
        bias: (M,), contiguous.

    Returns:
        (N, M), contiguous.
    """
    linear = torch.ops.mkldnn._linear_pointwise.binary
    return linear(_strided(a), other, _dense(b), bias, operation)  # type: ignore[no-any-return]


def _linear(a: Tensor, b: Tensor, bias: Tensor | None, function: str) -> Tensor:
    # The overload is named: to find it torch would try to read tensors as lists.
    linear = torch.ops.mkldnn._linear_pointwise.default
    return linear(_strided(a), _dense(b), bias, function, [], "")  # type: ignore[no-any-return]


def _strided(x: Tensor) -> Tensor:
    return x if 1 in x.stride() else x.contiguous()


def _dense(x: Tensor) -> Tensor:
    # Where rows or columns of a second factor are apart oneDNN takes a thousand times as long.
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def computed(tokens: Tensor) -> Tensor:
    """Tokens in the dtype of the products: float32 but for bfloat16."""
    return tokens if tokens.dtype == torch.bfloat16 else tokens.float()


def is_exact(tokens: Tensor) -> bool:
    """Whether products of tokens are float32."""
    return tokens.dtype != torch.bfloat16


def is_power_of_two(factor: float) -> bool:
    """Whether to multiply with it is exact, its sign aside."""
    return abs(math.frexp(factor)[0]) == 0.5


def factors(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Queries and keys whose product is scale · q kᵀ.

    In bfloat16 scaled queries are rounded, but by a power of two; what rounding took is multiplied as well.

    Args:
        q: (N, C') queries.
        k: (M, C') keys.
        scale: The factor on the logits.
    """
    if scale == 1.0:
        return q, k
    if is_exact(q) or is_power_of_two(scale):
        return q * scale, k
    scaled = q.float().mul_(scale)
    rounded = scaled.to(q.dtype)
    return beside(rounded, scaled.sub_(rounded).to(q.dtype)), beside(k, k)


def first_factor(tokens: Tensor) -> Tensor:
    """Tokens (N, C) as a product reads a first factor fastest: many of them with channels side by side."""
    return tokens if tokens.shape[0] <= MANY_TOKENS else tokens.contiguous()


def apart(tokens: Tensor) -> Tensor:
    """Tokens (B, N, C) that are part of a wider tensor, copied as they lie.

    torch copies such factors of a batched product by oneDNN each time, in the other order slowly.
    """
    if tokens.stride(1) == 1 and tokens.stride(2) != 1:
        return tokens.mT.contiguous().mT
    return tokens.contiguous() if tokens.stride(2) == 1 else tokens


def stacked(items: list[Tensor]) -> Tensor:
    """Tensors of one shape as a batch; a single one is not copied."""
    if len(items) > 1:
        return torch.stack(items)
    # Not a view, which could not be changed in place after a function of ours.
    (item,) = items
    return torch.ops.aten._unsafe_view(item, (1, *item.shape))  # type: ignore[no-any-return]


def beside(*parts: Tensor) -> Tensor:
    """The channels of several (N, C), lying in memory as the first does."""
    if parts[0].stride(0) == 1:
        return torch.cat([part.t() for part in parts]).t()
    return torch.cat(parts, 1)
