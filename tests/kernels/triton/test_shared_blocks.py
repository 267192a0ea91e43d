"""Tiles of queries that share their choices, in the interpreter: every way to fill a tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sa_patch import sparse_attention
from sa_patch.errors import UserError
from sa_patch.kernels.triton import shared_blocks_launch
from sa_patch.kernels.triton.backend import BACKEND
from sa_patch.kernels.triton.launch import Call
from sa_patch.patterns import PSA, SA, SWA, BlockTopK, MoBA, Pattern, Sinks, Tail, parse_pattern
from tests.laws.strategies import make_case
from tests.thorough import unless_thorough

TOLERANCE = 1e-5  # absolute, fp32


# Rows of tiles filled in every way.
TILES: list[tuple[Pattern, tuple[int, int]]] = [
    # Heads of a KV head that fill a tile together, in part, or alone; rows to spare.
    (BlockTopK(4, 3, 4, 0, branch=0, shared=8, segment=32), (8, 2)),
    (BlockTopK(8, 2, 8, 0, branch=0, shared=16, segment=32), (6, 2)),
    (BlockTopK(4, 3, 8, 0, shared=64, segment=64), (4, 1)),
    (BlockTopK(4, 3, 4, 0, branch=0, shared=8, segment=16, threshold=0.2), (4, 2)),
    (BlockTopK(4, 3, 4, 0, branch=0, grouped=False, shared=8, segment=16), (4, 2)),
    # Without a segment, with a tree, and with nothing to choose.
    (BlockTopK(3, 2, 2, 3, branch=2, beam=2, shared=5), (4, 2)),
    (BlockTopK(4, 0, 4, 0, branch=0, shared=8, segment=16), (4, 2)),
    # More queries than a tile of the kernel takes, and parts beside it.
    (BlockTopK(4, 1, 4, 0, branch=0, shared=144, segment=144), (2, 1)),
    (Sinks(11) | BlockTopK(4, 3, 4, 0, branch=0, shared=8, segment=16), (4, 2)),
    (Tail(5) | BlockTopK(4, 3, 4, 0, branch=0, shared=8, segment=16), (4, 2)),
    # Chosen blocks of which other parts show keys: windows, rings, what other parts choose.
    (SWA(40) | BlockTopK(4, 3, 4, 0, branch=0, shared=8, segment=16), (4, 2)),
    (SWA(9) | SA(6, per_head=True) | BlockTopK(4, 3, 4, 0, shared=8, segment=16), (4, 2)),
    (PSA(12) | SA(5) | BlockTopK(4, 3, 4, 0, branch=0, grouped=False, shared=72), (4, 2)),
    (MoBA(16, 3) | BlockTopK(4, 3, 4, 0, branch=0, shared=8, segment=16), (4, 2)),
    (BlockTopK(3, 4) | MoBA(16, 2) | BlockTopK(4, 3, 4, 0, branch=0, shared=144), (4, 1)),
    (SWA(9) | BlockTopK(3, 4) | BlockTopK(16, 1, 0, 0, branch=0, shared=8, percent=20), (4, 2)),
]
FEW = [TILES[place] for place in (0, 3, 4, 6, 8, 10, 13, 14)]


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
    launch = shared_blocks_launch._launch_tiles

    def launch_tiles(call: Call, *rest: Any) -> None:
        launches.append(call.query_len)
        launch(call, *rest)

    monkeypatch.setattr(shared_blocks_launch, "_launch_tiles", launch_tiles)
    # Tiles of 8 for two rows and two KV heads.
    monkeypatch.setattr(shared_blocks_launch, "CHOICES", 5 * 2 * 2 * 8 * pattern.most_picks(130))
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


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made, views not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for made in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(made, torch.Tensor) and made.is_contiguous():
                self.bytes = max(self.bytes, made.numel() * made.element_size())
        return found


@pytest.mark.parametrize("beside", ["swa:256+", "swa:256+psa:16+", "moba:256,2+", ""])
def test_memory_grows_with_the_choices_of_queries_alone(
    beside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with those of their tiles, of which each query would have 32 times as many."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "__call__", lambda *args, **options: None)
    # Of points that no kernel wrote.
    monkeypatch.setattr(torch, "_assert_async", lambda *args: None)
    text = "block_topk:16,4,16,branch=0,shared=32,segment=128,percent=20"
    chosen = parse_pattern(text)
    assert isinstance(chosen, BlockTopK)
    for n in (1024, 4096):
        q, k = torch.zeros(1, 2, n, 16), torch.zeros(1, 1, n, 16)
        with Largest() as found:
            sparse_attention(q, k, k, parse_pattern(beside + text), backend="triton")
        # As int64, of one KV head, to be sorted; and plans of rings, of all layers together.
        assert found.bytes / n <= max(8 * chosen.most_picks(n), 2048)


def test_keys_that_others_show_are_left_out_of_every_part_of_the_queries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rings are those of the whole sequences, of which a part holds the first queries."""
    shared = BlockTopK(4, 2, 4, 0, branch=0, shared=8, segment=16, percent=30)
    pattern = SWA(5) | PSA(6) | SA(4, per_head=True) | BlockTopK(3, 2, 2, 3) | shared
    case = make_case(batch=2, q_heads=4, kv_heads=2, seq_len=130, head_dim=16, lengths=[130, 50])
    whole = case.run(pattern, "triton")
    monkeypatch.setattr(shared_blocks_launch, "CHOICES", 5 * 2 * 2 * 8 * shared.most_picks(130))
    assert (case.run(pattern, "triton") - whole).abs().max() <= TOLERANCE
    assert (case.run(pattern, "reference") - whole).abs().max() <= TOLERANCE


def test_two_parts_that_share_choices_are_left_to_other_backends() -> None:
    pattern = BlockTopK(4, 1, 4, shared=8) | BlockTopK(8, 1, shared=4)
    case = make_case(seq_len=100)
    with pytest.raises(UserError, match="only one part of a pattern may share its choices"):
        case.run(pattern, "triton")
