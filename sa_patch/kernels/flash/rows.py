"""Rows of any length, and rows that hold several sequences, on FlashAttention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from sa_patch.kernels.backend import Spans
from sa_patch.kernels.flash.libraries import Library, Window
from sa_patch.patterns import Pattern

# Up to so many tokens a sequence costs what a tile of queries does.
_TILE = 128


def causal_rows(
    library: Library,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spans: Spans,
    window: Window,
    scale: float,
) -> Tensor:
    """Causal attention of a batch by one library; shapes as `Attend`, zero at padding."""
    queries, seq_len = q.shape[2], k.shape[2]
    # Of each row: real queries, and the keys up to the last of them.
    counts = [
        max(0, min(queries, n - start))
        for n, start in zip(spans.lengths, spans.starts, strict=True)
    ]
    ends = [start + count for start, count in zip(spans.starts, counts, strict=True)]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if set(counts) == {queries} and set(ends) == {seq_len}:
        out = library.dense(q, k, v, window=window, causal=True, scale=scale)
        return out.transpose(1, 2)
    rows = [row for row, count in enumerate(counts) if count]
    if not rows:
        return q.new_zeros(q.shape).transpose(1, 2)
    # Empty rows are left out: flash-attn 2 fails on them where all others hold one query.
    packed = library.packed(
        torch.cat([q[row, : counts[row]] for row in rows]),
        torch.cat([k[row, : ends[row]] for row in rows]),
        torch.cat([v[row, : ends[row]] for row in rows]),
        [counts[row] for row in rows],
        [ends[row] for row in rows],
        window=window,
        causal=True,
        scale=scale,
    )
    parts = dict(zip(rows, packed.split([counts[row] for row in rows]), strict=True))
    empty = packed[:0]
    padded = [
        torch.nn.functional.pad(parts.get(row, empty), (0, 0, 0, 0, 0, queries - counts[row]))
        for row in range(len(q))
    ]
    return torch.stack(padded).transpose(1, 2)


def packed_rows(
    library: Library,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spans: Spans,
    window: Window,
    scale: float,
) -> Tensor:
    """Causal attention in one call of a library; shapes as `Attend`."""
    lengths = [length for length in spans.lengths if length]
    queries, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = library.packed(
        queries, keys, values, lengths, lengths, window=window, causal=True, scale=scale
    )
    return out.unflatten(0, (len(q), -1)).transpose(1, 2)


def sequences_as_rows(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    attend: Callable[[Tensor, Tensor, Tensor, Spans], Tensor],
) -> Tensor:
    """Sequences of about one length as a right-padded batch, where the pattern is prefix-stable.

    What later tokens change in a pattern that is not would be changed by padding, so that only
    sequences of the very same length go together.

    Args:
        attend: ``(q, k, v, spans)`` to the output of such a batch.
    """
    groups: dict[int, list[int]] = {}
    for number, length in enumerate(spans.lengths):
        groups.setdefault(_room(length) if pattern.prefix_stable else length, []).append(number)
    sequences = list(spans.sequences(q, k, v))
    outs: list[Tensor] = [q[0, :, :0]] * len(sequences)
    for members in groups.values():
        lengths = [spans.lengths[number] for number in members]
        rows = [
            torch.cat([pad(x, (0, 0, 0, max(lengths) - x.shape[2])) for x in each])
            for each in zip(*(sequences[number] for number in members), strict=True)
        ]
        batch = attend(rows[0], rows[1], rows[2], Spans(tuple(lengths), (0,) * len(members)))
        for number, length, out in zip(members, lengths, batch, strict=True):
            outs[number] = out[:, :length]
    # Tokens before heads in memory, as models want it next.
    joined = torch.cat([out.transpose(0, 1) for out in outs])
    return joined.unflatten(0, (len(q), -1)).transpose(1, 2)


def _room(length: int) -> int:
    """What a length is rounded up to: tiles, and no more than a quarter above it."""
    step = max(_TILE, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step
