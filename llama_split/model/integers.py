"""Exact products with weights of 8 bits, for shields: what both sides must compute bit for bit the same.

A weight matrix is quantised by rows, W ≈ diag(w)·Q with Q in [−127, 127]. An argument is quantised by tokens, x ≈ a·z
with z in [−z_max, z_max]. Their product is a·w·(Q·z), where Q·z is computed without rounding. z_max is chosen for each
matrix so that Q·z stays inside ±2³¹: |Q·z| is at most z_max times the greatest L1 norm of a row. So Q·z is known once
it is known modulo 2³², and that is what a worker computes, of arguments that may be any 32-bit integers.

Shape suffixes: N rows, k input width, m output width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache

import torch

MOST_LEVELS = (1 << 15) - 1
"""The greatest z_max: 16 bits with the sign."""

_WEIGHT_LEVELS = 127
_LARGEST = (1 << 31) - 1
_DIGITS = 4  # of 8 bits in 32
_DIGIT_WIDTH = _LARGEST // (128 * 128)  # columns whose products with one digit fit into 32 bits
_FLOAT_WIDTH = (1 << 53) // (128 << 31)  # columns whose products with 32 bits are exact in float64
_TINY = torch.finfo(torch.float32).tiny  # the scale of zeros
_BLOCK_NUMBERS = 1 << 18
_GPU_BLOCK_NUMBERS = 1 << 26
_CACHED_ROWS = 64  # whose products with all digits stay in the processor's cache
_SIGNS = -0x7F7F7F80  # 0x80808080, the top bit of each byte, as a signed number


def quantise_rows(weight_mk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix, or some of its rows: the result is the same for a row in whatever block it comes.

    Returns:
        Q of int8, [m, k], and w of float32, [m].

    Raises:
        ValueError: a number is not finite.
    """
    wide = weight_mk.to(torch.float32)
    largest = wide.abs().amax(dim=1)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("weights that are not finite can't be quantised")
    scale_m = largest.div_(_WEIGHT_LEVELS).clamp_(min=_TINY)
    levels = torch.round(wide / scale_m[:, None]).clamp_(-_WEIGHT_LEVELS, _WEIGHT_LEVELS)
    return levels.to(torch.int8), scale_m


def greatest_norm(quantised_mk: torch.Tensor) -> int:
    """The greatest L1 norm of a row; of several blocks, the greatest of all counts."""
    return int(quantised_mk.to(torch.int32).abs_().sum(dim=1).max())


def levels_for(norm: int) -> int:
    """z_max of a matrix whose rows have this L1 norm at most."""
    return min(MOST_LEVELS, _LARGEST // max(norm, 1))


def quantise_tokens(argument_Nk: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise the rows of an argument, each by itself.

    A row with a number that is not finite becomes zeros with a scale that is not finite, so that its product is no
    number either.

    Args:
        argument_Nk: of any floating-point dtype.
        levels: z_max.

    Returns:
        z of int32, [N, k], and a of float32, [N].
    """
    wide = argument_Nk.to(torch.float32)
    scale_N = wide.abs().amax(dim=1).div_(levels).clamp_(min=_TINY)
    scaled = (wide / scale_N[:, None]).nan_to_num_(0.0, 0.0, 0.0)
    return scaled.round_().clamp_(-levels, levels).to(torch.int32), scale_N


def dequantise(
    product_Nm: torch.Tensor, scale_N: torch.Tensor, scale_m: torch.Tensor, bias_m: torch.Tensor | None
) -> torch.Tensor:
    """a·w·(Q·z) + bias, in float32, each number by itself; Q·z is int32, [N, m]."""
    result = product_Nm.to(torch.float32).mul_(scale_m).mul_(scale_N[:, None])
    return result if bias_m is None else result.add_(bias_m)


def multiply_exactly(argument_Nk: torch.Tensor, quantised_mk: torch.Tensor) -> torch.Tensor:
    """Argument · Qᵀ modulo 2³², as int32 [N, m], on the device of both.

    Args:
        argument_Nk: any int32.
        quantised_mk: int8.
    """
    product, widest = _way(argument_Nk.device.type)
    width = argument_Nk.shape[1]
    total = product(argument_Nk[:, :widest], quantised_mk[:, :widest])
    for start in range(widest, width, widest):
        total.add_(product(argument_Nk[:, start : start + widest], quantised_mk[:, start : start + widest]))
    return total


Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@lru_cache(maxsize=8)
def _way(device: str) -> tuple[Product, int]:
    """How to compute on this kind of device, and the most columns at a time.

    By digits of 8 bits where the processor multiplies them exactly: some saturate sums of two products in 16 bits. That
    is tried with the numbers for which it would show.
    """
    if device == "cpu" and sys.byteorder == "little" and hasattr(torch, "_int_mm"):
        extremes = torch.tensor([-128, 127], dtype=torch.int8)
        left, right = extremes[:, None].repeat(4, 64), extremes[:, None].repeat(8, 64)
        expected = left.to(torch.int64) @ right.to(torch.int64).t()
        if bool((torch._int_mm(left, right.t()) == expected).all()):  # noqa: SLF001 - torch has no public name for it
            return _by_digits, _DIGIT_WIDTH
    return _in_float64, _FLOAT_WIDTH


def _by_digits(argument_Nk: torch.Tensor, quantised_mk: torch.Tensor) -> torch.Tensor:
    """Products with the four signed digits of the argument in base 256, which one pass over the weights computes."""
    rows, width = argument_Nk.shape
    if width == 1:  # torch's product takes another element for the second row of such a matrix
        return _in_float64(argument_Nk, quantised_mk)
    if rows > _CACHED_ROWS:
        starts = range(0, rows, _CACHED_ROWS)
        return torch.cat([_by_digits(argument_Nk[start : start + _CACHED_ROWS], quantised_mk) for start in starts])
    # Digits from −128 to 127 are the bytes of x + 0x80808080, each less 128.
    digits = (argument_Nk + _SIGNS).bitwise_xor_(_SIGNS).view(torch.int8).view(rows, width, _DIGITS)
    stacked = digits.permute(2, 0, 1).reshape(_DIGITS * rows, width)
    first: torch.Tensor
    first, *others = torch._int_mm(stacked, quantised_mk.t()).view(_DIGITS, rows, -1)  # noqa: SLF001 - see _way
    total = first.clone()
    for place, part in enumerate(others, start=1):
        total.add_(part.bitwise_left_shift_(8 * place))
    return total


def _in_float64(argument_Nk: torch.Tensor, quantised_mk: torch.Tensor) -> torch.Tensor:
    """A product in float64, all of whose sums are whole numbers below 2⁵³; weights are converted in blocks of rows."""
    rows, width = quantised_mk.shape
    wide = argument_Nk.to(torch.float64)
    total = argument_Nk.new_empty((len(argument_Nk), rows))
    step = max(1, (_BLOCK_NUMBERS if argument_Nk.device.type == "cpu" else _GPU_BLOCK_NUMBERS) // width)
    for start in range(0, rows, step):
        block = quantised_mk[start : start + step].to(torch.float64)
        total[:, start : start + step] = (wide @ block.t()).to(torch.int64)  # int32 keeps the lower bits
    return total
