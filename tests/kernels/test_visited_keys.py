"""Visited keys: blocks that hold something visible to a tile, counted one by one."""

from __future__ import annotations

import pytest
import torch

from sa_patch.kernels.visited_keys import choosing_keys, visited_keys
from sa_patch.patterns import SA, SWA, BlockTopK, FlashPrefill, Full, MoBA, Pattern, Sinks, Tail

N, HEADS, KV_HEADS, SIZES = 512, 8, 2, (16, 64)
QUERIES = 128 // (HEADS // KV_HEADS)


def numbers(heads: int, n: int = N) -> torch.Tensor:
    return torch.randn(heads, n, 8, generator=torch.Generator().manual_seed(heads))


def counted(pattern: object, n: int = N) -> dict[int, float]:
    q, k = numbers(HEADS, n), numbers(KV_HEADS, n)
    shape = {"heads": HEADS, "kv_heads": KV_HEADS, "block_sizes": SIZES}
    return visited_keys(pattern, n, q=q, k=k, **shape).keys  # type: ignore[arg-type]


@pytest.mark.parametrize("size", SIZES)
def test_full_attention_reads_all_blocks_up_to_a_tile(size: int) -> None:
    # 16 tiles of 32 queries; 8 of them are sampled, as many even as odd ones.
    ends = range(QUERIES, N + 1, QUERIES)
    expected = sum(-(-end // size) * size for end in ends) / len(ends)
    assert counted(Full())[size] == expected


def test_a_window_reads_the_blocks_that_it_touches() -> None:
    n, window = 256, 40
    expected = 0
    for begin in range(0, n, QUERIES):
        first, last = max(0, begin - window + 1), begin + QUERIES - 1
        expected += (last // 16 - first // 16 + 1) * 16
    assert counted(SWA(window), n)[16] == expected / (n // QUERIES)


@pytest.mark.parametrize(
    "pattern", [MoBA(16, 3), BlockTopK(8, 3, 8, 0, shared=8, segment=32), BlockTopK(8, 3)], ids=str
)
def test_chosen_blocks_are_those_of_any_query_of_any_head_that_shares_the_keys(
    pattern: MoBA | BlockTopK,
) -> None:
    n = 256
    q, k = numbers(HEADS, n), numbers(KV_HEADS, n)
    seen = pattern.visible(torch.arange(n), n, heads=HEADS, q=q, k=k)
    expected = []
    for begin in range(0, n, QUERIES):
        for kv_head in range(KV_HEADS):
            keys = seen[kv_head * 4 : kv_head * 4 + 4, begin : begin + QUERIES].nonzero()[:, 2]
            expected.append(16 * len({int(key) // 16 for key in keys}))
    assert counted(pattern, n)[16] == pytest.approx(sum(expected) / len(expected))


def test_segments_are_sampled_at_their_beginning_and_at_their_end() -> None:
    # Of a segment's four tiles the last reads four times what the first does.
    so_far = counted(BlockTopK(16, 0, 0, branch=0, shared=QUERIES, segment=4 * QUERIES), 4096)
    assert so_far[16] == 2.5 * QUERIES


def test_random_orders_are_read_in_their_own_order() -> None:
    n, window = 4096, 64
    # A tile of slots, and a window to either side.
    reach = QUERIES + 2 * (window - 1)
    assert reach - 16 <= counted(SA(window), n)[16] <= reach + 32
    in_positions = counted(MoBA(1, 127), n)[16]
    assert in_positions > 5 * reach


def test_parts_of_a_union_are_passes_and_a_tail_reads_everything() -> None:
    union = counted(Sinks(4) | SWA(40))[16]
    assert union == pytest.approx(counted(Sinks(4))[16] + counted(SWA(40))[16], abs=16)
    tiles = N // QUERIES
    own = counted(SWA(40))[16]
    assert counted(SWA(40) | Tail(32))[16] == pytest.approx(own + (N - own) / tiles)


@pytest.mark.parametrize("last", [1, 3])
def test_last_blocks_that_read_everything_are_counted_though_no_sampled_tile_is_theirs(
    last: int,
) -> None:
    n, size = 2048, QUERIES
    pattern = FlashPrefill(1.0, size, sinks=0, local=1, last=last)
    q, k = numbers(HEADS, n), numbers(KV_HEADS, n)
    seen = pattern.visible(torch.arange(n), n, heads=HEADS, q=q, k=k)
    per_kv_head = seen.unflatten(0, (KV_HEADS, -1)).unflatten(2, (-1, QUERIES)).any(3).any(1)
    of_tiles = per_kv_head.unflatten(2, (-1, 16)).any(-1).sum(-1).double().mean(0) * 16
    assert counted(pattern, n)[16] == pytest.approx(float(of_tiles.mean()), abs=8)
    shape = {"heads": HEADS, "kv_heads": KV_HEADS, "block_sizes": SIZES}
    full = visited_keys(pattern, n, q=q, k=k, **shape).full[16]  # type: ignore[arg-type]
    assert full == pytest.approx((n + QUERIES) / 2, rel=0.03)


def choosing(pattern: Pattern, n: int) -> float:
    return choosing_keys(pattern, n, heads=HEADS, kv_heads=KV_HEADS)


def test_a_flat_choice_reads_the_mean_of_every_block_that_the_last_query_may_choose() -> None:
    n = 8 * QUERIES
    flat = BlockTopK(8, 3, 8, 0, branch=0, shared=8, segment=32)
    # Segments as long as tiles: blocks before the tile, without the sinks.
    expected = [max(0, tile * QUERIES // 8 - 1) for tile in range(8)]
    assert choosing(flat, n) == sum(each for each in expected if each > 3) / 2 / 8
    own = [(tile + 1) * QUERIES // 16 - 1 for tile in range(8)]
    assert choosing(MoBA(16, 3), n) == sum(each for each in own if each > 2) / 2 / 8
    assert choosing(Sinks(4) | SWA(9), n) == choosing(MoBA(16, 1), n) == 0
    assert choosing(Sinks(4) | flat | MoBA(16, 3), n) == choosing(flat, n) + choosing(
        MoBA(16, 3), n
    )


def test_a_tree_reads_fewer_means_than_its_queries_score_and_no_more_than_there_are() -> None:
    # One query to a tile reads what it scores; many read each mean once.
    tree, n = BlockTopK(4, 2, 4, 0, branch=4, beam=2), 2048
    eligible = tree.eligible(torch.arange(n))
    scored = tree.selection_dots(n)
    assert [tree.means_read(torch.tensor([i])) for i in range(n)] == scored.tolist()
    last = torch.arange(n - 128, n)
    levels = int(eligible[-1]), int(eligible[-1]) // 4, int(eligible[-1]) // 16
    assert scored[-1] < tree.means_read(last) < scored[last].sum()
    assert tree.means_read(last) <= sum(levels) + int(eligible[-1]) // 64 + 2


def test_a_saturated_pattern_reads_what_full_attention_reads() -> None:
    assert counted(SWA(N)) == counted(Full())
