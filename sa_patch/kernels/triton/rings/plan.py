"""Tokens on a ring as the blocks that the Triton kernel of rings walks.

Everything is computed on the device, once for a pattern, layer and length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sa_patch.kernels.triton import tiles as triton_plans
from sa_patch.kernels.triton.launch_table import UNLIMITED
from sa_patch.kernels.triton.parts import NOTHING, LocalWindow
from sa_patch.kernels.triton.rings import prefix_stable, stochastic
from sa_patch.kernels.triton.rings.prefix_stable import Blocks
from sa_patch.kernels.triton.tiles import Row, current_stream, lengths_of, on_device
from sa_patch.patterns import PSA, SA


class RingPlan(NamedTuple):
    """Blocks of neighbours on the ring, of one or several spans one after the other.

    Padding lies at positions beyond every real one.

    Args:
        queries: int32 ``[blocks, block]``, positions of each block's queries, ascending.
        query_steps: int32, like `queries`: where each query's reach begins on the ring, counted
            from where the block's does.
        windows: int32, like `queries`: points within its reach.
        keys: int32 ``[blocks, width]``, positions of each band's keys, ascending.
        key_steps: int32, like `keys`. A query sees keys of
            ``0 <= key_step - query_step < window``,
        counts: int32, like `queries`: and of them those among so many leading keys of the band,
            which neighbouring queries do not see otherwise,
        skips: int32 ``[blocks]``: and after so many, which are sinks.
    """

    queries: Tensor
    query_steps: Tensor
    windows: Tensor
    keys: Tensor
    key_steps: Tensor
    counts: Tensor
    skips: Tensor


class Span(NamedTuple):
    """Queries of one sequence: those at ``start .. end - 1`` of a ring of `length` tokens."""

    start: int
    end: int
    length: int


def span_of(row: Row, query_len: int) -> Span:
    return Span(max(0, row.start), min(row.length, row.start + query_len), row.length)


def _block_count(pattern: SA | PSA, span: Span, block: int) -> int:
    if isinstance(pattern, SA):
        return -(-span.length // block)
    return sum(
        -(-(last - first) // block)
        for first, last in prefix_stable.segments(pattern, span.start, span.end, block)
    )


@lru_cache(maxsize=128)
def ring_table(
    pattern: SA | PSA,
    rows: tuple[Row, ...],
    query_len: int,
    block: int,
    draws: int,
    device: torch.device,
    stream: int,
) -> Tensor:
    """Blocks of `block` queries of every row: int32 ``[blocks, 7]``.

    Columns: row of the batch, block of the concatenated plans of `ring_plan`, blocks of one draw,
    length, slot at which the block's band begins (of SA), position of the row's first query, which
    of the lengths this is.
    """
    begins, total = {}, 0
    for span in _spans(rows, query_len):
        begins[span] = total
        total += draws * _block_count(pattern, span, block)
    # Of no meaning for PSA.
    first_slot = max(1 - pattern.window, -UNLIMITED)
    parts = []
    for row in rows:
        span = span_of(row, query_len)
        count = _block_count(pattern, span, block)
        first = (row.batch, begins[span], count, row.length, first_slot, row.start)
        steps = np.array([0, 1, 0, 0, block, 0, 0], np.int32)
        number = np.arange(count, dtype=np.int32)[:, None]
        parts.append(number * steps + np.array([*first, lengths_of(rows).index(row.length)]))
    return on_device(torch.from_numpy(np.concatenate(parts).astype(np.int32)), device)


def _spans(rows: tuple[Row, ...], query_len: int) -> list[Span]:
    """The different spans of `rows`, in the order of their plans."""
    return sorted({span_of(row, query_len) for row in rows})


def ring_plan(
    pattern: SA | PSA,
    rows: tuple[Row, ...],
    query_len: int,
    local_window: LocalWindow,
    *,
    layer: int,
    heads: int,
    block: int,
    device: torch.device,
) -> RingPlan:
    """The plans of all spans of `rows`, concatenated in the order of `ring_table`.

    Args:
        local_window: keys that a query sees without the ring, which its plan leaves out.
        heads: query heads, each of which has a draw of its own where `pattern.per_head`.
        block: queries of a block.
    """
    spans = tuple(_spans(rows, query_len))
    draws = len(pattern.draws(heads))
    counts = [draws * _block_count(pattern, span, block) for span in spans]
    layers = _together(pattern, spans, sum(counts), block, layer)
    stream = current_stream(device)

    def of_span(span: Span) -> RingPlan:
        def build() -> tuple[Tensor, ...]:
            own: dict[str, Any] = {
                "layers": layers,
                "heads": heads,
                "block": block,
                "device": device,
            }
            sinks = local_window.sinks
            if isinstance(pattern, SA) and local_window == NOTHING:
                return stochastic.blocks_of(pattern, span.length, None, sinks, **own)
            lows = local_window.lows(span.length, device, stream)
            if isinstance(pattern, SA):
                return stochastic.blocks_of(pattern, span.length, lows, sinks, **own)
            parts = prefix_stable.blocks_of(pattern, span.start, span.end, **own)
            return _limited(parts, lows, sinks)

        key = (pattern, span, local_window, layers, draws, block, device, stream)
        return RingPlan(*triton_plans.PLANS.get(key, build))

    def of_all() -> RingPlan:
        plans = [
            [x.unflatten(0, (len(layers), count)) for x in of_span(span)]
            for span, count in zip(spans, counts, strict=True)
        ]
        return RingPlan(*(_joined(parts).flatten(0, 1) for parts in zip(*plans, strict=True)))

    if len(spans) == 1:
        together = of_span(spans[0])
    else:
        key = ("joined", pattern, spans, local_window, layers, draws, block, device, stream)
        together = RingPlan(*triton_plans.PLANS.get(key, of_all))
    begin = (layer - layers.start) * sum(counts)
    return RingPlan(*(part[begin : begin + sum(counts)] for part in together))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Blocks one after the other, ``[draws, blocks, ...]``, bands padded to the widest."""
    if parts[0].ndim == 2:
        return torch.cat(list(parts), dim=1)
    width = max(part.shape[-1] for part in parts)
    return torch.cat(
        [
            torch.nn.functional.pad(part, (0, width - part.shape[-1]), value=UNLIMITED)
            for part in parts
        ],
        dim=1,
    )


def _limited(parts: Blocks, lows: Tensor, sinks: int) -> RingPlan:
    queries, query_steps, windows, keys, key_steps = (part.flatten(0, 1) for part in parts)
    limits = lows[queries.clamp(max=len(lows) - 1)]
    counts = torch.searchsorted(keys, limits, out_int32=True)
    skips = (keys < sinks).sum(-1, dtype=torch.int32)
    return RingPlan(queries, query_steps, windows, keys, key_steps, counts, skips)


def _together(
    pattern: SA | PSA, spans: Sequence[Span], blocks: int, block: int, layer: int
) -> range:
    """The layers planned with this one, which are the same for each of them.

    Args:
        blocks: of a layer's plan.
    """
    if isinstance(pattern, SA):
        band = block + 2 * pattern.window
    else:
        band = max(prefix_stable.band_width(pattern, *span[:2], block) for span in spans)
    numbers = 4 * block + 2 * band
    return triton_plans.layers_together(layer, 4 * numbers * blocks)
