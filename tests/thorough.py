"""How much is tried: by default what tells most for its time, more of the same when asked for."""

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"


def unless_thorough(few: Sequence[T], every: Sequence[T]) -> Sequence[T]:
    """`few` of a test's cases, or with ``HYPOTHESIS_PROFILE=thorough`` `every` one of them."""
    return every if THOROUGH else few
