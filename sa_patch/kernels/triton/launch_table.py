"""Launch parameters of the Triton kernels.

What `_MEASURED` and `_CHOOSE` hold was the fastest of up to 72 candidates on an H200 (bfloat16, 32
query and 8 KV heads of 128, n = 32,768; eval/results/gpu). The rest was chosen by reasoning, from
the shared memory and the registers that the compiler reports: tiles as large as they can be without
spilling. What a file of `launch_files` holds for the card comes before either; `benchmark.tuning`
measures candidates and writes it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from sa_patch.kernels.triton.launch_files import measured_launches

# A window that hides nothing, as an int32.
UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class Launch:
    """One kernel's launch.

    Args:
        block_m: rows of a tile, queries times the heads that share their keys.
        block_n: keys of a step.
        warps, stages: of Triton.
    """

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class BandConfig:
    """A local window, and tokens on a ring.

    Args:
        tiles: tiles in a block of neighbours on a ring. More of them waste fewer keys in the
            future, and more on the band of a larger block.
        permute_once: copy k and v into the order of slots first, and read them there, where
            stochastic attention stands alone.
    """

    launch: Launch
    tiles: int = 4
    permute_once: bool = False


@dataclass(frozen=True)
class MobaConfig:
    """Large blocks chosen by content: one launch for each of its kernels.

    Args:
        choose: of the choice; read for mixture of block attention.
        chosen: of the chosen blocks.
        own: of the local window, where the results of chosen blocks are taken in.
    """

    choose: Launch
    chosen: Launch
    own: Launch


@dataclass(frozen=True)
class SmallBlocksConfig:
    """Small blocks chosen by content."""

    launch: Launch


Config = BandConfig | MobaConfig | SmallBlocksConfig

# What a card's file has entries for: sliding windows, stochastic attention, MoBA, and the choice
# of blocks where tiles of queries share it.
USES = WINDOW, RING, MOBA, CHOICE = "window", "ring", "moba", "choice"

# Under the interpreter a program costs milliseconds whatever its size. Short sequences, which tests
# use, must still fill several tiles.
_INTERPRETED_SHORT = 512
_SMALL = Launch(block_m=64, block_n=32)
_LARGE = Launch(block_m=512, block_n=512)

# By (4 bytes an element and not 2, head_dim > 64, head_dim > 128).
ShapeClass = tuple[bool, bool, bool]
_HOPPER: dict[ShapeClass, Launch] = {
    # With 4 warps Triton 3.6 spills where 3.9 just does not.
    (False, False, False): Launch(128, 64, warps=8, stages=3),
    (False, True, False): Launch(128, 64, warps=8, stages=3),
    (False, True, True): Launch(64, 32, warps=8, stages=2),
    # Exact fp32 products run outside the tensor cores, from registers.
    (True, False, False): Launch(32, 32, warps=8, stages=2),
    (True, True, False): Launch(32, 32, warps=8, stages=2),
    (True, True, True): Launch(16, 32, warps=8, stages=2),
}
_BAND: dict[str, dict[ShapeClass, Launch]] = {
    "hopper": _HOPPER,
    "blackwell": _HOPPER,
    "ampere": {
        **_HOPPER,
        (False, False, False): Launch(64, 64, warps=4, stages=3),
        (False, True, False): Launch(128, 32, warps=8, stages=3),
        (False, True, True): Launch(32, 32, warps=8, stages=2),
    },
}
# Bands are short: with small steps and few warps several tiles of them share a multiprocessor. SA
# 0.93 ms against 1.22 with the launch above, sliding windows 0.60 against 0.79 (w = 256).
_MEASURED: dict[tuple[str, ShapeClass], Launch] = {
    ("hopper", (False, True, False)): Launch(128, 32, warps=4, stages=3),
}
# Where a result is joined, a second tile of it is held, which spills there: 0.96 and 0.65 ms.
_MEASURED_JOINING: dict[tuple[str, ShapeClass], Launch] = {
    ("hopper", (False, True, False)): Launch(64, 32, warps=4, stages=3),
}
# The merge holds a second tile of results.
_OWN = {
    device: {**table, (False, True, True): Launch(32, 32, warps=8, stages=2)}
    for device, table in _BAND.items()
}
# The choice multiplies in fp32 whatever the dtype.
_CHOOSE: dict[ShapeClass, Launch] = {
    (wide, over_64, over_128): Launch(16 if over_128 else 32, 32, warps=8, stages=2)
    for wide in (False, True)
    for over_64, over_128 in ((False, False), (True, False), (True, True))
}

# All of MoBA at n = 32K and blocks of 128: 2.7 ms, and 6.2 with the launch above.
_CHOOSE_ON: dict[tuple[str, ShapeClass], Launch] = {
    ("hopper", (False, True, False)): Launch(64, 32, warps=4, stages=2),
    # More rows spill there.
    ("ampere", (False, True, False)): Launch(16, 32, warps=4, stages=2),
    ("ampere", (True, True, False)): Launch(16, 32, warps=4, stages=2),
}

# Elements of the keys that a program of 4 warps gathers at once.
_GATHERED = 4096


# Asked in every call.
@lru_cache(maxsize=64)
def device_class(device: torch.device, *, interpreted: bool) -> str:
    """Which part of the table serves a device: one of ampere, hopper, blackwell, interpreter."""
    if interpreted:
        return "interpreter"
    if device.type != "cuda":
        return "hopper"
    return class_of_capability(torch.cuda.get_device_capability(device))


def class_of_capability(capability: tuple[int, int]) -> str:
    """The part of the table for a compute capability."""
    if capability < (9, 0):
        return "ampere"
    if capability < (10, 0):
        return "hopper"
    # Consumer Blackwell multiplies as Ampere does, with as little shared memory.
    return "blackwell" if capability < (12, 0) else "ampere"


def _shape_class(q: Tensor) -> ShapeClass:
    return q.element_size() > 2, q.shape[3] > 64, q.shape[3] > 128


Measured = TypeVar("Measured", BandConfig, MobaConfig)


def use_key(use: str, q: Tensor) -> str:
    """The entry of a card's file for inputs like q; `use` is one of `USES`."""
    return f"{use} {q.element_size()} {padded_head_dim(q.shape[3])}"


def _from_file(kind: type[Measured], use: str, q: Tensor) -> Measured | None:
    if q.device.type != "cuda":
        return None
    return _of_card(kind, use_key(use, q), q.device)  # type: ignore[arg-type]


# Asked in every call. Types are hashable, whatever mypy makes of dataclasses' own.
@lru_cache(maxsize=256)
def _of_card(kind: type[Measured], key: str, device: torch.device) -> Measured | None:
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    entry = measured_launches(name, capability).get(key)
    return None if entry is None else config_of(kind, key, entry)


def config_of(kind: type[Measured], key: str, entry: dict[str, object]) -> Measured | None:
    """A file's entry as a config; None, with one sentence, for one of another make."""
    try:
        values = {name: Launch(**v) if isinstance(v, dict) else v for name, v in entry.items()}
        return kind(**values)  # type: ignore[arg-type]
    except TypeError as error:
        warnings.warn(f"launch parameters {key!r} are ignored: {error}", stacklevel=2)
        return None


def band_config(
    q: Tensor,
    seq_len: int,
    device: str,
    *,
    compared: bool = False,
    dense: bool = False,
    joining: bool = False,
    ring: bool = False,
) -> BandConfig:
    """The table's entry for local windows and for rings.

    Args:
        compared: the keys of a ring are compared with other rings, which takes registers.
        dense: queries see all keys before them, not a short band.
        joining: results over other keys are taken in.
        ring: tokens on a ring.
    """
    if device == "interpreter":
        return BandConfig(_SMALL if seq_len <= _INTERPRETED_SHORT else _LARGE, tiles=2)
    plain = not (compared or dense or joining)
    if plain and (found := _from_file(BandConfig, RING if ring else WINDOW, q)):
        return found
    shape = _shape_class(q)
    launch = _BAND[device][shape]
    if compared:
        return BandConfig(replace(launch, block_n=launch.block_n // 2))
    measured = _MEASURED_JOINING if joining else _MEASURED
    return BandConfig(launch if dense else measured.get((device, shape), launch))


def moba_config(
    q: Tensor,
    seq_len: int,
    block_size: int,
    device: str,
    *,
    compared: bool = False,
    shared: bool = False,
) -> MobaConfig:
    """The table's entry for large blocks chosen by content.

    Args:
        compared: keys of a block are compared with what other parts show.
        shared: tiles of queries share their choices; only `choose` is read then.
    """
    found = None if compared else _from_file(MobaConfig, CHOICE if shared else MOBA, q)
    if device == "interpreter":
        choose = chosen = own = _SMALL if seq_len <= _INTERPRETED_SHORT else _LARGE
    elif found:
        choose, chosen, own = found.choose, found.chosen, found.own
    else:
        shape = _shape_class(q)
        choose = _CHOOSE_ON.get((device, shape), _CHOOSE[shape])
        chosen, own = _BAND[device][shape], _OWN[device][shape]
        if compared:
            chosen = replace(chosen, block_m=min(64, chosen.block_m))
    # Keys beyond the block would only be masked.
    fitting = min(chosen.block_n, max(16, next_power_of_2(block_size)))
    return MobaConfig(choose, replace(chosen, block_n=fitting), own)


def small_blocks_config(q: Tensor, device: str) -> SmallBlocksConfig:
    """The table's entry for small blocks chosen by content."""
    if device == "interpreter":
        return SmallBlocksConfig(Launch(block_m=64, block_n=16))
    width = padded_head_dim(q.shape[3])
    # A thread holds its part of all keys and then of all values of a step in fp32.
    block_n = 8 if width <= 128 else 4
    block_m = min(64, _GATHERED // (block_n * width))
    return SmallBlocksConfig(Launch(block_m, block_n, warps=4, stages=1))


def shared_launch(
    q: Tensor, shared: int, group: int, device: str, *, compared: int = 0
) -> tuple[Launch, int]:
    """The launch of tiles of queries that share their choices, and the heads that a tile holds.

    Args:
        group: query heads that choose together.
        compared: with how many kinds of other parts the keys of a block are compared, of rings and
            choices; that takes registers.
    """
    wide = q.element_size() > 2
    rows = 32 if wide else 128
    fitting = [n for n in range(1, group + 1) if group % n == 0 and shared * n <= rows]
    pack = max(fitting, default=1)
    block_m = max(16, next_power_of_2(shared * pack))
    # As many keys as fit without spilling; beyond a head_dim of 128 half as many for 99 KiB.
    narrow = wide or q.shape[3] > (64 if device == "ampere" else 128)
    keys = 16 if device == "ampere" and q.shape[3] > 128 else 32 if narrow else 64
    keys = max(16, keys >> compared)
    warps = 8 if wide or block_m >= 128 else 4
    return Launch(block_m, keys, warps, stages=2), pack


def tree_launch(candidates: int, seq_len: int, device: str) -> Launch:
    """The launch of the search of a tree: queries of a tile, and the candidates of each.

    Args:
        candidates: of a query on a level, at most.
    """
    width = max(16, next_power_of_2(candidates))
    if device == "interpreter":
        # A step of no more elements than Triton takes.
        return Launch(64 if seq_len <= _INTERPRETED_SHORT else (1 << 16) // width, width)
    # A step reads 16 columns of every candidate: 64 registers a thread.
    return Launch(max(1, min(64, 512 // width)), width, warps=4 if width < 512 else 8, stages=1)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """Width of a row inside the kernels: a power of two that a matrix product takes."""
    return max(16, next_power_of_2(head_dim))


def packed_heads(group: int, block_m: int) -> int:
    """Query heads of a KV head that share a tile: a divisor of their number.

    At most a quarter of the tile's rows, so that several queries remain to each.
    """
    return max(n for n in range(1, min(group, max(1, block_m // 4)) + 1) if group % n == 0)
