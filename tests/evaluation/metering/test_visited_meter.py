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
