"""Stages `attention`, `model` and `moe`: a layer and whole models beside their rivals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sa_patch.benchmark.attention.goals import judge_goals
from sa_patch.benchmark.attention.options import make_options
from sa_patch.benchmark.attention.record import AttentionBench, read_bench
from sa_patch.benchmark.attention.run import run_bench
from sa_patch.benchmark.goals import goals_markdown
from sa_patch.benchmark.record import TIMED, write_results
from sa_patch.benchmark.stages.stage import Found, Visit
from sa_patch.benchmark.tables import number
from sa_patch.errors import UserError

BLOCKS = "block_topk:8,8,8,branch=0,shared=32,segment=128"
METHODS = ("sa:256", "swa:256", "moba:window=256", "block_topk:16,16", BLOCKS)
LAYER_METHODS = (*METHODS, "sinks:4+swa:128+psa:128")
SMALL_METHODS = ("sa:16", "swa:16", "moba:16,2", "sinks:4+swa:8+psa:8")
QUICK_AND_SLOW = (("banded",), "reference")  # of a rehearsal
QUICK_SHARE = 0.65  # of the time
LENGTHS = (8192, 32768, 131072, 2048, 65536)
B = TypeVar("B")


def time_attention(visit: Visit) -> Found:
    """One layer of Qwen3-8B; ``attention.json`` and ``.md``, and on a GPU ``goals``."""
    found = time_layer(visit, LAYER_METHODS, LENGTHS)
    if visit.device == "cuda" and not visit.small:
        goals = write_goals(visit.out, read_bench(visit.out / "attention.json"))
        found = dataclasses.replace(found, rows=[*found.rows, *goals])
    return found


def time_layer(visit: Visit, methods: tuple[str, ...], lengths: tuple[int, ...]) -> Found:
    """One layer of Qwen3-8B under these methods; ``attention.json`` and ``.md``."""
    given: dict[str, Any] = {"methods": methods, "n": lengths, "order": lengths}
    if visit.small:
        given = {"methods": SMALL_METHODS, "n": (128, 64), "order": (128, 64), "repeats": 3}
        given |= {"heads": 4, "kv_heads": 2, "head_dim": 16}
    quick, slow = (("triton", "flash"), "flex") if visit.device == "cuda" else QUICK_AND_SLOW
    # FlexAttention compiles for long: what the others take at every length comes first.
    for backends, share in ((quick, QUICK_SHARE), ((*quick, slow), 1.0)):
        options = make_options(
            device=visit.device,
            out=visit.out,
            backends=backends,
            budget=share * visit.left,
            **given,
        )
        bench = run_bench(
            options,
            visit.say,
            small_ceilings=visit.small,
            resumed=_earlier(visit.out / "attention.json", read_bench),
        ).bench
    rows = []
    for n in options.order:
        for cell in bench.where(n=n, status=TIMED):
            rows.append((f"n = {n}: {cell.label}, {cell.backend}", _ms(cell.median_ms)))
    return Found(rows, bench.wrong(), len(bench.unsettled()))


def time_model(visit: Visit) -> Found:
    """Qwen3-8B, stock and patched; ``model.json`` and ``.md``."""
    return _prefill(visit, "model", "qwen3-8b", (8192, 32768, 131072))


def time_moe(visit: Visit) -> Found:
    """Qwen3-30B-A3B, stock and patched; ``moe.json`` and ``.md``."""
    return _prefill(visit, "moe", "qwen3-30b-a3b", (8192, 32768))


def _prefill(visit: Visit, stem: str, model: str, lengths: tuple[int, ...]) -> Found:
    # transformers is needed from here on only, and takes seconds to import.
    from sa_patch.benchmark.prefill.options import make_options as make_prefill_options
    from sa_patch.benchmark.prefill.record import read_prefill
    from sa_patch.benchmark.prefill.run import run_prefill

    given: dict[str, Any] = {"n": lengths, "patterns": (*METHODS, "full"), "backends": ("auto",)}
    given |= {"checked": 1024, "decoded": 0}
    if visit.small:
        given |= {"n": (64, 128), "patterns": ("sa:16", "swa:16", "full"), "checked": 128}
    options = make_prefill_options(
        device=visit.device, models=(model,), small=visit.small, out=visit.out, **given
    )
    resumed = _earlier(visit.out / f"{stem}.json", read_prefill)
    # The time that importing took is the stage's.
    options = dataclasses.replace(options, budget=visit.left)
    bench = run_prefill(options, visit.say, stem=stem, resumed=resumed, building_counts=True)
    rows = [(f"n = {c.n}: {c.name}", _ms(c.median_ms)) for c in bench.where(status=TIMED)]
    return Found(rows, bench.wrong(), len(bench.unsettled()))


def write_goals(out: Path, bench: AttentionBench) -> list[tuple[str, str]]:
    """Judge the goals from what was timed; ``goals.json`` and ``.md``, and a row for each."""
    goals = judge_goals(bench)
    content = {
        "kind": "sa_patch goals of attention",
        "schema": 1,
        "provenance": bench.provenance,
        "goals": [dataclasses.asdict(goal) for goal in goals],
    }
    write_results(out / "goals", content, goals_markdown(goals) + "\n")
    return [(f"goal: {goal.name}", goal.status) for goal in goals]


def _earlier(path: Path, read: Callable[[Path], B]) -> B | None:
    """What an earlier call measured; None where its file is missing or torn."""
    try:
        return read(path) if path.exists() else None
    except UserError:
        return None


def _ms(median: float | None) -> str:
    return "-" if median is None else f"{number(median)} ms"
