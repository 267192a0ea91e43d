"""PowerAttention: a window, and keys at distances that are powers of two (2503.03588)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sa_patch.patterns.base import Pattern, Profile, Rule, whole_number


@dataclass(frozen=True)
class Power(Pattern):
    """Query i sees the nearest `window` keys, and blocks at distances of a power of two.

    Tokens are cut into blocks of `block_size`; in view are the query's own block, so far as it
    came, and the blocks 1, 2, 4, 8, ... before it. So d layers hand on what lies up to ``2^d``
    blocks away, by few keys each (arXiv 2503.03588: distances of tokens; its kernels
    take blocks of 256, a window of five and one block of sinks, ``sinks:256+power:1280,256``).
    Nothing is read to choose, and nothing depends on later tokens.

    Args:
        window: number of nearest keys in view, the query's own among them; at least 1.
        block_size: tokens in a block, at least 1.

    Raises:
        UserError: if a parameter is not a whole number of at least 1.
    """

    window: int = field(metadata={"always": True})
    block_size: int = field(default=1, metadata={"always": True})

    name: ClassVar[str] = "power"
    summary: ClassVar[str] = "a window, and blocks 1, 2, 4, 8, ... back (Chen et al., 2503.03588)"

    def __post_init__(self) -> None:
        whole_number(self.window, "window", 1)
        whole_number(self.block_size, "block_size", 1)

    def visible(
        self,
        query_positions: Tensor,
        seq_len: int,
        *,
        layer: int = 0,
        heads: int = 1,
        q: Tensor | None = None,
        k: Tensor | None = None,
    ) -> Tensor:
        i = query_positions[None, :, None]
        keys = torch.arange(seq_len, device=i.device)[None, None]
        return self.rule(seq_len)(i, keys) & (keys <= i)

    def rule(
        self, seq_len: int, *, layer: int = 0, heads: int = 1, device: torch.device | None = None
    ) -> Rule:
        def sees(i: Tensor, j: Tensor) -> Tensor:
            # A number without the bit that is its lowest is 0 for powers of two, and for 0.
            apart = i // self.block_size - j // self.block_size
            return (i - j < self.window) | (apart & (apart - 1) == 0)

        return sees

    def keys_per_query(self, seq_len: int) -> Tensor:
        return self.count_visible(seq_len)[0].double()

    def count_visible(self, seq_len: int, *, layer: int = 0, heads: int = 1) -> Tensor:
        i = torch.arange(seq_len)
        own, counts = i // self.block_size, (i + 1).clamp(max=self.window)
        before_window = (i + 1 - self.window).clamp(min=0)
        for apart in (0, *(1 << power for power in range(seq_len.bit_length()))):
            first = (own - apart) * self.block_size
            # Of each block what the window does not show.
            beyond = torch.minimum(first + self.block_size, before_window) - first
            counts = counts + beyond.clamp(min=0).where(first >= 0, 0)
        return counts[None]

    def profile(self, seq_len: int) -> Profile:
        seen = torch.arange(1, seq_len + 1, dtype=torch.float64)
        near = seen.clamp(max=self.window)
        far = self.keys_per_query(seq_len) - near
        return Profile(0, self.window, far / (seen - near).clamp(min=1))

    def saturated(self, seq_len: int) -> bool:
        last = max(0, seq_len - 1) // self.block_size
        # The farthest block that no query sees whole is not at a power of two.
        hidden = last - 1 if last & (last - 1) == 0 else last
        if hidden < 3:
            return True
        farthest = seq_len - 1 if hidden == last else (hidden + 1) * self.block_size - 1
        return farthest < self.window

    @property
    def effective_window(self) -> int | None:
        """Its window alone: how many keys lie at powers of two depends on n."""
        return self.window
