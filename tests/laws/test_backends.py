"""Law 4: every backend equals `reference`, and `reference` equals the float64 oracle.

MoBA ranks blocks by fp32 scores. Where the oracle finds the last chosen block and the first one
left out closer than rounding error, either choice is right and the query is not compared; such
queries must be rare, and exact ties are tested with whole numbers, where nothing rounds.

Seen red when `banded` took w for w - 1 or left the ring open; lost a tile of queries, the last
block or a key of a band; shared one permutation, or one head's need of keys, among all heads; cut
off keys that some tile of a group needs; hid them by too little; took the first w + 1 queries for
dense; merged MoBA's blocks with other weights or without their log-sum-exp; or took a nearly
saturated pattern for a saturated one. When SWA's definition was one key wide of the mark in every
backend; when MoBA settled ties for the later block or used another KV head's means; when `scale`
was ignored.
"""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.patterns import MoBA, Pattern
from tests.laws.drawn import METHODS, grid_patterns, narrow_pattern, patterns
from tests.laws.strategies import (
    BACKEND_NAMES,
    SLOW_BACKENDS,
    Case,
    affordable,
    cases,
    in_turns,
    make_case,
    serves,
)
from tests.oracle import OracleResult
from tests.thorough import THOROUGH, unless_thorough

FP32_TOLERANCE = 1e-5  # absolute
GRADIENT_TOLERANCE = 1e-4  # absolute, of gradients of size 1 to 10
CHOICE_TOLERANCE = 1e-4  # of block scores, whose size is about 1
MAX_UNDECIDED = 0.02  # share of queries


def compared(expected: OracleResult) -> Tensor:
    """The queries whose visible set is beyond doubt: bool [batch, q_heads, n]."""
    decided = torch.from_numpy(expected.margin > CHOICE_TOLERANCE)
    assert (~decided).float().mean() <= MAX_UNDECIDED
    return decided


def worst(actual: Tensor, expected: OracleResult) -> float:
    """Largest absolute difference from the oracle over the decided queries."""
    difference = (actual.double() - torch.from_numpy(expected.output)).abs().amax(-1)
    return float(difference[compared(expected)].max())


@pytest.mark.parametrize("backend", sorted({*BACKEND_NAMES, "auto"}))
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=200 if THOROUGH else 6)
@given(data=st.data())
def test_backend_equals_the_float64_oracle(method: str, backend: str, data: st.DataObject) -> None:
    if not affordable(backend, data):
        return
    pattern = data.draw(patterns(method))
    case = data.draw(cases())
    if serves(backend, pattern, case):
        actual = case.run(pattern, backend)
        assert actual.shape == case.q.shape and actual.dtype == case.q.dtype
        assert worst(actual, case.oracle(pattern)) <= FP32_TOLERANCE


SEQ_LENS = [1, 2, 63, 111, 128]
# Three turns have every pattern in the interpreter.
SLOW_SEQ_LENS = unless_thorough([1, 63, 128], SEQ_LENS)
HEAD_DIMS = [60, 64, 100, 128]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "q_heads, kv_heads, backend",
    [
        *((8, 2, b) for b in BACKEND_NAMES if b not in (*SLOW_BACKENDS, "reference")),
        *((9, 3, backend) for backend in unless_thorough(["banded", "flex"], BACKEND_NAMES)),
        *((6, 2, backend) for backend in SLOW_BACKENDS),
    ],
)
def test_backend_equals_reference_over_the_grid(
    q_heads: int, kv_heads: int, method: str, backend: str
) -> None:
    for index, n in enumerate(SLOW_SEQ_LENS if backend in SLOW_BACKENDS else SEQ_LENS):
        head_dim = HEAD_DIMS[(index + q_heads) % len(HEAD_DIMS)]
        for pattern in in_turns(grid_patterns(method, n), backend, index):
            case = make_case(
                batch=2,
                q_heads=q_heads,
                kv_heads=kv_heads,
                seq_len=n,
                head_dim=head_dim,
                lengths=[n, max(1, n // 3)],
                layer=index,
                seed=n,
            )
            if serves(backend, pattern, case):
                difference = case.run(pattern, backend) - case.run(pattern, "reference")
                assert difference.abs().max() <= FP32_TOLERANCE, (pattern, n)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@given(
    block_size=st.sampled_from([1, 2, 4, 8]),
    topk=st.integers(1, 5),
    seq_len=st.integers(1, 48),
    seed=st.integers(0, 2**20),
)
def test_moba_settles_ties_for_the_earlier_block(
    backend: str, block_size: int, topk: int, seq_len: int, seed: int
) -> None:
    """Small whole numbers tie often, and their means and products are exact in fp32."""
    if backend in SLOW_BACKENDS and seed % 4:
        return
    generator = torch.Generator().manual_seed(seed)

    def numbers(heads: int) -> Tensor:
        return torch.randint(-1, 2, (2, heads, seq_len, 4), generator=generator).float()

    case = Case(numbers(4), numbers(2), torch.randn(2, 2, seq_len, 4, generator=generator), None)
    pattern = MoBA(block_size, topk)
    if serves(backend, pattern, case):
        expected = torch.from_numpy(case.oracle(pattern).output)
        assert (case.run(pattern, backend).double() - expected).abs().max() <= FP32_TOLERANCE


def sdpa_error(case: Case, expected: OracleResult) -> Tensor:
    """Absolute error of torch's own attention on the oracle's mask, at real tokens."""
    group = case.q.shape[1] // case.k.shape[1]
    mask = torch.from_numpy(expected.visible)
    out = torch.nn.functional.scaled_dot_product_attention(
        case.q,
        case.k.repeat_interleave(group, 1),
        case.v.repeat_interleave(group, 1),
        attn_mask=mask,
        scale=case.scale,
    )
    return (out.double() - torch.from_numpy(expected.output)).abs()


def bfloat16_case(n: int, head_dim: int) -> Case:
    return make_case(q_heads=6, kv_heads=3, seq_len=n, head_dim=head_dim, dtype=torch.bfloat16)


@functools.cache  # the same for every backend, and the slow part
def bfloat16_oracle(n: int, head_dim: int, pattern: Pattern) -> OracleResult:
    return bfloat16_case(n, head_dim).oracle(pattern)


@pytest.mark.parametrize(
    "method, head_dim, backend",
    [
        *(
            (m, 64, b)
            for m in unless_thorough(["sa", "union"], METHODS)
            for b in ("banded", "auto")
        ),
        *((m, 100, b) for m in METHODS for b in BACKEND_NAMES if b != "flex"),
        # How flex rounds is its kernel's: tests/kernels/flex/test_flex.py.
    ],
)
def test_bfloat16_error_is_at_most_twice_that_of_sdpa(
    method: str, head_dim: int, backend: str
) -> None:
    for turn, n in enumerate((2, 63, 100)):
        case = bfloat16_case(n, head_dim)
        grid = in_turns(grid_patterns(method, n), backend, turn)
        for pattern in grid:
            if not serves(backend, pattern, case):
                continue
            expected = bfloat16_oracle(n, head_dim, pattern)
            actual = case.run(pattern, backend)
            assert actual.dtype == torch.bfloat16
            decided = compared(expected)
            ours = (actual.double() - torch.from_numpy(expected.output)).abs()[decided]
            theirs = sdpa_error(case, expected)[decided]
            assert ours.max() <= 2 * theirs.max(), (pattern, n)
            assert ours.square().mean() <= 4 * theirs.square().mean(), (pattern, n)


@pytest.mark.parametrize("backend", sorted({*BACKEND_NAMES, "auto"}))
@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_gradients_equal_those_of_reference(method: str, backend: str, data: st.DataObject) -> None:
    pattern = data.draw(patterns(method))
    case = data.draw(cases())
    if not serves(backend, pattern, case, gradients=True):
        return
    toward = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(1))
    gradients = []
    for name in (backend, "reference"):
        inputs = [t.clone().requires_grad_() for t in (case.q, case.k, case.v)]
        out = case.with_tensors(*inputs).run(pattern, name)
        gradients.append(torch.autograd.grad((out * toward).sum(), inputs))
    for ours, reference in zip(*gradients, strict=True):
        assert torch.isfinite(ours).all(), "padding leaked into a gradient"
        assert (ours - reference).abs().max() <= GRADIENT_TOLERANCE
        assert ours.abs().max() > 0 or case.seq_len == 1 or pattern.effective_window == 1


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_the_last_queries_alone_equal_the_end_of_the_whole(
    method: str, backend: str, data: st.DataObject
) -> None:
    """Fewer queries than keys are the last ones of each row: what decoding asks for."""
    if not affordable(backend, data):
        return
    pattern = data.draw(patterns(method))
    case = data.draw(cases(min_len=2, ragged=True))
    count = data.draw(st.integers(1, min(case.real_tokens())))
    rows = [(row, slice(length - count, length)) for row, length in enumerate(case.real_tokens())]
    last_queries = torch.stack([case.q[row, :, place] for row, place in rows])
    last_case = Case(last_queries, case.k, case.v, case.lengths, case.layer, case.scale)
    if any((length - count) % pattern.shared_queries for length in case.real_tokens()):
        with pytest.raises(UserError, match="must begin a tile"):
            last_case.run(pattern, backend)
        return
    if not (serves(backend, pattern, case) and serves(backend, pattern, last_case)):
        return
    whole = case.run(pattern, backend)
    last = last_case.run(pattern, backend)
    ends = torch.stack([whole[row, :, place] for row, place in rows])
    assert (last - ends).abs().max() <= FP32_TOLERANCE


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_strided_inputs_and_uninitialised_memory_do_not_show(method: str, backend: str) -> None:
    """Models pass transposed views; torch.empty is filled with NaN here, so use of it shows."""
    slow = backend in SLOW_BACKENDS
    for pattern in [narrow_pattern(method)] if slow else grid_patterns(method, 70):
        case = make_case(batch=2, seq_len=70, lengths=[70, 33], poison=False)
        if not serves(backend, pattern, case):
            continue
        expected = case.run(pattern, backend)
        views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (case.q, case.k, case.v)]
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            assert torch.isnan(torch.empty(8)).all()
            actual = case.with_tensors(*views).run(pattern, backend)
        finally:
            torch.use_deterministic_algorithms(False)
        assert (actual - expected).abs().max() <= FP32_TOLERANCE


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_empty_rows_and_single_tokens(method: str, backend: str) -> None:
    pattern = grid_patterns(method, 10)[-1]
    case = make_case(batch=3, seq_len=10, lengths=[0, 1, 10])
    if not serves(backend, pattern, case):
        return
    out = case.run(pattern, backend)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert np.allclose(out[1, :, 0], case.v[1, :, 0].repeat_interleave(2, 0), atol=1e-6)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_training_after_inference_mode_works(method: str, backend: str) -> None:
    """Nothing remembered from a call under inference_mode may stand in the way of gradients."""
    pattern = grid_patterns(method, 41)[1 if method != "full" else 0]
    case = make_case(seq_len=41, layer=17)
    if not serves(backend, pattern, case, gradients=True):
        return
    with torch.inference_mode():
        expected = case.run(pattern, backend)
    case.q.requires_grad_()
    out = case.run(pattern, backend)
    out.sum().backward()
    # Gradients may take another way to the same numbers.
    assert (out.detach() - expected).abs().max() <= FP32_TOLERANCE
    assert case.q.grad is not None and torch.isfinite(case.q.grad).all()
