"""Launches of the kernels of local windows and of rings: from tensors to grids and arguments.

Kernels are decorated when this module is imported, so it is imported at the first call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sa_patch.kernels.triton.launch_table import (
    BandConfig,
    Launch,
    packed_heads,
    padded_head_dim,
)
from sa_patch.kernels.triton.local_window import local_window_kernel
from sa_patch.kernels.triton.parts import LocalWindow
from sa_patch.kernels.triton.rings.kernel import ring_kernel
from sa_patch.kernels.triton.rings.plan import ring_plan, ring_table
from sa_patch.kernels.triton.rings.tables import ring_tables, slot_ordered
from sa_patch.kernels.triton.softmax import INTERPRETED
from sa_patch.kernels.triton.tiles import Row, band_table, current_stream
from sa_patch.patterns import PSA, SA

LOG2_E = 1.4426950408889634

Rows = tuple[Row, ...]


class Call(NamedTuple):
    """What every launch is given.

    Args:
        q, out: ``[batch, q_heads, nq, head_dim]``; k, v: ``[batch, kv_heads, n, head_dim]``; all
            with contiguous last dimensions.
        lse: fp32 ``[batch, q_heads, nq]``, contiguous, or None where it is not asked for.
        rows: what is served; nothing else of `out` and `lse` is written.
        layer: index of the layer.
        scale: of the scores, above 0.
        join: take in what `out`, in fp32, and `lse` hold: attention over other keys, or zero and
            -inf.
        softcap: of `Softmax`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor | None
    rows: Rows
    layer: int
    scale: float
    join: bool = False
    softcap: float | None = None

    @property
    def scores(self) -> tuple[float, float]:
        """What kernels take as `scale` and `cap`."""
        if self.softcap is None:
            return self.scale * LOG2_E, 0.0
        return self.softcap * LOG2_E, self.scale / self.softcap

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def query_len(self) -> int:
        return self.q.shape[2]

    @property
    def most_queries(self) -> int:
        """Queries of the row that has most of them."""
        return min(self.query_len, max(row.length - row.start for row in self.rows))

    @property
    def covers_all(self) -> bool:
        """Whether its rows hold every query."""
        count = self.query_len
        real = (min(count, row.length - row.start) - max(0, -row.start) for row in self.rows)
        return sum(real) == len(self.q) * count

    @property
    def stream(self) -> int:
        return current_stream(self.q.device)

    def of_queries(self, own: slice) -> Call:
        """For some of the queries, and the keys up to theirs; writes into a copy of `lse`.

        No row may be a packed sequence. All rows stay, with the lengths that rings are drawn for.
        """
        assert all(row.start >= 0 for row in self.rows)
        end = min(own.stop, self.query_len)
        rows = tuple(row._replace(start=row.start + own.start) for row in self.rows)
        keys = slice(max(min(row.length, row.start + end) for row in self.rows))
        return self._replace(
            q=self.q[:, :, own],
            k=self.k[:, :, keys],
            v=self.v[:, :, keys],
            out=self.out[:, :, own],
            lse=None if self.lse is None else self.lse[:, :, own].contiguous(),
            rows=rows,
        )

    def lows(self, local_window: LocalWindow) -> Tensor:
        return local_window.lows(max(row.length for row in self.rows), self.q.device, self.stream)

    def table(self, slots: int) -> Tensor:
        return band_table(self.rows, self.query_len, slots, self.q.device, self.stream)

    def strides(self) -> list[int]:
        return strides(self.q, self.k, self.v, self.out)

    def results(self) -> dict[str, bool]:
        """Compile-time parameters of the kernels that write `out`."""
        return {"WITH_LSE": self.lse is not None, "JOIN": self.join}


class ExcludedKeys(NamedTuple):
    """Keys beside the local window that a part leaves out, as `shown_by_other_part` takes them."""

    rings: Tensor | None = None
    sizes: Tensor | None = None
    starts: Tensor | None = None
    """int32 ``[batch, q_heads, nq, spans]``"""
    extents: Tensor | None = None

    def with_spans(self, starts: Tensor, extent: int) -> ExcludedKeys:
        """And spans of `extent` keys from ``starts [batch, q_heads, nq, spans]`` on."""
        extents = torch.full_like(starts[0, 0, 0], extent)
        if self.starts is not None and self.extents is not None:
            starts = torch.cat([self.starts, starts], -1)
            extents = torch.cat([self.extents, extents])
        return self._replace(starts=starts, extents=extents)

    def of_heads(self, heads: slice) -> ExcludedKeys:
        """For some of the query heads."""
        rings, starts = self.rings, self.starts
        if rings is not None and rings.shape[2] > 2:
            rings = torch.cat([rings[:, :, :1], rings[:, :, 1:][:, :, heads]], 2)
        if starts is not None:
            starts = starts[:, heads].contiguous()
        return self._replace(rings=rings, starts=starts)

    def of_queries(self, own: slice) -> ExcludedKeys:
        """For some of the queries."""
        starts = None if self.starts is None else self.starts[:, :, own].contiguous()
        return self._replace(starts=starts)

    def arguments(self) -> dict[str, Any]:
        """Of a kernel, by name."""
        return {
            "rings": self.rings,
            "sizes": self.sizes,
            "padded_len": 0 if self.rings is None else self.rings.shape[3],
            "starts": self.starts,
            "extents": self.extents,
            "RINGS": 0 if self.rings is None else self.rings.shape[1],
            "DRAWS": 1 if self.rings is None else self.rings.shape[2] - 1,
            "SPANS": 0 if self.starts is None else self.starts.shape[3],
        }


def excluded_keys(call: Call, rings: tuple[SA | PSA, ...]) -> ExcludedKeys:
    """The keys within reach on `rings`."""
    if not rings:
        return ExcludedKeys()
    tables, sizes = ring_tables(
        rings, call.rows, layer=call.layer, heads=call.q.shape[1], device=call.q.device
    )
    return ExcludedKeys(tables, sizes)


def strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def shape(q: Tensor, k: Tensor, launch: Launch) -> dict[str, int | bool]:
    """Compile-time parameters that every kernel takes."""
    return {
        "HEADS": q.shape[1],
        "KV_GROUP": q.shape[1] // k.shape[1],
        "HEAD_DIM": q.shape[3],
        "BLOCK_D": padded_head_dim(q.shape[3]),
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }


class Choices(NamedTuple):
    """Chosen blocks, and the attention of each query over each of them alone.

    Args:
        picks: int32 ``[batch, choosers, nq, count]``, -1 for none.
        partial, partial_lse: fp32 ``[batch, nq, q_heads, count, head_dim]`` and, in base 2,
            ``[batch, nq, q_heads, count]``; anything where there is no pick.
    """

    picks: Tensor
    partial: Tensor
    partial_lse: Tensor


def launch_local_window(
    call: Call, local_window: LocalWindow, launch: Launch, choices: Choices | None = None
) -> None:
    """Attention over the local window, and over chosen blocks where their results are given."""
    pack = packed_heads(call.group, launch.block_m)
    table = call.table(launch.block_m // pack)
    if not len(table):
        return
    local_window_kernel[(len(table) * (call.q.shape[1] // pack),)](
        call.q,
        call.k,
        call.v,
        call.out,
        call.lse,
        table,
        call.lows(local_window),
        None if choices is None else choices.partial,
        None if choices is None else choices.partial_lse,
        None if choices is None else choices.picks,
        call.query_len,
        local_window.sinks,
        0 if choices is None else choices.picks.shape[3],
        *call.scores,
        *call.strides(),
        PACK=pack,
        CHOOSERS=1 if choices is None else choices.picks.shape[1],
        CHOSEN=choices is not None,
        CAPPED=call.softcap is not None,
        WIDEN=INTERPRETED,
        **call.results(),
        **shape(call.q, call.k, launch),
    )


def launch_ring(
    call: Call,
    pattern: SA | PSA,
    local_window: LocalWindow,
    before: tuple[SA | PSA, ...],
    config: BandConfig,
) -> None:
    """Attention over the keys of a ring that neither `local_window` nor the rings `before` show.

    Of PSA those of `local_window.dense` on; of SA whole sequences, none of which it saturates.
    """
    q, k, v, launch = call.q, call.k, call.v, config.launch
    pack = 1 if pattern.per_head else packed_heads(call.group, launch.block_m)
    block = launch.block_m // pack * config.tiles
    heads = q.shape[1]
    draws = len(pattern.draws(heads))
    table = ring_table(pattern, call.rows, call.query_len, block, draws, q.device, call.stream)
    if not len(table):
        return
    plan = ring_plan(
        pattern,
        call.rows,
        call.query_len,
        local_window,
        layer=call.layer,
        heads=heads,
        block=block,
        device=q.device,
    )
    ordered = config.permute_once and isinstance(pattern, SA) and not (pattern.per_head or before)
    # Sequences that share a row would be ordered one by one.
    ordered = ordered and not any(row.start for row in call.rows)
    if ordered and isinstance(pattern, SA):
        k, v = (slot_ordered(x, pattern, call.rows, call.layer) for x in (k, v))
    arguments = excluded_keys(call, before).arguments()
    ring_kernel[(len(table) * config.tiles * (heads // pack),)](
        q,
        k,
        v,
        call.out,
        call.lse,
        table,
        *plan,
        arguments["rings"],
        arguments["sizes"],
        len(table),
        call.query_len,
        plan.keys.shape[1],
        arguments["padded_len"],
        *call.scores,
        *strides(q, k, v, call.out),
        PACK=pack,
        TILES=config.tiles,
        PER_HEAD=pattern.per_head,
        SLOT_ORDER=ordered,
        RINGS=arguments["RINGS"],
        DRAWS=arguments["DRAWS"],
        CAPPED=call.softcap is not None,
        WIDEN=INTERPRETED,
        **call.results(),
        **shape(q, k, launch),
    )
