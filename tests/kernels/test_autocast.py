"""Under `torch.autocast` every backend computes what it computes of inputs cast before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sa_patch import SA, SWA, MoBA, sparse_attention
from sa_patch.kernels import Spans, attend, choose_backend, dispatch, self_check
from sa_patch.patterns import Pattern, parse_pattern
from tests.block_walk import walked_lists
from tests.thorough import unless_thorough

__all__ = ["walked_lists"]

HEADS, KV_HEADS, N, HEAD_DIM = 4, 2, 140, 16
LENGTHS = torch.tensor([N, 97])
PATTERNS = [
    "swa:9",
    "sa:7",
    "psa:8",
    "moba:8,3",
    "block_topk:4,3,4,8",
    "block_topk:4,2,4,0,shared=8,segment=16",
    "tail:9+sinks:2+swa:5",
    "heads{1*swa:5|1*sa:7}",
]
INTERPRETED = unless_thorough(["sa:7", "moba:8,3"], PATTERNS)
SERVED = [
    *[(name, text) for name in ("auto", "reference", "banded", "flex") for text in PATTERNS],
    *[("triton", text) for text in INTERPRETED],
]
LATER = "xattention:block_size=16;topk=3"


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """As models hand them over: q and k are fp32 from their rotary embeddings."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, HEADS, N, HEAD_DIM), *[(2, KV_HEADS, N, HEAD_DIM)] * 2)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v.bfloat16()


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.usefixtures("walked_lists")
@pytest.mark.parametrize("backend, text", [*SERVED, ("banded", LATER)])
def test_inputs_are_cast_and_nothing_else(backend: str, text: str) -> None:
    (q, k, v), pattern = inputs(), parse_pattern(text)
    same: dict[str, Any] = {"lengths": LENGTHS, "layer": 1, "backend": backend}
    expected = sparse_attention(q.bfloat16(), k.bfloat16(), v, pattern, **same)
    with autocast():
        assert torch.is_autocast_enabled("cpu")
        found = sparse_attention(q, k, v, pattern, **same)
        assert torch.is_autocast_enabled("cpu")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["reference", "banded"])
@pytest.mark.parametrize("text", PATTERNS)
def test_gradients_too(text: str, backend: str) -> None:
    pattern, found = parse_pattern(text), []
    for before in (False, True):
        tensors = [x.float().requires_grad_() for x in inputs()]
        q, k, v = (
            (x.bfloat16() for x in tensors) if before else (*tensors[:2], tensors[2].bfloat16())
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=not before):
            out = sparse_attention(q, k, v, pattern, lengths=LENGTHS, backend=backend)
        out.float().square().sum().backward()
        found.append([x.grad for x in tensors])
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, atol=0, rtol=0)


def test_doubles_are_left_alone() -> None:
    q, k, v = (x.double() for x in inputs())
    expected = sparse_attention(q, k, v, SWA(9))
    with autocast():
        assert torch.equal(sparse_attention(q, k, v, SWA(9)), expected)


def test_packed_rows_too() -> None:
    q, k, v = inputs()
    same: dict[str, Any] = {"layer": 0, "scale": 0.3, "spans": Spans.packed([[90, 50], [140]])}
    expected = attend(MoBA(8, 3), q.bfloat16(), k.bfloat16(), v, **same)
    with autocast():
        assert torch.equal(attend(MoBA(8, 3), q, k, v, **same), expected)


@pytest.mark.parametrize("pattern", [SWA(9), SA(7), MoBA(8, 3)], ids=str)
def test_kernels_are_checked_without_it(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check finds is kept for the process."""
    monkeypatch.setattr(dispatch, "_fused_device", lambda device: True)
    monkeypatch.setattr(self_check, "_FOUND", {})
    q, k, v = inputs()
    with autocast():
        assert choose_backend(pattern, q, k, v=v).name == "triton"
    assert not self_check.failures()
