"""Rows that hold several documents: where each begins, told by a mask function or by lengths."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
)

from sa_patch.errors import UserError

MaskFunction = Callable[..., Tensor]
"""Of transformers: whether query i of a row and head sees key j, all of them indices."""

Documents = tuple[tuple[int, ...], ...]
"""The lengths of each row's documents."""


def documents_of(
    function: MaskFunction, batch: int, seq_len: int, device: torch.device
) -> Documents | None:
    """The documents within which a mask function is causal; None where it is anything else.

    Looks at O(n) pairs: neighbours, and each query with the first key of its document and row.
    That tells positions which start anew from prefixes and images, which are seen both ways; a
    function that hides single pairs in between cannot be told.
    """
    i = torch.arange(seq_len, device=device)[None, None, :, None]
    row = torch.arange(batch, device=device)[:, None, None, None]

    def sees(query: Tensor, key: Tensor) -> Tensor:
        seen = torch.as_tensor(function(row, torch.zeros_like(row), query, key), device=device)
        return seen.expand(batch, 1, len(query[0, 0]), 1)[:, 0, :, 0]

    begins = torch.ones(batch, seq_len, dtype=torch.bool, device=device)
    begins[:, 1:] = ~sees(i[:, :, 1:], i[:, :, :-1])
    first = i[0, 0, :, 0].where(begins, 0).cummax(1).values
    own_first = sees(i.expand(batch, -1, -1, -1), first[:, None, :, None])
    row_first = sees(i, torch.zeros_like(i))
    later = sees(i[:, :, :-1], i[:, :, 1:])
    plain = own_first.all() & (row_first == (first == 0)).all() & ~later.any()
    told = torch.cat([plain[None], begins.flatten()]).tolist()
    if not told[0]:
        return None
    rows = torch.tensor(told[1:]).view(batch, seq_len)
    return tuple(_lengths([*row.nonzero()[:, 0].tolist(), seq_len]) for row in rows)


def _lengths(ends: list[int]) -> tuple[int, ...]:
    return tuple(end - begin for begin, end in pairwise(ends))


def documents_of_lengths(
    cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor | None, batch: int, seq_len: int
) -> Documents:
    """The documents of a padding-free batch, by where each ends, the first at 0.

    Args:
        cu_seq_lens_q, cu_seq_lens_k: integers ``[documents + 1]``, of queries and of keys.

    Raises:
        UserError: unless they divide one row among documents.
    """
    ends = cu_seq_lens_q.tolist()
    keys = ends if cu_seq_lens_k is None else cu_seq_lens_k.tolist()
    ascending = all(begin <= end for begin, end in pairwise(ends))
    if batch != 1 or keys != ends or not ascending or ends[:1] + ends[-1:] != [0, seq_len]:
        raise UserError(
            f"cu_seq_lens_q and cu_seq_lens_k must be the same and go up from 0 to {seq_len}, the "
            f"tokens of a single row; got {ends} and {keys} for {batch} rows"
        )
    return (tuple(length for length in _lengths(ends) if length),)


def mask_within(documents: Documents, device: torch.device) -> MaskFunction:
    """The causal mask function within documents."""
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in documents]
    within = packed_sequence_mask_function(torch.stack(numbers).to(device))
    joined: MaskFunction = and_masks(within, causal_mask_function)
    return joined
