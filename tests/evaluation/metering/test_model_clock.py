"""The clock of a model's calls."""

import pytest

from sa_patch.evaluation.metering import model_clock
from sa_patch.evaluation.metering.model_clock import ModelClock


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Times that the clock reads, one after the other."""
    readings: list[float] = []
    monkeypatch.setattr(model_clock, "_now", lambda: readings.pop(0))
    return readings


def test_calls_add_up_without_what_happens_between_them(hands: list[float]) -> None:
    clock = ModelClock()
    hands += [1.0, 3.0, 10.0, 14.0]
    for _ in range(2):
        with clock.running():
            pass
    assert clock.seconds == 2.0 + 4.0


def test_what_is_done_to_measure_is_left_out(hands: list[float]) -> None:
    clock = ModelClock()
    hands += [0.0, 2.0, 5.0, 9.0]
    with clock.running(), clock.paused():
        pass
    assert clock.seconds == 9.0 - 3.0


def test_a_call_that_fails_counts_as_long_as_it_took(hands: list[float]) -> None:
    clock = ModelClock()
    hands += [0.0, 2.0]
    with pytest.raises(RuntimeError), clock.running():
        raise RuntimeError
    assert clock.seconds == 2.0
