"""The meter against counts made by hand from the definition."""

from __future__ import annotations

import pytest
import torch

from sa_patch import PSA, SA, SWA, BlockTopK, Full, MoBA, Sinks, Tail
from sa_patch.evaluation.metering.observed_keys import SAMPLED_QUERIES, sampled_positions
from sa_patch.evaluation.metering.pattern_meter import HeadShape, PatternMeter
from sa_patch.kernels import Spans
from sa_patch.patterns import FlashPrefill, Pattern
from tests.small_models import tiny_config

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 8, 3
SHAPE = HeadShape(HEADS, KV_HEADS, HEAD_DIM)


def meter(pattern: Pattern, sparse: tuple[int, ...] = (0, 1, 2)) -> PatternMeter:
    return PatternMeter(
        {layer: pattern if layer in sparse else None for layer in range(LAYERS)}, SHAPE
    )


def dense_count(pattern: Pattern, n: int, layer: int) -> torch.Tensor:
    positions = torch.arange(n)
    q = torch.randn(HEADS, n, HEAD_DIM)
    mask = pattern.visible(positions, n, layer=layer, heads=HEADS, q=q, k=q[:2])
    return mask.expand(HEADS, n, n).sum(-1).double().mean(0)


@pytest.mark.parametrize(
    "pattern",
    [
        Full(),
        SWA(5),
        SA(5),
        SA(3, per_head=True),
        SA(4, circular=False),
        MoBA(4, 2),
        PSA(6, seed=2),
        Sinks(2) | SWA(3) | SA(4, seed=1),
        BlockTopK(2, 3, 1, 2, grouped=True),
    ],
    ids=str,
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
    dots = [float(pattern.selection_dots(n, HEADS // KV_HEADS).sum()) for n in lengths]
    choosing = sum(dots) * LAYERS
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


def test_every_layer_counts_with_its_own_pattern() -> None:
    measured = PatternMeter({0: SWA(2), 1: None, 2: SWA(3)}, SHAPE)
    measured.add([10])
    summary = measured.summary()
    assert summary["mean_keys_per_query"] == pytest.approx((19 + 55 + 27) / 30)
    assert summary["last_query_keys"] == pytest.approx((2 + 10 + 3) / 3)
    assert summary["saturated_fraction"] == 0
    dense = PatternMeter({0: SWA(20), 1: None, 2: SWA(10)}, SHAPE)
    dense.add([10])
    assert dense.summary()["saturated_fraction"] == 1


def prefill(rows: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, HEADS, n, HEAD_DIM, generator=generator)
    return q, torch.randn(rows, KV_HEADS, n, HEAD_DIM, generator=generator)


def seen_keys(pattern: Pattern, layer: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Visible keys of every query of one row, mean over heads."""
    n = q.shape[1]
    mask = pattern.visible(torch.arange(n), n, layer=layer, heads=HEADS, q=q, k=k)
    return mask.sum(-1).double().mean(0)


def test_chosen_keys_that_coincide_with_others_are_counted_where_they_are_chosen() -> None:
    union = Sinks(2) | SWA(6) | MoBA(4, 3)
    measured = PatternMeter({0: union, 1: None, 2: union}, SHAPE)
    assert measured.observed_layers == [0, 2]
    lengths = (20, 31)
    measured.add(lengths)
    pairs = last = 0.0
    for layer in (0, 2):
        q, k = prefill(2, 31, seed=layer)
        measured.observe(layer, q, k, Spans(lengths, (0, 0)))
        for row, n in enumerate(lengths):
            counts = seen_keys(union, layer, q[row, :, :n], k[row, :, :n])
            pairs, last = pairs + float(counts.sum()), last + float(counts[-1])
    summary = measured.summary()
    full = sum(n * (n + 1) / 2 for n in lengths)
    assert summary["mean_keys_per_query"] == pytest.approx((pairs + full) / (51 * 3))
    assert summary["last_query_keys"] == pytest.approx((last + 51) / 6)
    dots = sum(float(union.selection_dots(n, 2).sum()) for n in lengths)
    assert summary["attention_flops"] == pytest.approx(
        (4 * (pairs + full) + 2 * 2 * dots) * HEAD_DIM * HEADS
    )


def test_a_long_prefill_is_counted_on_a_sample() -> None:
    union = SWA(9) | MoBA(8, 3)
    n = 50 * SAMPLED_QUERIES + 13
    measured = PatternMeter({0: union}, SHAPE)
    q, k = prefill(1, n, seed=1)
    measured.add([n])
    measured.observe(0, q, k, Spans((n,), (0,)))
    positions = sampled_positions(n)
    assert len(positions) == SAMPLED_QUERIES
    whole = float(seen_keys(union, 0, q[0], k[0]).mean())
    assert measured.summary()["mean_keys_per_query"] == pytest.approx(whole, rel=0.05)


def test_sampled_positions_are_spread_evenly() -> None:
    assert sampled_positions(5).tolist() == [0, 1, 2, 3, 4]
    positions = sampled_positions(64 * 10)
    assert positions.tolist() == [10 * part + 5 for part in range(64)]


def test_what_continues_a_cache_is_no_prefill_and_what_was_not_seen_is_an_error() -> None:
    measured = PatternMeter({0: SWA(2) | MoBA(2, 2)}, SHAPE)
    measured.add([9])
    q, k = prefill(1, 9, seed=0)
    measured.observe(0, q[:, :, 8:], k, Spans((9,), (8,)))
    with pytest.raises(RuntimeError, match="layer 0"):
        measured.summary()


def test_heads_are_read_from_the_configuration() -> None:
    assert HeadShape.of(tiny_config("qwen3")) == HeadShape(4, 2, 16)
    assert HeadShape.of(tiny_config("llama")) == HeadShape(4, 2, 8)


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


@pytest.mark.parametrize(
    "union", [SWA(9) | MoBA(8, 3) | Tail(70), FlashPrefill(0.9, 16, 1, 1, last=5)], ids=str
)
def test_a_dense_end_is_counted_by_itself(union: Pattern) -> None:
    n = 20 * SAMPLED_QUERIES
    measured = PatternMeter({0: union}, SHAPE)
    q, k = prefill(1, n, seed=3)
    measured.add([n])
    measured.observe(0, q, k, Spans((n,), (0,)))
    seen = seen_keys(union, 0, q[0], k[0])
    summary = measured.summary()
    assert summary["mean_keys_per_query"] == pytest.approx(float(seen.mean()), rel=0.02)
    assert summary["last_query_keys"] == n


def test_layers_with_a_window_of_their_own_count_as_that() -> None:
    n, stock = 20, {0: SWA(5), 1: Full(), 2: SWA(5)}
    own, full, sparse = (float(dense_count(one, n, 0).sum()) for one in (SWA(5), Full(), SWA(3)))
    measured = PatternMeter({0: None, 1: SWA(3), 2: None}, SHAPE, stock)
    measured.add([n])
    found = measured.summary()
    per_pair = 4 * HEAD_DIM * HEADS
    assert found["attention_flops"] == pytest.approx(per_pair * (2 * own + sparse))
    assert found["full_attention_flops"] == pytest.approx(per_pair * (2 * own + full))
    assert found["mean_keys_per_query"] == pytest.approx((2 * own + sparse) / (LAYERS * n))
    assert found["saturated_fraction"] == 0
    hides_nothing = PatternMeter({0: None, 1: SWA(n), 2: None}, SHAPE, stock)
    hides_nothing.add([n])
    found = hides_nothing.summary()
    assert found["attention_flops"] == found["full_attention_flops"]
    assert found["saturated_fraction"] == 1
