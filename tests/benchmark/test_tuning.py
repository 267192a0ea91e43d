"""Launch parameters are compiled in processes that may die or hang, and timed as time allows."""

import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sa_patch.benchmark.stages import tune as stage
from sa_patch.benchmark.stages.stage import Found, Visit
from sa_patch.benchmark.tuning import Timing, compile_beforehand
from sa_patch.kernels.triton.launch_files import read_table
from sa_patch.kernels.triton.launch_table import USES, BandConfig, Config, Launch
from sa_patch.patterns import SWA

SOUND = BandConfig(Launch(16, 16))


@dataclass(frozen=True)
class _Spoilt(BandConfig):
    """Does something to the process that is handed it, in place of arriving there."""

    does: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return self.does


ABORTS = _Spoilt(Launch(16, 16), does=(os.abort, ()))
HANGS = _Spoilt(Launch(16, 16), does=(time.sleep, (600,)))


def compiled(*configs: BandConfig, seconds: float) -> list[bool]:
    q = torch.zeros(1, 1, 16, 16)
    until = time.monotonic() + seconds
    return compile_beforehand([(SWA(4), config) for config in configs], q, q, 1, until)


def test_a_compiler_that_aborts_costs_only_itself() -> None:
    assert compiled(SOUND, ABORTS, SOUND, seconds=60) == [True, False, True]


def test_a_compiler_that_hangs_is_given_up_when_time_is_up() -> None:
    began, others = time.monotonic(), set(multiprocessing.active_children())
    assert compiled(HANGS, SOUND, seconds=1) == [False, False]
    assert time.monotonic() - began < 10
    assert set(multiprocessing.active_children()) == others


def test_the_beginning_of_a_list_comes_from_all_over_it() -> None:
    every: list[Config] = [BandConfig(Launch(16 * (1 + i), 16)) for i in range(100)]
    spread = stage._spread(every)
    assert spread[0] == every[0] and set(spread) == set(every)
    for count in (4, 10, 25):
        places = sorted(every.index(config) for config in spread[:count])
        gaps = [later - one for one, later in zip(places, [*places[1:], 100], strict=True)]
        assert max(gaps) <= 2 * 100 / count
        # What a list repeats in twos is not always the same one.
        assert {place % 2 for place in places} == {0, 1}


def test_no_more_is_chosen_than_there_is_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "JOBS", 1)
    every: list[Config] = [BandConfig(Launch(16 * (1 + i), 16)) for i in range(100)]
    each = stage.COMPILE_SECONDS + stage.TIME_SECONDS
    assert stage._fitting(every, 4.1 * each) == every[:4]
    assert stage._fitting(every, 1e6) == every
    assert stage._fitting(every, 0.0) == stage._fitting(every, -5.0) == []


class _Card:
    """Compiles so many of what it is asked for, taking all the time it is given, and times it."""

    def __init__(self, compiles: int) -> None:
        self.compiles = compiles
        self.calls: list[int] = []  # candidates of each call to compile
        self.timed: dict[str, list[Config]] = {}
        self.now = 0.0  # seconds

    def monotonic(self) -> float:
        return self.now

    def compile(self, work: Any, q: Any, k: Any, jobs: int, until: float) -> list[bool]:
        self.calls.append(len(work))
        self.now = max(self.now, until)
        return [index < self.compiles for index in range(len(work))]

    def tune(self, pattern: Any, *_: Any, configs: list[Config], until: float, **__: Any) -> Any:
        assert until > self.now
        self.timed[pattern.name] = configs
        return sorted(
            (Timing(config, len(str(config)) + 0.5, 1.0, 2.0) for config in configs),
            key=lambda timing: timing.median_ms,
        )


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> _Card:
    fake = _Card(compiles=80)
    small = Visit(Path(), "cpu", True, 0.0, print)
    inputs = stage._inputs(small)
    monkeypatch.setattr(stage, "_inputs", lambda visit: inputs)
    monkeypatch.setattr(stage, "compile_beforehand", fake.compile)
    monkeypatch.setattr(stage, "tune", fake.tune)
    monkeypatch.setattr(stage, "time", fake)
    monkeypatch.setattr(stage, "START_SECONDS", 0.1)
    monkeypatch.setattr(stage, "COMPILE_SECONDS", 1e-4)
    monkeypatch.setattr(stage, "TIME_SECONDS", 1e-4)
    return fake


def tuned(card: _Card, out: Path) -> Found:
    return stage.tune_kernels(Visit(out, "cpu", False, card.now + 1.0, lambda line: None))


def test_slow_compiling_leaves_time_for_what_is_compiled(card: _Card, tmp_path: Path) -> None:
    found = tuned(card, tmp_path)
    (wanted,) = card.calls
    assert wanted > card.compiles and not found.wrong
    assert found.missing == wanted - card.compiles
    assert sum(map(len, card.timed.values())) == card.compiles
    # Every use has its share of what was compiled.
    assert len(card.timed) == len(USES) and min(map(len, card.timed.values())) >= 2


def test_a_later_call_goes_on_with_what_found_no_time(card: _Card, tmp_path: Path) -> None:
    first = tuned(card, tmp_path)
    before = dict(card.timed)
    (table,) = tmp_path.glob("interpreter-*.json")
    assert len(read_table(table)) == len(USES)
    card.compiles = 10_000
    second = tuned(card, tmp_path)
    assert second.missing == 0 and first.missing == card.calls[1] - len(USES)
    for name, configs in card.timed.items():
        best = min(before[name], key=lambda config: len(str(config)))
        assert configs[0] == best and not set(configs[1:]) & set(before[name])
    assert all(told == "kept from an earlier call" for _, told in tuned(card, tmp_path).rows)
    assert len(card.calls) == 3 and card.calls[2] == 0
