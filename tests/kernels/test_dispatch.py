"""The functional face: shapes, backends by name, and refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from sa_patch import SA, SWA, Full, MoBA, sparse_attention
from sa_patch.errors import UserError
from sa_patch.kernels import BACKENDS, choose_backend
from sa_patch.patterns import Pattern


def inputs(
    n: int = 16, batch: int = 2, heads: int = 4, kv_heads: int = 2
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, n, 8), (batch, kv_heads, n, 8), (batch, kv_heads, n, 8)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def test_auto_takes_the_dense_mask_only_for_short_sequences() -> None:
    short, long = torch.empty(1, 1, 128, 8), torch.empty(1, 1, 4096, 8)
    for pattern in (Full(), SWA(8), SA(8), MoBA(8)):
        assert choose_backend(pattern, short, short).name == "reference"
        assert choose_backend(pattern, long, long).name == "banded"


def serving(pattern: Pattern, q: torch.Tensor, k: torch.Tensor) -> list[str]:
    """The backends that can serve a call."""
    return [name for name, backend in BACKENDS.items() if backend.supports(pattern, q, k)[0]]


def test_named_backend_is_taken_at_its_word() -> None:
    q, k, _ = inputs()
    able = serving(SA(4), q, k)
    assert {"reference", "banded", "triton"} <= set(able)
    for name in able:
        assert choose_backend(SA(4), q, k, name).name == name


@dataclass(frozen=True)
class Foreign(Pattern):
    """A pattern known by its definition alone: a query sees itself."""

    name: ClassVar[str] = "foreign"
    summary: ClassVar[str] = "sees itself only"

    def visible(
        self,
        query_positions: torch.Tensor,
        seq_len: int,
        *,
        layer: int = 0,
        heads: int = 1,
        q: torch.Tensor | None = None,
        k: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return (torch.arange(seq_len) == query_positions[:, None])[None]

    def keys_per_query(self, seq_len: int) -> torch.Tensor:
        return torch.ones(seq_len, dtype=torch.float64)

    def saturated(self, seq_len: int) -> bool:
        return seq_len <= 1

    @property
    def effective_window(self) -> int | None:
        return 1


def test_named_backend_that_cannot_serve_says_why() -> None:
    q, k, v = inputs()
    with pytest.raises(UserError, match="flex has no rule for the pattern 'foreign'"):
        sparse_attention(q, k, v, Foreign(), backend="flex")


def test_unknown_pattern_is_served_by_its_definition() -> None:
    q, k, v = inputs()
    for backend in ("auto", "reference", "banded"):
        out = sparse_attention(q, k, v, Foreign(), backend=backend)
        torch.testing.assert_close(out, v.repeat_interleave(2, dim=1))


def test_last_queries_alone_equal_the_whole() -> None:
    q, k, v = inputs(40)
    for pattern in (Full(), SWA(5), SA(5), SA(3, per_head=True), MoBA(4, 2)):
        for backend in ("auto", *serving(pattern, q[:, :, -7:], k)):
            whole = sparse_attention(q, k, v, pattern, backend=backend)
            last = sparse_attention(q[:, :, -7:], k, v, pattern, backend=backend)
            torch.testing.assert_close(last, whole[:, :, -7:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_lengths_may_be_zero(dtype: torch.dtype) -> None:
    q, k, v = inputs()
    for backend in serving(SA(3), q, k):
        out = sparse_attention(
            q, k, v, SA(3), lengths=torch.tensor([0, 9], dtype=dtype), backend=backend
        )
        assert not out[0].any() and not out[1, :, 9:].any()
        assert torch.isfinite(out).all()


def test_empty_inputs_give_empty_results() -> None:
    empty = torch.empty(0, 4, 5, 8)
    assert sparse_attention(empty, empty, empty, SA(3)).shape == empty.shape
    none = torch.empty(2, 4, 0, 8)
    assert sparse_attention(none, none, none, SA(3)).shape == none.shape


def bad_calls() -> dict[str, tuple[dict[str, object], str]]:
    q, k, v = inputs()
    return {
        "pattern": ({"pattern": 64}, "pattern must be a pattern"),
        "rank": ({"q": q[0]}, "q must be"),
        "key_value": ({"v": v[:, :, :4]}, "q must be"),
        "head_dim": ({"q": q[..., :4]}, "share batch and head_dim"),
        "heads": ({"q": q[:, :3]}, "multiple of kv_heads"),
        "more_queries": ({"k": k[:, :, :3], "v": v[:, :, :3]}, "more queries"),
        "lengths_high": ({"lengths": torch.tensor([3, 17])}, "from 0 to 16"),
        "lengths_count": ({"lengths": torch.tensor([3])}, "lengths must hold 2"),
        "lengths_float": ({"lengths": torch.tensor([3.0, 9.5])}, r"hold 2 whole .* got \[3.0, 9.5"),
        "lengths_list": ({"lengths": [3, 9.7]}, r"lengths must hold 2 whole .* got \[3, 9.7\]"),
        "lengths_number": ({"lengths": 9}, "lengths must hold 2 whole .* got 9"),
        "lengths_scalar": ({"lengths": torch.tensor(9)}, "lengths must hold 2 whole .* got 9"),
        "lengths_rows": ({"lengths": torch.tensor([[3], [9]])}, "lengths must hold 2 whole"),
        "numpy": ({"k": k.numpy()}, "must be tensors of torch, got Tensor, ndarray, Tensor"),
        "dtype": ({"k": k.double()}, "of one dtype .* got float32, float64, float32; cast"),
        "half values": ({"v": v.half()}, "of one dtype .* got float32, float32, float16; cast"),
        "integers": (
            {"q": q.long(), "k": k.long(), "v": v.long()},
            "float32 or float64.* got int64, int64, int64",
        ),
        "device": ({"v": v.to("meta")}, "on one device, got cpu, cpu, meta; move"),
        "layer": ({"layer": None}, "layer must be a whole number such as 0, got None"),
        "layer_float": ({"layer": 1.5}, "layer must be a whole number such as 0, got 1.5"),
        "sink": ({"sink": [0.0] * 4}, "sink must be a tensor of torch, got list"),
        "queries_beyond": ({"q": q[:, :, :5], "lengths": torch.tensor([4, 9])}, "5 queries"),
        "backend": ({"backend": "bandit"}, "did you mean 'banded'"),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_bad_calls_are_refused(case: str) -> None:
    q, k, v = inputs()
    change, says = bad_calls()[case]
    call = {"q": q, "k": k, "v": v, "pattern": SA(4)} | change
    with pytest.raises(UserError, match=says):
        sparse_attention(**call)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-0.25, 0, float("nan"), float("inf"), 1e-46, "x"], ids=str)
@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_scores_are_scaled_and_capped_by_numbers_above_zero(name: str, value: object) -> None:
    """Under others every backend would give something else, or NaN."""
    q, k, v = inputs()
    own: dict[str, Any] = {name: value}
    for backend in ("auto", "reference", "triton"):
        with pytest.raises(UserError, match=rf"{name} must be a number above 0 .*, got {value!r}"):
            sparse_attention(q, k, v, MoBA(4, 2), backend=backend, **own)


def test_a_scale_may_be_a_tensor_of_one_number() -> None:
    q, k, v = inputs()
    expected = sparse_attention(q, k, v, SA(4), scale=0.5)
    assert torch.equal(sparse_attention(q, k, v, SA(4), scale=torch.tensor(0.5)), expected)  # type: ignore[arg-type]


def test_lengths_may_be_any_whole_numbers() -> None:
    q, k, v = inputs()
    expected = sparse_attention(q, k, v, SA(4), lengths=torch.tensor([3, 9]))
    for lengths in ([3, 9], (3, 9), np.array([3, 9]), [torch.tensor(3), np.int32(9)], [3.0, 9.0]):
        found = sparse_attention(q, k, v, SA(4), lengths=lengths, layer=np.int64(0))  # type: ignore[arg-type]
        assert torch.equal(found, expected)
