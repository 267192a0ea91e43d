"""Rows that hold several documents: where each begins, told by a mask function or by lengths."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, pairwise

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


# In place of the number of a document: padding, and masks that tell no documents apart.
PADDING, NO_DOCUMENT = -1, -2


def document_numbers(
    function: MaskFunction, batch: int, seq_len: int, device: torch.device
) -> Tensor:
    """The documents within which a mask function is causal: int64 ``[batch, seq_len]``.

    Looks at O(n) pairs: neighbours, and each query with the first key of its document and row.
    That tells positions which start anew from prefixes and images, which are seen both ways; a
    function that hides single pairs in between cannot be told.

    Returns:
        For each token how many documents of its row come before; `NO_DOCUMENT` for all where the
        function is anything else.
    """
    columns = torch.arange(seq_len, device=device).expand(batch, seq_len)
    rows = torch.arange(batch, device=device)[:, None, None, None]

    def sees(queries: Tensor, keys: Tensor) -> Tensor:
        i, j = (x[:, None, :, None] for x in (queries, keys))
        seen = torch.as_tensor(function(rows, torch.zeros_like(rows), i, j), device=device)
        return seen.expand(i.shape)[:, 0, :, 0]

    follows = sees(columns[:, 1:], columns[:, :-1])
    begins = torch.nn.functional.pad(~follows, (1, 0))
    first = columns.where(begins, 0).cummax(1).values
    plain = sees(columns, first).all() & ~sees(columns[:, :-1], columns[:, 1:]).any()
    plain = plain & (sees(columns, torch.zeros_like(columns)) == (first == 0)).all()
    return begins.cumsum(1).where(plain, NO_DOCUMENT)


def is_plain_causal(function: MaskFunction, batch: int, seq_len: int, device: torch.device) -> bool:
    """Whether the two far corners are as in causal attention, in every row.

    Packing hides the first token from the last query; prefix and image overlays show the
    last token to the first query.
    """
    rows = torch.arange(batch, device=device)[:, None, None, None]
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    last = zero + seq_len - 1
    sees_first = bool(torch.as_tensor(function(rows, zero, last, zero)).all())
    sees_future = seq_len > 1 and bool(torch.as_tensor(function(rows, zero, zero, last)).any())
    return sees_first and not sees_future


def documents_of_numbers(numbers: Tensor) -> Documents:
    """The lengths of the documents that `document_numbers` tells apart.

    Raises:
        UserError: where it tells none apart.
    """
    rows = numbers.tolist()
    if rows and rows[0] and rows[0][0] == NO_DOCUMENT:
        raise UserError(
            "masks other than causal attention with padding, or within documents, are not "
            "supported, such as image tokens that see each other both ways; give tokens alone with "
            "a 2D attention_mask or position_ids that start anew, or unpatch_model(model) first"
        )
    return tuple(tuple(len(list(same)) for _, same in groupby(row)) for row in rows)


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
    return (tuple(end - begin for begin, end in pairwise(ends) if end > begin),)


def mask_within(documents: Documents, device: torch.device) -> MaskFunction:
    """The causal mask function within documents."""
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in documents]
    within = packed_sequence_mask_function(torch.stack(numbers).to(device))
    joined: MaskFunction = and_masks(within, causal_mask_function)
    return joined
