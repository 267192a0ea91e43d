"""Law 1: changing token t leaves everything before t bit-identical.

Mixture-of-experts models regroup their expert batches, so there the law holds to float tolerance.

Seen red when a window showed the next key (mask of `swa`, blocks of `banded`), the ring band
dropped `j <= i`, MoBA could choose its own block, and MoBA's own block was not cut at the query.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sa_patch import patch_model
from sa_patch.patterns import SA, SWA, MoBA, Pattern
from tests.laws.drawn import METHODS, MODEL_METHODS, patterns
from tests.laws.strategies import (
    BACKEND_NAMES,
    MODEL_BACKENDS,
    Case,
    affordable,
    cases,
    make_case,
    serves,
)
from tests.small_models import (
    FAMILIES,
    FIRST_WORD,
    MOE_FAMILIES,
    VOCAB_SIZE,
    random_tokens,
    tiny_model,
)

MOE_TOLERANCE = 1e-5


def with_other_tail(case: Case, start: int, stop: int, seed: int) -> Case:
    """The case with the numbers of positions start..stop-1 drawn anew, and much larger."""
    generator = torch.Generator().manual_seed(seed)
    changed = []
    for tensor in (case.q, case.k, case.v):
        tensor = tensor.clone()
        shape = tensor[:, :, start:stop].shape
        tensor[:, :, start:stop] = 20 * torch.randn(shape, generator=generator)
        changed.append(tensor)
    return case.with_tensors(*changed)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_outputs_before_a_changed_token_are_bit_identical(
    method: str, backend: str, data: st.DataObject
) -> None:
    if not affordable(backend, data):
        return
    pattern = data.draw(patterns(method))
    case = data.draw(cases(min_len=2))
    if not serves(backend, pattern, case):
        return
    start = data.draw(st.integers(1, case.seq_len - 1))
    stop = data.draw(st.sampled_from([start + 1, case.seq_len]))
    before = case.run(pattern, backend)
    after = with_other_tail(case, start, stop, seed=start).run(pattern, backend)
    assert torch.equal(before[:, :, :start], after[:, :, :start])


@pytest.mark.parametrize("pattern", [SWA(50), SA(40), MoBA(32, 3), MoBA(7, 4)], ids=str)
def test_threads_change_nothing_before_a_changed_token(pattern: Pattern) -> None:
    """Enough work for several threads, which must not split it by what the tokens are."""
    case = make_case(seq_len=700, head_dim=32)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before = case.run(pattern, "banded")
        after = with_other_tail(case, 301, 700, seed=1).run(pattern, "banded")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(before[:, :, :301], after[:, :, :301])
    assert not torch.equal(before[:, :, 301:], after[:, :, 301:])


@pytest.mark.parametrize("backend", MODEL_BACKENDS)
@pytest.mark.parametrize("method", MODEL_METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4)
@given(data=st.data())
def test_logits_before_a_changed_token_are_bit_identical(
    family: str, method: str, backend: str, data: st.DataObject
) -> None:
    pattern = data.draw(patterns(method, max_window=10))
    seq_len = data.draw(st.integers(2, 33))
    changed_at = data.draw(st.integers(1, seq_len - 1))
    model = patch_model(tiny_model(family), pattern, backend=backend)
    tokens = random_tokens(2, seq_len, seed=data.draw(st.integers(0, 1000)))
    other = tokens.clone()
    step = data.draw(st.integers(1, VOCAB_SIZE - FIRST_WORD - 1))
    words = VOCAB_SIZE - FIRST_WORD
    other[:, changed_at] = (other[:, changed_at] - FIRST_WORD + step) % words + FIRST_WORD
    with torch.no_grad():
        before, after = model(tokens).logits, model(other).logits
    if family in MOE_FAMILIES:
        difference = (before - after)[:, :changed_at].abs().max()
        assert difference <= MOE_TOLERANCE
    else:
        assert torch.equal(before[:, :changed_at], after[:, :changed_at])
    assert not torch.equal(before[:, changed_at:], after[:, changed_at:])
