"""The Triton kernels of mixture of block attention, interpreted: choice, groups and merge."""

from __future__ import annotations

from math import isfinite, isnan
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sa_patch.kernels.triton.launch_table import BandConfig, Launch, MobaConfig
from sa_patch.kernels.triton.tiles import Row
from sa_patch.patterns import MoBA
from tests.kernels.triton.test_triton import FP32_TOLERANCE, TINY_MOBA, assert_matches, run
from tests.laws.strategies import Case, make_case
from tests.oracle import block_scores, chosen_blocks

pytest.importorskip("triton")

NONE = -1


def choose(case: Case, pattern: MoBA, count: int, start: int = 0) -> list[list[list[set[int]]]]:
    """The blocks that the kernel chooses, as sets ``[batch][head][query]``."""
    from sa_patch.kernels.triton.block_choice.launch import choose as choose_blocks
    from sa_patch.kernels.triton.launch import Call

    rows = tuple(Row(b, start, length) for b, length in enumerate(case.real_tokens()))
    call = Call(case.q, case.k, case.v, case.q, None, rows, 0, 1.0)
    picks = choose_blocks(call, pattern, TINY_MOBA.choose)
    assert picks.dtype == torch.int32 and picks.shape == (*case.q.shape[:3], count)
    for listed in picks.flatten(0, 2).tolist():
        real = [block for block in listed if block != NONE]
        assert len(set(real)) == len(real), "a block is chosen twice"
    return [
        [[{b for b in listed if b != NONE} for listed in head] for head in row]
        for row in picks.tolist()
    ]


def whole_numbers(heads: int, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (1, heads, n, 4), generator=generator).float()


@pytest.mark.parametrize("block_size, topk", [(1, 3), (2, 2), (1, 7), (8, 20)])
def test_choice_equals_the_definition_where_scores_tie(block_size: int, topk: int) -> None:
    """Small whole numbers tie often, and their means and products are exact. With topk = 7 the
    kernel needs several sweeps, the last of them with places to spare."""
    case = Case(whole_numbers(4, 50, 1), whole_numbers(2, 50, 2), whole_numbers(2, 50, 3), None)
    pattern = MoBA(block_size, topk)
    count = min(topk - 1, 50 // block_size)
    got = choose(case, pattern, count)
    q, k = case.q[0].double().numpy(), case.k[0].double().numpy()
    for head in range(4):
        for i in range(50):
            scores = block_scores(i, q[head, i], k[head // 2], block_size)
            assert got[0][head][i] == set(chosen_blocks(scores, topk - 1)), (head, i)


def test_minus_zero_and_zero_are_one_score() -> None:
    k = torch.zeros(1, 1, 8, 4)
    k[0, 0, :2] = -0.0
    q = torch.ones(1, 1, 8, 4)
    got = choose(Case(q, k, k, None), MoBA(2, 2), 1)
    assert got[0][0][7] == {0}
    k[0, 0, :2], k[0, 0, 2:4] = 0.0, -0.0
    assert choose(Case(-q, k, k, None), MoBA(2, 2), 1)[0][0][7] == {0}


@pytest.mark.parametrize("topk", [3, 6])
def test_a_nan_score_ranks_as_in_the_definition(topk: int) -> None:
    """Above all others; and where all earlier blocks fit, none is hidden, one of -inf neither."""
    case = make_case(q_heads=2, kv_heads=1, seq_len=20, head_dim=4)
    case.k[0, 0, 4] = torch.tensor([torch.inf, -torch.inf, 0.0, 0.0])
    case.k[0, 0, 9] = torch.nan
    got = choose(case, MoBA(4, topk), topk - 1)
    scores = (case.q[0] @ case.k[0, 0].unflatten(0, (5, 4)).mean(1).T).tolist()
    kinds = {str(score) for head in scores for row in head for score in row if not isfinite(score)}
    assert kinds == {"nan", "inf", "-inf"}
    for head in range(2):
        for i, row in enumerate(scores[head]):
            earlier = sorted(range(i // 4), key=lambda b: (not isnan(row[b]), -row[b], b))  # noqa: B023
            assert got[0][head][i] == set(earlier[: topk - 1]), (head, i)


@pytest.mark.parametrize(
    "n, head_dim, q_heads, kv_heads, pattern",
    [
        (2, 64, 1, 1, MoBA(1, 2)),
        (63, 60, 9, 3, MoBA(7, 3)),
        (111, 96, 1, 1, MoBA(16, 2)),
        (64, 16, 4, 2, MoBA(3, 5)),
        (50, 16, 4, 2, MoBA(5, 1)),
        (40, 128, 8, 2, MoBA(8, 9)),
        (40, 16, 2, 1, MoBA(33, 2)),
    ],
    ids=str,
)
def test_output_and_log_sum_exp_equal_the_oracle(
    n: int, head_dim: int, q_heads: int, kv_heads: int, pattern: MoBA
) -> None:
    case = make_case(
        batch=2,
        q_heads=q_heads,
        kv_heads=kv_heads,
        seq_len=n,
        head_dim=head_dim,
        lengths=[n, max(1, n // 3)],
    )
    expected = case.oracle(pattern)
    assert (expected.margin > 1e-4).all(), "choose a seed whose choices are beyond doubt"
    assert_matches(case, pattern)


def test_many_tiles_with_every_kernel_in_small_steps() -> None:
    case = make_case(
        batch=2, q_heads=4, kv_heads=2, seq_len=100, head_dim=16, lengths=[100, 61], seed=3
    )
    assert (case.oracle(MoBA(20, 3)).margin > 1e-4).all()
    assert_matches(case, MoBA(20, 3), TINY_MOBA)


def test_all_queries_may_choose_one_block() -> None:
    """One group then fills many tiles, and all others none."""
    case = make_case(q_heads=4, kv_heads=1, seq_len=90, head_dim=16)
    q, k = case.q.abs(), case.k.clone()
    k[:, :, 10:20] = k[:, :, 10:20].abs() + 3
    skewed = case.with_tensors(q, k, case.v)
    got = choose(skewed, MoBA(10, 2), 1)
    assert all(blocks == {1} for blocks in got[0][0][20:])
    assert_matches(skewed, MoBA(10, 2), TINY_MOBA)


def test_kv_heads_in_turns_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from sa_patch.kernels.triton import chosen_blocks_launch as triton_chosen_launch

    case = make_case(batch=2, q_heads=6, kv_heads=3, seq_len=40, head_dim=16, lengths=[40, 21])
    out, lse = run(case, MoBA(6, 3))
    seen = []
    attend_choices = triton_chosen_launch.attend_choices

    def counted(call: Any, *args: Any) -> object:
        seen.append(call.q.shape[1])
        return attend_choices(call, *args)

    monkeypatch.setattr(triton_chosen_launch, "attend_choices", counted)
    monkeypatch.setattr(triton_chosen_launch, "PARTIAL_BYTES", 1)
    out_in_turns, lse_in_turns = run(case, MoBA(6, 3))
    assert seen == [2, 2, 2]
    assert torch.equal(out, out_in_turns) and torch.equal(lse, lse_in_turns)


def test_blocks_of_padding_are_never_chosen() -> None:
    """They are zeros by then, and zero beats every negative score."""
    case = make_case(batch=2, q_heads=2, kv_heads=1, seq_len=40, head_dim=8, lengths=[40, 17])
    q, k = case.q.nan_to_num(0.0).abs(), -case.k.nan_to_num(0.0).abs()
    got = choose(Case(q, k, k, case.lengths), MoBA(4, 3), 2)
    assert all(max(blocks, default=0) < 17 // 4 for blocks in got[1][0])
    assert all(not blocks for blocks in got[1][0][17:])


def test_configurations_of_the_table_agree() -> None:
    """What the table holds for other devices, with the interpreter's numbers."""
    case = make_case(q_heads=4, kv_heads=2, seq_len=70, head_dim=16)
    expected, _ = run(case, MoBA(24, 3), TINY_MOBA)
    big = MobaConfig(Launch(32, 32), Launch(128, 32), Launch(128, 64))
    assert np.allclose(run(case, MoBA(24, 3), big)[0], expected, atol=FP32_TOLERANCE)
    # A band configuration says nothing about these kernels, and must not be taken for theirs.
    assert np.allclose(
        run(case, MoBA(24, 3), BandConfig(Launch(16, 16)))[0], expected, atol=FP32_TOLERANCE
    )
