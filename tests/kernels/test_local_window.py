"""Runs of tiles, which together must be all tiles and hold all that is seen."""

import pytest
import torch

from sa_patch.kernels.local_window import LocalWindow

TILE = 32


@pytest.mark.parametrize(
    ("sinks", "neighbourhoods"),
    [
        (8, ((0, 128, 0),)),
        (0, ((8, 96, 32),)),
        (4, ((4, 32, 64),)),
        (4, ((0, 128, 0), (0, 1, 40))),
    ],
)
@pytest.mark.parametrize("position", [512, 777])
def test_runs_hold_what_tiles_see(
    sinks: int, neighbourhoods: tuple[tuple[int, int, int], ...], position: int
) -> None:
    window = LocalWindow(sinks, neighbourhoods)
    position += window.until_aligned(position, TILE)
    runs = window.runs(position, TILE, TILE + window.reach)
    tiles = 24
    found = {tile: run for run in runs for tile in range(run.skipped, tiles, run.stride)}
    assert sorted(found) == list(range(tiles))
    assert sum(len(range(run.skipped, tiles, run.stride)) for run in runs) == tiles
    for tile, run in found.items():
        queries = position + tile * TILE + torch.arange(TILE)
        # Neighbourhoods only reach as far as their first query's, since firsts ascend.
        first = int(window.first(queries[:1]))
        assert run.width >= int(queries[-1]) + 1 - first
        if len(runs) > 1:
            assert run.width < int(queries[-1]) + 1 - first + 16


def test_tiles_of_a_long_block_take_no_more_than_they_see() -> None:
    runs = LocalWindow(0, ((0, 128, 0),)).runs(256, TILE, TILE + 127)
    assert sorted(run.width for run in runs) == [32, 64, 96, 128]
