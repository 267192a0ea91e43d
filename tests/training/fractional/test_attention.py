"""Fractional neural attention against its definition, written a second time as float64 loops."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.patterns import PSA, SA, SWA, Full, MoBA, Pattern, Sinks, Tail
from sa_patch.patterns.rivals.by_head import ByHead
from sa_patch.training.fractional.attention import fractional_attention
from tests.laws.test_cost import LargestTensor
from tests.training.fractional.oracle import one_head

ALPHAS = (1.0, 1.2, 1.6, 2.0)
GEOMETRIES = ("euclidean", "geodesic")
# Relative to the largest value: sums in another order; float32 with powers of up to 66; bfloat16
# inputs and outputs, whose rounding is 2^-9.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 1e-2}
PATTERNS: tuple[Pattern, ...] = (
    SWA(4),
    SA(3, 5),
    SA(2, 1, per_head=True),
    PSA(3, 2, per_head=True),
    Sinks(2) | SWA(3) | Tail(2),
    Sinks(1) | SA(2, 7) | PSA(3),
)
TWO_SIDED = PATTERNS[:3]


def tensors(
    seed: int, shape: tuple[int, ...] = (2, 4, 11, 6), kv_heads: int = 2, value: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch, heads, n, d = shape
    q = torch.randn(batch, heads, n, d, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, n, d, generator=generator, dtype=torch.float64)
    return q, k, torch.randn(batch, kv_heads, n, value, generator=generator, dtype=torch.float64)


def expected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float,
    *,
    causal: bool = True,
    exclude_self: bool = False,
    lengths: list[int] | None = None,
    pattern: Pattern | None = None,
    layer: int = 0,
    **options: Any,
) -> Tensor:
    """By the oracle. Non-causal patterns by what DESIGN says of causal ones, without j <= i."""
    batch, heads, queries, _ = q.shape
    n, group = k.shape[2], heads // k.shape[1]
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for row in range(batch):
        length = n if lengths is None else lengths[row]
        start = length - queries if queries < n else 0
        mask = None
        if pattern is not None:
            mask = two_sided(pattern, length, layer, heads, causal).expand(heads, -1, -1)
        for head in range(heads):

            def sees(i: int, j: int, head: int = head, mask: Tensor | None = mask) -> bool:
                seen = (j <= i or not causal) and (i != j or not exclude_self)
                return seen and (mask is None or bool(mask[head, i, j]))

            real = min(length - start, queries)
            out[row, head, :real] = one_head(
                q[row, head, :real].double().numpy(),
                k[row, head // group, :length].double().numpy(),
                v[row, head // group, :length].double().numpy(),
                alpha,
                sees,
                start=start,
                **options,
            )
    return torch.from_numpy(out)


def attend(inputs: list[Tensor], alpha: float, **options: Any) -> Tensor:
    q, k, v = inputs
    return fractional_attention(q, k, v, alpha, **options)


def two_sided(pattern: Pattern, n: int, layer: int, heads: int, causal: bool) -> Tensor:
    seen = pattern.visible(torch.arange(n), n, layer=layer, heads=heads)
    # SWA and SA see as far ahead as behind, and by what is near both ways.
    return seen if causal else seen | seen.transpose(-1, -2)


def assert_near(found: Tensor, wanted: Tensor, tolerance: float | None = None) -> None:
    tolerance = TOLERANCE[found.dtype] if tolerance is None else tolerance
    assert bool(found.isfinite().all())
    scale = float(wanted.abs().max()) or 1.0
    assert float((found.detach().double() - wanted).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_it_is_the_definition(alpha: float, geometry: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors(1))
    for causal in (True, False):
        for density in (0.0, 0.7):
            options: dict[str, Any] = {
                "geometry": geometry, "causal": causal, "density": density, "bandwidth": 1.7,
            }  # fmt: skip
            found = fractional_attention(q, k, v, alpha, **options)
            assert found.dtype == dtype
            assert_near(found, expected(q, k, v, alpha, **options))


@given(data=st.data())
def test_every_option_is_the_definition_dense_and_sparse(data: st.DataObject) -> None:
    draw = data.draw
    causal = draw(st.booleans())
    patterns = (None, Full(), *(PATTERNS if causal else TWO_SIDED))
    n, d = draw(st.integers(1, 13)), draw(st.integers(2, 5))
    q, k, v = tensors(draw(st.integers(0, 9)), (2, 4, n, d), draw(st.sampled_from([1, 2, 4])))
    lengths = draw(st.none() | st.lists(st.integers(0, n), min_size=2, max_size=2))
    options: dict[str, Any] = {
        "geometry": draw(st.sampled_from(GEOMETRIES)),
        "bandwidth": draw(st.sampled_from([1.0, 0.3, "median"])),
        "density": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "exclude_self": draw(st.booleans()),
        "causal": causal,
        "pattern": draw(st.sampled_from(patterns)),
        "layer": draw(st.integers(0, 3)),
    }
    alpha = draw(st.sampled_from(ALPHAS) | st.floats(1, 2))
    given_lengths = None if lengths is None else torch.tensor(lengths)
    if lengths is not None:
        for row, length in enumerate(lengths):
            for x in (q, k, v):
                x[row, :, length:] = torch.nan
    found = fractional_attention(q, k, v, alpha, lengths=given_lengths, **options)
    assert_near(found, expected(q, k, v, alpha, lengths=lengths, **options), 1e-6)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_pattern_has_density_and_a_median_of_its_own(geometry: str, pattern: Pattern) -> None:
    q, k, v = tensors(10)
    for density, bandwidth in ((0.0, "median"), (1.0, 1.0)):
        options: dict[str, Any] = {
            "geometry": geometry, "density": density, "bandwidth": bandwidth, "pattern": pattern,
        }  # fmt: skip
        found = fractional_attention(q, k, v, 1.2, **options)
        assert_near(found, expected(q, k, v, 1.2, **options))


@pytest.mark.parametrize("pattern", [None, *PATTERNS], ids=str)
def test_fewer_queries_are_the_last_of_each_row(pattern: Pattern | None) -> None:
    q, k, v = tensors(2)
    lengths = [11, 7]
    found = fractional_attention(
        q[:, :, :4], k, v, 1.2, lengths=torch.tensor(lengths), pattern=pattern
    )
    wanted = expected(q[:, :, :4], k, v, 1.2, lengths=lengths, pattern=pattern)
    assert_near(found, wanted)


@pytest.mark.parametrize("pattern", [None, SA(3, 1)], ids=str)
def test_padding_may_stand_anywhere(pattern: Pattern | None) -> None:
    q, k, v = tensors(3)
    real = torch.tensor([[1] * 11, [0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1]], dtype=torch.bool)
    found = fractional_attention(q, k, v, 1.6, padding=real, pattern=pattern)
    alone = attend([x[1:, :, real[1]] for x in (q, k, v)], 1.6, pattern=pattern)
    assert_near(found[1:, :, real[1]], alone)
    assert not found[1, :, ~real[1]].any()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("alpha", [1.2, 2.0])  # both forms of the weights
@pytest.mark.parametrize("pattern", [None, Sinks(1) | SWA(2), SA(2, per_head=True)], ids=str)
def test_gradients_pass_gradcheck(alpha: float, geometry: str, pattern: Pattern | None) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(4, (2, 2, 6, 3), 1, 2))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fractional_attention(
            q, k, v, alpha, geometry=geometry, density=0.5, exclude_self=True, pattern=pattern,
            lengths=torch.tensor([6, 4]),
        )  # fmt: skip

    assert torch.autograd.gradcheck(attend, (q, k, v))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_chunks_change_neither_values_nor_gradients(
    geometry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for chunk in (1 << 15, 1):
        monkeypatch.setattr("sa_patch.training.fractional.pairs._CHUNK", chunk)
        inputs = [x.requires_grad_() for x in tensors(5)]
        out = attend(inputs, 1.2, geometry=geometry, pattern=SA(4), density=0.5)
        gradients = torch.autograd.grad(out.square().sum(), inputs)
        found.append([out, *gradients])
    for one, other in zip(*found, strict=True):
        assert_near(one, other.detach())


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_far_equal_and_zero_vectors_are_finite(
    alpha: float, geometry: str, dtype: torch.dtype
) -> None:
    _, _, v = tensors(6, kv_heads=4)
    base = torch.randn(2, 4, 11, 6, generator=torch.Generator().manual_seed(0))
    cases = {
        "equal": (base, base),
        "all one point": (base * 0 + 1, base * 0 + 1),
        "zero": (base * 0, base * 0),
        "opposite": (base, -base),
        "far": (base * 1e4, base * -1e4),
        "one far": (base, base.clone().index_fill_(2, torch.tensor([3]), 1e4)),
        "nearly equal": (base, base * (1 + 1e-7)),
    }
    for name, (q, k) in cases.items():
        for pattern in (None, SA(3)):
            inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
            out = attend(inputs, alpha, geometry=geometry, pattern=pattern, density=0.5)
            gradients = torch.autograd.grad(out.square().sum(), inputs)
            assert all(bool(x.isfinite().all()) for x in (out, *gradients)), (name, pattern)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_saturated_pattern_is_dense_and_a_narrow_one_is_not(alpha: float, geometry: str) -> None:
    q, k, v = tensors(7)
    dense = fractional_attention(q, k, v, alpha, geometry=geometry)
    for pattern in (SWA(11), SA(11), PSA(11), Sinks(5) | SWA(6)):
        assert pattern.saturated(11)
        assert_near(fractional_attention(q, k, v, alpha, geometry=geometry, pattern=pattern), dense)
    narrow = fractional_attention(q, k, v, alpha, geometry=geometry, pattern=SWA(3))
    assert float((narrow - dense).abs().max()) > 1e-2


@pytest.mark.parametrize("pattern", [None, SWA(3)], ids=str)
def test_a_query_that_sees_nothing_gives_zero(pattern: Pattern | None) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(8))
    out = fractional_attention(q, k, v, 1.2, exclude_self=True, pattern=pattern)
    assert not out[:, :, 0].any() and bool(out[:, :, 1:].any())
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(bool(x.isfinite().all()) for x in gradients)


@pytest.mark.parametrize("pattern", [None, SWA(4), PSA(3)], ids=str)
@given(t=st.integers(1, 10), alpha=st.sampled_from(ALPHAS))
def test_later_tokens_change_nothing_before_them(
    t: int, alpha: float, pattern: Pattern | None
) -> None:
    q, k, v = tensors(9)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, t:] += 1
    one = fractional_attention(q, k, v, alpha, pattern=pattern)
    other = attend(changed, alpha, pattern=pattern)
    assert torch.equal(one[:, :, :t], other[:, :, :t])
    # As documented, density lets the future in: through the sums of columns.
    one = fractional_attention(q, k, v, alpha, pattern=pattern, density=1.0)
    other = attend(changed, alpha, pattern=pattern, density=1.0)
    assert t < 2 or not torch.equal(one[:, :, :t], other[:, :, :t])


def test_a_pattern_costs_no_square_of_the_length() -> None:
    n, window = 4096, 16
    q, k, v = (x.float().requires_grad_() for x in tensors(0, (1, 1, n, 8), 1, 8))
    with LargestTensor() as largest:
        out = fractional_attention(
            q, k, v, 1.2, pattern=Sinks(2) | SWA(8) | SA(window), density=0.5
        )
        out.sum().backward()
    assert largest.elements < n * n // 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 0.9}, "alpha must be"),
        ({"alpha": 2.1}, "alpha must be"),
        ({"geometry": "flat"}, "geometry must be"),
        ({"bandwidth": 0.0}, "bandwidth must be"),
        ({"bandwidth": "mean"}, "bandwidth must be"),
        ({"density": -1.0}, "density must be"),
        ({"pattern": MoBA(4, 2)}, "chooses keys by dot products"),
        ({"pattern": Sinks(2) | SWA(3), "causal": False}, "no non-causal form"),
        ({"pattern": ByHead((Full(), SWA(2)))}, "differs from head to head"),
        ({"lengths": torch.tensor([1])}, "lengths must hold 2"),
        ({"padding": torch.ones(2, 3)}, "padding must be"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(options: dict[str, Any], words: str) -> None:
    q, k, v = tensors(0)
    with pytest.raises(UserError, match=words):
        fractional_attention(q, k, v, **{"alpha": 1.2, **options})
