"""Room on Python's stack, without which a hot loop may ask the system for memory at every call.

CPython (3.11 and later) keeps frames in chunks of 16 KiB and gives a chunk back as soon as its last
frame ends. Where a loop happens to stand at the end of a chunk, each call in it maps and unmaps
one: a third of the time of a kernel in Triton's interpreter. A frame too large for such a chunk is
given one of twice its size, in which what it calls then fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Values of 8 bytes: half a MiB for the frame, and as much for what it calls.
_VALUES = 1 << 16


def with_room(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, called from a frame that leaves room for many more."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_stacksize=_VALUES)
    return call
