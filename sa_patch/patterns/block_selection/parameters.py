"""Which numbers go together in block_topk."""

from __future__ import annotations

import math

from sa_patch.errors import UserError
from sa_patch.patterns.base import whole_number


def check_parameters(
    *,
    block_size: int,
    topk: int,
    sinks: int,
    local: int,
    branch: int,
    beam: int,
    grouped: bool,
    shared: int,
    segment: int,
    percent: int,
    threshold: float,
) -> None:
    """Raise UserError unless each parameter is of its kind and they fit each other.

    `block_size` is a whole number already: the default of `local` follows from it.
    """
    whole_number(beam, "beam", 1)
    whole_number(shared, "shared", 1)
    whole_number(segment, "segment", 0)
    whole_number(topk, "topk", 0)
    whole_number(sinks, "sinks", 0)
    whole_number(local, "local", 0)
    whole_number(branch, "branch", 0)
    whole_number(percent, "percent", 0)
    if percent > 99 or (percent and (branch or not topk)):
        raise UserError(
            "percent must be at most 99, and above 0 only with branch=0 and topk of at least 1,"
            f" got percent={percent}, branch={branch}, topk={topk}"
        )
    number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not number or not 0 <= threshold < math.inf:
        raise UserError(f"threshold must be a number of at least 0, got {threshold!r}")
    if threshold and (branch or percent or not topk):
        raise UserError(
            "threshold may be above 0 only with branch=0, percent=0 and topk of at least 1, got"
            f" branch={branch}, percent={percent}, topk={topk}"
        )
    if not isinstance(grouped, bool):
        raise UserError(f"grouped must be true or false, got {grouped!r}")
    if local % block_size:
        raise UserError(f"local must be a multiple of block_size={block_size}, got {local}")
    if segment and local:
        raise UserError(f"with segment, local must be 0, got {local}")
    if segment and sinks % block_size:
        raise UserError(
            f"with segment, sinks must be a multiple of block_size={block_size}, got {sinks}"
        )
    if segment % block_size or segment % shared:
        raise UserError(
            f"segment must be a multiple of block_size={block_size} and shared={shared}, "
            f"got {segment}"
        )
    if branch == 1:
        raise UserError("branch must be at least 2, or 0 for a flat choice; got 1")
    if branch and beam * branch < topk:
        raise UserError(
            f"beam * branch must be at least topk={topk}, so that enough blocks are left "
            f"to choose from; got beam={beam}, branch={branch}"
        )
