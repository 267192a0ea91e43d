"""BLASST, or skip softmax: blocks far below the running maximum are left out (2512.12087)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sa_patch.errors import UserError
from sa_patch.patterns.base import whole_number
from sa_patch.patterns.rivals.block_choice import whole_blocks
from sa_patch.patterns.rivals.whole_prompt import Chooser, Thresholded, causal_scores


@dataclass(frozen=True)
class SkipSoftmax(Thresholded):
    """A block of queries leaves out the blocks of keys whose scores cannot tell any more.

    A tile of `block_size` queries walks over blocks of as many keys from the first on, as
    FlashAttention does, and keeps each query's largest score so far. A block is left out, of the
    values and of the softmax's sum, if in every query of the tile its largest score lies more than
    ``-log(threshold)`` below that maximum, its own block included (arXiv 2512.12087).
    The threshold is ``factor / n`` for a prompt of n tokens, and 1 at most, where only blocks that
    raise a maximum stay. Each query head decides for itself.

    All scores are computed; what is saved are values, and exponentials. A query's choice depends on
    the other queries of its tile, later ones too, and the threshold on n.

    Args:
        factor: n times the threshold, above 0; the paper calibrates it for each model, and 1000 is
            no figure of its own.
        block_size: tokens in a block of queries, and in one of keys; at least 1.

    Raises:
        UserError: if a parameter is not of these kinds.
    """

    factor: float = field(default=1000.0, metadata={"always": True})
    block_size: int = field(default=128, metadata={"always": True})

    name: ClassVar[str] = "skip_softmax"
    summary: ClassVar[str] = "no blocks far below the running maximum (BLASST, 2512.12087)"
    scores_all: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole_number(self.block_size, "block_size", 1)
        number = isinstance(self.factor, (int, float)) and not isinstance(self.factor, bool)
        if not number or not 0 < self.factor < math.inf:
            raise UserError(f"factor must be a number above 0, got {self.factor!r}")

    @property
    def tile(self) -> int:
        return self.block_size

    def chooser(self, q: Tensor, k: Tensor) -> Chooser:
        n, size = q.shape[1], self.block_size
        depth = math.log(min(1.0, self.factor / n))

        def choose(tile: int) -> Tensor:
            low = tile * size
            scores = causal_scores(q[:, low : low + size], k, low)
            in_blocks = pad(scores, (0, -scores.shape[2] % size), value=-torch.inf)
            largest = in_blocks.unflatten(2, (-1, size)).amax(-1)
            telling = largest - largest.cummax(-1).values >= depth
            return whole_blocks(telling.any(1), size)

        return choose

    def saturated(self, seq_len: int) -> bool:
        # The first block raises every maximum.
        return seq_len <= self.block_size

    def selection_dots(self, seq_len: int, group: int = 1) -> Tensor:
        """Every score; of the keys that stay it is the one that attention needs as well."""
        return torch.arange(1, seq_len + 1, dtype=torch.float64)

    def means_read(self, positions: Tensor) -> int:
        return int(positions.max()) + 1
