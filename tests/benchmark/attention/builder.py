"""Tiny benchmark runs for the tests, and backends made up for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sa_patch.benchmark.attention.options import AttentionOptions, make_options
from sa_patch.benchmark.attention.record import AttentionCell
from sa_patch.benchmark.attention.run import BenchOutcome, run_bench
from sa_patch.kernels import BACKENDS, Backend


def tiny(out: Path, **given: Any) -> AttentionOptions:
    values: dict[str, Any] = {
        "n": (32, 64),
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "window": (8,),
        "backends": ("reference", "banded"),
        "device": "cpu",
        "repeats": 4,
        "budget": 60.0,
        "out": out,
    }
    return make_options(**(values | given))


def run(
    out: Path, said: list[str] | None = None, *, all_files: bool = False, **given: Any
) -> BenchOutcome:
    return run_bench(
        tiny(out, **given),
        ([] if said is None else said).append,
        command=["bench"],
        json_only=not all_files,
        small_ceilings=True,
    )


def register(
    monkeypatch: pytest.MonkeyPatch, attend: Callable[..., Tensor], name: str = "mine"
) -> None:
    backend = Backend(name, "for a test", lambda pattern, q, k: (True, ""), attend)
    monkeypatch.setitem(BACKENDS, name, backend)


def cells_of(outcome: BenchOutcome, backend: str) -> list[AttentionCell]:
    return [cell for cell in outcome.bench.cells if cell.backend == backend]
