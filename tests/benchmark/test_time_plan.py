"""What fits into a benchmark's time.

Seen red when the baseline was refused before a quicker cell, two repetitions were enough, and
memory of a dense mask was taken to grow as n.
"""

import pytest

from sa_patch.benchmark.attention.candidates import Candidate
from sa_patch.benchmark.time_plan import (
    History,
    Seen,
    length_share,
    refuse,
    repetitions,
    rounds_of,
)
from sa_patch.patterns import SWA, Full, Pattern


def contestant(name: str, pattern: Pattern, dense: bool = False) -> Candidate:
    return Candidate(name, "b", pattern, lambda q, k, v, layer: q, dense=dense)


def test_time_grows_with_the_needed_work_and_a_dense_mask_as_the_square() -> None:
    history = History()
    full, swa = contestant("full", Full()), contestant("swa", SWA(16))
    mask = contestant("mask", SWA(16), dense=True)
    for one in (full, swa, mask):
        assert history.milliseconds(one, 100) is None and history.extra_bytes(one, 100) is None
        history.keep(one, Seen(1000, 10.0, 500))
    assert history.milliseconds(full, 2000) == pytest.approx(40, rel=0.01)
    assert history.milliseconds(swa, 2000) == pytest.approx(20, rel=0.02)
    assert history.milliseconds(mask, 2000) == 40
    assert history.extra_bytes(swa, 4000) == 2000 and history.extra_bytes(mask, 4000) == 8000
    history.keep(swa, Seen(500, 99.0, 1))
    assert history.seen[swa.key].n == 1000, "a shorter call must not replace a longer one"


def test_the_baseline_comes_first_and_the_quick_before_the_slow() -> None:
    history = History()
    base = contestant("base", Full())
    cells = {name: contestant(name, SWA(4)) for name in ("slow", "quick", "new")}
    for one, ms in ((base, 1000.0), (cells["slow"], 900.0), (cells["quick"], 10.0)):
        history.keep(one, Seen(64, ms, 0))
    everyone = [base, *cells.values()]

    def refused(seconds: float) -> set[str]:
        reasons = refuse(everyone, history, 64, seconds=seconds, free_bytes=None)
        return {key.partition(" |")[0] for key in reasons}

    assert refused(100) == set()
    # The baseline costs its check and 3 repetitions, the slow cell a call more as it is quicker.
    assert refused(4 * 1.0 + 5 * 0.01 + 5 * 0.9 + 0.01) == set()
    assert refused(4 * 1.0 + 5 * 0.01 + 5 * 0.9 - 0.01) == {"slow"}
    assert refused(4 * 1.0 + 5 * 0.01 + 0.01) == {"slow"}
    assert refused(4 * 1.0 - 0.01) == {"base", "slow"}
    assert refused(0) == {"base", "slow", "quick", "new"}


def test_what_would_not_fit_into_memory_is_refused_with_the_figures() -> None:
    history, one = History(), contestant("mask", SWA(4), dense=True)
    history.keep(one, Seen(1024, 1.0, 1 << 30))
    free = 8 << 30
    assert refuse([one], history, 2048, seconds=99, free_bytes=free) == {}
    reasons = refuse([one], history, 4096, seconds=99, free_bytes=free)
    assert reasons == {one.key: "would take about 16 GiB of 8 GiB free"}


def test_repetitions_share_the_time_alike() -> None:
    assert repetitions({"a": 10.0, "b": 10.0}, seconds=1, most=15) == {"a": 15, "b": 15}
    assert repetitions({"a": 10.0, "b": 10.0}, seconds=0.2, most=15) == {"a": 10, "b": 10}
    assert repetitions({"a": 10.0, "b": 100.0}, seconds=1.05, most=15) == {"a": 15, "b": 9}
    assert repetitions({"a": 1e4}, seconds=0, most=15) == {"a": 3}
    assert repetitions({"a": 1e4}, seconds=0, most=2) == {"a": 2}
    assert repetitions({}, seconds=1, most=2) == {}


@pytest.mark.parametrize("count", [0, 1, 3, 7, 15])
def test_a_cell_takes_part_in_rounds_spread_over_the_whole(count: int) -> None:
    chosen = rounds_of(count, 15)
    assert len(chosen) == count and chosen <= set(range(15))
    if count > 1:
        assert min(chosen) == 0 and max(chosen) >= 15 - 15 / count - 1


def test_later_lengths_get_more_of_the_time() -> None:
    assert length_share(1, [1, 4]) == pytest.approx(1 / 9) and length_share(3, [3]) == 1
