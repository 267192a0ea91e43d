"""Soft caps and learned sinks, on every backend that serves them, against float64 by definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sa_patch import sparse_attention
from sa_patch.errors import UserError
from sa_patch.kernels import BACKENDS, PLAIN, Softmax, choose_backend
from sa_patch.patterns import PSA, SA, SWA, BlockTopK, Full, MoBA, Pattern, Sinks, Tail
from tests.thorough import THOROUGH, unless_thorough

HEADS, KV_HEADS, N, HEAD_DIM = 4, 2, 75, 16
LENGTHS = torch.tensor([N, 41])
PATTERNS: list[Pattern] = [
    Full(),
    SWA(9),
    SA(7),
    SA(5, per_head=True),
    PSA(8),
    MoBA(8, 3),
    BlockTopK(4, 3),
    BlockTopK(4, 2, 4, 0, shared=8, segment=16),
    Sinks(2) | SWA(6) | PSA(6),
    Sinks(2) | SA(5) | MoBA(4, 2),
    Tail(9) | SWA(5),
    SA(N),
]
# One for every kernel of triton: chosen blocks gathered and sorted, a ring, a local window.
KERNELS = [BlockTopK(4, 3), Sinks(2) | SA(5) | MoBA(4, 2), SA(N)]
CHANGED = {"softcap": (0.7, False), "sink": (None, True), "both": (0.7, True)}


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, HEADS, N, HEAD_DIM), *[(2, KV_HEADS, N, HEAD_DIM)] * 2, (HEADS,))
    q, k, v, sink = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v, sink + 1


def by_definition(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, softcap: float | None, sink: Tensor | None
) -> Tensor:
    """In float64, one row and head at a time, from the definition of what is visible."""
    out = q.double() * 0
    for row, n in enumerate(LENGTHS.tolist()):
        own_q, own_k = q[row, :, :n].detach(), k[row, :, :n].detach()
        seen = pattern.visible(torch.arange(n), n, layer=1, heads=HEADS, q=own_q, k=own_k)
        seen = seen.expand(HEADS, -1, -1)
        for head in range(HEADS):
            kv_head = head // (HEADS // KV_HEADS)
            scores = q[row, head, :n].double() @ k[row, kv_head, :n].double().T * HEAD_DIM**-0.5
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp() * seen[head]
            total = weights.sum(-1, keepdim=True)
            if sink is not None:
                total = total + sink[head].double().exp()
            out[row, head, :n] = weights / total @ v[row, kv_head, :n].double()
    return out


@pytest.mark.parametrize("changed", CHANGED)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_torch_backends_follow_the_definition(pattern: Pattern, changed: str) -> None:
    q, k, v, sink = inputs()
    softcap, has_sink = CHANGED[changed]
    own: dict[str, Any] = {"softcap": softcap, "sink": sink if has_sink else None}
    expected = by_definition(pattern, q, k, v, *own.values())
    for backend in ("reference", "banded", "auto"):
        found = sparse_attention(q, k, v, pattern, layer=1, lengths=LENGTHS, backend=backend, **own)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    plain = sparse_attention(q, k, v, pattern, layer=1, lengths=LENGTHS)
    assert (plain - expected).abs().max() > 0.05


@pytest.mark.parametrize("backend", ["reference", "banded"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gradients_are_those_of_the_definition(pattern: Pattern, backend: str) -> None:
    tensors = [x.requires_grad_() for x in inputs(1)]
    q, k, v, sink = tensors
    own: dict[str, Any] = {"softcap": 1.5, "sink": sink}
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad(
        (by_definition(pattern, q, k, v, 1.5, sink) * weight).sum(), tensors
    )
    found = sparse_attention(q, k, v, pattern, layer=1, lengths=LENGTHS, backend=backend, **own)
    for ours, right in zip(
        torch.autograd.grad((found * weight).sum(), tensors), expected, strict=True
    ):
        torch.testing.assert_close(ours, right, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("changed", unless_thorough(["both"], list(CHANGED)))
@pytest.mark.parametrize("pattern", unless_thorough(KERNELS, PATTERNS), ids=str)
def test_triton_follows_the_definition(pattern: Pattern, changed: str) -> None:
    q, k, v, sink = inputs()
    softcap, has_sink = CHANGED[changed]
    own: dict[str, Any] = {"softcap": softcap, "sink": sink if has_sink else None}
    expected = by_definition(pattern, q, k, v, *own.values())
    found = sparse_attention(q, k, v, pattern, layer=1, lengths=LENGTHS, backend="triton", **own)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not THOROUGH, reason="FlexAttention compiles for seconds: thorough only")
@pytest.mark.parametrize("pattern", [Full(), SWA(9), SA(7), PATTERNS[8]], ids=str)
def test_flex_caps_scores(pattern: Pattern) -> None:
    q, k, v, _ = inputs()
    expected = by_definition(pattern, q, k, v, 0.7, None)
    found = sparse_attention(
        q, k, v, pattern, layer=1, lengths=LENGTHS, backend="flex", softcap=0.7
    )
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_what_a_backend_cannot_serve_is_refused_or_left_out() -> None:
    q, k, v, sink = inputs()
    with pytest.raises(UserError, match="backend 'flex' cannot serve .* no learned sinks"):
        sparse_attention(q, k, v, SWA(5), backend="flex", sink=sink)
    flash = BACKENDS["flash"].refuses
    assert flash(PLAIN) == "" and "need FlashAttention-4, which is not" in flash(Softmax(2.0))
    for n in (N, 300):
        longer = [x.repeat_interleave(n // N, dim=2) for x in (q, k)]
        assert choose_backend(SWA(5), longer[0], longer[1], softmax=Softmax(2.0, sink)).name in (
            "reference",
            "banded",
        )


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"softcap": 0.0}, "softcap must be a number above 0 .*, got 0.0"),
        ({"sink": torch.zeros(2)}, r"each of the 4 query heads, got the shape \(2,\)"),
    ],
)
def test_bad_values_are_refused(own: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        sparse_attention(*inputs()[:3], SWA(5), **own)
