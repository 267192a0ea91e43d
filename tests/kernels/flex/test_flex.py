"""Backend `flex`, compiled: results, how often it compiles, and what it refuses.

Every result here comes from compiled code, which alone reads the block lists. Shapes are chosen
so that few families are compiled; the names below say which.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from sa_patch.errors import UserError
from sa_patch.kernels import sparse_attention
from sa_patch.kernels.flex import backend as flex
from sa_patch.kernels.flex import kernel as flex_kernel
from sa_patch.kernels.plans.plan import PLANS
from sa_patch.patterns import (
    PSA,
    SA,
    SWA,
    BlockTopK,
    Full,
    MoBA,
    Pattern,
    Sinks,
    parse_pattern,
)
from tests.laws.strategies import Case, make_case
from tests.thorough import unless_thorough

FP32_TOLERANCE = 1e-5  # absolute, law 4
BLOCK = 64
# Shorter than a block, at its edges, several of them, not a multiple of any.
LENGTHS = [2, 3, 40, 63, 64, 65, 128, 129, 200, 331]

LOCAL = Sinks(4) | SWA(20)
# By the code that is compiled for them.
PATTERNS: dict[str, list[Pattern]] = {
    "window": [
        Full(),
        SWA(1),
        SWA(9),
        SWA(64),
        SWA(150),
        SWA(1000),
        Sinks(4),
        Sinks(4) | SWA(65),
        Sinks(130) | SWA(20),
    ],
    "ring": [
        SA(1),
        SA(2, seed=3),
        SA(20, seed=1),
        SA(33, circular=False),
        SA(90, seed=2),
        PSA(1),
        PSA(2, seed=3),
        PSA(20, seed=1),
        PSA(90, seed=2),
    ],
    "ring_per_head": [
        SA(5, per_head=True),
        SA(40, circular=False, per_head=True),
        PSA(5, per_head=True),
        PSA(40, seed=3, per_head=True),
    ],
    "chosen": [
        MoBA(3, 3),
        MoBA(16, 3),
        MoBA(50, 3),
        MoBA(64, 3),
        BlockTopK(block_size=4, topk=2, sinks=3, local=8),
        BlockTopK(block_size=16, topk=2, sinks=0, local=0, branch=0),
        BlockTopK(block_size=7, topk=2, sinks=2, local=14, branch=2, beam=2, grouped=True),
        LOCAL | MoBA(11, 3),
    ],
    "window and ring": [
        LOCAL | SA(20),
        Sinks(3) | SA(30, seed=1, circular=False),
        SWA(64) | PSA(90, seed=3),
        Sinks(70) | SWA(150) | SA(9, seed=2, per_head=True),
    ],
    "rings and chosen": [
        LOCAL | SA(7) | PSA(9) | BlockTopK(block_size=4, topk=2, sinks=2, local=8),
        SA(30, per_head=True) | PSA(30, seed=5) | MoBA(16, 3),
    ],
}

FAMILIES = unless_thorough(["window", "ring", "rings and chosen"], list(PATTERNS))

pytestmark = pytest.mark.skipif(
    bool(flex._cpu_refusal()), reason=f"flex cannot compile here: {flex._cpu_refusal()}"
)


def compilations() -> int:
    return int(counters["stats"]["unique_graphs"])


def case_of(n: int, lengths: list[int] | None = None, **shape: Any) -> Case:
    """The shape most tests share, here and in the laws: 4 query and 2 KV heads of 8, fp32."""
    return make_case(**({"batch": 2, "layer": 3, "seed": n} | shape), seq_len=n, lengths=lengths)


def worst(case: Case, pattern: Pattern) -> float:
    """Largest absolute difference from `reference`."""
    return float((case.run(pattern, "flex") - case.run(pattern, "reference")).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_reference_and_compiles_once_whatever_the_length(family: str) -> None:
    before = compilations()
    for n in LENGTHS:
        for pattern in PATTERNS[family]:
            assert worst(case_of(n), pattern) <= FP32_TOLERANCE, (pattern, n)
    # Saturated patterns are windows, whichever family they come from.
    assert compilations() - before <= (2 if family != "window" else 1)


def test_new_lengths_windows_and_batches_compile_nothing() -> None:
    for family in FAMILIES:
        case_of(200).run(PATTERNS[family][-1], "flex")
    before = compilations()
    for pattern in (
        Sinks(9) | SWA(77),
        SA(31, seed=9),
        PSA(31, seed=9),
        LOCAL | SA(11, seed=9) | PSA(5) | BlockTopK(block_size=4, topk=3, sinks=3, local=4),
        Full(),
    ):
        for n, batch in ((450, 2), (451, 3), (77, 4)):
            assert worst(case_of(n, batch=batch, layer=n), pattern) <= FP32_TOLERANCE
    assert compilations() == before


def test_equals_the_float64_oracle() -> None:
    case = case_of(150, lengths=[150, 71])
    unions = PATTERNS["rings and chosen"]
    for pattern in (SWA(30), SA(25, seed=5), SA(25, circular=False), PSA(9), *unions):
        expected = torch.from_numpy(case.oracle(pattern).output)
        assert (case.run(pattern, "flex").double() - expected).abs().max() <= FP32_TOLERANCE


@pytest.mark.parametrize("pattern", [LOCAL | PSA(20) | MoBA(16, 2)], ids=str)
def test_bfloat16_error_is_at_most_twice_that_of_sdpa(pattern: Pattern) -> None:
    """Law 4 in half precision, compiled: the laws themselves walk the lists in plain torch."""
    case = case_of(200, dtype=torch.bfloat16, batch=1)
    expected = torch.from_numpy(case.oracle(pattern).output)
    actual = case.run(pattern, "flex")
    assert actual.dtype == torch.bfloat16
    ours = (actual.double() - expected).abs()
    theirs = (case.run(pattern, "reference").double() - expected).abs()
    assert ours.max() <= 2 * theirs.max()
    assert ours.square().mean() <= 4 * theirs.square().mean()


@pytest.mark.parametrize("lengths", [[331, 70, 1, 0], [65, 65, 331, 2], [64, 63, 0, 0]])
def test_ragged_rows(lengths: list[int]) -> None:
    case = case_of(331, lengths=lengths, batch=4)
    for family in FAMILIES:
        pattern = PATTERNS[family][1]
        assert worst(case, pattern) <= FP32_TOLERANCE, pattern
        out = case.run(pattern, "flex")
        for row, length in enumerate(lengths):
            assert not out[row, :, length:].any()


def test_one_token_sees_itself() -> None:
    case = case_of(1)
    for pattern in (Full(), SWA(3), SA(1), MoBA(1, 1)):
        out = case.run(pattern, "flex")
        assert torch.equal(out, case.v.repeat_interleave(2, dim=1))


def test_layer_is_heeded() -> None:
    case = case_of(200)
    plain = case.run(SA(20), "flex")
    other = Case(case.q, case.k, case.v, None, layer=4)
    assert (other.run(SA(20), "flex") - plain).abs().max() > 0.1
    assert worst(other, SA(20)) <= FP32_TOLERANCE


@pytest.mark.parametrize(
    "pattern",
    unless_thorough(
        [SA(20, per_head=True)],
        [SWA(33), PSA(20), SA(20, per_head=True), LOCAL | SA(9, per_head=True) | MoBA(9, 3)],
    ),
    ids=str,
)
def test_views_of_models_with_grouped_heads_and_their_scale(pattern: Pattern) -> None:
    """``[batch, n, heads, head_dim]`` transposed, as models hand over; 9 query and 3 KV heads."""
    case = case_of(140, batch=1, q_heads=9, kv_heads=3, head_dim=100, scale=0.3)
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (case.q, case.k, case.v)]
    assert worst(case.with_tensors(*views), pattern) <= FP32_TOLERANCE


def test_changing_a_token_leaves_earlier_ones_bit_identical() -> None:
    case = case_of(200)
    later = [x.clone() for x in (case.q, case.k, case.v)]
    for x in later:
        x[:, :, 150:] *= -30
    for pattern in (PATTERNS["ring"][2], PATTERNS["rings and chosen"][0]):
        before = case.run(pattern, "flex")
        after = case.with_tensors(*later).run(pattern, "flex")
        assert torch.equal(before[:, :, :150], after[:, :, :150])
        assert not torch.equal(before[:, :, 150:], after[:, :, 150:])


def test_autograd_switched_off_is_served() -> None:
    case = case_of(100)
    expected = case.run(SA(20), "reference")
    case.q.requires_grad_()
    with torch.no_grad():
        out = case.run(SA(20), "flex")
    assert (out - expected).abs().max() <= FP32_TOLERANCE and not out.requires_grad


def test_inference_mode_leaves_nothing_behind() -> None:
    """Cached plans serve calls outside, and the other way round."""
    case = case_of(111)
    with torch.inference_mode():
        inside = case.with_tensors(case.q.clone(), case.k.clone(), case.v.clone())
        expected = inside.run(SWA(21), "flex")
    assert torch.equal(case.run(SWA(21), "flex"), expected.clone())


def test_too_many_families_raise_instead_of_running_uncompiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case_of(200).run(SWA(5), "flex")
    monkeypatch.setattr(flex_kernel, "_MOST_COMPILATIONS", 1)
    with pytest.raises(UserError, match="flex could not be compiled"):
        case_of(200, head_dim=12).run(SWA(5), "flex")


def test_plans_are_cached_for_each_layer_that_draws() -> None:
    case = case_of(200)
    for pattern, added in ((SWA(20), 0), (SA(20), 1), (PSA(9), 1)):
        case.run(pattern, "flex")
        held = len(PLANS)
        case.run(pattern, "flex")
        assert len(PLANS) == held
        Case(case.q, case.k, case.v, None, layer=30).run(pattern, "flex")
        assert len(PLANS) == held + added


def refusal(pattern: Pattern, q: Tensor, k: Tensor) -> str:
    able, reason = flex.supports(pattern, q, k)
    assert not able
    with pytest.raises(UserError, match="cannot serve"):
        sparse_attention(q, k, k, pattern, backend="flex")
    return reason


def test_refusals_give_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 2, 9, 4)
    assert "prefill only" in refusal(SWA(3), q[:, :, :2], q)
    assert "not float64" in refusal(SWA(3), q.double(), q.double())
    long = torch.empty(1, 8, 1 << 17, 64, device="meta")
    shared, alone = parse_pattern("shared_topk"), parse_pattern("block_topk:4,50,4,16")
    # Of 8,183 blocks a tenth, of each of the 32 queries of a tile: 26,176, in lists of 65,536.
    assert "would take 512 GiB, more than 4" in flex.supports(shared, long, long)[1]
    assert "GiB" not in flex.supports(alone, long, long)[1]
    assert "no gradients on the CPU" in refusal(SWA(3), q.clone().requires_grad_(), q)
    assert "not on 'meta'" in flex.supports(SWA(3), q.to("meta"), q.to("meta"))[1]
    flex._cpu_refusal.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    try:
        assert "'no-such-compiler' is not installed" in refusal(SWA(3), q, q)
    finally:
        flex._cpu_refusal.cache_clear()


def test_gradients_of_values_alone_are_refused_too() -> None:
    """`supports` never sees the values."""
    case = case_of(40)
    case.v.requires_grad_()
    with pytest.raises(UserError, match="no gradients on the CPU"):
        case.run(SWA(3), "flex")


# From here on compiled code is thrown away, so these tests come last.


class Watching(TorchDispatchMode):
    """Any dispatch mode: torch compiles nothing under one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["compilation off", "dispatch mode"])
def uncompiled(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "compilation off":
        with torch._dynamo.config.patch(disable=True):
            yield
    else:
        with Watching():
            yield


@pytest.mark.parametrize("pattern", [SWA(16), SA(16), MoBA(16, 3)], ids=str)
def test_uncompiled_flexattention_is_refused(uncompiled: None, pattern: Pattern) -> None:
    """It would ignore the lists and build n x n scores."""
    with pytest.raises(UserError, match="flex must be compiled"):
        case_of(200, head_dim=12).run(pattern, "flex")


def test_a_refused_call_does_not_spoil_later_ones() -> None:
    with Watching(), pytest.raises(UserError, match="flex must be compiled"):
        case_of(200, head_dim=12).run(SWA(5), "flex")
    assert worst(case_of(200), SWA(5)) <= FP32_TOLERANCE
