"""Attention written a second time, in float64 and one query at a time, from the definitions.

Nothing here comes from `sa_patch`: the point of this file is to disagree with it when it is wrong.
Everything is NumPy and plain loops, slow and obvious. One sequence is a pair of `n` real tokens;
a query `i` has a list of visible keys `j`, and its output is the softmax average over that list.

The random permutation of `sa` is an input here (`slots[i]` is the slot of position `i`), and so are
the points of `psa`; that they are uniformly random is tested by itself in `tests/laws`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def keys_tail(i: int, n: int, size: int) -> list[int]:
    """All keys for the last `size` queries of n, its own for every other."""
    return list(range(i + 1)) if n - i <= size else [i]


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


def keys_sinks(i: int, size: int) -> list[int]:
    """The first `size` keys, as far as they came before the query or are it."""
    return [j for j in range(i + 1) if j < size]


def keys_psa(i: int, points: Ints, window: int, ring: int) -> list[int]:
    """The query's own key, and earlier ones whose points lie within (window - 1) / (2 i) of the
    ring's circumference, rounded down."""
    seen = []
    for j in range(i + 1):
        apart = abs(int(points[i]) - int(points[j]))
        distance = min(apart, ring - apart)
        if j == i or distance * i <= (window - 1) * (ring // 2):
            seen.append(j)
    return seen


def tree_search(
    query: Floats, leaves: list[Floats], topk: int, branch: int, beam: int
) -> tuple[list[int], float, int]:
    """The leaves (mean keys of blocks, all of them eligible) that a beam search finds best.

    Returns the leaves, the smallest margin of any decision on the way, and the dot products spent.
    """
    levels = [leaves]
    while branch and len(levels[-1]) > beam:
        below = levels[-1]
        levels.append(
            [
                np.mean(below[node * branch : (node + 1) * branch], axis=0)
                for node in range(len(below) // branch)
            ]
        )
    candidates = list(range(len(levels[-1])))
    margin, spent = float("inf"), 0
    for level in range(len(levels) - 1, -1, -1):
        limit = beam if level else topk
        if len(candidates) > limit:
            scores = [float(np.dot(query, levels[level][node])) for node in candidates]
            spent += len(scores)
            margin = min(margin, choice_margin(scores, limit))
            candidates = [candidates[place] for place in chosen_blocks(scores, limit)]
        if level:
            below_count = len(levels[level - 1])
            children = [node * branch + step for node in candidates for step in range(branch)]
            candidates = [*children, *range(len(levels[level]) * branch, below_count)]
    return sorted(candidates), margin, spent


def blocks_worth_reading(
    weighing: list[Floats],
    unchosen: Floats,
    blocks: list[Floats],
    topk: int,
    threshold: float,
    scale: float,
) -> tuple[list[int], float]:
    """The blocks thought to get a share of the attention that the unchosen keys get; the margin.

    A block counts by the head of `weighing` that it gets the largest share of. The estimate is that
    of scores spread like a normal distribution, with the keys' mean variance in every direction.
    """
    shares = []
    for keys in blocks:
        logs = []
        for query in weighing:
            mean = keys.mean(axis=0)
            variance = ((keys - mean) ** 2).mean()
            score = scale * float(query @ mean) + scale**2 * float(query @ query) * variance / 2
            total = np.exp(scale * (unchosen @ query)).sum()
            logs.append(score + math.log(len(keys)) - math.log(total))
        shares.append(max(logs))
    chosen = [
        block for block in chosen_blocks(shares, topk) if shares[block] >= math.log(threshold)
    ]
    apart = [abs(share - math.log(threshold)) for share in shares]
    return chosen, min([choice_margin(shares, topk), *apart])


def keys_block_topk(
    i: int,
    query: Floats,
    weighing: list[Floats],
    scale: float,
    keys: Floats,
    block_size: int,
    topk: int,
    sinks: int,
    local: int,
    branch: int,
    beam: int,
    segment: int,
    percent: int,
    threshold: float,
) -> tuple[set[int], set[int], float]:
    """Sinks, own block and `local` tokens before it; the best earlier blocks; and the margin.

    With `segment`, its segment up to itself in place of its own block; with `percent` so many of a
    hundred earlier blocks, where these are more than `topk`.
    """
    if i < sinks:
        return set(range(i + 1)), set(), float("inf")
    first_near = max(sinks, sinks + (i - sinks) // block_size * block_size - local)
    if segment:
        first_near = max(sinks, i // segment * segment)
    count = (first_near - sinks) // block_size
    starts = [sinks + block * block_size for block in range(count)]
    leaves = [keys[start : start + block_size].mean(axis=0) for start in starts]
    topk = max(topk, math.floor(len(leaves) * percent / 100))
    if threshold:
        unchosen = np.concatenate([keys[:sinks], keys[first_near : i + 1]])
        blocks = [keys[start : start + block_size] for start in starts]
        chosen, margin = blocks_worth_reading(weighing, unchosen, blocks, topk, threshold, scale)
    else:
        chosen, margin, _ = tree_search(query, leaves, topk, branch, beam)
    keys_chosen: set[int] = set()
    for block in chosen:
        keys_chosen.update(range(starts[block], starts[block] + block_size))
    return {*range(sinks), *range(first_near, i + 1)}, keys_chosen, margin


@dataclass
class OracleResult:
    """output: [batch, q_heads, n, head_dim], zero at padding; visible: [batch, q_heads, n, n] bool.

    `margin [batch, q_heads, n]` says by how much a choice of blocks was decided. Where it is within
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


@dataclass
class Row:
    """One head of one row: queries [n, head_dim], keys [n, head_dim], of the query head `head`.

    `group` are the queries of all heads that share its KV head: [heads, n, head_dim]; `scale` is
    that of the scores.
    """

    queries: Floats
    keys: Floats
    group: Floats
    head: int
    scale: float


def visible_keys(
    i: int, row: Row, method: str, arguments: dict[str, Any]
) -> tuple[list[int], float]:
    """The keys that query i sees, ascending, and the margin of its choice."""
    certain = float("inf")
    if method == "full":
        return keys_full(i), certain
    if method == "swa":
        return keys_swa(i, **arguments), certain
    if method == "sinks":
        return keys_sinks(i, **arguments), certain
    if method == "tail":
        return keys_tail(i, len(row.keys), **arguments), certain
    if method == "sa":
        slots = arguments["slots"](len(row.keys), row.head)
        return keys_sa(i, slots, arguments["window"], arguments["circular"]), certain
    if method == "psa":
        points = arguments["points"](len(row.keys), row.head)
        return keys_psa(i, points, arguments["window"], arguments["ring"]), certain
    if method == "moba":
        block_size, topk = arguments["block_size"], arguments["topk"]
        shared = arguments["shared"]
        in_view = {j for j in range(i + 1) if j // block_size == i // block_size}
        margin = certain
        for j in range(i // shared * shared, i + 1):
            query = row.group[:, j].sum(axis=0) if arguments["grouped"] else row.queries[j]
            scores = block_scores(j, query, row.keys, block_size)
            own = j // block_size
            # What an earlier query of the tile chose is in view; its own block only as a choice.
            seen_by_one = keys_moba(j, scores, block_size, topk)
            in_view.update(key for key in seen_by_one if key // block_size != own)
            margin = min(margin, choice_margin(scores, topk - 1))
        return sorted(in_view), margin
    if method == "block_topk":
        not_own = ("grouped", "shared")
        rest = {key: value for key, value in arguments.items() if key not in not_own}
        seen_by_tile: set[int] = set()
        margin = certain
        for j in range(i // arguments["shared"] * arguments["shared"], i + 1):
            query = row.group[:, j].sum(axis=0) if arguments["grouped"] else row.queries[j]
            weighing = list(row.group[:, j]) if arguments["grouped"] else [row.queries[j]]
            near, chosen, own_margin = keys_block_topk(
                j, query, weighing, row.scale, row.keys, **rest
            )
            # What an earlier query of the tile chose is in view, not what stood near it.
            seen_by_tile.update(chosen)
            margin = min(margin, own_margin)
        return sorted(seen_by_tile.union(near)), margin
    if method == "union":
        seen: set[int] = set()
        margin = certain
        for part, own in arguments["parts"]:
            keys, part_margin = visible_keys(i, row, part, own)
            seen.update(keys)
            margin = min(margin, part_margin)
        return sorted(seen), margin
    raise ValueError(f"the oracle has no definition of {method!r}")


def attention(
    q: Floats,
    k: Floats,
    v: Floats,
    method: str,
    *,
    lengths: Sequence[int] | None = None,
    scale: float | None = None,
    **arguments: Any,
) -> OracleResult:
    """Attention of `method` over right-padded rows.

    q: [batch, q_heads, n, head_dim]; k, v: [batch, kv_heads, n, head_dim]; lengths: [batch].
    `arguments` are the method's own. For `sa`, slots(seq_len, q_head) gives the slot of each
    position; for `psa`, points(seq_len, q_head) its point, of `ring` that there are; a `union`
    has `parts`, pairs of a method and its arguments.
    """
    batch, q_heads, n, head_dim = q.shape
    group = q_heads // k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    result = OracleResult(
        output=np.zeros((batch, q_heads, n, v.shape[3])),
        visible=np.zeros((batch, q_heads, n, n), dtype=bool),
        margin=np.full((batch, q_heads, n), np.inf),
    )
    for index in range(batch):
        length = n if lengths is None else int(lengths[index])
        for head in range(q_heads):
            kv_head = head // group
            values = v[index, kv_head, :length]
            row = Row(
                queries=q[index, head, :length],
                keys=k[index, kv_head, :length],
                group=q[index, kv_head * group : (kv_head + 1) * group, :length],
                head=head,
                scale=scale,
            )
            for i in range(length):
                seen, result.margin[index, head, i] = visible_keys(i, row, method, arguments)
                result.visible[index, head, i, seen] = True
                result.output[index, head, i] = softmax_average(
                    row.queries[i], row.keys[seen], values[seen], scale
                )
    return result
