"""Times launch parameters of the Triton kernels on the GPU at hand, for files that `auto` reads."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sa_patch.benchmark.clock import Clock
from sa_patch.errors import UserError
from sa_patch.files.atomic_write import write_json
from sa_patch.kernels.backend import Spans
from sa_patch.kernels.triton.backend import attend_with_lse, supports
from sa_patch.kernels.triton.launch_files import (
    KIND,
    SCHEMA,
    Table,
    file_name,
    measured_launches,
    read_table,
    triton_version,
)
from sa_patch.kernels.triton.launch_table import (
    CHOICE,
    MOBA,
    RING,
    WINDOW,
    BandConfig,
    Config,
    Launch,
    SmallBlocksConfig,
    device_class,
    moba_config,
    use_key,
)
from sa_patch.kernels.triton.parts import disjoint_parts, shares_tiles, sorts_choices
from sa_patch.patterns import SA, BlockTopK, MoBA, Pattern

# Of the queries of patterns that choose by content.
_UNDECIDED = 0.01
_LAUNCHES = [
    Launch(block_m, block_n, warps, stages)
    for block_m, warps in ((32, 8), (64, 4), (64, 8), (128, 4), (128, 8))
    for block_n in (32, 64, 128)
    for stages in (2, 3, 4)
]


_CHOOSING = [Launch(m, n, warps) for m in (16, 32, 64) for n in (16, 32, 64) for warps in (4, 8)]
# What is tuned for each use, by pattern.
TUNED = {
    RING: "sa:256",
    WINDOW: "swa:256",
    MOBA: "moba:window=256",
    CHOICE: "block_topk:8,8,8,branch=0,shared=32,segment=128",
}


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
    part = device_class(q.device, interpreted=False)
    base = moba_config(q, seq_len, pattern.block_size, part)
    if shares_tiles(pattern):
        return [replace(base, choose=launch) for launch in _CHOOSING]
    if not sorts_choices(pattern):
        few = [(m, n, warps) for m in (4, 8, 16, 32) for n in (4, 8, 16) for warps in (2, 4, 8)]
        return [SmallBlocksConfig(Launch(*size)) for size in few]
    varied: list[Config] = [replace(base, chosen=launch) for launch in _LAUNCHES]
    varied += [replace(base, own=launch) for launch in _LAUNCHES]
    if isinstance(pattern, MoBA):
        varied += [replace(base, choose=launch) for launch in _CHOOSING]
    return varied


def compile_beforehand(
    work: Sequence[tuple[Pattern, Config]], q: Tensor, k: Tensor, jobs: int, until: float
) -> list[bool]:
    """Compile in several processes, into Triton's cache on disk.

    168 configurations took 24 s in 15 processes, and seconds each one after the other. A compiler
    that aborts, or runs out of memory, takes its process along: what was in work then is given up,
    and the rest goes on in new processes.

    Args:
        work: each configuration with its pattern, what is wanted most first.
        q, k: of `tune`; their shapes, dtype and device count.
        until: of `time.monotonic`; what is in work then is given up.

    Returns:
        Of each whether it is known to compile or to be refused, so that it can be timed.
    """
    done = [False] * len(work)
    waiting = list(range(len(work)))
    while waiting and (left := until - time.monotonic()) > 0:
        with _processes(min(jobs, len(waiting))) as pool:
            futures: dict[Future[None], int] = {}
            with contextlib.suppress(BrokenProcessPool):
                for index in waiting:
                    task = (*work[index], q.shape, k.shape, q.dtype, str(q.device))
                    futures[pool.submit(_compile, *task)] = index
            finished, late = wait(futures, timeout=left)
            for future in finished:
                done[futures[future]] = future.exception() is None
        if late:
            break
        # Which process died is not told; the oldest of what is left were in work.
        waiting = [index for index in waiting if not done[index]][jobs:]
    return done


@contextlib.contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes, which are gone afterwards whatever they do."""
    others = set(multiprocessing.active_children())
    # A forked process could not use a GPU that this one has touched.
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        # One that hangs in the compiler never hears that there is nothing left to do.
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.shutdown(cancel_futures=True)


def _compile(
    pattern: Pattern,
    config: Config,
    q_shape: torch.Size,
    k_shape: torch.Size,
    dtype: torch.dtype,
    device: str,
) -> None:
    q = torch.randn(q_shape, dtype=dtype, device=device)
    k = torch.randn(k_shape, dtype=dtype, device=device)
    # What fails does so again when it is timed, and is reported there.
    with contextlib.suppress(Exception):
        _call(pattern, q, k, k, config)


def _call(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, config: Config) -> Tensor:
    spans = Spans((k.shape[2],) * len(q), (0,) * len(q))
    scale = q.shape[3] ** -0.5
    return attend_with_lse(pattern, q, k, v, layer=0, spans=spans, scale=scale, configs=(config,))[
        0
    ]


def tune(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    configs: list[Config] | None = None,
    repeat_ms: int = 50,
    tolerance: float = 2e-2,
    until: float = float("inf"),
    interpreted: bool = False,
) -> list[Timing]:
    """Time configurations on whole sequences, fastest first; plans come from the cache.

    Args:
        q: ``[batch, q_heads, n, head_dim]`` on a CUDA device; k, v: ``[batch, kv_heads, n,
            head_dim]``.
        configs: what to time; `candidates` by default.
        repeat_ms: time spent on each.
        tolerance: largest absolute difference from the first that runs; a candidate that differs
            by more is a failure, whatever its speed. Of patterns that choose by content so may one
            query in a hundred, whose choice was a tie.
        until: of `time.monotonic`; configurations after that are left out.
        interpreted: rehearse in Triton's interpreter, where no time means anything.

    Raises:
        UserError: if the tensors are not on a CUDA device, or the backend cannot serve them.
    """
    if q.device.type != "cuda" and not interpreted:
        raise UserError(f"tune needs tensors on a CUDA device, got {q.device}")
    able, reason = supports(pattern, q, k)
    if not able:
        raise UserError(f"backend 'triton' cannot serve {pattern}: {reason}")
    timings: list[Timing] = []
    expected: Tensor | None = None
    for config in configs if configs is not None else candidates(pattern, q, k.shape[2]):
        if time.monotonic() > until:
            break
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
    def run() -> Tensor:
        return _call(pattern, q, k, v, config)

    try:
        out = run()
        if expected is not None:
            wrong = ~((out - expected).abs().amax(-1) <= tolerance)
            share = float(wrong.float().mean())
            if share > (_UNDECIDED if pattern.reads_content else 0.0):
                return Timing(config, failure=f"{share:.1%} of the queries differ"), None
        median, fastest, slowest = _milliseconds(run, q.device, repeat_ms)
    # Whatever the compiler or the driver refuses (shared memory, registers, shapes) is a result.
    except Exception as error:
        if q.is_cuda:
            torch.cuda.synchronize(q.device)
        return Timing(config, failure=f"{type(error).__name__}: {error}".splitlines()[0]), None
    return Timing(config, median, fastest, slowest), out


def _milliseconds(
    run: Callable[[], Tensor], device: torch.device, repeat_ms: int
) -> tuple[float, float, float]:
    """Median, fastest and slowest call."""
    if device.type == "cuda":
        from triton.testing import do_bench

        median, fastest, slowest = do_bench(run, rep=repeat_ms, quantiles=[0.5, 0.0, 1.0])
        return median, fastest, slowest
    taken = [Clock("cpu").milliseconds(run) for _ in range(2)]
    return statistics.median(taken), min(taken), max(taken)


def entry_of(use: str, q: Tensor, best: Config) -> Table:
    """The entry that `write_table` keeps for this use."""
    return {use_key(use, q): dataclasses.asdict(best)}


def card(device: str) -> tuple[str, tuple[int, int]]:
    """Name and compute capability of the GPU at hand; of no card where kernels are interpreted."""
    if device == "cuda":
        return torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    return "interpreter", (0, 0)


def write_table(folder: Path, device: str, capability: tuple[int, int], entries: Table) -> Path:
    """Write a card's table, with the version of Triton installed, and forget what was read.

    Entries that a readable table for the same card has beside these stay.

    Raises:
        OSError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(device, capability)
    content = {
        "kind": KIND,
        "schema": SCHEMA,
        "device": device,
        "capability": list(capability),
        "triton": triton_version(),
        "entries": (read_table(path) if path.exists() else {}) | entries,
    }
    write_json(path, content)
    measured_launches.cache_clear()
    return path
