"""How long a model's own calls took, without what is only there to measure them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ModelClock:
    """Adds up the wall-clock seconds of the calls that run under `running`.

    On a GPU it waits for the work that was queued before, and for its own, so that each call is
    given its own time and no other's.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside."""
        start = _now()
        try:
            yield
        finally:
            self.seconds += _now() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside; for use within `running`."""
        start = _now()
        try:
            yield
        finally:
            self.seconds -= _now() - start


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
