"""Values narrower or wider than keys, as in latent attention (MLA), on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sa_patch.kernels import BACKENDS, PLAIN, Softmax, Spans, attend
from sa_patch.patterns import Pattern, parse_pattern
from tests.block_walk import walked_lists

__all__ = ["walked_lists"]

HEADS, KV_HEADS, N, KEY_WIDTH, LAYER, SCALE = 4, 2, 75, 16, 1, 0.25
LENGTHS = (N, 41)
ROWS = [[50, 25], [75]]
TOLERANCE = 1e-5
NARROW, WIDE = 12, 40

PATTERNS = [
    "swa:9",
    "sa:7",
    "psa:8",
    "moba:8,3",
    "block_topk:4,3",
    "sinks:2+swa:6+sa:5",
    "tail:9+swa:5",
    "heads{1*swa:5|1*sa:7}",
]
SERVED = [
    *[(name, text) for name in ("reference", "banded", "flex", "triton") for text in PATTERNS],
    # Its definition reads how wide keys are.
    ("banded", "prism:0.5,8"),
]


def inputs(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values that lie between others, which are NaN."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, HEADS, N, KEY_WIDTH), (2, KV_HEADS, N, KEY_WIDTH), (2, KV_HEADS, N, width))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    room = torch.full((2, KV_HEADS, N, width + 2 * KEY_WIDTH), torch.nan)
    room[..., :width] = v
    return q, k, room[..., :width]


def by_definition(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence ``[1, heads, n, width]`` in float64, from what the pattern shows."""
    n = q.shape[2]
    seen = pattern.visible(torch.arange(n), n, layer=LAYER, heads=HEADS, q=q[0], k=k[0])
    k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = (q.double() @ k.transpose(2, 3)) * SCALE
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


@pytest.mark.usefixtures("walked_lists")
@pytest.mark.parametrize("width", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("backend, text", SERVED)
def test_values_of_any_width(backend: str, text: str, width: int) -> None:
    pattern, (q, k, v) = parse_pattern(text), inputs(width)
    same: dict[str, Any] = {"layer": LAYER, "scale": SCALE, "backend": backend}
    out = attend(pattern, q, k, v, spans=Spans(LENGTHS, (0, 0)), **same)
    assert out.shape == (2, HEADS, N, width)
    for row, n in enumerate(LENGTHS):
        own = (slice(row, row + 1), slice(None), slice(n))
        expected = by_definition(pattern, q[own], k[own], v[own])
        assert (out[own] - expected).abs().max() <= TOLERANCE
        assert not out[row, :, n:].any()


@pytest.mark.usefixtures("walked_lists")
@pytest.mark.parametrize("backend", ["reference", "banded", "flex", "triton"])
def test_packed_rows_too(backend: str) -> None:
    pattern, (q, k, v) = parse_pattern("swa:9"), inputs(NARROW)
    packed = Spans.packed(ROWS)
    out = attend(pattern, q, k, v, layer=LAYER, spans=packed, scale=SCALE, backend=backend)
    for number, row in enumerate(ROWS):
        begin = 0
        for length in row:
            own = (slice(number, number + 1), slice(None), slice(begin, begin + length))
            expected = by_definition(pattern, q[own], k[own], v[own])
            assert (out[own] - expected).abs().max() <= TOLERANCE
            begin += length


@pytest.mark.parametrize("softmax", [PLAIN, Softmax(0.7, torch.ones(HEADS))], ids=["", "changed"])
@pytest.mark.parametrize("width", [NARROW, WIDE], ids=["narrow", "wide"])
def test_gradients_of_banded_are_those_of_reference(width: int, softmax: Softmax) -> None:
    found = []
    for backend in ("reference", "banded"):
        tensors = [x.detach().clone().requires_grad_() for x in inputs(width)]
        same: dict[str, Any] = {"spans": Spans(LENGTHS, (0, 0)), "softmax": softmax}
        pattern = parse_pattern("sinks:2+swa:6+sa:5")
        out = attend(pattern, *tensors, layer=LAYER, scale=SCALE, backend=backend, **same)
        out.square().sum().backward()
        found.append([x.grad for x in tensors])
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, atol=2e-5, rtol=1e-4)


def test_every_backend_that_runs_here_is_tried() -> None:
    assert {backend for backend, _ in SERVED} == set(BACKENDS) - {"flash"}
