"""The methods of `sa_patch.patterns.rivals` written a second time, from their papers.

As in `tests/oracle.py` everything is float64, NumPy and plain loops, and nothing comes from
`sa_patch`. A function takes the queries of one head, its keys and the method's own parameters, and
returns what every query sees, with the margin by which its choice was made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CERTAIN = float("inf")


@dataclass
class Seen:
    """keys: for each query a set; margin: for each query how far its choice was from another."""

    keys: list[set[int]]
    margin: list[float]


def power(queries: Floats, keys: Floats, *, window: int, block_size: int) -> Seen:
    """PowerAttention (2503.03588, section 3.3): the window, own block, and blocks 2^k before it."""
    seen: list[set[int]] = []
    for i in range(len(queries)):
        own = i // block_size
        blocks = {own}
        apart = 1
        while apart <= own:
            blocks.add(own - apart)
            apart *= 2
        in_blocks = {j for j in range(i + 1) if j // block_size in blocks}
        seen.append(in_blocks | set(range(max(0, i - window + 1), i + 1)))
    return Seen(seen, [CERTAIN] * len(queries))


METHODS: dict[str, Callable[..., Seen]] = {"power": power}


def visible(method: str, queries: Floats, keys: Floats, arguments: dict[str, Any]) -> Seen:
    """queries: [n, head_dim] of one head; keys: [n, head_dim]."""
    seen = METHODS[method](queries, keys, **arguments)
    for i, own in enumerate(seen.keys):
        assert own and max(own) <= i, "the oracle itself looks ahead"
    return seen
