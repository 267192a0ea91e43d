"""``backend="auto"`` on a GPU: fused kernels, and what happens where one of them cannot be trusted.

The device is simulated: the kernels run in Triton's interpreter on the CPU.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sa_patch.kernels import (
    BACKENDS,
    choose_backend,
    dispatch,
    forget_plans,
    self_check,
    sparse_attention,
)
from sa_patch.kernels.flash import backend as flash
from sa_patch.patterns import SA, SWA, Full, MoBA, Pattern, parse_pattern


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_fused_device", lambda device: True)
    monkeypatch.setattr(self_check, "_FOUND", {})


def inputs(n: int = 200, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, n, width), (1, 2, n, width), (1, 2, n, width)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)  # type: ignore[return-value]


def name(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor | None = None) -> str:
    return choose_backend(pattern, q, k, v=v).name


def broken(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Tensor]) -> None:
    whole = BACKENDS["triton"]

    def attend(*args: Any, **options: Any) -> Tensor:
        return change(whole.attend(*args, **options))

    monkeypatch.setitem(BACKENDS, "triton", dataclasses.replace(whole, attend=attend))


@pytest.mark.parametrize(
    "text", ["swa:8", "sa:8", "psa:8", "moba:8,2", "block_topk:4,2", "sinks:4+swa:8+sa:8"]
)
def test_sparse_prompts_go_to_the_fused_kernels(text: str) -> None:
    q, k, v = inputs()
    pattern = parse_pattern(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert name(pattern, q, k) == "triton"
        out = sparse_attention(q, k, v, pattern)
    assert torch.allclose(out, sparse_attention(q, k, v, pattern, backend="reference"), atol=1e-5)
    assert not self_check.failures()


def test_dense_calls_generated_tokens_and_gradients_do_not() -> None:
    q, k, v = inputs()
    # Torch's own attention, however short.
    assert name(Full(), q, k) == name(SWA(200), q, k) == "banded"
    assert name(Full(), q[:, :, :20], k[:, :, :20]) == "banded"
    assert name(SWA(8), q[:, :, -1:], k) != "triton"
    v.requires_grad_()
    assert name(SWA(8), q, k, v) != "triton"
    with torch.no_grad():
        assert name(SWA(8), q, k, v) == "triton"


def test_a_wrong_kernel_is_said_once_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, lambda out: out * 1.01)
    q, k, _ = inputs()
    with pytest.warns(UserWarning, match="left out .* differs from the reference in 100"):
        assert name(SA(8), q, k) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert name(SA(20, seed=3), q[:, :, :120], k[:, :, :120]) == "reference"
    assert "differs" in next(iter(self_check.failures().values()))
    # Its user named it, and is taken at his word.
    assert choose_backend(SA(8), q, k, "triton").name == "triton"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("PTXAS error: invalid instruction"),
        RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376"),
    ],
    ids=["compilation", "shared memory"],
)
def test_a_kernel_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(out: Tensor) -> Tensor:
        raise error

    broken(monkeypatch, fail)
    q, k, v = inputs()
    with pytest.warns(UserWarning, match="PTXAS error|out of resource"):
        out = sparse_attention(q, k, v, MoBA(8, 2))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("fails", [False, True], ids=["wrong", "not compiled"])
def test_a_kernel_of_plans_that_cannot_be_trusted_is_left_out(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """The attention kernel is right, and told to attend to the wrong keys."""
    from sa_patch.kernels.triton.rings import draws

    hashes = draws.hashes

    def broken_hashes(*args: Any) -> Tensor:
        if fails:
            raise RuntimeError("PTXAS error: invalid instruction")
        return hashes(*args).flip(-1)

    monkeypatch.setattr(draws, "hashes", broken_hashes)
    forget_plans()
    q, k, v = inputs()
    with pytest.warns(UserWarning, match="left out .* (PTXAS error|differs from the reference)"):
        out = sparse_attention(q, k, v, SA(8))
    forget_plans()
    assert torch.equal(out, sparse_attention(q, k, v, SA(8), backend="reference"))


def test_the_order_on_cuda_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-4 first where it serves and passes its check, then Triton."""
    q = torch.zeros(1, 2, 300, 16)
    pattern = SA(8)
    monkeypatch.setattr(dispatch, "_fused_device", lambda device: True)
    monkeypatch.setattr(dispatch, "_fused_order", lambda *given: dispatch._FUSED_ORDER[9, False])
    monkeypatch.setattr(dispatch, "failure", lambda backend, *given: "")
    assert dispatch.choose_backend(pattern, q, q).name == "triton", "the CPU has no flash"
    able = dataclasses.replace(dispatch.BACKENDS["flash"], supports=lambda *given: (True, ""))
    monkeypatch.setitem(dispatch.BACKENDS, "flash", able)
    assert dispatch.choose_backend(pattern, q, q).name == "triton", "an older library"
    monkeypatch.setattr(flash, "attention4_serves", lambda *given: True)
    assert dispatch.choose_backend(pattern, q, q).name == "flash"
    monkeypatch.setattr(
        dispatch, "failure", lambda backend, *given: "wrong" if backend.name == "flash" else ""
    )
    assert dispatch.choose_backend(pattern, q, q).name == "triton", "one that failed its check"
