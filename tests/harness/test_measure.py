"""The meter against counts made by hand from the definition."""

from __future__ import annotations

import pytest
import torch

from sa_patch import SA, SWA, Full, MoBA
from sa_patch.harness.measure import PatternMeter
from sa_patch.patterns import Pattern

HEADS, HEAD_DIM, LAYERS = 4, 8, 3


def meter(pattern: Pattern, sparse: tuple[int, ...] = (0, 1, 2)) -> PatternMeter:
    return PatternMeter(
        pattern, sparse_layers=sparse, all_layers=range(LAYERS), heads=HEADS, head_dim=HEAD_DIM
    )


def dense_count(pattern: Pattern, n: int, layer: int) -> torch.Tensor:
    positions = torch.arange(n)
    q = torch.randn(HEADS, n, HEAD_DIM)
    mask = pattern.visible(positions, n, layer=layer, heads=HEADS, q=q, k=q[:2])
    return mask.expand(HEADS, n, n).sum(-1).double().mean(0)


@pytest.mark.parametrize(
    "pattern", [Full(), SWA(5), SA(5), SA(3, per_head=True), SA(4, circular=False), MoBA(4, 2)]
)
def test_figures_equal_a_count_of_the_masks(pattern: Pattern) -> None:
    lengths = [20, 20, 31]
    measured = meter(pattern)
    measured.add(lengths)
    summary = measured.summary()
    counts = {n: [dense_count(pattern, n, layer) for layer in range(LAYERS)] for n in (20, 31)}
    pairs = sum(float(count.sum()) for n in lengths for count in counts[n])
    last = sum(float(count[-1]) for n in lengths for count in counts[n])
    assert summary["sequences"] == 3
    assert summary["tokens"] == 71
    assert summary["prompt_lengths"] == {"min": 20, "mean": 71 / 3, "max": 31}
    assert summary["mean_keys_per_query"] == pytest.approx(pairs / (71 * LAYERS))
    assert summary["last_query_keys"] == pytest.approx(last / (3 * LAYERS))
    choosing = sum(float(pattern.selection_dots(n).sum()) for n in lengths) * LAYERS
    assert summary["attention_flops"] == pytest.approx(
        (4 * pairs + 2 * choosing) * HEAD_DIM * HEADS
    )
    full = sum(n * (n + 1) / 2 for n in lengths) * LAYERS
    assert summary["full_attention_flops"] == pytest.approx(4 * full * HEAD_DIM * HEADS)


def test_layers_left_out_count_as_full_attention() -> None:
    measured = meter(SWA(2), sparse=(1,))
    measured.add([10])
    sparse, full = 1 + 9 * 2, 55
    assert measured.summary()["mean_keys_per_query"] == pytest.approx((sparse + 2 * full) / 30)


def test_choosing_blocks_is_paid_for() -> None:
    # Blocks of 4 in 10 tokens: queries 4-7 score one earlier block, queries 8-9 two.
    assert float(MoBA(4, 2).selection_dots(10).sum()) == 4 * 1 + 2 * 2
    assert float(MoBA(4, 1).selection_dots(10).sum()) == 0


def test_saturated_fraction_is_a_share_of_sequences() -> None:
    measured = meter(SWA(16))
    measured.add([10, 16, 17, 40])
    assert measured.summary()["saturated_fraction"] == 0.5


def test_reset_forgets_and_nothing_counted_is_not_zero_keys() -> None:
    measured = meter(SWA(4))
    measured.add([5, 0])
    assert measured.counts() == {5: 1}
    measured.reset()
    assert measured.summary()["mean_keys_per_query"] is None
