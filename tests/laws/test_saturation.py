"""Law 2: a pattern that admits every j <= i gives full attention; one that does not, differs.

Seen red when SA, SWA or MoBA called itself saturated one step early, `layers=` was ignored, and the
pattern was ignored altogether.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sa_patch import patch_model
from sa_patch.patterns import SA
from tests.laws.drawn import (
    COUNTED_METHODS,
    METHODS,
    MODEL_METHODS,
    MODEL_SPARSE_METHODS,
    SPARSE_METHODS,
    narrow_pattern,
    patterns,
    saturating_pattern,
)
from tests.laws.strategies import (
    BACKEND_NAMES,
    MODEL_BACKENDS,
    Case,
    affordable,
    cases,
    make_case,
    serves,
)
from tests.small_models import FAMILIES, random_tokens, tiny_model

KERNEL_TOLERANCE = 1e-5  # absolute, float32
LOGIT_TOLERANCE = 2e-4  # absolute, float32 logits of size 1 to 10 after up to three layers


def dense(case: Case) -> torch.Tensor:
    """Stock causal attention of torch over each row's real tokens, zero at padding."""
    group = case.q.shape[1] // case.k.shape[1]
    out = torch.zeros(*case.q.shape[:3], case.v.shape[3])
    for row, length in enumerate(case.real_tokens()):
        q = case.q[row, :, :length]
        k, v = (t[row, :, :length].repeat_interleave(group, 0) for t in (case.k, case.v))
        out[row, :, :length] = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=case.scale
        )[0]
    return out


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_a_saturated_pattern_equals_dense_attention(
    method: str, backend: str, data: st.DataObject
) -> None:
    if not affordable(backend, data):
        return
    case = data.draw(cases())
    pattern = saturating_pattern(method, case.seq_len)
    assert pattern.saturated(case.seq_len)
    if serves(backend, pattern, case):
        difference = (case.run(pattern, backend) - dense(case)).abs().max()
        assert difference <= KERNEL_TOLERANCE


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_saturated_says_whether_every_earlier_key_is_visible(
    method: str, data: st.DataObject
) -> None:
    pattern = data.draw(patterns(method))
    case = data.draw(cases(ragged=False))
    causal = np.tril(np.ones((case.seq_len, case.seq_len), dtype=bool))
    hidden = causal & ~case.oracle(pattern).visible
    assert isinstance(pattern.saturated(case.seq_len), bool)
    # What is drawn, or joined, may happen to hide no earlier key; never the other way round.
    if pattern.saturated(case.seq_len):
        assert not hidden.any()
    elif method in COUNTED_METHODS:
        assert hidden.any()


@pytest.mark.parametrize("n", [2, 3, 8, 9, 64, 65])
@pytest.mark.parametrize("circular", [True, False])
def test_sa_saturates_exactly_where_no_pair_of_slots_is_too_far_apart(
    n: int, circular: bool
) -> None:
    farthest = max(min(d, n - d) if circular else d for d in range(n))
    assert not SA(farthest, circular=circular).saturated(n)
    assert SA(farthest + 1, circular=circular).saturated(n)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("method", SPARSE_METHODS)
def test_a_sparse_pattern_differs_from_dense_attention(method: str, backend: str) -> None:
    case = make_case(batch=2, seq_len=30, lengths=[25, 30])
    pattern = narrow_pattern(method)
    if not serves(backend, pattern, case):
        return
    assert (case.run(pattern, backend) - dense(case)).abs().max() > 0.05


@pytest.mark.parametrize("backend", MODEL_BACKENDS)
@pytest.mark.parametrize("method", MODEL_METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3)
@given(seq_len=st.integers(1, 40), seed=st.integers(0, 1000))
def test_logits_of_a_saturated_model_equal_the_stock_models(
    family: str, method: str, backend: str, seq_len: int, seed: int
) -> None:
    model = tiny_model(family)
    tokens = random_tokens(2, seq_len, seed)
    with torch.no_grad():
        stock = model(tokens).logits
        patch_model(model, saturating_pattern(method, seq_len), backend=backend)
        saturated = model(tokens).logits
    assert (saturated - stock).abs().max() <= LOGIT_TOLERANCE


@pytest.mark.parametrize("method", MODEL_SPARSE_METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_sparse_model_differ_from_the_stock_models(family: str, method: str) -> None:
    model = tiny_model(family)
    tokens = random_tokens(2, 30)
    with torch.no_grad():
        stock = model(tokens).logits
        patch_model(model, narrow_pattern(method))
        sparse = model(tokens).logits
    assert (sparse - stock).abs().max() > 0.05


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_only_the_named_layers_are_sparse(layer: int) -> None:
    """Hidden states before the patched layer are the stock model's, those after it are not."""
    model = tiny_model("llama")
    tokens = random_tokens(1, 30)
    with torch.no_grad():
        stock = model(tokens, output_hidden_states=True).hidden_states
        patch_model(model, SA(3), layers=[layer])
        sparse = model(tokens, output_hidden_states=True).hidden_states
    for depth in range(len(stock)):
        difference = float((stock[depth] - sparse[depth]).abs().max())
        if depth <= layer:
            assert difference <= LOGIT_TOLERANCE
        else:
            assert difference > 0.01
