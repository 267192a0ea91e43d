"""FLOPs by closed form are those of counted keys, and grow as they should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa_patch.analysis.cost import measure_cost
from sa_patch.errors import UserError
from sa_patch.patterns import SA, SWA, ByHead, Full, MoBA, Pattern, Sinks


@given(n=st.integers(1, 200), window=st.integers(1, 40), head_dim=st.integers(1, 128))
def test_expected_is_counted_where_nothing_is_random(n: int, window: int, head_dim: int) -> None:
    for pattern in (SWA(window), Full(), Sinks(3) | SWA(window)):
        cost = measure_cost(pattern, [n], head_dim=head_dim)
        assert cost.expected[0] == pytest.approx(cost.counted[0])
        assert cost.exponent() is None
    assert measure_cost(Full(), [n], head_dim=head_dim).expected[0] == 2 * head_dim * n * (n + 1)


@pytest.mark.parametrize("heads", [(Full(), SWA(2)), (SWA(2), Full()), (SWA(5), SWA(5), Full())])
def test_of_heads_the_mean_is_expected_and_counted(heads: tuple[Pattern, ...]) -> None:
    cost = measure_cost(ByHead(heads), [64])
    alone = [measure_cost(own, [64]).counted[0] for own in heads]
    assert cost.expected[0] == pytest.approx(cost.counted[0])
    assert cost.counted[0] == pytest.approx(np.mean(alone))


def test_growth() -> None:
    lengths = [4096, 8192, 16384]
    full, swa, sa = (measure_cost(p, lengths, count_up_to=4096) for p in (Full(), SWA(64), SA(64)))
    assert full.exponent() == pytest.approx(2, abs=1e-3)
    assert swa.exponent() == pytest.approx(1, abs=0.01)
    assert sa.exponent() == pytest.approx(1, abs=0.01)
    # Half of an SA query's candidates lie ahead: w keys on average, in every draw.
    assert sa.counted[0] / (4 * 64 * 4096) == pytest.approx(64, rel=0.02)
    assert np.isnan(sa.counted[1:]).all()


def test_choosing_is_counted_and_shared_within_a_group() -> None:
    alone, shared = (measure_cost(MoBA(16), [1024], group=group) for group in (1, 2))
    keys = 4 * 64 * float(MoBA(16).keys_per_query(1024).sum())
    dots = float(MoBA(16).selection_dots(1024, 1).sum())
    assert alone.expected[0] == pytest.approx(keys + 2 * 64 * dots) and dots > 0
    assert keys <= shared.expected[0] <= alone.expected[0] and np.isnan(alone.counted[0])


@pytest.mark.parametrize(
    ("lengths", "options", "says"),
    [
        ([], {}, "lengths must rise"),
        ([8, 4], {}, "lengths must rise"),
        ([0, 4], {}, "n must be a whole number"),
        ([4], {"head_dim": 0}, "head_dim must be a whole number"),
        ([4], {"group": 0}, "group must be a whole number"),
    ],
)
def test_bad_numbers(lengths: list[int], options: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        measure_cost(Full(), lengths, **options)
