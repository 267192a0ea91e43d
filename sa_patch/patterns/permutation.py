"""The random permutation of stochastic attention, as a pure function of its coordinates.

Counter-based: each position is hashed on its own, and a stable argsort of the hashes gives the
order. There is no generator state, so CPU and GPU, any batch and any backend draw the same
permutation, and the global random number generator is neither read nor moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF

# Sequences up to this length are served from a cache: evaluation suites meet the same short
# lengths in every layer again and again, where drawing costs as much as attention itself.
# 4096 entries x 2 tensors x 8 bytes x 1024 positions bounds it to 64 MiB.
_CACHED_LENGTH = 1024


def _mix32(x: Tensor) -> Tensor:
    """Avalanche 32-bit integers held in int64 (the finaliser of MurmurHash3), in place.

    Products may exceed 64 bits and wrap; the low 32 bits, all that is kept, are exact on every
    device.
    """
    x ^= x >> 16
    x *= 0x85EBCA6B
    x &= _MASK32
    x ^= x >> 13
    x *= 0xC2B2AE35
    x &= _MASK32
    x ^= x >> 16
    return x


def _mix32_int(x: int) -> int:
    """`_mix32` for one Python integer."""
    x &= _MASK32
    x ^= x >> 16
    x = (x * 0x85EBCA6B) & _MASK32
    x ^= x >> 13
    x = (x * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def hash_key(*coordinates: int, key: int = 0x9E3779B9) -> int:
    """Fold integers (of any size and sign) into one 32-bit key, order mattering.

    Args:
        key: of the coordinates before these.
    """
    for value in coordinates:
        # Two words per coordinate, so that seeds beyond 32 bits still differ.
        for word in (value & _MASK32, (value >> 32) & _MASK32):
            key = _mix32_int(key * 0x01000193 + _mix32_int(word + 0x6D2B79F5))
    return key


def hash_positions(seq_len: int, key: int, device: torch.device | None = None) -> Tensor:
    """62-bit pseudo-random integers, one per position: int64 ``[seq_len]``."""
    return _hashes(seq_len, _salts(key), device)


def hash_draws(seq_len: int, keys: Sequence[int], device: torch.device | None = None) -> Tensor:
    """`hash_positions` of several keys at once: int64 ``[keys, seq_len]``."""
    return _hashes(seq_len, draw_salts(keys, device)[..., None])


def draw_salts(keys: Sequence[int], device: torch.device | None = None) -> Tensor:
    """The three numbers below 2^32 that each key's hashes are made with: int64 ``[3, keys]``."""
    salts = torch.tensor(list(zip(*map(_salts, keys), strict=True)))
    if device is not None and device.type == "cuda":
        # From pageable memory the copy would wait for all work queued before it.
        salts = salts.pin_memory()
    return salts.to(device, non_blocking=True)


def _salts(key: int) -> tuple[int, int, int]:
    return key, _mix32_int(key ^ 0x3C6EF372), _mix32_int(key + 0x1B873593)


def _hashes(
    seq_len: int, salts: Tensor | tuple[int, int, int], device: torch.device | None = None
) -> Tensor:
    """Of one key's `_salts`: int64 ``[seq_len]``; or of ``[3, draws, 1]``: ``[draws, seq_len]``."""
    first, second, third = salts
    positions = torch.arange(seq_len, device=salts.device if isinstance(salts, Tensor) else device)
    high, low = _mix32(torch.stack([(positions + first) & _MASK32, positions ^ third]))
    high ^= second
    _mix32(high)
    low += high
    low &= _MASK32
    _mix32(low)
    high >>= 1
    high <<= 31
    low >>= 1
    high |= low
    return high


def permutation_order(
    seq_len: int,
    seed: int = 0,
    layer: int = 0,
    head: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The position that sits in each slot: int64 ``[seq_len]``, the inverse of the slots.

    Args:
        seq_len: number of real tokens n.
        seed, layer, head: coordinates of the draw; `head` is None where heads share it.
        device: where the result lives.
    """
    return _draw(seq_len, seed, layer, head, device)[0].clone()


def permutation_orders(
    seq_len: int,
    draws: Sequence[tuple[int, int, int | None]],
    device: torch.device | None = None,
) -> Tensor:
    """`permutation_order` of several draws at once: int64 ``[draws, seq_len]``.

    As many operations as for one draw, and no waiting for a GPU.

    Args:
        draws: seed, layer and head of each.
    """
    keys = [permutation_key(seq_len, *draw) for draw in draws]
    return torch.argsort(hash_draws(seq_len, keys, device), dim=-1, stable=True)


def inverse(order: Tensor) -> Tensor:
    """The slot of each position from the position in each slot, or back: int64 ``[..., n]``."""
    numbers = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, numbers)


def permutation_slots(
    seq_len: int,
    seed: int = 0,
    layer: int = 0,
    head: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The slot ``s(i)`` of each position: int64 ``[seq_len]``, uniform over permutations.

    A pure function of ``(seed, layer, head, seq_len)``, the same on every device
    (arXiv 2604.00754: an independent permutation in each layer).
    """
    return _draw(seq_len, seed, layer, head, device)[1].clone()


def _draw(
    seq_len: int, seed: int, layer: int, head: int | None, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    # Cached tensors are shared between calls: whoever hands one on must copy it.
    where = torch.device(device) if device is not None else torch.device("cpu")
    draw = _draw_cached if seq_len <= _CACHED_LENGTH else _draw_fresh
    return draw(seq_len, seed, layer, head, where)


def permutation_key(seq_len: int, seed: int, layer: int, head: int | None) -> int:
    """The key of a draw, with the arguments of `permutation_order`."""
    return hash_key(0 if head is None else head + 1, seq_len, key=_layer_key(seed, layer))


# Shared by all heads of a layer.
_layer_key = lru_cache(maxsize=256)(hash_key)


def _draw_fresh(
    seq_len: int, seed: int, layer: int, head: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    key = permutation_key(seq_len, seed, layer, head)
    order = torch.argsort(hash_positions(seq_len, key, device), stable=True)
    return order, inverse(order)


_draw_cached = lru_cache(maxsize=4096)(_draw_fresh)


def forget_permutations() -> None:
    """Draw anew what was remembered, as for a prompt of a length never seen: for measurements."""
    _draw_cached.cache_clear()
