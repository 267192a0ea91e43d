"""Launches of the Triton band kernel: from tensors and rows of a batch to grids and arguments.

Kernels are decorated when this module is imported, so it is imported at the first call.
"""

from __future__ import annotations

from torch import Tensor

from sa_patch.kernels.triton_band import band_kernel
from sa_patch.kernels.triton_configs import (
    UNLIMITED,
    BandConfig,
    Launch,
    packed_heads,
    padded_head_dim,
)
from sa_patch.kernels.triton_plans import (
    RingPlan,
    Row,
    band_table,
    current_stream,
    ring_plan,
    ring_table,
    slot_ordered,
)
from sa_patch.kernels.triton_softmax import INTERPRETED
from sa_patch.patterns import SA

LOG2_E = 1.4426950408889634

Rows = tuple[Row, ...]


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


def launch_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    rows: Rows,
    window: int,
    scale: float,
    config: BandConfig,
) -> None:
    """Write the attention of `rows` over the nearest `window` keys to `out` and `lse`.

    Args:
        q, out: ``[batch, q_heads, nq, head_dim]``; k, v: ``[batch, kv_heads, n, head_dim]``; all
            with contiguous last dimensions.
        lse: fp32 ``[batch, q_heads, nq]``, contiguous.
        scale: of the scores, at least 0.
    """
    pack = packed_heads(q.shape[1] // k.shape[1], config.launch.block_m)
    slots = config.launch.block_m // pack
    table = band_table(rows, q.shape[2], slots, q.device, current_stream(q.device))
    _launch_band(q, k, v, out, lse, table, None, window, scale, pack, False, config)


def launch_ring(
    pattern: SA,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    rows: Rows,
    layer: int,
    scale: float,
    config: BandConfig,
) -> None:
    """Stochastic attention of whole sequences `rows`, none of them saturated.

    Arguments as of `launch_window`.
    """
    heads, launch = q.shape[1], config.launch
    pack = 1 if pattern.per_head else packed_heads(heads // k.shape[1], launch.block_m)
    block = launch.block_m // pack * config.tiles
    draws = len(pattern.draws(heads))
    table = ring_table(rows, block, draws, q.device, current_stream(q.device))
    plan = ring_plan(pattern, rows, layer=layer, heads=heads, block=block, device=q.device)
    if config.permute_once and not pattern.per_head:
        k, v = (slot_ordered(x, pattern, rows, layer) for x in (k, v))
    window = 2 * pattern.window - 1
    _launch_band(q, k, v, out, lse, table, plan, window, scale, pack, pattern.per_head, config)


def _launch_band(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    table: Tensor,
    plan: RingPlan | None,
    window: int,
    scale: float,
    pack: int,
    per_head: bool,
    config: BandConfig,
) -> None:
    tiles = 1 if plan is None else config.tiles
    if not len(table):
        return
    band_kernel[(len(table) * tiles * (q.shape[1] // pack),)](
        q,
        k,
        v,
        out,
        lse,
        table,
        *(plan or [None] * len(RingPlan._fields)),
        len(table),
        q.shape[2],
        min(window, UNLIMITED),
        0 if plan is None else plan.keys.shape[1],
        scale * LOG2_E,
        *strides(q, k, v, out),
        PACK=pack,
        TILES=tiles,
        RING=plan is not None,
        PER_HEAD=per_head,
        SLOT_ORDER=plan is not None and config.permute_once and not per_head,
        WITH_LSE=lse is not None,
        WIDEN=INTERPRETED,
        **shape(q, k, config.launch),
    )
