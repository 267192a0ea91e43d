"""The kernel that chooses blocks coarse to fine, interpreted: as torch does, and a plain loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sa_patch.kernels.triton import launch_table
from sa_patch.kernels.triton.launch_table import Launch
from sa_patch.kernels.triton.tiles import Row
from sa_patch.patterns import BlockTopK
from tests.kernels.triton.test_triton import TINY, assert_matches
from tests.laws.strategies import make_case
from tests.oracle import tree_search
from tests.thorough import unless_thorough

pytest.importorskip("triton")

Choices = list[list[list[list[int]]]]
# Blocks, topk, sinks and tokens before; several levels at the lengths below.
TREES = [
    BlockTopK(2, 5, 1, 2, branch=2, beam=3),
    BlockTopK(1, 3, 0, 0, branch=2, beam=2, grouped=False),
    BlockTopK(2, 7, 3, 4, branch=3, beam=5),
    BlockTopK(1, 4, 2, 1, branch=5, beam=1, grouped=False),
    BlockTopK(4, 12, 4, 8, branch=4, beam=8),
    BlockTopK(2, 4, 2, 0, branch=2, beam=4, segment=8),
]


def kernel_choices(pattern: BlockTopK, q: Tensor, k: Tensor, rows: tuple[Row, ...]) -> Choices:
    """The blocks that the kernel writes, in their order: ``[batch][chooser][query]``."""
    from sa_patch.kernels.triton.block_choice.launch import own_choices
    from sa_patch.kernels.triton.launch import Call

    picks = own_choices(Call(q, k, k, q, None, rows, 0, 1.0), pattern, TINY)
    choosers = k.shape[1] if pattern.grouped else q.shape[1]
    assert picks.dtype == torch.int32
    assert picks.shape == (len(q), choosers, q.shape[2], pattern.topk)
    return [
        [[[block for block in listed if block >= 0] for listed in head] for head in row]
        for row in picks.tolist()
    ]


def torch_choices(pattern: BlockTopK, q: Tensor, k: Tensor, rows: tuple[Row, ...]) -> Choices:
    """Those of the definition in torch, ascending; none at padding."""
    choices = []
    for row in rows:
        end = min(q.shape[2], row.length - row.start)
        positions = torch.arange(row.start, row.start + end)
        own = pattern.own_choices(
            q[row.batch, :, :end], k[row.batch, :, : row.length], positions
        ).tolist()
        padding: list[list[int]] = [[]] * (q.shape[2] - end)
        choices.append(
            [[sorted(b for b in listed if b >= 0) for listed in head] + padding for head in own]
        )
    return choices


def whole_numbers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def use_tiles(monkeypatch: pytest.MonkeyPatch, block_m: int) -> None:
    """Queries of a tile, in place of the interpreter's."""
    of_table = launch_table.tree_launch

    def tree_launch(candidates: int, seq_len: int, device: str) -> Launch:
        return replace(of_table(candidates, seq_len, device), block_m=block_m)

    monkeypatch.setattr(launch_table, "tree_launch", tree_launch)


@pytest.mark.parametrize(
    "pattern", [tree for tree in TREES if tree.branch in (2, 4) and not tree.segment], ids=str
)
def test_tied_scores_are_settled_as_in_the_definition(
    pattern: BlockTopK, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small whole numbers tie often, and their means over powers of two and products are exact."""
    use_tiles(monkeypatch, 16)
    n = 131
    q, k = whole_numbers(1, 4, n, 3, seed=1), whole_numbers(1, 2, n, 3, seed=2)
    (got,) = kernel_choices(pattern, q, k, (Row(0, 0, n),))
    for chooser, listed in enumerate(got):
        kv_head = chooser if pattern.grouped else chooser // 2
        own = q[0, 2 * chooser : 2 * chooser + 2].sum(0) if pattern.grouped else q[0, chooser]
        leaves = list(
            k[0, kv_head, pattern.sinks :].unfold(0, pattern.block_size, pattern.block_size)
            .mean(-1).double().numpy()
        )  # fmt: skip
        for i in range(n):
            eligible = leaves[: pattern.eligible_at(i)]
            wanted, _, _ = tree_search(
                own[i].double().numpy(), eligible, pattern.topk, pattern.branch, pattern.beam
            )
            assert listed[i] == wanted, (chooser, i)


# Every head_dim, and all trees; under `thorough` each with each.
SHAPES = [(64, (9, 3)), (60, (4, 1)), (128, (4, 2))]
CHOICES = [(tree, *SHAPES[place % 3]) for place, tree in enumerate(TREES)]


@pytest.mark.parametrize(
    "pattern, head_dim, heads",
    unless_thorough(CHOICES, [(tree, *shape) for tree in TREES for shape in SHAPES]),
    ids=str,
)
def test_choices_equal_those_of_torch(
    pattern: BlockTopK, head_dim: int, heads: tuple[int, int]
) -> None:
    """In a batch whose rows differ in length, heads beside each other in memory."""
    n = 147
    case = make_case(
        batch=2, q_heads=heads[0], kv_heads=heads[1], seq_len=n, head_dim=head_dim, lengths=[n, 58]
    )
    q, k = (
        x.nan_to_num(0.0).transpose(1, 2).contiguous().transpose(1, 2) for x in (case.q, case.k)
    )
    rows = Row(0, 0, n), Row(1, 0, 58)
    wanted = torch_choices(pattern, q, k, rows)
    assert kernel_choices(pattern, q, k, rows) == wanted
    # And not because all blocks are chosen.
    assert max(map(len, wanted[0][0])) < pattern.eligible_at(n - 1)


@pytest.mark.parametrize("pattern", TREES[:2], ids=str)
def test_the_last_queries_choose_as_in_the_whole(pattern: BlockTopK) -> None:
    """A piece of a prompt behind a cache, of rows that begin at different positions."""
    case = make_case(batch=2, q_heads=4, kv_heads=2, seq_len=120, head_dim=16)
    q, k = case.q[:, :, -37:], case.k
    rows = Row(0, 83, 120), Row(1, 40, 77)
    assert kernel_choices(pattern, q, k, rows) == torch_choices(pattern, q, k, rows)


@pytest.mark.parametrize("block_m", [1, 16])
def test_tiles_may_be_small(block_m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile begins on the level on which its last query has to choose."""
    use_tiles(monkeypatch, block_m)
    case = make_case(q_heads=2, kv_heads=1, seq_len=41, head_dim=16)
    rows = (Row(0, 0, 41),)
    for pattern in TREES[:2]:
        wanted = torch_choices(pattern, case.q, case.k, rows)
        assert kernel_choices(pattern, case.q, case.k, rows) == wanted


def with_scores_that_are_no_numbers() -> tuple[Tensor, Tensor, tuple[Row, ...]]:
    """Queries, keys and their row; some scores are NaN, infinite, or zeros of either sign."""
    q, k = whole_numbers(1, 2, 90, 4, seed=3), whole_numbers(1, 1, 90, 4, seed=4)
    k[0, 0, 11] = torch.tensor([torch.inf, -torch.inf, 0.0, 0.0])
    k[0, 0, 30] = torch.tensor([torch.inf, 0.0, 0.0, 0.0])
    k[0, 0, 52] = torch.nan
    k[0, 0, 60:64] = -0.0
    rows = (Row(0, 0, 90),)
    return q, k, rows


def test_scores_that_are_no_numbers_rank_as_in_torch() -> None:
    q, k, rows = with_scores_that_are_no_numbers()
    for pattern in TREES[:2]:
        assert kernel_choices(pattern, q, k, rows) == torch_choices(pattern, q, k, rows)


def test_a_beam_too_wide_for_the_kernel_is_searched_in_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sa_patch.kernels.triton.block_choice import launch

    case = make_case(q_heads=2, kv_heads=1, seq_len=75, head_dim=16)
    rows = (Row(0, 0, 75),)
    expected = kernel_choices(TREES[0], case.q, case.k, rows)
    monkeypatch.setattr(launch, "tree_search_kernel", None)
    with pytest.raises(TypeError, match="subscriptable"):
        kernel_choices(TREES[0], case.q, case.k, rows)
    monkeypatch.setattr(launch, "MOST_CANDIDATES", 6)
    found = kernel_choices(TREES[0], case.q, case.k, rows)
    assert [[sorted(listed) for listed in head] for head in found[0]] == expected[0]
    monkeypatch.undo()
    assert_matches(case, BlockTopK(1, 3, 0, 0, branch=2, beam=600))


def test_output_equals_the_oracle() -> None:
    case = make_case(
        batch=2, q_heads=4, kv_heads=2, seq_len=90, head_dim=16, lengths=[90, 50], seed=7
    )
    for pattern in (TREES[0], TREES[4]):
        assert (case.oracle(pattern).margin > 1e-5).all(), "choose another seed"
        assert_matches(case, pattern)
