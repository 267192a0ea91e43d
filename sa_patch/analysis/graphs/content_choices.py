"""Visible keys of patterns that choose by content, and random queries and keys to choose from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sa_patch.patterns import BlockTopK, MoBA, Pattern
from sa_patch.patterns import visible_pairs as pairs
from sa_patch.patterns.block_selection.block_means import block_means

HEAD_DIM = 64


@dataclass(frozen=True)
class Content:
    """One head's queries and keys of one layer.

    Args:
        q, k: float ``[1, seq_len, head_dim]``.
    """

    q: Tensor
    k: Tensor


def random_content(seq_len: int, layer: int, seed: int) -> Content:
    """Independent standard normal queries and keys: blocks are then chosen as good as at random.

    A model's own choices are more alike from query to query and from layer to layer, so that what
    is measured on these says nothing of a particular model. The global generator is left alone.

    Args:
        seq_len: number of tokens.
        layer, seed: coordinates of the draw.
    """
    generator = torch.Generator().manual_seed((seed << 16) + layer)
    q, k = torch.randn(2, 1, seq_len, HEAD_DIM, generator=generator)
    return Content(q, k)


def visible_ranges(
    pattern: Pattern,
    queries: Tensor,
    seq_len: int,
    *,
    causal: bool = True,
    content: Content | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The keys that each query sees, as ranges that do not overlap.

    Args:
        queries: int64 ``[m]``, positions.
        causal: False for the non-causal forms of full attention and the sliding window.
        content: queries and keys, for patterns that choose by content.

    Returns:
        First keys and ends (the key after the last), int64 ``[m, ranges]`` each; a range that does
        not end after its first key is empty. None for a pattern that is not known here.
    """
    pattern = pattern.computed_as
    if isinstance(pattern, MoBA) and content is not None:
        return _moba(pattern, queries, content)
    if isinstance(pattern, BlockTopK) and content is not None:
        return _block_topk(pattern, queries, content)
    return pairs.visible_ranges(pattern, queries, seq_len, causal=causal)


def _moba(pattern: MoBA, queries: Tensor, content: Content) -> tuple[Tensor, Tensor]:
    own = queries // pattern.block_size
    means = block_means(content.k, pattern.block_size)
    chosen = pattern.rank_blocks(content.q[:, queries], means, own)[0]
    first = torch.cat([own[:, None], chosen], dim=1) * pattern.block_size
    end = first + pattern.block_size
    end[:, 0] = queries + 1
    # -1 marks that no earlier block was left to choose.
    return first.clamp(min=0), end.where(first >= 0, 0)


def _block_topk(pattern: BlockTopK, queries: Tensor, content: Content) -> tuple[Tensor, Tensor]:
    after = (queries + 1)[:, None]
    picks = pattern.picks(content.q[:, queries], content.k, queries)[0]
    local_start = pattern.sinks + pattern.eligible(queries)[:, None] * pattern.block_size
    first_chosen = pattern.sinks + picks * pattern.block_size
    end_chosen = (first_chosen + pattern.block_size).where(picks >= 0, 0)
    first = torch.cat(
        [torch.zeros_like(local_start), local_start, first_chosen.clamp(min=0)], dim=1
    )
    end = torch.cat([after.clamp(max=pattern.sinks), after, end_chosen], dim=1)
    return first, end
