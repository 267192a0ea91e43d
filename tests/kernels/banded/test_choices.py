"""How many queries' choices `banded` holds at once."""

from __future__ import annotations

import torch

from sa_patch.kernels.banded import choices
from sa_patch.patterns import BlockTopK


def test_what_grows_with_a_tile_is_held_for_tiles() -> None:
    alone, sharing = BlockTopK(4, 2, 4), BlockTopK(4, 5, 4, shared=32)
    assert list(choices.parts_of_queries([alone], torch.empty(8, 9999, 4), 3)) == [
        (slice(0, 9999), 3, 10002)
    ]
    for n in (1 << 12, 1 << 16):
        parts = list(choices.parts_of_queries([alone, sharing], torch.empty(8, n, 1), 32))
        sizes = [own.stop - own.start for own, _, _ in parts]
        assert sum(sizes) == n and max(sizes) * 8 * 32 * 5 <= choices.CHOSEN
        assert all(own.start % 32 == 0 and low == 32 + own.start for own, low, _ in parts)
