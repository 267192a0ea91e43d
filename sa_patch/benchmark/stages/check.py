"""Stage `check`: the machine's ceilings, and every kernel against float64."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sa_patch.benchmark.attention.cases import REFUSED, Case, check
from sa_patch.benchmark.clock import Clock, measure_ceilings
from sa_patch.benchmark.record import FAILED, WRONG, read_content, write_results
from sa_patch.benchmark.stages.stage import Found, Visit
from sa_patch.benchmark.tables import number
from sa_patch.errors import UserError
from sa_patch.patterns import parse_pattern

KIND = "sa_patch GPU check"
SHAPES = (
    ("bfloat16", 128, 8, 2),
    ("bfloat16", 64, 9, 3),
    ("float32", 64, 8, 2),
    ("float16", 128, 8, 8),
)
# Rows of different lengths are padded; none fills its tiles.
LENGTHS = ((1,), (63, 21), (1000, 333))
LONG = (131072,)
PATTERNS = (
    "full",
    "swa:256",
    "sa:256",
    "sa:64,per_head=true",
    "moba:window=256",
    "block_topk:16,8",
    "block_topk:8,8,8,branch=0,shared=32,segment=128",
    "sinks:4+swa:128+psa:128",
)
SMALL_PATTERNS = ("swa:16", "sa:16", "moba:16,2", "block_topk:4,2,4,branch=0,shared=16,segment=16")


def check_kernels(visit: Visit) -> Found:
    """Measure the ceilings and check the cases that ``check.json`` does not hold yet."""
    path = visit.out / "check.json"
    content = _known(path)
    if content["ceilings"] is None:
        dtype = torch.bfloat16 if visit.device == "cuda" else torch.float32
        ceilings = measure_ceilings(Clock(visit.device), dtype, small=visit.small)
        content["ceilings"] = dataclasses.asdict(ceilings)
        _write(path, content)
    rates = content["ceilings"]
    found = check_cases(visit, path, _cases(visit))
    rows = [
        ("copy", f"{number(rates['copy_gb_per_s'])} GB/s"),
        ("matrix products", f"{number(rates['matmul_tflop_per_s'])} TFLOP/s"),
        *found.rows,
    ]
    return dataclasses.replace(found, rows=rows)


def check_cases(visit: Visit, path: Path, cases: Sequence[Case]) -> Found:
    """Check the cases that a file does not hold yet, against float64."""
    content = _known(path)
    known: dict[str, Any] = content["cases"]
    for case in cases:
        if str(case) in known:
            continue
        if time.monotonic() > visit.deadline:
            break
        found = check(case, visit.device)
        known[str(case)] = {
            "status": found.status,
            "error": found.error,
            "tolerance": found.tolerance,
            "reason": found.reason,
        }
        if found.status in (WRONG, FAILED):
            visit.say(f"{found.status}: {case}: {found.reason}")
        _write(path, content)
    tally = Counter(one["status"] for one in known.values())
    counts = ", ".join(f"{n} {status}" for status, n in tally.items())
    wrong = [
        f"{one['status']}: {case}: {one['reason']}"
        for case, one in known.items()
        if one["status"] in (WRONG, FAILED)
    ]
    missing = sum(str(case) not in known for case in cases)
    return Found([("cases against float64", counts)], wrong, missing)


def _cases(visit: Visit) -> list[Case]:
    """What is used most comes first; the longest before other shapes."""
    if visit.small:
        return [
            Case("triton", parse_pattern(text), "float32", width, 4, 2, (67, 21))
            for width, texts in ((16, SMALL_PATTERNS), (32, SMALL_PATTERNS[:2]))
            for text in texts
        ]
    backends = ("triton", "flash") if visit.device == "cuda" else ("banded",)

    def at(shapes: Any, lengths: Any) -> list[Case]:
        return [
            Case(backend, parse_pattern(text), dtype, width, heads, kv_heads, rows)
            for dtype, width, heads, kv_heads in shapes
            for rows in lengths
            for backend in backends
            for text in PATTERNS
        ]

    long = at(SHAPES[:1], (LONG,)) if visit.device == "cuda" else []
    return at(SHAPES[:1], LENGTHS) + long + at(SHAPES[1:], LENGTHS)


def _known(path: Path) -> dict[str, Any]:
    if path.exists():
        try:
            content = read_content(path, KIND, 1)
            # What no backend could serve may be served after an installation.
            cases = {k: v for k, v in content["cases"].items() if v["status"] != REFUSED}
            return content | {"cases": cases}
        except (UserError, KeyError, TypeError):
            pass  # torn: measured again
    return {"kind": KIND, "schema": 1, "ceilings": None, "cases": {}}


def _write(path: Path, content: dict[str, Any]) -> None:
    write_results(path.with_suffix(""), content)
