"""A call in launches: local window, rings, chosen blocks, each joined to those before.

Imports the kernels, so it is imported at the first call.
"""

from __future__ import annotations

from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from sa_patch.kernels.triton import launch_table
from sa_patch.kernels.triton.block_choice.launch import choose, of_query_heads
from sa_patch.kernels.triton.chosen_blocks_launch import (
    first_keys,
    launch_gathered,
    launch_sorted,
)
from sa_patch.kernels.triton.launch import Call, excluded_keys, launch_local_window, launch_ring
from sa_patch.kernels.triton.launch_table import (
    BandConfig,
    Config,
    MobaConfig,
    SmallBlocksConfig,
    band_config,
    moba_config,
    small_blocks_config,
)
from sa_patch.kernels.triton.parts import (
    EVERYTHING,
    NOTHING,
    DisjointParts,
    disjoint_parts,
    shares_tiles,
    sorts_choices,
    takes_local_window,
)
from sa_patch.kernels.triton.shared_blocks_launch import launch_shared
from sa_patch.kernels.triton.softmax import INTERPRETED
from sa_patch.patterns import Pattern

Kind = TypeVar("Kind", BandConfig, MobaConfig, SmallBlocksConfig)


class Configs:
    """Launch parameters: those that were given, and the table's for other kinds."""

    def __init__(self, call: Call, given: tuple[Config, ...]) -> None:
        self._q = call.q
        self._longest = max(row.length for row in call.rows)
        self._given = given
        self._device = launch_table.device_class(call.q.device, interpreted=INTERPRETED)

    def _find(self, kind: type[Kind]) -> Kind | None:
        return next((config for config in self._given if isinstance(config, kind)), None)

    def band(self, **kind: bool) -> BandConfig:
        """With the keyword arguments of `band_config`."""
        return self._find(BandConfig) or band_config(self._q, self._longest, self._device, **kind)

    def moba(self, block_size: int, *, compared: bool, shared: bool = False) -> MobaConfig:
        return self._find(MobaConfig) or moba_config(
            self._q, self._longest, block_size, self._device, compared=compared, shared=shared
        )

    def small_blocks(self) -> SmallBlocksConfig:
        return self._find(SmallBlocksConfig) or small_blocks_config(self._q, self._device)


def serve(pattern: Pattern, call: Call, given: tuple[Config, ...]) -> None:
    """Write the attention of all rows of a call that does not join anything.

    Raises:
        ValueError: for a pattern that `pieces` does not know.
    """
    parts = disjoint_parts(pattern)
    if parts is None:
        raise ValueError(f"no pieces for {pattern}")
    configs = Configs(call, given)
    dense = tuple(row for row in call.rows if pattern.saturated(row.length))
    sparse = tuple(row for row in call.rows if not pattern.saturated(row.length))
    if sparse:
        _serve_sparse(pattern, parts, call._replace(rows=sparse), configs)
    if dense:
        launch_local_window(call._replace(rows=dense), EVERYTHING, configs.band(dense=True).launch)


def _serve_sparse(pattern: Pattern, parts: DisjointParts, call: Call, configs: Configs) -> None:
    """Rows that the pattern does not saturate; others of the call may be overwritten."""
    fused = any(map(takes_local_window, parts.chosen))
    launches = len(parts.rings) + len(parts.chosen) + (parts.local_window.everywhere and not fused)
    if launches == 1:
        _serve_parts(parts, call, configs, fused)
        return
    # Half precision would be rounded at every piece.
    out, lse = _wide_results(call.q)
    # The local window's launch then writes all there is, for others to join.
    begins = parts.local_window.everywhere and not fused and call.covers_all
    if not begins:
        out.zero_()
        lse.fill_(-torch.inf)
    _serve_parts(parts, call._replace(out=out, lse=lse, join=True), configs, fused, begins=begins)
    call.out.copy_(out)
    if call.lse is not None:
        call.lse.copy_(lse)


def _wide_results(q: Tensor) -> tuple[Tensor, Tensor]:
    """Room for a result in fp32 and its log-sum-exp, in one piece of memory."""
    rows = prod(q.shape[:3])
    memory = q.new_empty(rows * (q.shape[3] + 1), dtype=torch.float32)
    out, lse = memory.split([rows * q.shape[3], rows])
    return out.view(q.shape), lse.view(q.shape[:3])


def _serve_parts(
    parts: DisjointParts, call: Call, configs: Configs, fused: bool, *, begins: bool = False
) -> None:
    """Each part in its launches, joined to those before where the call says so.

    Args:
        fused: the local window is served with chosen blocks.
        begins: nothing stands in the results before the local window.
    """
    local_window, rings = parts.local_window, parts.rings
    if local_window.everywhere and not fused:
        launch = configs.band(joining=call.join).launch
        launch_local_window(call._replace(join=call.join and not begins), local_window, launch)
    elif local_window.dense and not fused:
        early = [row._replace(length=min(row.length, local_window.dense)) for row in call.rows]
        rows = tuple(row for row in early if row.start < row.length)
        if rows:
            launch = configs.band(joining=call.join).launch
            launch_local_window(call._replace(rows=rows), local_window, launch)
    for number, ring in enumerate(rings):
        launch_ring(
            call,
            ring,
            local_window,
            rings[:number],
            configs.band(compared=number > 0, joining=call.join, ring=True),
        )
    shown = excluded_keys(call, rings if parts.chosen else ())
    # The local window goes with the first that takes it. What tiles share is never listed for each
    # query, for others to leave out, so that it comes last.
    chosen = sorted(parts.chosen, key=lambda part: (shares_tiles(part), not sorts_choices(part)))
    takes = next(filter(takes_local_window, chosen), None)
    # What a pattern keeps in its local window is never among the blocks that it chooses.
    alone = len(chosen) == 1 and disjoint_parts(chosen[0]) == parts
    for number, pattern in enumerate(chosen):
        own = local_window if pattern is takes else NOTHING
        if shares_tiles(pattern):
            launch = configs.moba(pattern.block_size, compared=False, shared=True).choose
            keys = {"local": pattern is takes, "limited": not alone}
            launch_shared(call, pattern, local_window, shown, launch, **keys)
            continue
        config = configs.moba(pattern.block_size, compared=not alone)
        picks = None if alone else choose(call, pattern, config.choose)
        if sorts_choices(pattern):
            hidden = None if alone else local_window
            launch_sorted(call, pattern, picks, own, hidden, shown, config)
        else:
            picks = choose(call, pattern, config.choose) if picks is None else picks
            launch_gathered(call, pattern, picks, local_window, shown, configs.small_blocks())
        if number + 1 < len(chosen) and picks is not None:
            starts = of_query_heads(first_keys(pattern, picks), call.q.shape[1])
            shown = shown.with_spans(starts, pattern.block_size)
