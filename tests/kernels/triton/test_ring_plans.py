"""Plans of rings by kernels are, bit for bit, those of their torch twins."""

from __future__ import annotations

import pytest
import torch

from sa_patch.kernels.slot_tiles import ring_tiles
from sa_patch.kernels.triton.parts import NOTHING, LocalWindow
from sa_patch.patterns import PSA, SA

pytest.importorskip("triton")

from sa_patch.kernels.triton.rings import draws, stochastic

CPU = torch.device("cpu")


@pytest.mark.parametrize("n, elements", [(1, 64), (63, 64), (700, 1024), (700, 1 << 16)])
def test_draws_are_those_of_the_definition(
    n: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one program or several, the last of which is not full."""
    monkeypatch.setattr(draws, "_ELEMENTS", elements)
    for seed, per_head in ((0, False), (-1, True), (2**40 + 5, False)):
        for layers in (range(2), range(94, 97)):
            sa, psa = SA(9, seed, per_head=per_head), PSA(9, seed, per_head)
            assert torch.equal(draws.orders(sa, n, layers, 3, CPU), sa.orders(n, layers, 3))
            assert torch.equal(draws.points(psa, n, layers, 3, CPU), psa.points(n, layers, 3))
            slots = torch.stack([sa.slots(n, layer, 3) for layer in layers])
            assert torch.equal(draws.points(sa, n, layers, 3, CPU), slots)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("n, window", [(2, 1), (130, 1), (130, 20), (130, 65), (1000, 40)])
def test_plans_of_all_layers_are_the_tiles_of_each(
    n: int, window: int, circular: bool, per_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With bands that wrap, hold a position twice or hang over an end, and blocks of padding."""
    monkeypatch.setattr(draws, "_ELEMENTS", 1 << 13)
    pattern, layers, heads, block = SA(window, 3, circular, per_head), range(3, 5), 2, 48
    near = LocalWindow(3, ((0, 1, 5),)) if circular != per_head else NOTHING
    lows = near.lows(n, CPU, 0)
    made = stochastic.blocks_of(
        pattern,
        n,
        None if near == NOTHING else lows,
        near.sinks,
        layers=layers,
        heads=heads,
        block=block,
        device=CPU,
    )
    tiles = [
        ring_tiles(pattern, n, layer=layer, heads=heads, block=block, device=CPU)
        for layer in layers
    ]
    queries, query_steps, keys, key_steps = (
        torch.cat([getattr(one, name).flatten(0, 1) for one in tiles])
        for name in ("queries", "query_steps", "keys", "key_steps")
    )
    wanted = (
        *(queries, query_steps, torch.full_like(queries, 2 * window - 1), keys, key_steps),
        torch.searchsorted(keys, lows[queries], out_int32=True),
        (keys < near.sinks).sum(-1, dtype=torch.int32),
    )
    for found, right in zip(made, wanted, strict=True):
        assert found.dtype == right.dtype == torch.int32 and torch.equal(found, right)
