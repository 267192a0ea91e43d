"""Attention written a second time, in float64 and one query at a time, from the definitions.

Nothing here comes from `sa_patch`: the point of this file is to disagree with it when it is wrong.
Everything is NumPy and plain loops, slow and obvious. One sequence is a pair of `n` real tokens;
a query `i` has a list of visible keys `j`, and its output is the softmax average over that list.

The random permutation of `sa` is an input here (`slots[i]` is the slot of position `i`); that it is
uniformly random is tested by itself in `tests/laws/test_budget.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def keys_full(i: int) -> list[int]:
    """All keys up to the query itself."""
    return list(range(i + 1))


def keys_swa(i: int, window: int) -> list[int]:
    """The last `window` keys, the query's own among them."""
    return [j for j in range(i + 1) if 0 <= i - j < window]


def keys_sa(i: int, slots: Ints, window: int, circular: bool) -> list[int]:
    """Earlier keys whose slot lies within `window - 1` slots of the query's slot."""
    n = len(slots)
    seen = []
    for j in range(i + 1):
        distance = abs(int(slots[i]) - int(slots[j]))
        if circular:
            distance = min(distance, n - distance)
        if distance <= window - 1:
            seen.append(j)
    return seen


def block_scores(i: int, query: Floats, keys: Floats, block_size: int) -> list[float]:
    """Dot product of the query with the mean key of each complete block before the query's own."""
    scores = []
    for block in range(i // block_size):
        mean_key = np.zeros(keys.shape[1])
        for j in range(block * block_size, (block + 1) * block_size):
            mean_key = mean_key + keys[j]
        scores.append(float(np.dot(query, mean_key / block_size)))
    return scores


def chosen_blocks(scores: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` largest scores; of equal scores the earlier block goes first."""
    order = sorted(range(len(scores)), key=lambda block: (-scores[block], block))
    return sorted(order[:count])


def choice_margin(scores: Sequence[float], count: int) -> float:
    """How far the last chosen block is ahead of the best one left out (infinite: none left out)."""
    ranked = sorted(scores, reverse=True)
    if count <= 0 or count >= len(ranked):
        return float("inf")
    return ranked[count - 1] - ranked[count]


def keys_moba(i: int, scores: Sequence[float], block_size: int, topk: int) -> list[int]:
    """Keys of the query's own block up to itself, and of the `topk - 1` best earlier blocks."""
    blocks = [*chosen_blocks(scores, topk - 1), i // block_size]
    return [j for j in range(i + 1) if j // block_size in blocks]


@dataclass
class OracleResult:
    """output: [batch, q_heads, n, head_dim], zero at padding; visible: [batch, q_heads, n, n] bool.

    `margin [batch, q_heads, n]` says by how much MoBA's choice was decided. Where it is within
    rounding error of zero, 32-bit arithmetic may rightly choose another block.
    """

    output: Floats
    visible: NDArray[np.bool_]
    margin: Floats


def softmax_average(query: Floats, keys: Floats, values: Floats, scale: float) -> Floats:
    """query: [head_dim]; keys, values: [visible, head_dim]; returns [head_dim]."""
    logits = keys @ query * scale
    weights = np.exp(logits - logits.max())
    return np.asarray((weights / weights.sum()) @ values, dtype=np.float64)


def attention(
    q: Floats,
    k: Floats,
    v: Floats,
    method: str,
    *,
    lengths: Sequence[int] | None = None,
    scale: float | None = None,
    window: int = 0,
    circular: bool = True,
    slots: Callable[[int, int], Ints] | None = None,
    block_size: int = 0,
    topk: int = 0,
) -> OracleResult:
    """Attention of `method` over right-padded rows.

    q: [batch, q_heads, n, head_dim]; k, v: [batch, kv_heads, n, head_dim]; lengths: [batch].
    slots(seq_len, q_head) gives the slot of each position, for `sa`.
    """
    batch, q_heads, n, head_dim = q.shape
    group = q_heads // k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    result = OracleResult(
        output=np.zeros((batch, q_heads, n, v.shape[3])),
        visible=np.zeros((batch, q_heads, n, n), dtype=bool),
        margin=np.full((batch, q_heads, n), np.inf),
    )
    for row in range(batch):
        length = n if lengths is None else int(lengths[row])
        for head in range(q_heads):
            queries = q[row, head, :length]
            keys = k[row, head // group, :length]
            values = v[row, head // group, :length]
            row_slots = slots(length, head) if slots is not None and length else None
            for i in range(length):
                if method == "full":
                    seen = keys_full(i)
                elif method == "swa":
                    seen = keys_swa(i, window)
                elif method == "sa":
                    assert row_slots is not None, "sa needs its permutation"
                    seen = keys_sa(i, row_slots, window, circular)
                elif method == "moba":
                    scores = block_scores(i, queries[i], keys, block_size)
                    seen = keys_moba(i, scores, block_size, topk)
                    result.margin[row, head, i] = choice_margin(scores, topk - 1)
                else:
                    raise ValueError(f"the oracle has no definition of {method!r}")
                result.visible[row, head, i, seen] = True
                result.output[row, head, i] = softmax_average(
                    queries[i], keys[seen], values[seen], scale
                )
    return result
