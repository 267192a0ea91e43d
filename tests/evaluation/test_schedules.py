"""Schedules of equal budget: by measured harm, and by rules of thumb."""

from collections.abc import Callable, Sequence

import pytest

from sa_patch.errors import UserError
from sa_patch.evaluation.calibration.measurement import (
    RIVALS,
    check_budget,
    ends,
    every_kth,
    first,
    last,
    most_harmed,
)

LAYERS = [2, 3, 5, 7, 11, 13, 17]


def test_the_most_harmed_layers_stay_full() -> None:
    rises = {0: 0.1, 1: -0.2, 2: 0.5, 3: 0.1}
    assert [most_harmed(rises, budget) for budget in range(4)] == [[], [2], [0, 2], [0, 2, 3]]


@pytest.mark.parametrize(
    ("rule", "budget", "full"),
    [
        (every_kth, 1, [7]),
        (every_kth, 2, [3, 13]),
        (every_kth, 3, [3, 7, 13]),
        (first, 2, [2, 3]),
        (last, 2, [13, 17]),
        (ends, 1, [2]),
        (ends, 2, [2, 17]),
        (ends, 3, [2, 3, 17]),
    ],
)
def test_rules_of_thumb(
    rule: Callable[[Sequence[int], int], list[int]], budget: int, full: list[int]
) -> None:
    assert rule(LAYERS, budget) == full


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_every_rule_keeps_to_every_budget(name: str, count: int) -> None:
    layers = list(range(10, 10 + count))
    for budget in range(count):
        full = RIVALS[name](layers, budget)
        assert len(set(full)) == budget and full == sorted(full) and set(full) <= set(layers)


def test_one_layer_in_five_is_full_unless_said_otherwise() -> None:
    assert [check_budget(None, range(n)) for n in (1, 2, 5, 9, 10, 30)] == [0, 1, 1, 1, 2, 6]
    assert check_budget(0, range(3)) == 0
    assert check_budget(2, range(3)) == 2
    for budget in (-1, 3):
        with pytest.raises(UserError, match=f"from 0 to 2; got {budget}"):
            check_budget(budget, range(3))
