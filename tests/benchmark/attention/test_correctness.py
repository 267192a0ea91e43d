"""The benchmark's correctness check: its oracle against another one, and what it lets pass.

Seen red when the oracle ignored the layer, ten times the tolerance was allowed, NaN passed, three
times the error of torch was taken for twice, and ties of MoBA were compared.
"""

import numpy as np
import pytest
import torch

from sa_patch import sparse_attention
from sa_patch.benchmark.attention.correctness import (
    FP32_TOLERANCE,
    HALF_FACTOR,
    Verdict,
    expect,
    judge,
    merge,
    sample_positions,
)
from sa_patch.patterns import SA, SWA, Full, MoBA, Pattern
from tests.laws.strategies import Case, make_case
from tests.oracle import choice_margin

PATTERNS: list[Pattern] = [
    Full(),
    SWA(7),
    SA(7, seed=3),
    SA(7, circular=False),
    SA(5, per_head=True),
    MoBA(8, 3),
    MoBA(5, 1),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("q_heads, kv_heads", [(4, 2), (6, 1), (3, 3)])
def test_the_sampled_oracle_equals_the_one_written_apart(
    q_heads: int, kv_heads: int, pattern: Pattern
) -> None:
    case = make_case(
        batch=2, q_heads=q_heads, kv_heads=kv_heads, seq_len=90, lengths=[90, 70], layer=2
    )
    theirs = case.oracle(pattern)
    for row, length in enumerate(case.real_tokens()):
        ours = expect(pattern, case.q, case.k, case.v, layer=2, row=row, length=length)
        assert ours.positions[-1] == length - 1 and len(ours.positions) > 50
        wanted = torch.from_numpy(theirs.output[row][:, ours.positions.numpy()])
        decided = ours.decided
        assert float((ours.output - wanted)[decided].abs().max()) < 1e-12
        assert float(decided.double().mean()) > 0.95
        margins = theirs.margin[row][:, ours.positions.numpy()]
        assert np.array_equal(decided.numpy(), margins > 1e-4)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000, 131072])
def test_sampled_positions_are_spread_and_hold_both_ends(length: int) -> None:
    positions = sample_positions(length, seed=1, device=torch.device("cpu")).tolist()
    assert positions == sorted(set(positions))
    assert positions[0] == 0 and positions[-1] == length - 1
    assert min(length, 48) <= len(positions) <= 64
    gaps = np.diff([*positions, length])
    assert gaps.max() <= max(1, 2 * length / 64 + 1)


def sparse(case: Case, pattern: Pattern) -> torch.Tensor:
    return sparse_attention(case.q, case.k, case.v, pattern, layer=case.layer, backend="reference")


def verdict(case: Case, out: torch.Tensor, pattern: Pattern) -> Verdict:
    return judge(out, expect(pattern, case.q, case.k, case.v, layer=case.layer))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_right_result_passes_and_a_slightly_wrong_one_does_not(pattern: Pattern) -> None:
    case = make_case(seq_len=90, layer=1)
    out = sparse(case, pattern)
    right = verdict(case, out, pattern)
    assert right.passed and right.error < 2e-6 and right.tolerance == FP32_TOLERANCE
    assert right.compared + right.undecided == 4 * len(sample_positions(90, 90, out.device))
    last = out.clone()
    last[0, -1, -1, -1] += 3e-5
    assert "off by 3.0e-05, allowed 1.0e-05" in verdict(case, last, pattern).reason
    assert "not finite" in verdict(case, torch.full_like(out, torch.nan), pattern).reason


def test_a_window_that_is_one_key_wide_of_the_mark_is_seen() -> None:
    case = make_case(seq_len=500, layer=1)
    for right, wrong in ((SWA(64), SWA(65)), (SA(64), SA(63)), (MoBA(16, 3), MoBA(16, 4))):
        assert verdict(case, sparse(case, right), right).passed
        assert not verdict(case, sparse(case, wrong), right).passed
    other = make_case(seq_len=500, layer=2)
    assert not verdict(case, sparse(other, SA(64)), SA(64)).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_held_to_twice_the_error_of_torch(dtype: torch.dtype) -> None:
    case = make_case(seq_len=90, dtype=dtype, head_dim=64)
    for pattern in PATTERNS:
        out = sparse(case, pattern)
        expected = expect(pattern, case.q, case.k, case.v, layer=0)
        found = judge(out, expected)
        assert found.passed
        assert expected.peer_error is not None and found.tolerance == 2 * expected.peer_error
        off = out.double()
        off[0, :, expected.positions] = expected.output + 3 * expected.peer_error
        assert not judge(off, expected).passed
        # Small everywhere: each difference is allowed, all of them together are not.
        off[0, :, expected.positions] = expected.output + 1.9 * expected.peer_error
        assert "root mean square" in judge(off, expected).reason
    assert HALF_FACTOR == 2


def test_queries_whose_choice_is_a_tie_are_not_compared() -> None:
    case = make_case(seq_len=64, q_heads=2, kv_heads=1)
    k = case.k.clone()
    k[:, :, 8:16] = k[:, :, 0:8]  # two blocks with one mean
    pattern = MoBA(8, 2)
    tied = case.with_tensors(case.q, k, case.v)
    expected = expect(pattern, tied.q, tied.k, tied.v, layer=0)
    assert 0 < int((~expected.decided).sum()) < expected.decided.numel() / 2
    for head, sample in zip(*torch.where(~expected.decided), strict=True):
        query = tied.q[0, head, expected.positions[sample]].double().numpy()
        blocks = tied.k[0, 0].double().unflatten(0, (-1, 8)).mean(1).numpy()
        own = int(expected.positions[sample]) // 8
        assert choice_margin([float(query @ mean) for mean in blocks[:own]], 1) < 1e-4
    out = sparse(tied, pattern)
    out[
        0, ~expected.decided.new_zeros(2, 64).index_copy(1, expected.positions, expected.decided)
    ] = 9
    assert "choices are ties" in judge(out, expected).reason, "too many ties to be sure"


def test_a_check_that_is_all_ties_does_not_pass() -> None:
    case = make_case(seq_len=64)
    same = case.with_tensors(case.q, torch.ones_like(case.k), case.v)
    found = verdict(same, sparse(same, MoBA(8, 2)), MoBA(8, 2))
    assert not found.passed and "cannot be checked" in found.reason


def test_the_worst_row_speaks_for_the_batch() -> None:
    good, bad = Verdict(1e-7, 1e-5, 10, 1), Verdict(1e-3, 1e-5, 20, 2, "off")
    assert merge([good, bad, good]) == Verdict(1e-3, 1e-5, 40, 4, "off")
    assert merge([good, Verdict(2e-7, 1e-5, 5, 0)]).error == 2e-7
