"""The methods of others: parameters, text forms, what meters, reports and budgets make of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sa_patch.analysis.cost import measure_cost
from sa_patch.benchmark.attention.options import make_options
from sa_patch.errors import UserError
from sa_patch.kernels import BACKENDS
from sa_patch.kernels.availability import example
from sa_patch.kernels.visited_keys import TILE_ROWS, choosing_keys, visited_keys
from sa_patch.patterns import PATTERNS as ALL_METHODS
from sa_patch.patterns import (
    Pattern,
    Sinks,
    XAttention,
    fit_budget,
    flops_share,
    parse_pattern,
)
from sa_patch.patterns.registry import parameters
from sa_patch.report.recovery_figures import composition
from sa_patch.report.variants import BUDGET, METHOD_LABELS
from tests.laws import rivals
from tests.laws.rivals import EXAMPLES, NAMES
from tests.laws.strategies import make_case, serves

N = 40


@pytest.mark.parametrize("name", NAMES)
def test_other_backends_refuse_with_a_reason(name: str) -> None:
    pattern = EXAMPLES[name].grid[0]
    for backend in BACKENDS.keys() - {"reference", "banded"}:
        assert not serves(backend, pattern, make_case(seq_len=N))


@pytest.mark.parametrize("pattern", rivals.LOOKS_AHEAD, ids=str)
def test_what_some_queries_see_is_told_as_for_all(pattern: Pattern) -> None:
    """Meters ask for evenly spaced queries, and for tiles of another size than the pattern's."""
    case = make_case(seq_len=N)
    content: dict[str, Any] = {"heads": 4, "q": case.q[0], "k": case.k[0]}
    whole = pattern.visible(torch.arange(N), N, **content)
    some = torch.tensor([37, 5, 6, 39, 0])
    assert torch.equal(pattern.visible(some, N, **content), whole[:, some])
    view = pattern.view(N, **content)
    assert torch.equal(view(3, 26), whole[:, 3:26, :26])
    united = Sinks(2) | pattern
    assert torch.equal(
        united.visible(some, N, **content)[:, 1], whole[:, 5] | (torch.arange(N) < 2)
    )


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
        if pattern.scores_all:  # keys were read to choose
            expected[-1] /= 2
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
        lambda: fit_budget("block_topk:4,8,branch=0,threshold={}", 512, 1 / 2),
        lambda: measure_cost(parse_pattern("sparge:0.9"), [512]),
        lambda: make_options(methods="flashprefill:0.5", n="64", device="cpu"),
    ):
        with pytest.raises(UserError, match="depends on the text"):
            refuse()
    found = fit_budget("xattention:16,{}", 512, 1 / 2)
    assert isinstance(found, XAttention)
    assert flops_share(found, 512) <= 1 / 2 < flops_share(XAttention(16, found.topk + 1), 512)


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
