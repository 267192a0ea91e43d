"""Permutations and points of all layers in one launch.

The same integers, bit for bit, as of `patterns.permutation`, which defines them, modulo 2^32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sa_patch.kernels.triton.launch_table import next_power_of_2
from sa_patch.kernels.triton.softmax import INTERPRETED
from sa_patch.kernels.triton.tiles import PLANS, current_stream
from sa_patch.patterns import PSA, SA
from sa_patch.patterns.permutation import draw_salts, inverse
from sa_patch.patterns.prefix_stable import ring_points

# Under the interpreter a program costs milliseconds whatever its size.
_ELEMENTS = 1 << 16 if INTERPRETED else 1 << 10


def flat_grid(total: int) -> tuple[tuple[int], int]:
    """Programs that share `total` elements, and the elements of each."""
    # Of one size on GPUs, so that nothing is compiled twice.
    elements = min(_ELEMENTS, next_power_of_2(total)) if INTERPRETED else _ELEMENTS
    return (triton.cdiv(total, elements),), elements


@triton.jit
def mix32(x: tl.tensor) -> tl.tensor:
    """Avalanche uint32 numbers."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["draws", "seq_len", "total"])
def hash_kernel(
    hashes: tl.tensor,
    salts: tl.tensor,
    draws: tl.tensor,
    seq_len: tl.tensor,
    total: tl.tensor,
    ELEMENTS: tl.constexpr,
) -> None:
    """One 62-bit hash for each draw and position: int64 ``[draws, seq_len]``.

    Args:
        salts: int64 ``[3, draws]``, of `draw_salts`.
    """
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = place < total
    draw = place // seq_len
    positions = (place - draw * seq_len).to(tl.uint32)
    first = tl.load(salts + draw, mask=inside, other=0).to(tl.uint32)
    second = tl.load(salts + draws + draw, mask=inside, other=0).to(tl.uint32)
    third = tl.load(salts + 2 * draws + draw, mask=inside, other=0).to(tl.uint32)
    high = mix32(mix32(positions + first) ^ second)
    low = mix32(mix32(positions ^ third) + high)
    both = ((high >> 1).to(tl.int64) << 31) | (low >> 1).to(tl.int64)
    tl.store(hashes + place, both, mask=inside)


def hashes(
    pattern: SA | PSA, seq_len: int, layers: range, heads: int, device: torch.device
) -> Tensor:
    """What `hash_draws` gives for a pattern's keys: int64 ``[layers, heads or 1, seq_len]``."""
    salts = draw_salts(pattern.keys(seq_len, layers, heads), device)
    draws = salts.shape[1]
    out = torch.empty(draws, seq_len, dtype=torch.int64, device=device)
    grid, elements = flat_grid(out.numel())
    hash_kernel[grid](*(out, salts, draws, seq_len, out.numel()), ELEMENTS=elements, num_warps=4)
    return out.view(len(layers), -1, seq_len)


def orders(pattern: SA, seq_len: int, layers: range, heads: int, device: torch.device) -> Tensor:
    """What `SA.orders` gives: int64 ``[layers, heads or 1, seq_len]``."""
    return hashes(pattern, seq_len, layers, heads, device).argsort(dim=-1, stable=True)


def points(
    pattern: SA | PSA, seq_len: int, layers: range, heads: int, device: torch.device
) -> Tensor:
    """Points of several layers: int64 ``[layers, heads or 1, seq_len]``; those of PSA, which
    several tables are made from, are remembered."""
    if isinstance(pattern, SA):
        return inverse(orders(pattern, seq_len, layers, heads, device))
    draws = len(pattern.draws(heads))
    key = ("points", pattern, seq_len, layers, draws, device, current_stream(device))

    def build() -> tuple[Tensor]:
        return (ring_points(hashes(pattern, seq_len, layers, heads, device)),)

    return PLANS.get(key, build)[0]
