"""Dot products of chosen pairs, and attention over small chosen blocks without copies of them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sa_patch.kernels.banded import small_blocks as banded_leaves
from sa_patch.kernels.banded.chosen_blocks import attend_chosen
from sa_patch.patterns import BlockTopK
from sa_patch.patterns.block_selection.pair_dots import pair_dots
from sa_patch.patterns.block_selection.top_candidates import _by_argmax, _by_topk, first_best
from tests.laws.strategies import make_case
from tests.laws.test_cost import LargestTensor, allocations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    rows=st.integers(0, 40),
    length=st.integers(1, 50),
    width=st.integers(0, 60),
    dim=st.sampled_from([1, 3, 16, 64, 100]),
    seed=st.integers(0, 2**20),
)
def test_pair_dots_are_those_of_gathered_rows(
    dtype: torch.dtype, rows: int, length: int, width: int, dim: int, seed: int
) -> None:
    """Places in any order, some twice, more of them than there are rows."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, dim, dtype=dtype, generator=generator)
    table = torch.randn(length, dim, dtype=dtype, generator=generator)
    places = torch.randint(0, length, (rows, width), generator=generator)
    dots = pair_dots(left, table, places)
    assert dots.dtype == dtype and dots.shape == places.shape
    assert torch.allclose(dots, (left[:, None] * table[places]).sum(-1), atol=1e-4)


def test_a_dot_product_does_not_depend_on_what_else_is_asked_for() -> None:
    left, table = torch.randn(50, 64), torch.randn(300, 64)
    places = torch.randint(0, 300, (50, 40))
    whole = pair_dots(left, table, places)
    for row in (0, 17, 49):
        one = slice(row, row + 1)
        assert torch.equal(pair_dots(left[one], table, places[one]), whole[one])
        assert torch.equal(pair_dots(left[one], table, places[one, 5:9]), whole[one, 5:9])


def test_torch_is_not_heard_to_say_that_sparse_tensors_are_in_beta() -> None:
    """It says so once in a process, so another one has to listen."""
    code = (
        "import torch; from sa_patch.patterns.block_selection.pair_dots import pair_dots;"
        "pair_dots(torch.ones(2, 3), torch.ones(9, 3), torch.zeros(2, 4, dtype=torch.int64))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


@pytest.mark.parametrize("width", [1, 7, 40, 700])
@given(seed=st.integers(0, 2**20), picks=st.integers(0, 12), absent=st.floats(0, 1))
def test_of_equal_scores_the_first_is_best_on_every_way(
    width: int, seed: int, picks: int, absent: float
) -> None:
    picks = min(picks, width)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (30, width), generator=generator).float()
    scores[torch.rand(30, width, generator=generator) < absent] = -torch.inf
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[:, :picks]
    real = scores.gather(1, expected) > -torch.inf
    for way in (first_best, _by_topk, _by_argmax):
        best = way(scores.clone(), picks)
        assert best.shape == expected.shape
        assert torch.equal(best[real], expected[real])


def test_pieces_of_queries_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(batch=2, q_heads=4, kv_heads=2, seq_len=150, head_dim=12, seed=3)
    pattern = BlockTopK(4, 5, branch=2, beam=3)
    inputs = case.q, case.k, case.v
    whole = attend_chosen(pattern, *inputs, start=0, scale=0.3)
    monkeypatch.setattr(banded_leaves, "_SCORES", 1)
    disjoint_parts = attend_chosen(pattern, *inputs, start=0, scale=0.3)
    for one, other in zip(whole, disjoint_parts, strict=True):
        assert torch.equal(one, other)


def test_extreme_scores_stay_finite() -> None:
    """Their exponentials would not; and a weight of 0 must not meet a value of inf."""
    case = make_case(q_heads=2, kv_heads=1, seq_len=64, head_dim=4, seed=1)
    for size in (1e4, 1e-30):
        out, lse = attend_chosen(
            BlockTopK(4, 3, beam=3), case.q * size, case.k * size, case.v, start=0, scale=1.0
        )
        seen = lse > -torch.inf
        assert seen[..., -1].all() and not seen[..., 0].any()
        assert torch.isfinite(out).all() and torch.isfinite(lse[seen]).all()


def test_no_copy_of_the_chosen_keys_is_made() -> None:
    """A query sees 128 of them: copies would hold 128 times what the sequence does."""
    n, head_dim = 4096, 64
    case = make_case(q_heads=2, kv_heads=1, seq_len=n, head_dim=head_dim)
    pattern = BlockTopK(16, 8)

    def run() -> object:
        return attend_chosen(pattern, case.q, case.k, case.v, start=0, scale=0.1)

    run()
    with LargestTensor() as seen:
        run()
    assert seen.elements <= 4 * n * head_dim
    assert allocations(run)[1] <= 16 * 4 * 4 * n * head_dim
