"""Backend `flex` on unions with a ring: calls over disjoint sets of keys, merged.

Every result here comes from compiled code. Patterns share their families where they can: a window,
a ring of each kind alone and behind another, and chosen blocks behind a ring.
"""

from __future__ import annotations

import pytest
import torch

from sa_patch.kernels.flex import backend as flex
from sa_patch.patterns import PSA, SA, SWA, BlockTopK, MoBA, Pattern, Sinks
from tests.kernels.flex.test_flex import FP32_TOLERANCE, case_of, compilations, worst

pytestmark = pytest.mark.skipif(
    bool(flex._cpu_refusal()), reason=f"flex cannot compile here: {flex._cpu_refusal()}"
)

LOCAL = Sinks(4) | SWA(20)
UNIONS: dict[str, list[Pattern]] = {
    "window and ring": [
        LOCAL | SA(20),
        Sinks(3) | SA(30, seed=1, circular=False),
        # Sinks beyond a block, and a window that hides most of the ring.
        Sinks(70) | SWA(150) | SA(9, seed=2),
    ],
    "window and points": [LOCAL | PSA(20), SWA(64) | PSA(90, seed=3)],
    "two rings": [SA(20) | PSA(9, seed=1), LOCAL | SA(7) | PSA(30)],
    "ring and chosen": [
        LOCAL | PSA(9) | BlockTopK(block_size=4, topk=2, sinks=2, local=8),
        PSA(30, seed=5) | MoBA(16, 3),
    ],
}


@pytest.mark.parametrize("family", UNIONS)
def test_equals_reference_and_compiles_once_whatever_the_length(family: str) -> None:
    for pattern in UNIONS[family]:
        assert worst(case_of(200), pattern) <= FP32_TOLERANCE, pattern
    before = compilations()
    for n in (2, 40, 64, 65, 129, 331):
        for pattern in UNIONS[family]:
            assert worst(case_of(n), pattern) <= FP32_TOLERANCE, (pattern, n)
    # A union may be saturated, and is a plain window then.
    assert compilations() - before <= 1


def test_ragged_rows_of_a_prefix_stable_union_take_one_call() -> None:
    pattern = UNIONS["window and points"][0]
    case_of(331).run(pattern, "flex")
    before = compilations()
    case = case_of(331, lengths=[331, 70, 1, 0], batch=4)
    assert worst(case, pattern) <= FP32_TOLERANCE
    assert compilations() == before


def test_ragged_rows_of_a_union_with_slots() -> None:
    case = case_of(331, lengths=[200, 200, 331, 331, 1, 0], batch=6)
    assert worst(case, LOCAL | SA(20)) <= FP32_TOLERANCE


def test_scores_of_any_size_are_merged() -> None:
    """Queries 40 times as large: sums of exponentials that differ beyond the range of floats."""
    case = case_of(200)
    loud = case.with_tensors(case.q * 40, case.k, case.v)
    for pattern in (LOCAL | SA(20), LOCAL | PSA(20)):
        assert worst(loud, pattern) <= 1e-3, "scores of 500 are known to 3e-5 in fp32"


def test_an_equal_case_in_bfloat16_is_merged_in_float32() -> None:
    case = case_of(200, dtype=torch.bfloat16)
    pattern = LOCAL | PSA(20)
    out = case.run(pattern, "flex")
    assert out.dtype == torch.bfloat16
    expected = torch.from_numpy(case.oracle(pattern).output)
    ours = (out.double() - expected).abs()
    theirs = (case.run(pattern, "reference").double() - expected).abs()
    assert ours.max() <= 2 * theirs.max()


def test_changing_a_token_leaves_earlier_ones_bit_identical() -> None:
    case = case_of(200)
    later = [x.clone() for x in (case.q, case.k, case.v)]
    for x in later:
        x[:, :, 150:] *= -30
    for pattern in (LOCAL | SA(20), UNIONS["ring and chosen"][0]):
        before = case.run(pattern, "flex")
        after = case.with_tensors(*later).run(pattern, "flex")
        assert torch.equal(before[:, :, :150], after[:, :, :150])
        assert not torch.equal(before[:, :, 150:], after[:, :, 150:])
