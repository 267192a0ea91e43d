"""Stage `tune`, and ``sa-patch bench --tune``: launch parameters, in a table that `auto` reads."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from sa_patch.benchmark.clock import quiet_process
from sa_patch.benchmark.record import read_content, write_results
from sa_patch.benchmark.stages.stage import Found, Visit
from sa_patch.benchmark.tables import Say, number
from sa_patch.benchmark.tuning import (
    TUNED,
    Timing,
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
from sa_patch.patterns import Pattern, parse_pattern

SMALL = {
    RING: "sa:16",
    WINDOW: "swa:16",
    MOBA: "moba:16,2",
    CHOICE: "block_topk:4,2,4,branch=0,shared=16,segment=16",
}
# What compiling a candidate takes of one core, and timing it, on the machine of the H200.
COMPILE_SECONDS, TIME_SECONDS = 2.2, 0.15
START_SECONDS = 10.0  # of the processes that compile; not measured on a GPU
GOLDEN_RATIO = (1 + 5**0.5) / 2
KIND = "sa_patch tuning"
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

    ``tune.json`` holds what was timed, so that a later call goes on with what found no time.

    Args:
        anew: tune what the table holds too, and leave no ``tune.json``.
    """
    name, capability = card(visit.device)
    path = folder / file_name(name, capability)
    q, k, v = _inputs(visit)
    known: Table = read_table(path) if path.exists() and not anew else {}
    # Without the table's entry what was timed is another card's, or an older Triton's.
    timed = {key: of_use for key, of_use in _timed(folder).items() if key in known}
    rows: list[tuple[str, str]] = []
    patterns, every, possible = {}, {}, {}
    for use, text in (SMALL if visit.small else TUNED).items():
        key, patterns[use] = use_key(use, q), parse_pattern(text)
        all_of_use = candidates(patterns[use], q, q.shape[2])
        every[use] = all_of_use[:2] if visit.small else _spread(all_of_use)
        waiting = [config for config in every[use] if str(config) not in timed.get(key, {})]
        if key in known and (key not in timed or not waiting):
            rows.append((use, "kept from an earlier call"))
            continue
        # The best so far is timed beside what is new.
        best = _best(timed.get(key, {}))
        possible[use] = [config for config in every[use] if str(config) == best] + waiting
    chosen = _compiled(visit, patterns, possible, q, k)
    wrong: list[str] = []
    missing = 0
    for index, (use, configs) in enumerate(chosen.items()):
        pattern, left = patterns[use], visit.deadline - time.monotonic()
        owed = sum(map(len, list(chosen.values())[index:]))
        until = time.monotonic() + left * len(configs) / max(1, owed)
        try:
            with quiet_process(None):
                timings = tune(
                    pattern, q, k, v, configs=configs, until=until, interpreted=visit.small
                )
        except Exception as error:
            wrong.append(f"failed: {use}: {one_line(error)}")
            continue
        missing += len(possible[use]) - len(timings)
        if not timings:
            continue
        best_timing, key = timings[0], use_key(use, q)
        if best_timing.failure:
            wrong.append(f"failed: {use}: {best_timing.failure}")
            continue
        timed[key] = timed.get(key, {}) | {str(one.config): _told(one) for one in timings}
        if not anew:
            write_results(folder / "tune", {"kind": KIND, "schema": 1, "timed": timed})
        best = _best(timed[key])
        config = next((one for one in every[use] if str(one) == best), best_timing.config)
        write_table(folder, name, capability, entry_of(use, q, config))
        tried = f"fastest of {len(timed[key])} of {len(every[use])}"
        told = f"{number(timed[key][str(config)]['median_ms'])} ms"
        rows.append((f"{use} ({pattern})", f"{told}, {tried}"))
        visit.say(f"{use}: {told} with {config}")
    return Found(rows, wrong, missing)


def _compiled(
    visit: Visit,
    patterns: dict[str, Pattern],
    possible: dict[str, list[Config]],
    q: torch.Tensor,
    k: torch.Tensor,
) -> dict[str, list[Config]]:
    """For each use what there is time for, compiled, if it is not interpreted.

    All are compiled by the same processes, whose start takes as long as many a candidate. What is
    slower to compile than was thought is cut, so that the rest can still be timed.
    """
    left = visit.deadline - time.monotonic() - (0.0 if visit.small else START_SECONDS)
    total = sum(map(len, possible.values()))
    chosen = {
        use: _fitting(configs, left * len(configs) / total) for use, configs in possible.items()
    }
    if visit.small:
        return chosen
    # A cut takes the same share of every use.
    work = sorted(
        (rank / len(configs), use, rank)
        for use, configs in chosen.items()
        for rank in range(len(configs))
    )
    share = COMPILE_SECONDS / JOBS / (COMPILE_SECONDS / JOBS + TIME_SECONDS)
    until = visit.deadline - left * (1.0 - share)
    done = compile_beforehand(
        [(patterns[use], chosen[use][rank]) for _, use, rank in work], q, k, JOBS, until
    )
    ready = {(use, rank) for (_, use, rank), one in zip(work, done, strict=True) if one}
    return {
        use: [config for rank, config in enumerate(configs) if (use, rank) in ready]
        for use, configs in chosen.items()
    }


def _spread(configs: list[Config]) -> list[Config]:
    """In an order of which every beginning comes from all over the list."""
    # Multiples of the golden ratio lie evenly, and in step with nothing that the list repeats.
    places = sorted(range(len(configs)), key=lambda place: place * GOLDEN_RATIO % 1)
    return [configs[place] for place in places]


def _fitting(configs: list[Config], seconds: float) -> list[Config]:
    """As many as can be compiled and timed in so many seconds."""
    return configs[: max(0, int(seconds / (COMPILE_SECONDS / JOBS + TIME_SECONDS)))]


def _timed(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """What earlier calls timed, by the table's key and the config; none where that is torn."""
    try:
        timed: dict[str, dict[str, dict[str, Any]]] = read_content(folder / "tune.json", KIND, 1)[
            "timed"
        ]
        return timed
    except (UserError, KeyError):
        return {}


def _told(timing: Timing) -> dict[str, Any]:
    return {"failure": timing.failure} if timing.failure else {"median_ms": timing.median_ms}


def _best(timed: dict[str, dict[str, Any]]) -> str | None:
    return min(
        (config for config, one in timed.items() if "median_ms" in one),
        key=lambda config: float(timed[config]["median_ms"]),
        default=None,
    )


def _inputs(visit: Visit) -> tuple[torch.Tensor, ...]:
    """Qwen3-8B's heads at n = 32K, as in `launch_table`."""
    n, heads, kv_heads, width = (64, 4, 2, 16) if visit.small else (32768, 32, 8, 128)
    dtype = torch.float32 if visit.device == "cpu" else torch.bfloat16
    generator = torch.Generator(visit.device).manual_seed(0)
    return tuple(
        torch.randn(1, h, n, width, generator=generator, device=visit.device).to(dtype)
        for h in (heads, kv_heads, kv_heads)
    )
