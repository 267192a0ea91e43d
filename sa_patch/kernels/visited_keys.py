"""Visited keys: what a kernel on matrix units reads for a tile of queries, block by block.

A tile of 128 rows holds 128 / group queries of the `group` query heads that share a KV head, and
reads every block of keys that holds something visible to one of them. Tiles and blocks follow the
order that kernels give the tokens: positions, or the slots of a random order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.patterns.base import Pattern
from sa_patch.patterns.full import Full
from sa_patch.patterns.prefix_stable import PSA
from sa_patch.patterns.rivals.by_head import ByHead
from sa_patch.patterns.stochastic import SA
from sa_patch.patterns.tail import Tail
from sa_patch.patterns.union import parts_of

TILE_ROWS = 128
BLOCK_SIZES = (16, 64, 128)
# Tiles that stand for all of a sequence.
SAMPLED_TILES = 8


@dataclass(frozen=True)
class VisitedKeys:
    """Mean keys of a tile by block size, of a pattern and of full attention on the same tiles."""

    keys: dict[int, float]
    full: dict[int, float]


def visited_keys(
    pattern: Pattern,
    seq_len: int,
    *,
    heads: int,
    kv_heads: int,
    layer: int = 0,
    q: Tensor | None = None,
    k: Tensor | None = None,
    block_sizes: Sequence[int] = BLOCK_SIZES,
) -> VisitedKeys:
    """Count what some tiles of one sequence read.

    The parts of a union are passes of their own, as in kernels, and together never more than full
    attention. What is read to choose blocks is counted by `choosing_keys`.

    Args:
        q: ``[heads, seq_len, head_dim]``, only read where the pattern reads content.
        k: ``[kv_heads, seq_len, head_dim]``, likewise.
    """
    group = heads // kv_heads
    if isinstance(pattern, ByHead):
        each = [
            visited_keys(
                own,
                seq_len,
                heads=group,
                kv_heads=1,
                layer=layer,
                q=None if q is None else q[head * group : (head + 1) * group],
                k=None if k is None else k[head : head + 1],
                block_sizes=block_sizes,
            )
            for head, own in enumerate(pattern.patterns)
        ]
        return VisitedKeys(_means([one.keys for one in each]), _means([one.full for one in each]))
    queries, chosen = _sampled_tiles(pattern, seq_len, group)
    tiles = -(-seq_len // queries)
    parts = [part for part in parts_of(pattern) if not isinstance(part, Tail)]
    # What reads everything because it is last is counted by itself: a sample would miss it.
    sampled_end = seq_len
    if len(chosen) < tiles:
        sampled_end -= max((part.dense_end(seq_len) for part in parts), default=0)
        chosen = _sampled_tiles(pattern, sampled_end, group)[1]
    sums = torch.zeros(2, len(block_sizes), dtype=torch.float64)
    for tile in chosen.tolist():
        places = torch.arange(tile * queries, min((tile + 1) * queries, sampled_end))
        full = _blocks_of(Full(), places, seq_len, layer, heads, kv_heads, q, k, block_sizes)
        own = torch.zeros_like(full)
        for part in parts:
            read = _blocks_of(part, places, seq_len, layer, heads, kv_heads, q, k, block_sizes)
            # Where all keys are read to choose, values are left.
            own += read / 2 if part.scores_all else read
        sums += torch.stack([own.minimum(full), full])
    own, full = (sums / max(1, len(chosen))).unbind(0)

    def with_last(keys: Tensor, last: int) -> Tensor:
        share = min(1.0, -(-last // queries) / max(1, tiles))
        return keys + share * (seq_len - keys).clamp(min=0)

    tails = [part.size for part in parts_of(pattern) if isinstance(part, Tail)]
    apart = seq_len - sampled_end
    own = with_last(own, min(seq_len, max([apart, *tails])))
    full = with_last(full, apart)
    return VisitedKeys(
        dict(zip(block_sizes, own.tolist(), strict=True)),
        dict(zip(block_sizes, full.tolist(), strict=True)),
    )


def _means(each: Sequence[dict[int, float]]) -> dict[int, float]:
    """Means by block size."""
    return {size: sum(one[size] for one in each) / len(each) for size in each[0]}


def visited_share(pattern: Pattern, seq_len: int, group: int = 1) -> float:
    """What a tile reads in blocks of 16, as a share of what it reads under full attention.

    Raises:
        UserError: for a pattern that chooses by content, which tells only where it is run.
    """
    if pattern.reads_content:
        raise UserError(
            f"what a tile of {pattern} reads depends on the text, and is counted where it is run; "
            "name patterns one by one, and compare them with sa-patch recovery --by visited"
        )
    size = BLOCK_SIZES[0]
    found = visited_keys(pattern, seq_len, heads=group, kv_heads=1, block_sizes=(size,))
    return found.keys[size] / found.full[size]


def choosing_keys(pattern: Pattern, seq_len: int, *, heads: int, kv_heads: int) -> float:
    """What a tile reads to choose its blocks, in visited keys: a mean over some tiles.

    A block's mean is read as a key without a value is: half a visited key.
    """
    queries, chosen = _sampled_tiles(pattern, seq_len, heads // kv_heads)
    read = [
        pattern.means_read(torch.arange(tile * queries, min((tile + 1) * queries, seq_len)))
        for tile in chosen.tolist()
    ]
    return sum(read) / 2 / max(1, len(read))


def _sampled_tiles(pattern: Pattern, seq_len: int, group: int) -> tuple[int, Tensor]:
    """Queries of a tile, which holds whole tiles of shared choices, and one tile of each eighth.

    Their places within the eighths differ: at even distances all might begin a segment.
    """
    shared = pattern.shared_queries
    queries = max(1, TILE_ROWS // group // shared) * shared
    tiles = -(-seq_len // queries)
    if tiles <= SAMPLED_TILES:
        return queries, torch.arange(tiles)
    part = torch.arange(SAMPLED_TILES)
    length = tiles // SAMPLED_TILES
    # An odd step, so that all places modulo 2, 4 and 8 have their turn.
    offsets = (part * (length // 3 | 1) + length // 2) % length
    return queries, part * tiles // SAMPLED_TILES + offsets


def _blocks_of(
    part: Pattern,
    places: Tensor,
    seq_len: int,
    layer: int,
    heads: int,
    kv_heads: int,
    q: Tensor | None,
    k: Tensor | None,
    block_sizes: Sequence[int],
) -> Tensor:
    """Keys in the blocks that one tile reads, a mean over KV heads: float64 ``[block_sizes]``."""
    if not isinstance(part, (SA, PSA)):
        device = None if q is None else q.device
        positions = places.to(device) if device is not None else places
        seen = part.visible(
            positions,
            seq_len,
            layer=layer,
            heads=heads,
            q=part.queries_read(q, positions) if q is not None and part.reads_content else None,
            k=k if part.reads_content else None,
        )
        per_kv_head = seen.any(1).unflatten(0, (min(len(seen), kv_heads), -1)).any(1)
        return _keys_in_blocks(per_kv_head, block_sizes)
    # Queries of a segment stand in the order of the ring, and so do the keys that they may see.
    ring = part.ring(seq_len, layer, heads)
    counts = []
    # Draws of their own for every head: each head's order has its own tiles.
    for draw, points in enumerate(ring.points):
        ordered = [low + points[low:end].argsort(stable=True) for low, end in ring.segments()]
        positions = torch.cat(ordered)[places]
        end = min(end for _, end in ring.segments() if end > int(positions.max()))
        seen = part.visible(positions, seq_len, layer=layer, heads=heads)[draw].any(0)
        counts.append(_keys_in_blocks(seen[points[:end].argsort()][None], block_sizes))
    return torch.stack(counts).mean(0)


def _keys_in_blocks(seen: Tensor, block_sizes: Sequence[int]) -> Tensor:
    """``seen [kv_heads, seq_len]`` to keys in blocks that hold something seen."""
    totals = []
    for size in block_sizes:
        padded = torch.nn.functional.pad(seen, (0, -seen.shape[1] % size))
        read = padded.unflatten(1, (-1, size)).any(-1).sum(1) * size
        totals.append(read.clamp(max=seen.shape[1]).double().mean().cpu())
    return torch.stack(totals)
