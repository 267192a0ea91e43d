"""The kernel that chooses many of all eligible blocks, interpreted: as torch does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sa_patch.kernels.triton.tiles import Row
from sa_patch.patterns import BlockTopK
from tests.kernels.triton.test_tree_choice import (
    torch_choices,
    whole_numbers,
    with_scores_that_are_no_numbers,
)
from tests.kernels.triton.test_triton import TINY
from tests.laws.strategies import make_case

pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from sa_patch.kernels.triton.block_choice import launch
from sa_patch.kernels.triton.launch import Call

# Choices that grow with the position, and more of a fixed number than are made in sweeps.
MANY = [
    BlockTopK(2, 1, 0, 0, branch=0, percent=40),
    BlockTopK(2, 3, 4, 0, branch=0, grouped=False, segment=8, percent=7),
    BlockTopK(1, 2, 3, 1, branch=0, percent=99),
    BlockTopK(2, 17, 1, 2, branch=0),
    BlockTopK(1, 40, 0, 0, branch=0, grouped=False),
]


def kernel_choices(
    pattern: BlockTopK, q: Tensor, k: Tensor, rows: tuple[Row, ...]
) -> list[list[list[list[int]]]]:
    """The blocks that the kernel writes, in their order: ``[batch][chooser][query]``."""
    picks = launch.own_choices(Call(q, k, k, q, None, rows, 0, 1.0), pattern, TINY)
    choosers = k.shape[1] if pattern.grouped else q.shape[1]
    assert picks.dtype == torch.int32
    assert picks.shape == (len(q), choosers, q.shape[2], pattern.most_picks(k.shape[2]))
    return [
        [[[block for block in listed if block >= 0] for listed in head] for head in row]
        for row in picks.tolist()
    ]


@pytest.mark.parametrize("pattern", MANY, ids=str)
def test_choices_equal_those_of_torch_where_scores_tie(pattern: BlockTopK) -> None:
    """Small whole numbers tie often, and their means over powers of two and products are exact."""
    n = 131
    q, k = whole_numbers(2, 4, n, 3, seed=1), whole_numbers(2, 2, n, 3, seed=2)
    rows = Row(0, 0, n), Row(1, 0, 58)
    found = kernel_choices(pattern, q, k, rows)
    assert found == torch_choices(pattern, q, k, rows)
    # And not because all blocks are chosen.
    assert len(found[0][0][-1]) < pattern.eligible_at(n - 1)
    # A piece of a prompt behind a cache, of rows that begin at different positions.
    last, rows = q[:, :, -37:], (Row(0, 83, 120), Row(1, 40, 77))
    assert kernel_choices(pattern, last, k, rows) == torch_choices(pattern, last, k, rows)


@pytest.mark.parametrize("head_dim, heads", [(64, (6, 3)), (20, (4, 1))])
def test_choices_equal_those_of_torch(head_dim: int, heads: tuple[int, int]) -> None:
    case = make_case(q_heads=heads[0], kv_heads=heads[1], seq_len=147, head_dim=head_dim)
    rows = (Row(0, 0, 147),)
    for pattern in MANY[:2]:
        wanted = torch_choices(pattern, case.q, case.k, rows)
        assert kernel_choices(pattern, case.q, case.k, rows) == wanted


def test_scores_that_are_no_numbers_rank_as_in_torch() -> None:
    q, k, rows = with_scores_that_are_no_numbers()
    for pattern in (MANY[0], MANY[3]):
        assert kernel_choices(pattern, q, k, rows) == torch_choices(pattern, q, k, rows)


def test_the_work_does_not_grow_with_the_number_of_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sweep over the mean keys was for 4 picks: cubic in n where picks grow with it."""
    case = make_case(q_heads=2, kv_heads=1, seq_len=150, head_dim=16)
    counted: dict[str, int] = {}

    def count(name: str) -> Any:
        real = getattr(InterpreterBuilder, name)

        def counting(builder: Any, *args: Any, **options: Any) -> Any:
            counted[name] = counted.get(name, 0) + 1
            return real(builder, *args, **options)

        return counting

    for name in ("create_dot", "create_masked_load"):
        monkeypatch.setattr(InterpreterBuilder, name, count(name))
    work = []
    for few in (
        BlockTopK(1, 1, 0, 0, branch=0, percent=5),
        BlockTopK(1, 1, 0, 0, branch=0, percent=90),
    ):
        counted.clear()
        kernel_choices(few, case.q, case.k, (Row(0, 0, 150),))
        work.append(dict(counted))
    assert work[0] == work[1] and work[0]["create_dot"]
    # Ten tiles of 16 queries and as many steps of 16 blocks, half of them in the past.
    assert work[0]["create_dot"] <= 10 * 10


def test_scores_are_held_for_some_tiles_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(
        batch=2, q_heads=4, kv_heads=2, seq_len=150, head_dim=16, lengths=[150, 70], seed=1
    )
    q, k = case.q.nan_to_num(0.0), case.k.nan_to_num(0.0)
    rows = Row(0, 0, 150), Row(1, 0, 70)
    whole = kernel_choices(MANY[0], q, k, rows)
    grids: list[int] = []
    real = GridExecutor.__call__

    def run(executor: Any, *args: Any, **options: Any) -> None:
        grids.append(executor.grid[0])
        assert args[2].numel() <= 4 * 2 * 16 * 80
        args[2].fill_(7)
        real(executor, *args, **options)
        # Every program in memory of its own: on a GPU they run at once.
        of_programs = args[2][: grids[-1] * 16 * 80].view(grids[-1], 16, 80)
        assert (of_programs[:, :, 0] != 7).all()

    monkeypatch.setattr(GridExecutor, "__call__", run)
    monkeypatch.setattr(launch, "SCORES", 4 * 2 * 16 * 80)
    assert kernel_choices(MANY[0], q, k, rows) == whole
    # 15 tiles of 16 queries for two KV heads.
    assert grids == [8, 8, 8, 6]
