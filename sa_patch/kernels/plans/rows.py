"""Rows of a batch by length, for kernels that serve rows of one length at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from sa_patch.kernels.backend import Spans
from sa_patch.patterns import Full, Pattern

AttendRows = Callable[[Pattern, Tensor, Tensor, Tensor], Tensor]
"""``(pattern, q, k, v)`` to the output: whole rows of one length, or of any where the pattern is
prefix-stable."""


def attend_by_length(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, spans: Spans, attend_rows: AttendRows
) -> Tensor:
    """Attention of rows that may differ in length; shapes as `Attend`."""
    count, seq_len, longest = q.shape[2], k.shape[2], max(spans.lengths)
    groups = spans.groups()
    whole = list(groups) == [(seq_len, seq_len - count)]
    stable = pattern.prefix_stable or pattern.saturated(longest)
    if whole or (stable and count == seq_len):
        # What a query sees depends on nothing behind it: padding at the right included.
        return attend_rows(Full() if pattern.saturated(longest) else pattern, q, k, v)
    out = q.new_zeros(q.shape)
    for (length, start), members in groups.items():
        real = min(count, length - start)
        if real <= 0:
            continue
        rows = torch.tensor(members, device=q.device)
        shown = Full() if pattern.saturated(length) else pattern
        keys, values = (x[rows, :, :length] for x in (k, v))
        of_rows = attend_rows(shown, q[rows, :, :real], keys, values)
        out = out.index_copy(0, rows, pad(of_rows, (0, 0, 0, count - real)))
    return out
