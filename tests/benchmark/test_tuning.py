"""Launch parameters are compiled in processes that may die or hang."""

import multiprocessing
import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from sa_patch.benchmark.tuning import compile_beforehand
from sa_patch.kernels.triton.launch_table import BandConfig, Launch
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
