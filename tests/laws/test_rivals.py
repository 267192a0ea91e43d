"""The laws for the methods of others, which `reference` and `banded` serve.

A method whose choice depends on later tokens breaks laws 1 and 8; that it does is tested here, so
that nobody takes it for what it is not.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sa_patch import patch_model, unpatch_model
from sa_patch.analysis.cost import measure_cost
from sa_patch.benchmark.attention.options import make_options
from sa_patch.errors import UserError
from sa_patch.evaluation.metering.observed_keys import Observed
from sa_patch.kernels import BACKENDS, Spans
from sa_patch.kernels.availability import example
from sa_patch.kernels.visited_keys import TILE_ROWS, choosing_keys, visited_keys
from sa_patch.patching import layer_patterns
from sa_patch.patterns import PATTERNS as ALL_METHODS
from sa_patch.patterns import (
    SWA,
    MoBA,
    Pattern,
    Sinks,
    Tail,
    XAttention,
    fit_budget,
    flops_share,
    parse_pattern,
)
from sa_patch.patterns.registry import parameters
from sa_patch.report.recovery_report import composition
from sa_patch.report.variants import BUDGET, METHOD_LABELS
from tests.laws import rivals
from tests.laws.rivals import EXAMPLES, NAMES, rival_of_oracle
from tests.laws.strategies import PROBE_WIDTH, Case, make_case, serves, visible_sets
from tests.laws.test_causality import with_other_tail
from tests.laws.test_cost import LargestTensor
from tests.laws.test_decode import GREEDY
from tests.laws.test_padding import row_alone
from tests.laws.test_saturation import dense
from tests.small_models import random_tokens, tiny_model
from tests.thorough import unless_thorough

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
    # As wide as what reads off the sets, whose padding would change the scale of choices.
    case = ragged_case(q_heads=6, kv_heads=2, head_dim=PROBE_WIDTH)
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


@pytest.mark.parametrize("name", NAMES)
def test_other_backends_refuse_with_a_reason(name: str) -> None:
    pattern = EXAMPLES[name].grid[0]
    for backend in BACKENDS.keys() - {"reference", "banded"}:
        assert not serves(backend, pattern, make_case(seq_len=N))


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


@pytest.mark.parametrize("pattern", rivals.LOOKS_AHEAD, ids=str)
def test_what_some_queries_see_is_told_as_for_all(pattern: Pattern) -> None:
    """Meters ask for evenly spaced queries, and for tiles of another size than the pattern's."""
    case = make_case(seq_len=N)
    content: dict[str, Any] = {"heads": 4, "q": case.q[0], "k": case.k[0]}
    whole = pattern.visible(torch.arange(N), N, **content)
    some = torch.tensor([37, 5, 6, 39, 0])
    assert torch.equal(pattern.visible(some, N, **content), whole[:, some])
    view = pattern.view(N, **content)
    assert torch.equal(view(3, 26), whole[:, 3:26])
    united = Sinks(2) | pattern
    assert torch.equal(
        united.visible(some, N, **content)[:, 1], whole[:, 5] | (torch.arange(N) < 2)
    )


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
def test_visited_keys_are_those_of_any_query_of_a_tile(name: str) -> None:
    pattern, n, heads = EXAMPLES[name].grid[-1], 130, 8
    case = make_case(q_heads=heads, kv_heads=2, seq_len=n)
    seen = pattern.visible(torch.arange(n), n, heads=heads, q=case.q[0], k=case.k[0])
    expected = []
    for low in range(0, n, TILE_ROWS // 4):
        keys = seen[:, low : low + TILE_ROWS // 4].any(1).expand(heads, -1)
        by_kv_head = keys.unflatten(0, (2, 4)).any(1)
        blocks = torch.nn.functional.pad(by_kv_head, (0, -n % 16)).unflatten(1, (-1, 16)).any(-1)
        expected.append(float((blocks.sum(1) * 16).clamp(max=n).double().mean()))
    shape: Any = {"heads": heads, "kv_heads": 2, "block_sizes": (16,)}
    found = visited_keys(pattern, n, q=case.q[0], k=case.k[0], **shape)
    assert found.keys[16] == pytest.approx(sum(expected) / len(expected))
    choosing = choosing_keys(pattern, n, heads=heads, kv_heads=2)
    assert choosing > 0 if pattern.reads_content else choosing == 0
    assert (pattern.selection_dots(n) > 0).any() == pattern.reads_content


def test_reports_and_listings_know_them_all() -> None:
    assert METHOD_LABELS.keys() >= ALL_METHODS.keys()
    for name in NAMES:
        text = str(EXAMPLES[name].grid[-1])
        point: Any = SimpleNamespace(pattern=f"sinks:2+{text}", layers="all")
        assert composition(point) == f"sinks + {METHOD_LABELS[name]}"
        assert set(BUDGET[name]) <= set(parameters(ALL_METHODS[name]))
        # What `sa-patch methods` shows: a method by its name alone, and a window where it has one.
        assert example(name, 64).keys_per_query(N)[-1] <= N


def test_budgets_are_refused_where_the_text_decides() -> None:
    for refuse in (
        lambda: fit_budget("prism:{}", 512, 1 / 2),
        lambda: measure_cost(parse_pattern("sparge:0.9"), [512]),
        lambda: make_options(methods="flashprefill:0.5", n="64", device="cpu"),
    ):
        with pytest.raises(UserError, match="depends on the text"):
            refuse()
    found = fit_budget("xattention:16,{}", 512, 1 / 2)
    assert isinstance(found, XAttention)
    assert flops_share(found, 512) <= 1 / 2 < flops_share(XAttention(16, found.topk + 1), 512)


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


@pytest.mark.parametrize("pattern", rivals.PATTERNS, ids=str)
def test_text_forms_read_back(pattern: Pattern) -> None:
    assert parse_pattern(str(pattern)) == pattern
    assert pattern.name in ALL_METHODS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("power:0", "window must be a whole number of at least 1, got 0"),
        ("vertical_slash:4,8,sinks=5", "sinks must be at most vertical=4, got 5"),
        ("vertical_slash:4,8,local=0", "local must be a whole number of at least 1"),
        ("xattention:64,topk=1", "topk must be at least 2"),
        ("xattention:64,threshold=1.5", "threshold must be a number from 0 to 1, got 1.5"),
        ("xattention:64,topk=4,threshold=0.5", "either topk or threshold, not both"),
        ("skip_softmax:0", "factor must be a number above 0, got 0"),
        ("flexprefill:0", "gamma must be a number from 1e-06 to 1, got 0"),
        ("sparge:0.9,8,rows=12", "multiple of block_size=8, got 12"),
        ("permuted_blocks:8,3,segment=12", "multiple of block_size=8, got 12"),
        ("prism:2", "threshold must be a number from 1e-06 to 1, got 2"),
        ("flashprefill:0.5,local=0", "local must be a whole number of at least 1"),
        ("xattention:12,stride=8", "multiple of stride=8, got 12"),
    ],
)
def test_bad_parameters_are_refused(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_pattern(text)
