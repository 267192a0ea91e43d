"""Patterns for the laws: random, narrow and saturating ones, and what the oracle is told.

A new method has to be given its line in each of these.
"""

import functools
from typing import Any

import numpy as np
from hypothesis import strategies as st

from sa_patch.patterns import (
    PATTERNS,
    PSA,
    RIVALS,
    SA,
    SWA,
    BlockTopK,
    Full,
    MoBA,
    Pattern,
    Sinks,
    Tail,
    Union,
    unite,
)
from sa_patch.patterns.permutation import permutation_slots
from sa_patch.patterns.prefix_stable import RING_SIZE

# What others made has its laws in test_rivals.py: two backends serve it.
METHODS: tuple[str, ...] = (*(name for name in PATTERNS if PATTERNS[name] not in RIVALS), "union")
SPARSE_METHODS: tuple[str, ...] = tuple(name for name in METHODS if name != "full")
# What whole models are tested with: each way in which a pattern may meet padding, caches and
# generation; unions hold the other methods.
MODEL_METHODS: tuple[str, ...] = ("full", "swa", "sa", "moba", "block_topk", "union")
MODEL_SPARSE_METHODS: tuple[str, ...] = MODEL_METHODS[1:]
# Their number of visible keys is certain.
COUNTED_METHODS: tuple[str, ...] = ("full", "swa", "moba", "sinks", "tail", "block_topk")


@st.composite
def patterns(draw: st.DrawFn, method: str, max_window: int = 24) -> Pattern:
    """A pattern of the named method."""
    window = draw(st.integers(1, max_window))
    seeds = st.integers(-3, 2**40)
    if method == "full":
        return Full()
    if method == "swa":
        return SWA(window)
    if method == "sinks":
        return Sinks(window)
    if method == "tail":
        return Tail(window)
    if method == "sa":
        return SA(window, draw(seeds), circular=draw(st.booleans()), per_head=draw(st.booleans()))
    if method == "psa":
        return PSA(window, draw(seeds), per_head=draw(st.booleans()))
    if method == "moba":
        return MoBA(
            block_size=draw(st.integers(1, max_window // 2)),
            topk=draw(st.integers(1, 4)),
            shared=draw(st.sampled_from([1, 1, 2, 4])),
            grouped=draw(st.booleans()),
        )
    if method == "block_topk":
        block_size = draw(st.integers(1, 4))
        shared = draw(st.sampled_from([1, 1, 2, 4]))
        segment = block_size * shared * draw(st.integers(0, 2))
        topk, branch = draw(st.integers(0, 4)), draw(st.sampled_from([0, 2, 3]))
        percent = draw(st.sampled_from([0, 30, 60])) if topk and not branch else 0
        return BlockTopK(
            block_size,
            topk=topk,
            sinks=block_size * draw(st.integers(0, 1)) if segment else draw(st.integers(0, 3)),
            local=0 if segment else block_size * draw(st.integers(0, 2)),
            branch=branch,
            beam=draw(st.integers(2, 4)),
            grouped=draw(st.booleans()),
            shared=shared,
            segment=segment,
            percent=percent,
            threshold=draw(st.sampled_from([0.0, 0.2]))
            if topk and not (branch or percent)
            else 0.0,
        )
    if method == "union":
        names = st.sampled_from(["sinks", "swa", "tail", "sa", "psa", "moba", "block_topk"])
        parts = draw(st.lists(names, min_size=2, max_size=3))
        return unite(*(draw(patterns(part, max_window=max(2, max_window // 2))) for part in parts))
    raise AssertionError(f"teach tests/laws/drawn.py to draw patterns of {method!r}")


def narrow_pattern(method: str, seed: int = 0) -> Pattern:
    """A pattern that hides many keys at every length the model tests use (20 tokens and more)."""
    return {
        "full": Full(),
        "swa": SWA(4),
        "sinks": Sinks(2),
        "tail": Tail(3),
        "sa": SA(3, seed),
        "psa": PSA(4, seed),
        "moba": MoBA(block_size=3, topk=2),
        "block_topk": BlockTopK(2, topk=2, sinks=1, local=2, branch=2, beam=2),
        "union": Sinks(1) | SWA(3) | PSA(2, seed) | MoBA(block_size=2, topk=2),
    }[method]


def saturating_pattern(method: str, seq_len: int) -> Pattern:
    """A pattern of the method that only just admits every ``j <= i`` at this length."""
    blocks = 3
    size = -(-seq_len // blocks)
    return {
        "full": Full(),
        "swa": SWA(seq_len),
        "sinks": Sinks(seq_len),
        "tail": Tail(max(1, seq_len - 1)),
        "sa": SA(seq_len // 2 + 1),
        "psa": PSA(seq_len),
        "moba": MoBA(block_size=size, topk=blocks),
        "block_topk": BlockTopK(size, topk=blocks - 1, sinks=0, local=0, branch=2, beam=2),
        "union": Sinks(max(1, seq_len // 2)) | SWA(seq_len - seq_len // 2) | SA(1),
    }[method]


PREFIX_STABLE: tuple[str, ...] = tuple(
    name for name in METHODS if narrow_pattern(name).prefix_stable
)
MODEL_PREFIX_STABLE: tuple[str, ...] = tuple(
    name for name in MODEL_METHODS if narrow_pattern(name).prefix_stable
)


def grid_patterns(method: str, n: int) -> list[Pattern]:
    """w = 1, a middling one, w = n - 1 and w >= n, and what else a method can be told."""
    windows = sorted({1, max(1, n // 5), max(1, n - 1), n, 2 * n})
    near = max(1, n // 6)
    grid: dict[str, list[Pattern]] = {
        "full": [Full()],
        "swa": [SWA(window) for window in windows],
        "sinks": [Sinks(window) for window in windows],
        "tail": [Tail(window) for window in windows],
        "sa": [
            *(SA(window, seed=window) for window in windows),
            *(SA(9, circular=False), SA(9, per_head=True)),
        ],
        "psa": [*(PSA(window, seed=window) for window in windows), PSA(9, per_head=True)],
        "moba": [
            *(MoBA(block_size=max(1, window // 2), topk=3) for window in windows),
            *(MoBA(3, topk=2, shared=8, grouped=grouped) for grouped in (False, True)),
        ],
        "block_topk": [
            *(BlockTopK(size, topk=3, sinks=2, local=size, beam=2) for size in (1, 4, 16)),
            *(BlockTopK(2, topk=near, branch=0, grouped=grouped) for grouped in (False, True)),
            BlockTopK(4, topk=2, sinks=4, local=0, shared=8, segment=16),
            BlockTopK(4, topk=1, sinks=4, branch=0, shared=8, segment=16, percent=40),
            BlockTopK(4, topk=3, sinks=4, branch=0, shared=8, segment=16, threshold=0.2),
            BlockTopK(2, topk=4, sinks=1, branch=0, grouped=False, threshold=0.3),
        ],
        "union": [
            Sinks(2) | SWA(near),
            Sinks(1) | SWA(near) | SA(near),
            Sinks(2) | Tail(near),
            Sinks(3) | SWA(near) | MoBA(3, topk=3, shared=8),
            Sinks(2) | Tail(3) | BlockTopK(2, topk=2, sinks=1, local=2),
            SWA(2) | PSA(near, 3, per_head=True),
            Sinks(3) | SA(4, per_head=True) | PSA(5) | MoBA(4, 3),
            SWA(n - 1) | SA(2) if n > 1 else SWA(1) | SA(1),
            MoBA(3, 2) | BlockTopK(2, topk=2, sinks=1, local=0),
        ],
    }
    return grid[method]


def oracle_arguments(pattern: Pattern, layer: int) -> dict[str, Any]:
    """What the oracle has to be told about a pattern."""
    if isinstance(pattern, SWA):
        return {"window": pattern.window}
    if isinstance(pattern, (Sinks, Tail)):
        return {"size": pattern.size}
    names = ("block_size", "topk", "shared", "grouped")
    if isinstance(pattern, MoBA):
        return {name: getattr(pattern, name) for name in names}
    if isinstance(pattern, BlockTopK):
        rest = ("sinks", "local", "branch", "beam", "segment", "percent", "threshold")
        every = (*names, *rest)
        return {name: getattr(pattern, name) for name in every}
    if isinstance(pattern, SA):

        @functools.cache  # the oracle asks for each query
        def slots(seq_len: int, head: int) -> np.ndarray:
            draw = head if pattern.per_head else None
            return permutation_slots(seq_len, pattern.seed, layer, draw).numpy()

        return {"window": pattern.window, "circular": pattern.circular, "slots": slots}
    if isinstance(pattern, PSA):

        @functools.cache
        def points(seq_len: int, head: int) -> np.ndarray:
            drawn = pattern.ring(seq_len, layer, head + 1).points
            return np.asarray(drawn[head if pattern.per_head else 0].numpy())

        return {"window": pattern.window, "points": points, "ring": RING_SIZE}
    if isinstance(pattern, Union):
        return {"parts": [(part.name, oracle_arguments(part, layer)) for part in pattern.parts]}
    return {}
