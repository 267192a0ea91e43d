"""Stage `flash`: every pattern through FlashAttention-4, beside Triton and FlexAttention."""

from __future__ import annotations

import dataclasses
import time

from sa_patch.benchmark.attention.candidates import RIVAL
from sa_patch.benchmark.attention.cases import Case
from sa_patch.benchmark.attention.record import AttentionBench, read_bench
from sa_patch.benchmark.stages.check import check_cases
from sa_patch.benchmark.stages.speed import LAYER_METHODS, time_layer
from sa_patch.benchmark.stages.stage import Found, Visit
from sa_patch.patterns import parse_pattern

METHODS = (*LAYER_METHODS, "sa:256,per_head=true", "psa:256", "sinks:4+swa:256")
LENGTHS = (32768, 8192)
CHECKED = ((129,), (1000, 333))
HEAD_DIMS = (128, 64)
CHECK_SHARE = 0.4  # of the time; what is not checked by then is left to a later call


def time_flash(visit: Visit) -> Found:
    """``flash_check.json`` against float64 first, then ``flash/attention.json``.

    FlashAttention-3 and -4, cuDNN and FlexAttention by FlashAttention-4 on full attention are among
    the rivals of the second; a row says why one is missing. On a CPU `banded` takes the place of
    the kernels.
    """
    backends = ("flash",) if visit.device == "cuda" else ("banded",)
    # Each case compiles: without an end of their own, nothing might be timed.
    checking = dataclasses.replace(visit, deadline=time.monotonic() + CHECK_SHARE * visit.left)
    checked = check_cases(checking, visit.out / "flash_check.json", _cases(visit, backends))
    folder = visit.out / "flash"
    folder.mkdir(parents=True, exist_ok=True)
    timed = time_layer(dataclasses.replace(visit, out=folder), METHODS, LENGTHS)
    return Found(
        [*checked.rows, *timed.rows, *_missing(read_bench(folder / "attention.json"))],
        [*checked.wrong, *timed.wrong],
        checked.missing + timed.missing,
    )


def _missing(bench: AttentionBench) -> list[tuple[str, str]]:
    return [
        (f"{one.label}, {one.backend}", f"not measured: {one.reason}")
        for one in bench.not_served
        if one.label.startswith(RIVAL)
    ]


def _cases(visit: Visit, backends: tuple[str, ...]) -> list[Case]:
    if visit.small:
        return [
            Case(backend, parse_pattern(text), "float32", 16, 4, 2, (67, 21))
            for backend in backends
            for text in ("sa:16", "sinks:4+swa:8+psa:8")
        ]
    return [
        Case(backend, parse_pattern(text), "bfloat16", width, 8, 2, rows)
        for backend in backends
        for width in HEAD_DIMS
        for rows in CHECKED
        for text in METHODS
    ]
