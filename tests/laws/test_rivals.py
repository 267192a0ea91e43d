"""The laws for the methods of others, which `reference` and `banded` serve.

A method whose choice depends on later tokens breaks laws 1 and 8; that it does is tested here, so
that nobody takes it for what it is not.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from sa_patch import patch_model, unpatch_model
from sa_patch.errors import UserError
from sa_patch.evaluation.metering.observed_keys import Observed
from sa_patch.kernels import Spans
from sa_patch.patching import layer_patterns
from sa_patch.patterns import (
    SWA,
    MoBA,
    Pattern,
    Sinks,
    Tail,
    XAttention,
    flops_share,
)
from tests.laws import rivals
from tests.laws.rivals import EXAMPLES, NAMES, rival_of_oracle
from tests.laws.strategies import PROBE_WIDTH, Case, make_case, visible_sets
from tests.laws.test_causality import with_other_tail
from tests.laws.test_cost import LargestTensor
from tests.laws.test_decode import GREEDY
from tests.laws.test_padding import row_alone
from tests.laws.test_saturation import dense
from tests.small_models import random_tokens, tiny_model
from tests.thorough import THOROUGH, unless_thorough

FP32_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 2e-4
DECIDED = 1e-5
MAX_UNDECIDED = 0.02
N = 40
# Within the last block of any pattern that is tried.
CUT = 38


def ragged_case(seed: int = 0, **shape: Any) -> Case:
    return make_case(batch=2, seq_len=N, lengths=[N - 11, N], poison=False, seed=seed, **shape)


def differing(one: Tensor, other: Tensor) -> Tensor:
    """Which queries differ: bool ``[batch, heads, n]``."""
    return (one - other).abs().amax(-1) > FP32_TOLERANCE


@pytest.mark.parametrize("pattern", rivals.PATTERNS, ids=str)
def test_backends_equal_the_oracle_and_see_what_it_sees(pattern: Pattern) -> None:
    # As wide as what reads off the sets: dimensions that are added would change Prism's bands.
    case = ragged_case(q_heads=6, kv_heads=2, head_dim=PROBE_WIDTH, scale=0.25)
    expected = rival_of_oracle(pattern, case)
    decided = torch.from_numpy(expected.margin > DECIDED)
    assert (~decided).float().mean() <= MAX_UNDECIDED
    causal = torch.ones(N, N).tril().bool()
    assert (causal & ~torch.from_numpy(expected.visible)[1]).any(), "it hides nothing"
    for backend in ("reference", "banded"):
        error = (case.run(pattern, backend).double() - torch.from_numpy(expected.output)).abs()
        assert error[decided].max() <= FP32_TOLERANCE, backend
        found = visible_sets(pattern, case, backend)
        assert torch.equal(found[decided], torch.from_numpy(expected.visible)[decided]), backend


@pytest.mark.parametrize("seed", range(30 if THOROUGH else 2))
@pytest.mark.parametrize("name", NAMES)
def test_any_pattern_at_any_length_sees_what_the_oracle_sees(name: str, seed: int) -> None:
    rng = random.Random(f"{name} {seed}")
    pattern, n = rivals.drawn(name, rng), rng.randint(1, 45)
    case = make_case(q_heads=4, kv_heads=2, seq_len=n, head_dim=rng.choice([4, 6, 8]), seed=seed)
    expected = rival_of_oracle(pattern, case)
    decided = torch.from_numpy(expected.margin > DECIDED)[0]
    seen = pattern.visible(torch.arange(n), n, heads=4, q=case.q[0], k=case.k[0])
    seen = seen.expand(4, -1, -1)
    assert torch.equal(seen[decided], torch.from_numpy(expected.visible)[0][decided])
    if pattern.saturated(n):
        assert (seen | torch.ones(n, n).triu(1).bool()).all()
    if not pattern.counts_need_content:
        counts = seen.sum(-1).double()
        assert torch.equal(counts, pattern.keys_per_query(n).expand_as(counts))


def test_scores_of_groups_are_computed_for_some_tiles_at_a_time() -> None:
    n = 150
    case = make_case(q_heads=4, kv_heads=2, seq_len=n, head_dim=6, seed=4)
    pattern = XAttention(4, topk=5, stride=1)
    expected = rival_of_oracle(pattern, case)
    decided = torch.from_numpy(expected.margin > DECIDED)[0]
    assert (~decided).float().mean() <= MAX_UNDECIDED
    queries = torch.cat([torch.arange(n - 3, n), torch.arange(n)])  # not one tile after the other
    seen = pattern.visible(queries, n, heads=4, q=case.q[0], k=case.k[0])
    visible = torch.from_numpy(expected.visible)[0][:, queries]
    assert torch.equal(seen[decided[:, queries]], visible[decided[:, queries]])


@pytest.mark.parametrize("name", NAMES)
def test_longer_rows_unions_and_gradients_equal_reference(name: str) -> None:
    """More than one tile of queries, other patterns beside it, and a tail over it."""
    case = make_case(batch=2, seq_len=130, lengths=[130, 71], seed=3)
    own = EXAMPLES[name].grid[-1]
    for pattern in (own, Sinks(2) | SWA(5) | own | MoBA(8, 2) | Tail(9)):
        inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
        outputs, gradients = [], []
        for backend in ("banded", "reference"):
            out = case.with_tensors(*inputs).run(pattern, backend)
            outputs.append(out)
            gradients.append(torch.autograd.grad(out.square().sum(), inputs))
            with torch.no_grad():
                assert (case.run(pattern, backend) - out).abs().max() <= FP32_TOLERANCE
        assert (outputs[0] - outputs[1]).abs().max() <= FP32_TOLERANCE, pattern
        for ours, theirs in zip(*gradients, strict=True):
            assert (ours - theirs).abs().max() <= GRADIENT_TOLERANCE, pattern


@pytest.mark.parametrize("pattern", rivals.CAUSAL, ids=str)
def test_law_1_outputs_before_a_changed_token_are_bit_identical(pattern: Pattern) -> None:
    case = make_case(seq_len=N)
    for backend in ("reference", "banded"):
        before = case.run(pattern, backend)
        after = with_other_tail(case, 21, N, seed=1).run(pattern, backend)
        assert torch.equal(before[:, :, :21], after[:, :, :21]), backend


@pytest.mark.parametrize("pattern", rivals.LOOKS_AHEAD, ids=str)
def test_law_1_is_broken_where_a_choice_looks_ahead(pattern: Pattern) -> None:
    changed = []
    for seed in range(4):
        case = make_case(seq_len=N, seed=seed)
        before = case.run(pattern, "banded")
        after = with_other_tail(case, CUT, N, seed=seed).run(pattern, "banded")
        changed.append(bool(differing(before, after)[:, :, :CUT].any()))
    assert any(changed), "what it says of later tokens is wrong"


@pytest.mark.parametrize("pattern", rivals.LOOKS_AHEAD, ids=str)
def test_law_8_is_broken_where_a_choice_looks_ahead_and_parts_of_prompts_are_refused(
    pattern: Pattern,
) -> None:
    changed = []
    for seed in range(4):
        case = make_case(seq_len=N, seed=seed)
        begin = Case(case.q[:, :, :CUT], case.k[:, :, :CUT], case.v[:, :, :CUT], None)
        whole = case.run(pattern, "banded")[:, :, :CUT]
        changed.append(bool(differing(begin.run(pattern, "banded"), whole).any()))
    assert any(changed), "what it says of later tokens is wrong"
    last = Case(case.q[:, :, CUT:], case.k, case.v, None)
    for backend in ("auto", "reference", "banded"):
        with pytest.raises(UserError, match="give whole prompts"):
            last.run(pattern, backend)
    with pytest.raises(UserError, match=f"give the {N} queries"):
        pattern.visible(torch.arange(CUT, N), N, heads=4, q=case.q[0, :, CUT:], k=case.k[0])


@pytest.mark.parametrize("name", NAMES)
def test_law_2_saturated_it_is_dense_and_narrow_it_is_not(name: str) -> None:
    case = ragged_case()
    pattern = EXAMPLES[name].saturating(N)
    assert pattern.saturated(N) and not EXAMPLES[name].grid[0].saturated(N)
    for backend in ("reference", "banded"):
        assert (case.run(pattern, backend) - dense(case)).abs().max() <= FP32_TOLERANCE
        assert (case.run(EXAMPLES[name].grid[0], backend) - dense(case)).abs().max() > 0.05


@pytest.mark.parametrize("pattern", rivals.PATTERNS, ids=str)
def test_saturated_says_that_nothing_is_hidden(pattern: Pattern) -> None:
    for n in unless_thorough((1, 2, 5, 8, 13, 33), range(1, 60)):
        case = make_case(q_heads=2, kv_heads=1, seq_len=n, seed=n)
        seen = pattern.visible(torch.arange(n), n, heads=2, q=case.q[0], k=case.k[0])
        everything = bool((seen | torch.ones(n, n).triu(1).bool()).all())
        assert everything or not pattern.saturated(n)
        assert pattern.saturated(n) or not everything or pattern.reads_content
        assert not (seen & torch.ones(n, n).triu(1).bool()).any()


@pytest.mark.parametrize("pattern", [*rivals.PATTERNS, Sinks(2) | Tail(7)], ids=str)
def test_the_dense_end_of_a_prompt_is_all_that_sees_everything(pattern: Pattern) -> None:
    """So that costs count it by itself: a sample of tiles or queries would miss it."""
    for n in (1, 90, 97):
        case = make_case(q_heads=2, kv_heads=1, seq_len=n, head_dim=16, seed=n)
        # Scores far apart, so that thresholds hide something.
        q = 9 * case.q[0]
        seen = pattern.visible(torch.arange(n), n, heads=2, q=q, k=case.k[0])
        dense = (seen.sum(-1) == torch.arange(1, n + 1)).all(0)
        end = pattern.dense_end(n)
        assert dense[n - end :].all()
        assert n == 1 or not dense[n - end - 1]


@pytest.mark.parametrize("name", NAMES)
def test_law_3_a_padded_row_equals_the_row_alone(name: str) -> None:
    pattern = EXAMPLES[name].grid[-1]
    case = make_case(batch=3, seq_len=N, lengths=[N - 11, 1, N])
    for backend in ("reference", "banded"):
        together = case.run(pattern, backend)
        for row, length in enumerate(case.real_tokens()):
            alone = row_alone(case, row).run(pattern, backend)
            assert (together[row, :, :length] - alone[0]).abs().max() <= FP32_TOLERANCE
            assert not together[row, :, length:].any()


@pytest.mark.parametrize("pattern", rivals.COUNTED, ids=str)
def test_law_6_counts_are_the_closed_form(pattern: Pattern) -> None:
    for n in (1, 2, 17, N):
        case = make_case(q_heads=2, kv_heads=1, seq_len=n, seed=n)
        seen = pattern.visible(torch.arange(n), n, heads=2, q=case.q[0], k=case.k[0])
        counts = seen.sum(-1).double().expand(len(seen), -1)
        assert torch.equal(counts, pattern.keys_per_query(n).expand_as(counts))
        assert torch.equal(pattern.count_visible(n)[0].double(), pattern.keys_per_query(n))


@pytest.mark.parametrize("pattern", rivals.LOOKS_AHEAD, ids=str)
def test_law_6_counts_are_measured(pattern: Pattern) -> None:
    """Of random queries and keys: what is chosen is as good as drawn at random."""
    if pattern.counts_need_content:
        with pytest.raises(UserError, match="where its keys are chosen"):
            pattern.count_visible(N)
    counts, expected = [], pattern.keys_per_query(N)
    for seed in range(4):
        case = make_case(q_heads=8, kv_heads=8, seq_len=N, head_dim=16, seed=seed)
        observed = Observed()
        observed.add(pattern, 0, case.q, case.k, Spans((N,), (0,)))
        mean, last = observed.means(0)
        seen = pattern.visible(torch.arange(N), N, heads=8, q=case.q[0], k=case.k[0])
        assert mean == pytest.approx(float(seen.sum(-1).double().mean()))
        assert last == pytest.approx(float(seen[:, -1].sum(-1).double().mean()))
        counts.append(mean)
    assert (expected <= torch.arange(1, N + 1)).all() and (expected >= 1).all()
    mean = sum(counts) / len(counts)
    if pattern.keys_are_bounds:
        assert 0.3 * expected.mean() < mean < 0.97 * expected.mean()
        with pytest.raises(UserError, match="depends on the text"):
            flops_share(Sinks(1) | pattern, N)
    else:
        assert mean == pytest.approx(float(expected.mean()), rel=0.1)
        assert flops_share(pattern, N) > mean / (N + 1) * 2


@pytest.mark.parametrize("name", NAMES)
def test_law_7_nothing_is_of_size_n_squared(name: str) -> None:
    n = 768
    case = make_case(q_heads=2, kv_heads=1, seq_len=n, head_dim=4)
    with LargestTensor() as seen:
        case.run(EXAMPLES[name].grid[-1], "banded")
    assert seen.elements < n * n / 4


@pytest.mark.parametrize("name", NAMES)
def test_laws_5_and_8_in_a_model(name: str) -> None:
    pattern = EXAMPLES[name].grid[-1]
    model = tiny_model("qwen3")
    tokens = random_tokens(2, N)
    with torch.no_grad():
        stock = model(tokens).logits
        patch_model(model, pattern)
        whole = model(tokens).logits
        if pattern.looks_ahead:
            _check_refusals(model, pattern, tokens)
            assert torch.equal(unpatch_model(model)(tokens).logits, stock)
            return
        cache = model(tokens[:, :17], use_cache=True)
        rest = model(tokens[:, 17:], past_key_values=cache.past_key_values).logits
        assert (torch.cat([cache.logits, rest], 1) - whole).abs().max() <= LOGIT_TOLERANCE
        assert (whole - stock).abs().max() > 0.05
        assert torch.equal(unpatch_model(model)(tokens).logits, stock)


def _check_refusals(model: Any, pattern: Pattern, tokens: Tensor) -> None:
    """What needs prefix stability, refused; a prompt whole and full attention behind it, served."""
    cached = model(tokens[:, :17], use_cache=True).past_key_values
    with pytest.raises(UserError, match="needs a prompt in one piece"):
        model(tokens[:, 17:], past_key_values=cached)
    generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY)
    assert generated.shape[1] == N + 8
    with pytest.raises(UserError, match="patch with decode='full'"):
        patch_model(model, Sinks(2) | pattern, decode="pattern")
    assert layer_patterns(model)[0] == pattern
