"""Thresholds that spend a share of FLOPs, measured on texts."""

from __future__ import annotations

import pytest
import torch

from sa_patch.errors import UserError
from sa_patch.evaluation.calibration.thresholds import fit_threshold, measure_spent
from sa_patch.patching import observe_layers, patched
from sa_patch.patterns import Sinks, SkipSoftmax, parse_pattern
from tests.small_models import random_tokens, tiny_model
from tests.thorough import unless_thorough

DOCUMENTS = [random_tokens(1, n, seed=n)[0] for n in (40, 24)]


def test_what_is_spent_is_counted_where_keys_are_chosen() -> None:
    model, pattern = tiny_model("llama"), parse_pattern("prism:0.5,4")
    spent = measure_spent(model, pattern, DOCUMENTS)
    seen, dots, full, queries = 0.0, 0.0, 0.0, 0
    with torch.no_grad(), patched(model, pattern):
        calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        layers = range(model.config.num_hidden_layers)
        observe_layers(model, lambda _, q, k, spans: calls.append((q[0], k[0])), layers)
        for tokens in DOCUMENTS:
            model(tokens[None])
    for q, k in calls:
        n = q.shape[1]
        mask = pattern.visible(torch.arange(n), n, heads=len(q), q=q, k=k)
        seen += float(mask.sum()) / len(q)
        dots += float(pattern.selection_dots(n, len(q) // len(k)).sum())
        full, queries = full + n * (n + 1) / 2, queries + n
    assert spent.mean_keys == pytest.approx(seen / queries)
    assert spent.share == pytest.approx((2 * seen + dots) / (2 * full))


def test_scores_that_choosing_took_are_counted_once() -> None:
    """Where nothing is skipped, skipping costs what full attention does."""
    nothing = SkipSoftmax(1e-6, 4)
    for pattern in (nothing, Sinks(2) | nothing):
        assert measure_spent(tiny_model("llama"), pattern, DOCUMENTS).share == pytest.approx(1)


FALLING = ("flashprefill:{},4,sinks=0,local=1,last=0", 0.6)


@pytest.mark.parametrize(
    "family, share", unless_thorough([FALLING], [("prism:{},4", 0.7), FALLING])
)
def test_the_most_within_a_share_is_found(family: str, share: float) -> None:
    model = tiny_model("llama")
    stock = model(DOCUMENTS[0][None]).logits
    tries: list[object] = []
    pattern, spent = fit_threshold(
        model, family, share, DOCUMENTS, report=lambda *found: tries.append(found)
    )
    assert (pattern, spent) in tries and len(tries) <= 12
    assert share - 0.05 < spent.share <= share
    assert measure_spent(model, pattern, DOCUMENTS) == spent
    assert torch.equal(model(DOCUMENTS[0][None]).logits, stock)


def test_what_is_near_enough_ends_the_search() -> None:
    model, pattern = tiny_model("llama"), parse_pattern("prism:0.5,4")
    tries: list[object] = []
    share = measure_spent(model, pattern, DOCUMENTS[:1]).share + 1e-6
    found = fit_threshold(
        model, "prism:{},4", share, DOCUMENTS[:1], report=lambda *one: tries.append(one[0])
    )
    # Both ends of the range, and its middle.
    assert found[0] == pattern and len(tries) == 3


def test_numbers_beyond_one_are_sought_by_their_exponents() -> None:
    pattern, spent = fit_threshold(tiny_model("llama"), "skip_softmax:{},4", 0.9, DOCUMENTS)
    assert isinstance(pattern, SkipSoftmax) and pattern.factor > 1
    assert 0.7 < spent.share <= 0.9


@pytest.mark.parametrize(
    "family, share, says",
    [
        ("skip_softmax:{},4", 0.3, "even skip_softmax:.* spends 0.[5-9]"),
        ("prism:0.5", 0.5, "has {} for the number"),
        ("prism:{},4", 0.0, "a share above 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(family: str, share: float, says: str) -> None:
    with pytest.raises(UserError, match=says):
        fit_threshold(tiny_model("llama"), family, share, DOCUMENTS)
