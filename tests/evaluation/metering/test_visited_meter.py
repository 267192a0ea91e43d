"""Visited keys of a model, from a few of its layers."""

from __future__ import annotations

import pytest

from sa_patch.evaluation.metering.visited_meter import VisitedMeter
from sa_patch.patterns import SWA, ByHead, Full, Pattern

N = 512


def visited(patterns: dict[int, Pattern]) -> float:
    meter = VisitedMeter({layer: (own,) for layer, own in patterns.items()}, heads=4, kv_heads=2)
    assert meter.layers == []  # nothing is chosen by content
    return float(meter.summary({N: 1})["visited_keys"]["16"])


def test_every_pattern_counts_by_its_layers() -> None:
    few, many = ByHead((Full(), SWA(16))), SWA(16)
    alone = [visited(dict.fromkeys(range(30), own)) for own in (few, many, Full())]
    # One layer among 30, and not in the middle of any third.
    mixed: dict[int, Pattern] = dict.fromkeys(range(29), many) | {29: few}
    assert visited(mixed) == pytest.approx((alone[0] + 29 * alone[1]) / 30)
    assert visited(mixed | {0: Full()}) == pytest.approx((alone[0] + 28 * alone[1] + alone[2]) / 30)


def test_layers_with_a_window_of_their_own_read_that() -> None:
    own, sparse, full = SWA(16), SWA(32), Full()
    meter = VisitedMeter({0: (own,), 1: (sparse,)}, 4, 2, stock={0: own, 1: full})
    found = meter.summary({N: 1})
    of_own, of_sparse, of_full = (visited({0: one}) for one in (own, sparse, full))
    assert found["visited_keys"]["16"] == pytest.approx((of_own + of_sparse) / 2)
    assert found["full_visited_keys"]["16"] == pytest.approx((of_own + of_full) / 2)
