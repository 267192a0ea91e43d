"""Is a backend right? One case, row by row, against the float64 oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_patch.benchmark.attention.correctness import expect, judge, merge
from sa_patch.benchmark.options import DTYPES
from sa_patch.benchmark.record import FAILED, WRONG
from sa_patch.errors import one_line
from sa_patch.kernels import BACKENDS, sparse_attention
from sa_patch.patterns import Pattern

PASSED, REFUSED = "passed", "refused"  # beside `WRONG` and `FAILED`
LAYER = 3


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
