"""Which backends really served: a record of the calls that `auto` and names were resolved to."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sa_patch.kernels.backend import Backend
from sa_patch.kernels.dispatch import BACKENDS


@contextmanager
def counting_backends() -> Iterator[Counter[str]]:
    """How often each backend is called inside."""
    calls: Counter[str] = Counter()
    before = dict(BACKENDS)
    for name, backend in before.items():
        BACKENDS[name] = _counted(backend, calls)
    try:
        yield calls
    finally:
        BACKENDS.update(before)


def served_by(calls: Counter[str]) -> str:
    """Such as ``attention by triton (36 calls)``."""
    if not calls:
        return "no attention call of a pattern"
    names = (f"{name} ({count:,} calls)" for name, count in calls.most_common())
    return f"attention by {', '.join(names)}"


def _counted(backend: Backend, calls: Counter[str]) -> Backend:
    def attend(*args: Any, **kwargs: Any) -> Any:
        calls[backend.name] += 1
        return backend.attend(*args, **kwargs)

    return dataclasses.replace(backend, attend=attend)
