"""Which numbers go together in block_topk."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sa_patch.errors import UserError
from sa_patch.patterns.base import whole_number

if TYPE_CHECKING:
    from sa_patch.patterns.block_topk import BlockTopK


def check_parameters(pattern: BlockTopK) -> None:
    """Raise UserError unless each parameter is of its kind and they fit each other.

    `block_size` is a whole number already: the default of `local` follows from it.
    """
    whole_number(pattern.beam, "beam", 1)
    whole_number(pattern.shared, "shared", 1)
    whole_number(pattern.segment, "segment", 0)
    for name in ("topk", "sinks", "local", "branch", "percent"):
        whole_number(getattr(pattern, name), name, 0)
    if pattern.percent > 99 or (pattern.percent and (pattern.branch or not pattern.topk)):
        raise UserError(
            "percent must be at most 99, and above 0 only with branch=0 and topk of at least 1,"
            f" got percent={pattern.percent}, branch={pattern.branch}, topk={pattern.topk}"
        )
    share = pattern.threshold
    number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not number or not 0 <= share < math.inf:
        raise UserError(f"threshold must be a number of at least 0, got {share!r}")
    if share and (pattern.branch or pattern.percent or not pattern.topk):
        raise UserError(
            "threshold may be above 0 only with branch=0, percent=0 and topk of at least 1, got"
            f" branch={pattern.branch}, percent={pattern.percent}, topk={pattern.topk}"
        )
    if not isinstance(pattern.grouped, bool):
        raise UserError(f"grouped must be true or false, got {pattern.grouped!r}")
    size = pattern.block_size
    if pattern.local % size:
        raise UserError(f"local must be a multiple of block_size={size}, got {pattern.local}")
    if pattern.segment and pattern.local:
        raise UserError(f"with segment, local must be 0, got {pattern.local}")
    if pattern.segment and pattern.sinks % size:
        raise UserError(
            f"with segment, sinks must be a multiple of block_size={size}, got {pattern.sinks}"
        )
    if pattern.segment % size or pattern.segment % pattern.shared:
        raise UserError(
            f"segment must be a multiple of block_size={size} and shared={pattern.shared}, "
            f"got {pattern.segment}"
        )
    if pattern.branch == 1:
        raise UserError("branch must be at least 2, or 0 for a flat choice; got 1")
    if pattern.branch and pattern.beam * pattern.branch < pattern.topk:
        raise UserError(
            f"beam * branch must be at least topk={pattern.topk}, so that enough blocks are left "
            f"to choose from; got beam={pattern.beam}, branch={pattern.branch}"
        )
