"""Trainings at once, each in a process that is bound to a core of its own."""

import os

import pytest

from sa_patch.training.cores import train_each


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no processes")
def test_every_run_is_done_once_on_the_core_it_was_given() -> None:
    core = max(os.sched_getaffinity(0))
    found = train_each(os.sched_getaffinity, [(0,), (0,), (0,)], [core])
    assert list(found) == [{core}] * 3
