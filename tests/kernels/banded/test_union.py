"""`banded` against `reference` where laws of whole sequences do not look: few queries behind many
cached keys, chunks, and gradients of unions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sa_patch.kernels import sparse_attention
from sa_patch.kernels.local_window import joined, local_window_of
from sa_patch.patterns import PSA, SA, SWA, BlockTopK, MoBA, Pattern, Sinks
from tests.laws.drawn import METHODS, patterns
from tests.laws.strategies import Case, make_case

FP32_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
# Share of queries whose best blocks nearly tie in fp32, which either choice settles rightly.
UNDECIDED = 1e-3


def last_queries(case: Case, count: int, pattern: Pattern, backend: str) -> torch.Tensor:
    return sparse_attention(
        case.q[:, :, -count:],
        case.k,
        case.v,
        pattern,
        layer=case.layer,
        backend=backend,
    )


def differing(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Share of the queries that differ."""
    return float(((actual - expected).abs().amax(-1) > FP32_TOLERANCE).float().mean())


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25)
@given(data=st.data())
def test_the_last_queries_equal_reference(method: str, data: st.DataObject) -> None:
    pattern = data.draw(patterns(method, max_window=60))
    n = data.draw(st.integers(2, 260))
    first = data.draw(st.integers(0, n - 1)) // pattern.shared_queries * pattern.shared_queries
    count = n - first
    case = make_case(batch=2, q_heads=4, kv_heads=2, seq_len=n, layer=1, seed=n)
    actual = last_queries(case, count, pattern, "banded")
    expected = last_queries(case, count, pattern, "reference")
    assert differing(actual, expected) <= (UNDECIDED if pattern.reads_content else 0)


LONG = [
    Sinks(4),
    Sinks(4) | SWA(60),
    PSA(60),
    PSA(60, per_head=True),
    PSA(700),
    SA(60),
    SA(60, circular=False, per_head=True),
    Sinks(4) | SWA(30) | SA(30),
    Sinks(4) | SWA(30) | PSA(30, per_head=True),
    SA(20) | SA(20, seed=1, per_head=True) | PSA(20),
    BlockTopK(4, 8),
    BlockTopK(8, 4, grouped=True, branch=0),
    Sinks(4) | SWA(20) | MoBA(16, 4),
    Sinks(4) | MoBA(64, 2),
    SWA(100) | BlockTopK(4, 8, branch=4, beam=4),
    Sinks(9) | PSA(20) | BlockTopK(8, 4) | MoBA(37, 3),
]


@pytest.mark.parametrize("count", [1, 7, 31, 32, 33, 500])
@pytest.mark.parametrize("pattern", LONG, ids=str)
def test_few_queries_behind_many_keys(pattern: Pattern, count: int) -> None:
    case = make_case(q_heads=6, kv_heads=3, seq_len=1500, head_dim=16, layer=2)
    actual = last_queries(case, count, pattern, "banded")
    expected = last_queries(case, count, pattern, "reference")
    assert differing(actual, expected) <= (UNDECIDED if pattern.reads_content else 0)


@pytest.mark.parametrize("pattern", [p for p in LONG if p.prefix_stable], ids=str)
def test_chunks_equal_the_whole(pattern: Pattern) -> None:
    case = make_case(q_heads=6, kv_heads=3, seq_len=900, head_dim=16, layer=2)
    whole = case.run(pattern, "banded")
    low = 0
    for size in (3, 200, 1, 250, 446):
        high = low + size
        chunk = sparse_attention(
            case.q[:, :, low:high],
            case.k[:, :, :high],
            case.v[:, :, :high],
            pattern,
            layer=2,
            backend="banded",
        )
        allowed = UNDECIDED if pattern.reads_content else 0
        assert differing(chunk, whole[:, :, low:high]) <= allowed
        low = high


@pytest.mark.parametrize("pattern", LONG, ids=str)
def test_gradients_equal_those_of_reference(pattern: Pattern) -> None:
    case = make_case(batch=1, q_heads=4, kv_heads=2, seq_len=150, seed=3)
    target = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(0))
    gradients = {}
    for backend in ("banded", "reference"):
        small_blocks = [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]
        out = case.with_tensors(*small_blocks).run(pattern, backend)
        gradients[backend] = torch.autograd.grad((out * target).sum(), small_blocks)
    for actual, expected in zip(gradients["banded"], gradients["reference"], strict=True):
        assert torch.isfinite(actual).all()
        assert (actual - expected).abs().max() <= GRADIENT_TOLERANCE


def test_a_neighbourhood_is_the_union_of_its_parts() -> None:
    parts = [Sinks(3), SWA(5), MoBA(8, 1), BlockTopK(4, 0, sinks=2, local=8)]
    n = 60
    positions = torch.arange(n)
    for chosen in ([0], [1], [2], [3], [0, 1], [1, 2], [1, 3], [0, 2, 3], [0, 1, 2, 3]):
        near = joined([local_window_of(parts[index]) for index in chosen])
        i, j = positions[:, None], positions
        q, k = torch.zeros(1, n, 2), torch.zeros(1, n, 2)
        expected = torch.zeros(n, n, dtype=torch.bool)
        for index in chosen:
            expected |= parts[index].visible(positions, n, q=q, k=k)[0]
        assert torch.equal(near.sees(i, j) & (j <= i), expected)
        first = near.first(positions)
        assert (first.diff() >= 0).all()
        assert int((positions - first).max()) <= near.reach
        full = expected == (j <= i)
        assert near.all_seen(n) == int(full.all(1).long().cumprod(0).sum())


def test_a_window_that_holds_a_block_needs_no_block() -> None:
    near = joined(
        [local_window_of(MoBA(16, 2)), local_window_of(SWA(16)), local_window_of(Sinks(4))]
    )
    assert near == local_window_of(SWA(16)).__class__(4, local_window_of(SWA(16)).neighbourhoods)
    wider = joined([local_window_of(MoBA(17, 2)), local_window_of(SWA(16))])
    assert len(wider.neighbourhoods) == 2
