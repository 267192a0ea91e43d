"""Times launch parameters of the Triton kernels on the GPU at hand, to fill `launch_table`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.kernels.backend import Spans
from sa_patch.kernels.triton.backend import attend_with_lse, supports
from sa_patch.kernels.triton.launch_table import (
    BandConfig,
    Config,
    Launch,
    SmallBlocksConfig,
    device_class,
    moba_config,
)
from sa_patch.kernels.triton.parts import disjoint_parts, sorts_choices
from sa_patch.patterns import SA, BlockTopK, MoBA, Pattern

_LAUNCHES = [
    Launch(block_m, block_n, warps, stages)
    for block_m, warps in ((32, 8), (64, 4), (64, 8), (128, 4), (128, 8))
    for block_n in (32, 64, 128)
    for stages in (2, 3, 4)
]


@dataclass(frozen=True)
class Timing:
    """One candidate: milliseconds of a call (median, fastest, slowest), or why it cannot run."""

    config: Config
    median_ms: float = float("inf")
    fastest_ms: float = float("inf")
    slowest_ms: float = float("inf")
    failure: str = ""


def candidates(pattern: Pattern, q: Tensor, seq_len: int) -> list[Config]:
    """Launch parameters worth timing for a pattern; those that do not fit fail when tried."""
    parts = disjoint_parts(pattern)
    if parts is None or pattern.saturated(seq_len):
        return [BandConfig(launch) for launch in _LAUNCHES]
    fused = any(map(sorts_choices, parts.chosen))
    varied: list[Config] = []
    if parts.rings:
        alone = isinstance(pattern, SA)
        varied += [
            BandConfig(launch, tiles, permute_once)
            for launch in _LAUNCHES
            for tiles in (2, 4, 8)
            for permute_once in ((False, True) if alone else (False,))
        ]
    elif not fused:
        varied += [BandConfig(launch) for launch in _LAUNCHES]
    for chosen in parts.chosen:
        varied += _chosen_candidates(chosen, q, seq_len)
    return varied


def _chosen_candidates(pattern: MoBA | BlockTopK, q: Tensor, seq_len: int) -> list[Config]:
    if not sorts_choices(pattern):
        few = [(m, n, warps) for m in (4, 8, 16, 32) for n in (4, 8, 16) for warps in (2, 4, 8)]
        return [SmallBlocksConfig(Launch(*size)) for size in few]
    base = moba_config(q, seq_len, pattern.block_size, device_class(q.device, interpreted=False))
    varied: list[Config] = [replace(base, chosen=launch) for launch in _LAUNCHES]
    varied += [replace(base, own=launch) for launch in _LAUNCHES]
    if isinstance(pattern, MoBA):
        sizes = [(m, n, warps) for m in (16, 32, 64) for n in (16, 32, 64) for warps in (4, 8)]
        varied += [replace(base, choose=Launch(*size)) for size in sizes]
    return varied


def tune(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    configs: list[Config] | None = None,
    repeat_ms: int = 50,
    tolerance: float = 2e-2,
) -> list[Timing]:
    """Time configurations on whole sequences, fastest first; plans come from the cache.

    Args:
        q: ``[batch, q_heads, n, head_dim]`` on a CUDA device; k, v: ``[batch, kv_heads, n,
            head_dim]``.
        configs: what to time; `candidates` by default.
        repeat_ms: time spent on each.
        tolerance: largest absolute difference from the first that runs; a candidate that differs
            by more is a failure, whatever its speed.

    Raises:
        UserError: if the tensors are not on a CUDA device, or the backend cannot serve them.
    """
    if q.device.type != "cuda":
        raise UserError(f"tune needs tensors on a CUDA device, got {q.device}")
    able, reason = supports(pattern, q, k)
    if not able:
        raise UserError(f"backend 'triton' cannot serve {pattern}: {reason}")
    timings: list[Timing] = []
    expected: Tensor | None = None
    for config in configs if configs is not None else candidates(pattern, q, k.shape[2]):
        timing, out = _time(pattern, q, k, v, config, expected, repeat_ms, tolerance)
        expected = out if expected is None else expected
        timings.append(timing)
    return sorted(timings, key=lambda timing: timing.median_ms)


def _time(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: Config,
    expected: Tensor | None,
    repeat_ms: int,
    tolerance: float,
) -> tuple[Timing, Tensor | None]:
    from triton.testing import do_bench

    length = k.shape[2]
    spans = Spans((length,) * len(q), (0,) * len(q))

    def run() -> Tensor:
        return attend_with_lse(
            pattern, q, k, v, layer=0, spans=spans, scale=q.shape[3] ** -0.5, configs=(config,)
        )[0]

    try:
        out = run()
        if expected is not None:
            worst = float((out - expected).abs().max())
            if not worst <= tolerance:
                return Timing(config, failure=f"differs by {worst:.3g}"), None
        median, fastest, slowest = do_bench(run, rep=repeat_ms, quantiles=[0.5, 0.0, 1.0])
    # Whatever the compiler or the driver refuses (shared memory, registers, shapes) is a result.
    except Exception as error:
        torch.cuda.synchronize(q.device)
        return Timing(config, failure=f"{type(error).__name__}: {error}".splitlines()[0]), None
    return Timing(config, median, fastest, slowest), out
