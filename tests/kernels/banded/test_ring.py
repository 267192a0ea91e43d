"""Ranges of a ring: each tile's range holds every key that its queries see, no key twice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sa_patch.kernels.banded.ring import RingPart, attend_ranges
from sa_patch.kernels.banded.ring_ranges import ring_ranges
from sa_patch.patterns import PSA, SA
from tests.laws.strategies import make_case

TILE = 8


@settings(max_examples=60)
@given(data=st.data())
def test_ranges_hold_all_that_is_seen_once(data: st.DataObject) -> None:
    n = data.draw(st.integers(TILE, 200))
    window, seed = data.draw(st.integers(1, 80)), data.draw(st.integers(0, 99))
    kind = data.draw(st.sampled_from(["psa", "sa", "line"]))
    per_head = data.draw(st.booleans())
    pattern: PSA | SA = (
        PSA(window, seed, per_head=per_head)
        if kind == "psa"
        else SA(window, seed, circular=kind == "sa", per_head=per_head)
    )
    ring = pattern.ring(n, 0, 2)
    shift = data.draw(st.integers(0, n // 2))
    first_key = data.draw(st.integers(0, 5))
    latest = torch.arange(n) - shift
    low = n - data.draw(st.integers(1, n // TILE)) * TILE
    while low < n and int(latest[low]) < first_key:
        low += TILE
    if low >= n:
        return
    ranges = ring_ranges(ring, low, first_key, latest, TILE)
    assert ranges.widths == sorted(ranges.widths)
    queries = ranges.queries
    assert torch.equal(
        queries.flatten(1).sort(1).values, torch.arange(low, n).expand(len(queries), -1)
    )
    visible = ring.visible(torch.arange(n))
    everything = slice(0, len(ranges.widths))
    width = ranges.widths[-1] + 7
    keys, places = ranges.range_of(everything, width)
    for draw, tile in torch.cartesian_prod(
        torch.arange(len(queries)), torch.arange(len(ranges.widths))
    ).tolist():
        count = int(ranges.counts[draw, tile])
        held = keys[draw, tile, :count].tolist()
        assert len(set(held)) == count <= ranges.widths[tile]
        own = queries[draw, tile]
        for query in own.tolist():
            seen = visible[draw, query].nonzero().flatten()
            wanted = seen[(seen >= first_key) & (seen <= latest[query])]
            assert set(wanted.tolist()) <= set(held)
        distance = (places[draw, tile] - ranges.query_places[draw, tile][:, None]).abs()
        if ranges.wide[tile]:
            distance = torch.minimum(distance, (ranges.turn - distance).abs())
        near = distance <= ring.reach[own][:, None]
        expected = visible[draw, own][:, keys[draw, tile]]
        before = keys[draw, tile] <= own[:, None]
        assert torch.equal((near & before)[:, :count], expected[:, :count])
        assert not near[:, count:].any()


def test_the_cost_of_small_windows_stays_near_what_is_seen() -> None:
    """Ranges of about three times the window in tiles of 32, and no segment without end."""
    for pattern in (PSA(64), PSA(8), SA(64), SA(8)):
        n = 8192
        ring = pattern.ring(n, 0, 1)
        ranges = ring_ranges(ring, 96 if isinstance(pattern, PSA) else 0, 0, torch.arange(n), 32)
        mean = sum(ranges.widths) / len(ranges.widths)
        assert mean <= 3 * pattern.window + 48
        assert ranges.keys.numel() <= 4 * n


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hidden_keys_weigh_nothing_in_any_dtype(dtype: torch.dtype, sums: bool) -> None:
    pattern, n = PSA(20, seed=2), 300
    case = make_case(q_heads=4, kv_heads=2, seq_len=n, head_dim=16)
    q, k, v = (x.to(dtype) for x in (case.q, case.k, case.v))
    piece = RingPart(pattern.ring(n, 0, 4), 0, torch.arange(n), dense=20)
    out, lse = attend_ranges(piece, q, k, v, start=0, scale=0.25, sums=sums)
    assert (lse is not None) == sums
    reference = case.with_tensors(q.float(), k.float(), v.float()).run(pattern, "reference")
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert (out.float() - reference).abs().max() <= tolerance
