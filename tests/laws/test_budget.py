"""Law 6: the number of visible keys is what the definitions say, and SA's permutations are random.

The visible sets here are the ones a backend really used, read off its output. Every seed is
fixed, so a test that passes once passes always; the bounds are those of a test at p = 1e-4.

Seen red when the permutation left out layer, length or the high half of the seed, came from a weak
hash or the global generator, when w was taken for w - 1 (sets, closed form), and when MoBA's count
took k blocks beside the query's own.
"""

import math
import pickle
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from sa_patch.patterns import SA
from sa_patch.patterns.permutation import (
    forget_permutations,
    permutation_orders,
    permutation_slots,
)
from tests.laws.drawn import COUNTED_METHODS, METHODS, narrow_pattern, patterns
from tests.laws.strategies import BACKEND_NAMES, affordable, make_case, serves, visible_sets
from tests.thorough import THOROUGH

P_VALUE = 1e-4


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("method", COUNTED_METHODS)
@given(data=st.data())
def test_measured_counts_are_the_closed_form(
    method: str, backend: str, data: st.DataObject
) -> None:
    if not affordable(backend, data):
        return
    pattern = data.draw(patterns(method).filter(lambda drawn: not drawn.counts_need_content))
    n = data.draw(st.integers(1, 40))
    case = make_case(seq_len=n, seed=data.draw(st.integers(0, 1000)))
    if serves(backend, pattern, case):
        counts = visible_sets(pattern, case, backend).sum(-1).double()
        assert torch.equal(counts, pattern.keys_per_query(n).expand_as(counts))


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=200 if THOROUGH else 5)
@given(data=st.data())
def test_measured_visible_sets_are_the_definitions(
    method: str, backend: str, data: st.DataObject
) -> None:
    if not affordable(backend, data):
        return
    pattern = data.draw(patterns(method))
    case = make_case(
        batch=2,
        seq_len=32,
        lengths=[data.draw(st.integers(1, 32)), 32],
        seed=data.draw(st.integers(0, 1000)),
        layer=data.draw(st.integers(0, 30)),
        poison=False,
    )
    if serves(backend, pattern, case):
        expected = case.oracle(pattern)
        decided = torch.from_numpy(expected.margin > 1e-5)
        measured = visible_sets(pattern, case, backend)
        assert torch.equal(measured[decided], torch.from_numpy(expected.visible)[decided])


@pytest.mark.parametrize("method", ["sa", "psa", "union"])
@given(data=st.data())
def test_count_visible_is_the_measured_count(method: str, data: st.DataObject) -> None:
    pattern = data.draw(patterns(method))
    if pattern.reads_content:
        return
    n, layer = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 30))
    case = make_case(seq_len=n, layer=layer)
    measured = visible_sets(pattern, case, "reference")[0].sum(-1)
    counted = pattern.count_visible(n, layer=layer, heads=4)
    assert torch.equal(measured, counted.expand_as(measured))


@pytest.mark.parametrize("circular", [True, False])
@pytest.mark.parametrize("n, window", [(16, 3), (31, 8), (40, 1), (24, 12), (24, 40)])
def test_mean_counts_of_sa_are_the_closed_form(n: int, window: int, circular: bool) -> None:
    """Each query's mean over many permutations lies within its confidence interval."""
    draws = 3000
    expected = SA(window, circular=circular).keys_per_query(n).numpy()
    counts = np.stack(
        [SA(window, seed, circular).count_visible(n, layer=seed % 7)[0] for seed in range(draws)]
    )
    assert expected.dtype == np.float64 and expected.shape == (n,)
    error = counts.std(axis=0) / math.sqrt(draws)
    limit = stats.norm.isf(P_VALUE / n)
    assert (np.abs(counts.mean(axis=0) - expected) <= limit * error + 1e-12).all()


@pytest.mark.parametrize("n, window", [(12, 2), (17, 4), (30, 15)])
def test_every_pair_is_visible_with_the_papers_probability(n: int, window: int) -> None:
    """Proposition 1 with half-width w - 1: P(pair within the window) = (2w - 2) / (n - 1)."""
    draws = 4000
    seen = np.zeros((n, n))
    for seed in range(draws):
        seen += SA(window, seed).visible(torch.arange(n), n, layer=5)[0].numpy()
    earlier = np.tril_indices(n, -1)
    probability = min(1.0, (2 * window - 2) / (n - 1))
    spread = math.sqrt(probability * (1 - probability) / draws)
    limit = stats.norm.isf(P_VALUE / len(earlier[0]))
    assert np.abs(seen[earlier] / draws - probability).max() <= limit * spread + 1e-12
    assert (np.diag(seen) == draws).all()


def slot_table(permutations: np.ndarray) -> np.ndarray:
    """How often each position stands in each slot: [n, n] from [draws, n]."""
    n = permutations.shape[1]
    table = np.zeros((n, n))
    for slots in permutations:
        table[np.arange(n), slots] += 1
    return table


def uniformity(permutations: np.ndarray) -> float:
    """p-value of the positions x slots table under uniformly random permutations.

    A permutation fills each row and column once, so the usual statistic is scaled by (n - 1) / n
    and has (n - 1)^2 degrees of freedom.
    """
    draws, n = permutations.shape
    table = slot_table(permutations)
    statistic = ((table - draws / n) ** 2 / (draws / n)).sum() * (n - 1) / n
    return float(stats.chi2.sf(statistic, (n - 1) ** 2))


def slots(n: int, seed: int, layer: int, head: int | None = None) -> np.ndarray:
    return permutation_slots(n, seed=seed, layer=layer, head=head).numpy()


def slots_of(n: int, draws: Sequence[tuple[int, int, int | None]]) -> np.ndarray:
    """`slots` of many draws, made at once."""
    return permutation_orders(n, draws).argsort(-1).numpy()


DRAWS: dict[str, list[tuple[int, int, int | None]]] = {
    "seeds": [(seed, 0, None) for seed in range(4000)],
    "layers": [(0, layer, None) for layer in range(4000)],
    "heads": [(0, 0, head) for head in range(4000)],
    "grid": [(seed, layer, None) for seed in range(100) for layer in range(40)],
    "large seeds": [(seed << 33, 0, None) for seed in range(4000)],
    "negative seeds": [(-seed, 0, None) for seed in range(1, 4001)],
}


@pytest.mark.parametrize("along", DRAWS)
@pytest.mark.parametrize("n", [2, 5, 16, 33])
def test_permutations_are_uniform(n: int, along: str) -> None:
    drawn = slots_of(n, DRAWS[along])
    assert (drawn[7] == slots(n, *DRAWS[along][7])).all()
    assert (np.sort(drawn, axis=1) == np.arange(n)).all()
    assert uniformity(drawn) > P_VALUE
    # Neighbours in the text must not be neighbours in the slots any more often than others.
    if n > 2:
        steps = (drawn[:, 1:] - drawn[:, :-1]) % n
        p_values = [stats.chisquare(np.bincount(s, minlength=n)[1:]).pvalue for s in steps.T]
        assert min(p_values) > P_VALUE / n


def test_all_orders_of_four_are_equally_likely() -> None:
    draws = [(seed, layer, None) for seed in range(2400) for layer in (0, 3)]
    drawn = [tuple(order) for order in slots_of(4, draws)]
    counts = [drawn.count(order) for order in sorted(set(drawn))]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > P_VALUE


@pytest.mark.parametrize("along", ["layers", "seeds", "heads", "grid"])
@pytest.mark.parametrize("n", [5, 16])
def test_neighbouring_draws_are_independent(n: int, along: str) -> None:
    """Of independent uniform permutations, one undone by the next is uniform again."""
    drawn = slots_of(n, DRAWS[along])
    relative = np.stack([b[np.argsort(a)] for a, b in zip(drawn[:-1], drawn[1:], strict=True)])
    assert uniformity(relative) > P_VALUE


def test_neighbouring_lengths_are_independent() -> None:
    """The permutation of n + 1 tokens is no permutation of n tokens with one more put in."""
    draws = [(seed, 1, None) for seed in range(4000)]
    pairs = zip(slots_of(16, draws), slots_of(17, draws), strict=True)
    table = np.zeros((16, 17))
    for a, b in pairs:
        table[a, b[:16]] += 1
    expected = table.sum() / table.size
    statistic = ((table - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(statistic, 15 * 16) > P_VALUE


def test_no_two_coordinates_share_a_permutation() -> None:
    drawn = {
        slots(64, seed, layer, head).tobytes()
        for seed in range(-4, 12)
        for layer in range(12)
        for head in (None, *range(6))
    }
    assert len(drawn) == 16 * 12 * 7


State = tuple[Tensor, bytes, object]


def generator_states() -> State:
    return torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()


def seeded(seed: int) -> State:
    """Seed every global generator; where they stand then."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    return generator_states()


def assert_unmoved(before: State) -> None:
    torch_state, *others = generator_states()
    assert torch.equal(torch_state, before[0])
    assert others == [*before[1:]]


@pytest.mark.parametrize("n", [5, 700, 1500])
def test_permutations_neither_read_nor_move_the_global_random_state(n: int) -> None:
    drawn = []
    for seed in (1, 2):
        before = seeded(seed)
        forget_permutations()
        drawn.append(permutation_slots(n, seed=9, layer=1000 + n))
        assert_unmoved(before)
    assert torch.equal(*drawn)


def test_no_backend_moves_the_global_random_state() -> None:
    case = make_case(seq_len=30)
    before = seeded(1)
    for method in METHODS:
        for backend in BACKEND_NAMES:
            if serves(backend, narrow_pattern(method), case):
                case.run(narrow_pattern(method), backend)
    assert_unmoved(before)


def test_writing_into_a_permutation_does_not_change_the_next_draw() -> None:
    drawn = permutation_slots(50, seed=4, layer=2)
    before = drawn.clone()
    drawn.zero_()
    assert torch.equal(permutation_slots(50, seed=4, layer=2), before)
