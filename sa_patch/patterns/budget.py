"""Splitting a budget of keys over sinks, neighbourhood and the rest."""

from __future__ import annotations

from sa_patch.errors import UserError
from sa_patch.patterns.base import Pattern, whole_number
from sa_patch.patterns.registry import make_pattern
from sa_patch.patterns.sinks import Sinks
from sa_patch.patterns.swa import SWA
from sa_patch.patterns.union import unite


def split_budget(
    total: int,
    *,
    sinks: int = 4,
    local: float = 0.5,
    rest: str = "sa",
    seed: int | None = None,
) -> Pattern:
    """A union that shows a query about `total` keys.

    Args:
        total: nominal number of keys in view.
        sinks: first tokens among them, at least 0.
        local: share of what is left that goes to the sliding window, from 0 to 1.
        rest: method that gets what is left then, by its `window`; such as sa, psa or moba.
        seed: of `rest`, where it is random.

    Raises:
        UserError: for a value out of range, or a method that takes no window or seed.
    """
    whole_number(total, "total", 1)
    whole_number(sinks, "sinks", 0)
    if isinstance(local, bool) or not isinstance(local, (int, float)) or not 0 <= local <= 1:
        raise UserError(f"local must be a share from 0 to 1, got {local!r}")
    if sinks >= total:
        raise UserError(f"sinks={sinks} leave nothing of total={total}; take fewer sinks")
    near = round((total - sinks) * local)
    left = total - sinks - near
    parts: list[Pattern] = []
    if sinks:
        parts.append(Sinks(sinks))
    if near:
        parts.append(SWA(near))
    if left:
        parts.append(make_pattern(rest, window=left, seed=seed))
    return unite(*parts)
