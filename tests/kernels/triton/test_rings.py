"""Rings as the Triton kernel is told about them: plans that show each pair once, and no other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sa_patch.kernels.triton.launch_table import BandConfig
from sa_patch.kernels.triton.parts import EVERYTHING, NOTHING, LocalWindow, disjoint_parts
from sa_patch.kernels.triton.tiles import Row, current_stream
from sa_patch.patterns import PSA, SA, SWA, BlockTopK, Full, MoBA, Pattern, Sinks
from tests.kernels.triton.test_triton import TINY, assert_matches
from tests.laws.drawn import patterns
from tests.laws.strategies import make_case

pytest.importorskip("triton")

from sa_patch.kernels.triton.rings.plan import RingPlan, ring_plan, ring_table

CPU = torch.device("cpu")


def window_mask(near: LocalWindow, n: int) -> Tensor:
    """What the kernel of near keys shows: bool ``[n, n]``."""
    low = near.lows(n, CPU, current_stream(CPU))[:n, None]
    keys = torch.arange(n)
    return ((keys >= low) | (keys < near.sinks)) & (keys <= keys[:, None])


@given(data=st.data(), n=st.integers(1, 60))
def test_near_keys_equal_the_definitions(data: st.DataObject, n: int) -> None:
    i = torch.arange(n)
    parts = data.draw(st.lists(st.sampled_from(["sinks", "swa", "block_topk", "moba"]), min_size=1))
    drawn = [data.draw(patterns(part)) for part in parts]
    wanted = torch.zeros(n, n, dtype=torch.bool)
    for part in drawn:
        if isinstance(part, BlockTopK):
            wanted |= part.unchosen(i, n)
        elif isinstance(part, MoBA):
            wanted |= (i[:, None] // part.block_size == i // part.block_size) & (i <= i[:, None])
        else:
            wanted |= part.visible(i, n)[0]
    union = drawn[0]
    for part in drawn[1:]:
        union = union | part
    found = disjoint_parts(union)
    assert found is not None and torch.equal(window_mask(found.local_window, n), wanted)
    low = found.local_window.lows(n, CPU, 0)
    assert (low.diff() >= 0).all(), "the kernel takes the first and the last query for all between"


@pytest.mark.parametrize("pattern", [Full(), SWA(2**40), MoBA(2**40, 2), BlockTopK(2**35, 1)])
def test_numbers_beyond_every_length_do_not_overflow(pattern: Pattern) -> None:
    found = disjoint_parts(pattern)
    assert found is not None and window_mask(found.local_window, 50).equal(
        window_mask(EVERYTHING, 50)
    )
    sinks = disjoint_parts(Sinks(2**40))
    assert sinks is not None and window_mask(sinks.local_window, 50).equal(
        window_mask(EVERYTHING, 50)
    )


def shown_by(plan: RingPlan, row: list[int], draws: int, n: int) -> Tensor:
    """How often a plan shows each pair: int ``[draws, n, n]``, by one row of the table."""
    shown = torch.zeros(draws, n, n, dtype=torch.int64)
    for draw in range(draws):
        block = row[1] + draw * row[2]
        queries, keys = plan.queries[block], plan.keys[block]
        ahead = plan.key_steps[block] - plan.query_steps[block][:, None]
        place = torch.arange(len(keys))
        visible = (ahead >= 0) & (ahead < plan.windows[block][:, None])
        visible &= (place >= plan.skips[block]) & (place < plan.counts[block][:, None])
        visible &= queries[:, None] < n
        a, b = visible.nonzero(as_tuple=True)
        ones = torch.ones(len(a), dtype=torch.int64)
        shown[draw].index_put_((queries[a].long(), keys[b].long()), ones, accumulate=True)
    return shown


@settings(max_examples=100)
@given(
    data=st.data(),
    method=st.sampled_from(["sa", "psa"]),
    block=st.sampled_from([1, 3, 8, 16]),
    heads=st.integers(1, 3),
    layer=st.integers(0, 3),
)
def test_a_plan_shows_each_pair_of_the_ring_once(
    data: st.DataObject, method: str, block: int, heads: int, layer: int
) -> None:
    """Of PSA those of queries that do not see all; near keys left out."""
    pattern = data.draw(patterns(method, max_window=12))
    assert isinstance(pattern, (SA, PSA))
    n = data.draw(st.integers(1, 70))
    if pattern.saturated(n):
        return
    start = data.draw(st.integers(0, n - 1)) if method == "psa" else 0
    count = data.draw(st.integers(1, n - start)) if method == "psa" else n
    near = LocalWindow(data.draw(st.integers(0, 4)), ((0, 1, data.draw(st.integers(0, 6))),))
    near = data.draw(st.sampled_from([NOTHING, near]))
    # A row of another length stands before and after.
    other = Row(1, 0, max(1, n - 3))
    rows: tuple[Row, ...] = (other, Row(0, start, n), other._replace(batch=2))
    if pattern.saturated(other.length):
        rows = (Row(0, start, n),)
    plan = ring_plan(pattern, rows, count, near, layer=layer, heads=heads, block=block, device=CPU)
    draws = len(pattern.draws(heads))
    table = ring_table(pattern, rows, count, block, draws, CPU, 0).tolist()
    shown = sum(shown_by(plan, row, draws, n) for row in table if row[0] == 0)
    ring = pattern.ring(n, layer, heads).visible(torch.arange(n))
    wanted = ring & ~window_mask(near, n)
    wanted[:, :start] = wanted[:, start + count :] = False
    if method == "psa":
        wanted[:, : pattern.window] = False
    assert torch.equal(torch.as_tensor(shown).expand_as(wanted), wanted.long())


@pytest.mark.parametrize("start", [0, 1010])
def test_bands_of_long_sequences_hold_all_keys(start: int) -> None:
    """Where they are narrower than the ring; a wider one would be an error."""
    n, pattern = 1300, PSA(20)
    rows = (Row(0, start, n),)
    plan = ring_plan(pattern, rows, n - start, NOTHING, layer=1, heads=1, block=32, device=CPU)
    assert plan.keys.shape[1] < n
    table = ring_table(pattern, rows, n - start, 32, 1, CPU, 0).tolist()
    shown = torch.stack([shown_by(plan, row, 1, n) for row in table]).sum(0)
    wanted = pattern.ring(n, 1).visible(torch.arange(n)).long()
    wanted[:, : max(start, pattern.window)] = 0
    assert torch.equal(shown, wanted)


def test_late_queries_read_few_keys_beyond_their_own() -> None:
    """What a tile of PSA walks is a small multiple of what its queries see, at every position."""
    n, block = 4096, 64
    pattern = PSA(64)
    plan = ring_plan(
        pattern, (Row(0, 0, n),), n, NOTHING, layer=0, heads=1, block=block, device=CPU
    )
    real = plan.queries[plan.queries[:, 0] < n]
    assert len(real) <= n // block + n.bit_length()
    walked = plan.counts.amax(-1).double()
    assert walked.mean() <= 2.2 * (block + pattern.window)
    assert plan.keys.shape[1] <= 6 * (block + pattern.window)


@pytest.mark.parametrize(
    "pattern", [PSA(1), PSA(9), PSA(20, 5), PSA(6, 1, per_head=True), PSA(39)], ids=str
)
def test_prefix_stable_output_equals_the_oracle(pattern: PSA) -> None:
    """With bands that wrap, blocks that hang over, and a row that the last pattern saturates."""
    case = make_case(
        batch=3, q_heads=3, kv_heads=1, seq_len=90, head_dim=16, lengths=[90, 61, 30], layer=2
    )
    assert_matches(case, pattern, BandConfig(TINY, tiles=3))
