"""Independent trainings: one after another, or several at once on CPU cores of their own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice, starmap
from typing import Any, TypeVar

import torch

from sa_patch.errors import UserError

Result = TypeVar("Result")


def whole_numbers(text: str, option: str) -> list[int]:
    """Different whole numbers between commas; `option` names them in messages.

    Raises:
        UserError: for anything else.
    """
    parts = text.split(",")
    # `isdigit` holds for ² too, which `int` does not read.
    numbers = [int(part) for part in parts if part.isdecimal()]
    if len(set(numbers)) < len(parts):
        raise UserError(f"{option} must be different whole numbers such as 0,1,2, got {text!r}")
    return numbers


def read_cores(text: str | None) -> list[int] | None:
    """From the option ``--cores 0,1``; None where it is not given.

    Raises:
        UserError: for cores that this process may not use, or a system that binds none.
    """
    if not text:
        return None
    cores = whole_numbers(text, "--cores")
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("this system cannot bind a process to a core; leave --cores out")
    if not set(cores) <= os.sched_getaffinity(0):
        raise UserError(f"--cores {text}: usable are {sorted(os.sched_getaffinity(0))}")
    return cores


def train_each(
    train: Callable[..., Result], runs: Iterable[tuple[Any, ...]], cores: Sequence[int] | None
) -> Iterator[Result]:
    """What `train` returns for each run's arguments, as it is done.

    Args:
        cores: that many runs at once, each in a process on one core and one thread; None for one
            after another in this process.

    Raises:
        UserError: if a process was killed from outside.
    """
    if cores is None:
        yield from starmap(train, runs)
        return
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for core in cores:
        free.put(core)
    with ProcessPoolExecutor(len(cores), context, initializer=_bind, initargs=(free,)) as pool:
        waiting = iter(runs)
        # No more than there are cores: a pool cannot take back what it has queued.
        going = {pool.submit(train, *run) for run in islice(waiting, len(cores))}
        try:
            while going:
                done, going = wait(going, return_when=FIRST_COMPLETED)
                for future in done:
                    result = future.result()
                    going |= {pool.submit(train, *run) for run in islice(waiting, 1)}
                    yield result
        except BrokenProcessPool as error:
            raise UserError("a training process was killed; the same command goes on") from error


def _bind(free: Any) -> None:
    """A worker takes a core of its own from a queue of them, and computes on one thread."""
    os.sched_setaffinity(0, {free.get()})
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
