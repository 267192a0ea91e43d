"""Stage `tune`, and ``sa-patch bench --tune``: launch parameters, in a table that `auto` reads."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from sa_patch.benchmark.clock import quiet_process
from sa_patch.benchmark.stages.stage import Found, Visit
from sa_patch.benchmark.tables import Say, number
from sa_patch.benchmark.tuning import (
    TUNED,
    candidates,
    card,
    compile_beforehand,
    entry_of,
    tune,
    write_table,
)
from sa_patch.errors import UserError, one_line
from sa_patch.kernels.triton.launch_files import Table, cached_folder, file_name, read_table
from sa_patch.kernels.triton.launch_table import CHOICE, MOBA, RING, WINDOW, Config, use_key
from sa_patch.patterns import parse_pattern

SMALL = {
    RING: "sa:16",
    WINDOW: "swa:16",
    MOBA: "moba:16,2",
    CHOICE: "block_topk:4,2,4,branch=0,shared=16,segment=16",
}
# What compiling a candidate takes of one core, and timing it, on the machine of the H200.
COMPILE_SECONDS, TIME_SECONDS = 2.2, 0.15
JOBS = min(16, os.cpu_count() or 1)


def tune_kernels(visit: Visit) -> Found:
    """Tune what the card's table in `visit.out` does not hold yet."""
    return tune_into(visit.out, visit)


def tune_for_user(device: str, seconds: float, say: Say) -> Path:
    """Tune on this card, into the user's cache; the table's path.

    Raises:
        UserError: without a CUDA device, or where nothing could be timed.
    """
    if device != "cuda":
        raise UserError("--tune times kernels of a GPU; torch sees no CUDA device here")
    folder = cached_folder()
    visit = Visit(folder, device, False, time.monotonic() + seconds, say)
    found = tune_into(folder, visit, anew=True)
    for what, value in found.rows:
        say(f"{what}: {value}")
    if not found.rows:
        raise UserError("no launch parameters could be timed: " + "; ".join(found.wrong))
    return folder / file_name(*card(device))


def tune_into(folder: Path, visit: Visit, *, anew: bool = False) -> Found:
    """Tune each use of `TUNED` that the card's table in `folder` lacks, and write it each time.

    Args:
        anew: tune what it holds too.
    """
    name, capability = card(visit.device)
    path = folder / file_name(name, capability)
    q, k, v = _inputs(visit)
    known: Table = read_table(path) if path.exists() and not anew else {}
    waiting = [use for use in TUNED if use_key(use, q) not in known]
    rows = [(use, "kept from an earlier call") for use in TUNED if use not in waiting]
    wrong: list[str] = []
    missing = 0
    patterns = {use: parse_pattern((SMALL if visit.small else TUNED)[use]) for use in waiting}
    possible = {use: candidates(patterns[use], q, q.shape[2]) for use in waiting}
    for index, use in enumerate(waiting):
        pattern, left = patterns[use], visit.deadline - time.monotonic()
        share = left * len(possible[use]) / sum(len(possible[each]) for each in waiting[index:])
        configs = possible[use][:2] if visit.small else _fitting(possible[use], share)
        if left <= 0 or not configs:
            missing += 1
            continue
        until = time.monotonic() + share
        try:
            if not visit.small:
                work = [(pattern, config) for config in configs]
                compiled = compile_beforehand(work, q, k, JOBS, until)
                configs = [config for config, done in zip(configs, compiled, strict=True) if done]
            with quiet_process(None):
                timings = tune(
                    pattern, q, k, v, configs=configs, until=until, interpreted=visit.small
                )
            best = timings[0] if timings else None
        except Exception as error:
            wrong.append(f"failed: {use}: {one_line(error)}")
            continue
        if best is None:
            missing += 1
        elif best.failure:
            wrong.append(f"failed: {use}: {best.failure}")
        else:
            write_table(folder, name, capability, entry_of(use, q, best.config))
            tried = f"fastest of {len(timings)} of {len(possible[use])}"
            rows.append((f"{use} ({pattern})", f"{number(best.median_ms)} ms, {tried}"))
            visit.say(f"{use}: {number(best.median_ms)} ms with {best.config}")
    return Found(rows, wrong, missing)


def _fitting(configs: list[Config], seconds: float) -> list[Config]:
    """As many as can be compiled and timed in so many seconds, from all over the list."""
    count = min(len(configs), int(seconds / (COMPILE_SECONDS / JOBS + TIME_SECONDS)))
    return [configs[index * len(configs) // count] for index in range(max(0, count))]


def _inputs(visit: Visit) -> tuple[torch.Tensor, ...]:
    """Qwen3-8B's heads at n = 32K, as in `launch_table`."""
    n, heads, kv_heads, width = (64, 4, 2, 16) if visit.small else (32768, 32, 8, 128)
    dtype = torch.float32 if visit.device == "cpu" else torch.bfloat16
    generator = torch.Generator(visit.device).manual_seed(0)
    return tuple(
        torch.randn(1, h, n, width, generator=generator, device=visit.device).to(dtype)
        for h in (heads, kv_heads, kv_heads)
    )
