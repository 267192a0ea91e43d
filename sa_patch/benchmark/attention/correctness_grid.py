"""Are the backends right? Each against the float64 oracle over a grid of shapes."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_patch.benchmark.attention.correctness import expect, judge, merge
from sa_patch.benchmark.options import DTYPES
from sa_patch.benchmark.record import FAILED, WRONG
from sa_patch.benchmark.tables import Say
from sa_patch.errors import one_line
from sa_patch.kernels import BACKENDS, sparse_attention
from sa_patch.patterns import SA, SWA, Full, MoBA, Pattern

PASSED, REFUSED = "passed", "refused"  # beside `WRONG` and `FAILED`
LAYER = 3
# dtype, head_dim, query heads, KV heads; what is used most comes first, for time may run out.
FIRST_SHAPES = (
    ("bfloat16", 128, 8, 2),
    ("float32", 64, 8, 2),
    ("bfloat16", 64, 9, 3),
    ("float16", 128, 9, 3),
    ("bfloat16", 96, 8, 2),
)
# Each shape costs `flex` minutes of compilation: it has two, after the others' first two.
FLEX_SHAPES = 2


@dataclass(frozen=True)
class Case:
    """One call: rows of `lengths` real tokens, padded on the right to the longest."""

    backend: str
    pattern: Pattern
    dtype: str
    head_dim: int
    heads: int
    kv_heads: int
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        rows = "+".join(str(length) for length in self.lengths)
        heads = f"{self.heads}:{self.kv_heads} heads of {self.head_dim}"
        return f"{self.backend} {self.pattern} {self.dtype} {heads}, n = {rows}"


@dataclass(frozen=True)
class Checked:
    """What became of a case; `reason` where it did not pass."""

    case: Case
    status: str
    error: float | None = None
    tolerance: float | None = None
    reason: str = ""


def grid(backends: Sequence[str], *, small: bool) -> list[Case]:
    """All cases: every dtype, head_dim and grouping, the most used first.

    Args:
        small: lengths of up to 128 and four shapes, for a rehearsal.
    """
    product = itertools.product((64, 96, 128), DTYPES, ((8, 2), (9, 3)))
    every = [(dtype, head_dim, *heads) for head_dim, dtype, heads in product]
    shapes = list(dict.fromkeys([*FIRST_SHAPES, *every]))
    rows: list[tuple[int, ...]] = [(1,), (63, 21), (1000, 333), (4096,), (4096, 1500)]
    if small:
        rows, shapes = [(1,), (63, 21), (128,)], shapes[:4]
    others = [name for name in backends if name != "flex"]
    flex = [name for name in backends if name == "flex"]
    first, rest = shapes[:FLEX_SHAPES], shapes[FLEX_SHAPES:]
    return [
        Case(backend, pattern, *shape, lengths)
        for names, shapes in ((others, first), (flex, first), (others, rest))
        for shape in shapes
        for lengths in rows
        for backend in names
        for pattern in _patterns(max(lengths))
    ]


def run_checks(cases: Iterator[Case], device: str, deadline: float, say: Say) -> list[Checked]:
    """Check cases until they or the time of `time.monotonic` run out; what is wrong is said."""
    found = []
    for case in cases:
        found.append(check(case, device))
        if found[-1].status in (WRONG, FAILED):
            say(f"{found[-1].status}: {case}: {found[-1].reason}")
        if time.monotonic() > deadline:
            break
    return found


@torch.no_grad()
def check(case: Case, device: str) -> Checked:
    """Run one case and compare every row with the oracle; padding holds NaN."""
    q, k, v = _inputs(case, device)
    ok, reason = BACKENDS[case.backend].supports(case.pattern, q, k)
    if not ok:
        return Checked(case, REFUSED, reason=reason)
    lengths = torch.tensor(case.lengths)
    try:
        out = sparse_attention(
            q, k, v, case.pattern, layer=LAYER, lengths=lengths, backend=case.backend
        )
        verdict = merge(
            [
                judge(out, expect(case.pattern, q, k, v, layer=LAYER, row=row, length=length))
                for row, length in enumerate(case.lengths)
            ]
        )
    except Exception as error:
        return Checked(case, FAILED, reason=one_line(error))
    if any(bool(out[row, :, length:].any()) for row, length in enumerate(case.lengths)):
        return Checked(case, WRONG, reason="the result at padding is not zero")
    worst = verdict.error if math.isfinite(verdict.error) else None
    status = PASSED if verdict.passed else WRONG
    return Checked(case, status, worst, verdict.tolerance, verdict.reason)


def tally(checks: Sequence[Checked]) -> dict[str, Counter[str]]:
    """How many cases of each backend have each status."""
    found: dict[str, Counter[str]] = {}
    for one in checks:
        found.setdefault(one.case.backend, Counter())[one.status] += 1
    return found


def _patterns(n: int) -> list[Pattern]:
    """Every kind of pattern, sparse at n tokens wherever that is possible."""
    window = max(1, min(256, n // 8))
    block = max(1, window // 2)
    return [
        Full(),
        SWA(window),
        SA(window),
        SA(window, seed=1, circular=False),
        SA(max(1, window // 4), seed=2, per_head=True),
        MoBA(block, 2),
        MoBA(block, 4),
    ]


def _inputs(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(max(case.lengths))
    tensors = []
    for heads in (case.heads, case.kv_heads, case.kv_heads):
        size = (len(case.lengths), max(case.lengths), heads, case.head_dim)
        drawn = torch.randn(size, generator=generator, device=device).to(DTYPES[case.dtype])
        for row, length in enumerate(case.lengths):
            drawn[row, length:] = torch.nan
        # As models hand it over: heads and positions transposed.
        tensors.append(drawn.transpose(1, 2))
    return tensors[0], tensors[1], tensors[2]
