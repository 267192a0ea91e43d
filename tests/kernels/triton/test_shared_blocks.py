"""Tiles of queries that share their choices, in the interpreter: every way to fill a tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sa_patch import sparse_attention
from sa_patch.kernels.triton import chosen_blocks_launch
from sa_patch.kernels.triton.backend import BACKEND
from sa_patch.kernels.triton.launch import Call
from sa_patch.patterns import BlockTopK, Pattern, Sinks, Tail
from tests.laws.strategies import make_case
from tests.thorough import unless_thorough

TOLERANCE = 1e-5  # absolute, fp32


# Rows of tiles filled in every way.
TILES: list[tuple[Pattern, tuple[int, int]]] = [
    # Heads of a KV head that fill a tile together, in part, or alone; rows to spare.
    (BlockTopK(4, 3, 4, 0, branch=0, shared=8, segment=32), (8, 2)),
    (BlockTopK(8, 2, 8, 0, branch=0, shared=16, segment=32), (6, 2)),
    (BlockTopK(4, 3, 8, 0, shared=64, segment=64), (4, 1)),
    (BlockTopK(4, 3, 4, 0, branch=0, grouped=False, shared=8, segment=16), (4, 2)),
    # Without a segment, with a tree, and with nothing to choose.
    (BlockTopK(3, 2, 2, 3, branch=2, beam=2, shared=5), (4, 2)),
    (BlockTopK(4, 0, 4, 0, branch=0, shared=8, segment=16), (4, 2)),
    # More queries than a tile of the kernel takes, and parts beside it.
    (BlockTopK(4, 1, 4, 0, branch=0, shared=144, segment=144), (2, 1)),
    (Sinks(11) | BlockTopK(4, 3, 4, 0, branch=0, shared=8, segment=16), (4, 2)),
    (Tail(5) | BlockTopK(4, 3, 4, 0, branch=0, shared=8, segment=16), (4, 2)),
]
FEW = [TILES[place] for place in (0, 3, 4, 6, 8)]


@pytest.mark.parametrize(("pattern", "heads"), unless_thorough(FEW, TILES), ids=str)
def test_equals_reference(pattern: Pattern, heads: tuple[int, int]) -> None:
    n = 260
    case = make_case(
        batch=2, q_heads=heads[0], kv_heads=heads[1], seq_len=n, head_dim=20, lengths=[n, 103]
    )
    expected = case.run(pattern, "reference")
    assert (case.run(pattern, "triton") - expected).abs().max() <= TOLERANCE
    # And it is not by hiding nothing that it is right.
    assert (case.run(Sinks(n), "reference") - expected).abs().max() > 0.01


def test_pieces_that_begin_with_a_tile_are_the_end_of_the_whole() -> None:
    pattern = BlockTopK(4, 3, 4, 0, branch=0, shared=8, segment=32)
    case = make_case(seq_len=150, head_dim=16)
    whole = case.run(pattern, "triton")
    last = sparse_attention(case.q[:, :, 104:], case.k, case.v, pattern, backend="triton")
    assert (last - whole[:, :, 104:]).abs().max() <= TOLERANCE


def test_choices_that_grow_are_made_for_some_queries_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pattern = BlockTopK(4, 2, 4, 0, branch=0, shared=8, segment=16, percent=30)
    case = make_case(batch=2, q_heads=4, kv_heads=2, seq_len=130, head_dim=16, lengths=[110, 50])
    whole = case.run(pattern, "triton")
    launches: list[int] = []
    launch = chosen_blocks_launch._launch_tiles

    def launch_tiles(call: Call, *rest: Any) -> None:
        launches.append(call.query_len)
        launch(call, *rest)

    monkeypatch.setattr(chosen_blocks_launch, "_launch_tiles", launch_tiles)
    # Tiles of 8 for two rows and two KV heads.
    monkeypatch.setattr(chosen_blocks_launch, "CHOICES", 5 * 2 * 2 * 8 * pattern.most_picks(130))
    assert (case.run(pattern, "triton") - whole).abs().max() <= TOLERANCE
    assert launches == [40, 40, 40]
    # The keys of a packed sequence would be looked for in the wrong columns.
    assert not BACKEND.packs(pattern)


def test_half_precision_is_as_exact_as_the_other_kernels() -> None:
    pattern = BlockTopK(8, 2, 8, 0, branch=0, shared=16, segment=32)
    case = make_case(seq_len=260, head_dim=64, dtype=torch.bfloat16)
    exact = case.with_tensors(case.q.float(), case.k.float(), case.v.float())
    expected = exact.run(pattern, "reference")
    difference = (case.run(pattern, "triton").float() - expected).abs()
    # Rounding of the result, and of the weights before they are multiplied.
    assert difference.max() <= 2 * 2**-8 * expected.abs().max()
