"""Finding the largest pattern of a family within a share of full attention's FLOPs."""

from __future__ import annotations

import pytest
import torch

from sa_patch import PSA, SWA, Full, MoBA, Sinks
from sa_patch.errors import UserError
from sa_patch.patterns import fit_budget, flops_share, parse_pattern

FAMILIES = [
    "swa:{}",
    "sa:{}",
    "psa:{}",
    "sinks:4+swa:{}",
    "sinks:4+swa:16+sa:{}",
    "moba:16,{}",
    "sinks:4+moba:16,{}",
    "block_topk:8,{},branch=0",
    "block_topk:window={}",
    "sinks:4+swa:12+psa:{}",
]


def test_a_share_counts_scores_results_and_choosing() -> None:
    assert flops_share(Full(), 300) == 1.0
    assert flops_share(SWA(1), 99) == pytest.approx(1 / 50)
    # Queries of block b score b means; blocks of 10, one chosen beside the own.
    keys = sum(min(i, 10 + i % 10) + 1 for i in range(100))
    dots = 10 * sum(range(10))
    assert flops_share(MoBA(10, 2), 100) == pytest.approx((2 * keys + dots) / (100 * 101))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [1 / 5, 1 / 3])
@pytest.mark.parametrize("n", [600, 1000])
def test_the_largest_that_fits_is_found(family: str, n: int, share: float) -> None:
    found = fit_budget(family, n, share)
    assert flops_share(found, n) <= share
    numbers = {str(parse_pattern(family.replace("{}", str(x)))): x for x in _buildable(family, n)}
    larger = numbers[str(found)] + 1
    assert flops_share(parse_pattern(family.replace("{}", str(larger))), n) > share


def test_the_smallest_blocks_may_cost_more_than_larger_ones() -> None:
    assert flops_share(parse_pattern("moba:window=2"), 2048) > 1 / 8
    found = fit_budget("moba:window={}", 2048, 1 / 8)
    assert isinstance(found, MoBA) and found.topk == 2
    assert flops_share(found, 2048) <= 1 / 8
    assert flops_share(MoBA(found.block_size + 1, 2), 2048) > 1 / 8


def test_a_narrow_range_between_small_and_large_numbers_is_found() -> None:
    """Only windows of 24 to 30 fit, choosing costing more below and seeing above."""
    shares = {w: flops_share(parse_pattern(f"moba:window={w}"), 1024) for w in range(2, 101, 2)}
    least = min(shares.values())
    largest = max(w for w, share in shares.items() if share <= 1.01 * least)
    assert largest < 32, "a search by powers of two would find it"
    found = fit_budget("moba:window={}", 1024, 1.01 * least)
    assert found == parse_pattern(f"moba:window={largest}")


def test_a_parameter_may_bound_what_is_sought() -> None:
    found = fit_budget("block_topk:4,{},4,16,beam=4", 4096, 1 / 2)
    assert str(found) == "block_topk:block_size=4,topk=16,sinks=4,local=16,beam=4"


def _buildable(family: str, n: int) -> list[int]:
    found = []
    for number in range(n):
        try:
            parse_pattern(family.replace("{}", str(number)))
        except UserError:
            continue
        found.append(number)
    return found


def test_a_shared_choice_costs_less() -> None:
    flat = "block_topk:4,{},branch=0,grouped=true"
    alone, shared = (fit_budget(flat, 800, 0.2, group=group) for group in (1, 3))
    assert (shared.effective_window or 0) > (alone.effective_window or 0)


@pytest.mark.parametrize(
    ("family", "n", "share", "says"),
    [
        ("swa:64", 100, 0.5, "has {} for the number"),
        ("saa:{}", 100, 0.5, "did you mean 'sa'"),
        ("swa:{}", 100, 0.0, "above 0"),
        ("swa:{}", 100, 1.5, "at most 1"),
        ("swa:{}", 0, 0.5, "at least 1"),
        ("sinks:4+swa:64+sa:{}", 200, 0.1, "take a larger share"),
    ],
)
def test_what_cannot_be_fitted_is_refused(family: str, n: int, share: float, says: str) -> None:
    with pytest.raises(UserError, match=says):
        fit_budget(family, n, share)


def test_the_whole_budget_is_full_attention() -> None:
    assert fit_budget("swa:{}", 64, 1.0).saturated(64)
    assert fit_budget("psa:{}", 64, 1.0).saturated(64)
    assert isinstance(fit_budget("psa:{}", 64, 0.5), PSA)
    counts = Sinks(4).keys_per_query(10)
    assert torch.equal(counts, torch.tensor([1, 2, 3, 4, 4, 4, 4, 4, 4, 4]).double())
