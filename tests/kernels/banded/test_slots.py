"""Stochastic attention in `banded` with windows so wide that blocks grow with them."""

import pytest
import torch

from sa_patch.kernels.banded.slots import attend_ring
from sa_patch.kernels.slot_tiles import RingTiles, ring_tiles
from sa_patch.patterns import SA
from tests.laws.strategies import make_case


def test_a_wide_window_equals_reference_and_its_indices_stay_a_few_for_each_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pattern, n = SA(2048, seed=3), 4300
    assert not pattern.saturated(n)
    made: list[RingTiles] = []

    def watched(*args: object, **options: object) -> RingTiles:
        made.append(ring_tiles(*args, **options))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr("sa_patch.kernels.banded.slots.ring_tiles", watched)
    case = make_case(q_heads=2, kv_heads=1, seq_len=n, head_dim=8)
    out = attend_ring(pattern, case.q, case.k, case.v, layer=0, scale=8**-0.5)
    assert (out - case.run(pattern, "reference")).abs().max() <= 1e-5
    # A band for each block of fixed size would come to 2 w / block keys for every token.
    assert made[0].keys.numel() <= 20 * n
    assert torch.equal(made[0].queries[made[0].queries < n].sort().values, torch.arange(n).int())
