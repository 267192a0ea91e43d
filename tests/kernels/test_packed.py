"""Rows that hold several sequences, on every backend: each is as if alone.

Seen red when a sequence's keys were read from its row's first column, when one permutation was
drawn for a whole row, and when saturated sequences were overwritten by the others.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sa_patch.kernels import Spans, attend
from sa_patch.patterns import Pattern, parse_pattern
from tests.thorough import unless_thorough

ROWS = [[37, 5, 1, 64], [50, 57]]
HEADS, KV_HEADS, HEAD_DIM, LAYER, SCALE = 4, 2, 16, 2, 0.3
TOLERANCE = 1e-5

PATTERNS = [
    "full",
    "swa:8",
    "sinks:2",
    "tail:4+sinks:2+swa:5",
    "sa:6",
    "sa:6,per_head=true,circular=false",
    "psa:8",
    "moba:8,2",
    "block_topk:4,3,2,4",
    "block_topk:4,2,4,shared=8,segment=16",
    "sinks:2+swa:6+sa:5",
    "sinks:2+swa:4+psa:7+sa:4",
]
INTERPRETED = unless_thorough(["sa:6", "psa:8", "moba:8,2", "sinks:2+swa:6+sa:5"], PATTERNS)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(len(ROWS), sum(ROWS[0]), heads, HEAD_DIM, generator=generator).transpose(1, 2)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return q, k, v


def alone(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence in float64, from what the pattern says is visible."""
    n = q.shape[2]
    seen = pattern.visible(torch.arange(n), n, layer=LAYER, heads=HEADS, q=q[0], k=k[0])
    k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = (q.double() @ k.transpose(2, 3)) * SCALE
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize(
    "backend, text",
    [("reference", text) for text in PATTERNS]
    + [("banded", text) for text in PATTERNS]
    + [("triton", text) for text in INTERPRETED],
)
def test_packed_sequences_are_as_if_alone(backend: str, text: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    pattern, (q, k, v) = parse_pattern(text), inputs()
    packed = Spans.packed(ROWS)
    out = attend(pattern, q, k, v, layer=LAYER, spans=packed, scale=SCALE, backend=backend)
    assert out.shape == q.shape
    ends = iter([end for row in ROWS for end in torch.tensor(row).cumsum(0).tolist()])
    for number, row in enumerate(ROWS):
        for length in row:
            end = next(ends)
            own = (slice(number, number + 1), slice(None), slice(end - length, end))
            expected = alone(pattern, q[own], k[own], v[own])
            assert (out[own] - expected).abs().max() <= TOLERANCE, (number, length)


def test_a_row_of_many_sequences_takes_the_launches_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from triton.runtime.interpreter import GridExecutor

    launched: list[str] = []
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda executor, *_, **__: launched.append(executor.fn.__name__)
    )
    q, k, v = inputs()
    for spans in (Spans.packed(ROWS), Spans.packed([[107], [107]])):
        launched.append("|")
        for text in ("swa:4", "sinks:2+swa:6+sa:5"):
            pattern = parse_pattern(text)
            attend(pattern, q, k, v, layer=0, spans=spans, scale=SCALE, backend="triton")
    together, one = "".join(launched).split("|")[1:]
    # Those of the sequences that the pattern saturates are one more for each pattern.
    assert together.count("kernel") <= one.count("kernel") + 2
