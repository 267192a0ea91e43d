"""Splitting a budget of keys over sinks, neighbourhood and the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import suppress

from sa_patch.errors import UserError
from sa_patch.patterns.base import Pattern, whole_number
from sa_patch.patterns.registry import make_pattern, parse_pattern
from sa_patch.patterns.rivals.power import Power
from sa_patch.patterns.sinks import Sinks
from sa_patch.patterns.sliding_window import SWA
from sa_patch.patterns.union import unite

# Numbers in a row for which a family may have no pattern, such as those no multiple of a block.
_LONGEST_GAP = 64


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
        rest: method that gets what is left then, by its `window`; such as sa, psa or moba. One that
            begins with the nearest tokens itself (swa, power) gets the sliding window's keys too.
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
    local_keys = round((total - sinks) * local)
    left = total - sinks - local_keys
    parts: list[Pattern] = []
    if left:
        own = make_pattern(rest, window=left, seed=seed)
        if isinstance(own, (SWA, Power)):
            # Two windows would show the same keys.
            own, local_keys = dataclasses.replace(own, window=left + local_keys), 0
        parts.append(own)
    if sinks:
        parts.append(Sinks(sinks))
    if local_keys:
        parts.append(SWA(local_keys))
    return unite(*parts)


def flops_share(pattern: Pattern, seq_len: int, group: int = 1) -> float:
    """Expected attention FLOPs of a prefill as a share of full attention's, choosing included.

    A visible key costs two dot products (its score and its part of the result), a candidate of a
    choice one. Queries that share their choices count as if they chose at random: on text, where
    they agree, far less is spent.

    Args:
        seq_len: tokens of the prompt, at least 1.
        group: query heads that share a KV head.

    Raises:
        UserError: if the text decides how many keys are seen, as under a threshold.
    """
    whole_number(seq_len, "seq_len", 1)
    require_known_keys(pattern)
    keys = float(pattern.keys_per_query(seq_len).sum())
    dots = float(pattern.selection_dots(seq_len, group).sum())
    return (2 * keys + dots) / (seq_len * (seq_len + 1))


def require_known_keys(pattern: Pattern) -> None:
    """Raise `UserError` if only the text decides how many keys are seen, as under a threshold."""
    if pattern.keys_are_bounds:
        raise UserError(
            f"how many keys {pattern} shows depends on the text, and is measured where it is run; "
            "to keep to a budget, choose by a number of blocks (topk) where the method can"
        )


def fit_budget(
    template: str,
    seq_len: int,
    share: float,
    group: int = 1,
    spent: Callable[[Pattern, int, int], float] = flops_share,
) -> Pattern:
    """The largest pattern of a family that spends at most a share of full attention's FLOPs.

    ``fit_budget("sinks:4+swa:{}", 4096, 1 / 8)`` finds the window.

    Args:
        template: text form of the family, with ``{}`` for the whole number that is sought; the
            more of it, the more FLOPs, small numbers apart (MoBA's smallest blocks cost most).
        seq_len: tokens of the prompt for which the share holds.
        share: of full causal attention, above 0 and at most 1; see `flops_share`.
        group: query heads that share a KV head.
        spent: the share that a pattern spends, where not FLOPs are meant; it takes pattern,
            `seq_len` and `group`.

    Raises:
        UserError: if the template has no ``{}``, or its smallest pattern is too large already.
    """
    whole_number(seq_len, "n", 1)
    if not isinstance(template, str) or "{}" not in template:
        raise UserError(
            f"a family has {{}} for the number that is sought, such as swa:{{}}; got {template!r}"
        )
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise UserError(f"a share of full attention lies above 0 and is at most 1, got {share!r}")

    try:
        threshold = parse_pattern(template.replace("{}", "0.5"))
    except UserError:
        pass
    else:
        # As a whole number it would be none at all, or all.
        require_known_keys(threshold)
    smallest = _smallest(template, seq_len)

    def member(number: int) -> Pattern:
        """Of the next smaller number where the family skips some, as it does odd ones."""
        lowest = max(smallest, number - _LONGEST_GAP)
        for candidate in range(number, lowest, -1):
            with suppress(UserError):
                return parse_pattern(template.replace("{}", str(candidate)))
        return parse_pattern(template.replace("{}", str(lowest)))

    def fits(number: int) -> bool:
        try:
            return spent(member(number), seq_len, group) <= share
        except UserError:
            # Some parameters allow only so much of another, as a beam does of chosen blocks.
            return False

    low = next((number for number in _growing(smallest, 2 * seq_len) if fits(number)), None)
    if low is None:
        least = spent(member(smallest), seq_len, group)
        raise UserError(
            f"even {member(smallest)} spends {least:.3f} of full attention's at n = "
            f"{seq_len}, more than {share:g}; take a larger share, or another family"
        )
    step = 1
    while low < 2 * seq_len and fits(low + step):
        low, step = low + step, 2 * step
    while step > 1:
        step //= 2
        if fits(low + step):
            low += step
    return member(low)


def _growing(first: int, last: int) -> Iterator[int]:
    """Numbers at growing distances: the smallest blocks may cost more to choose than to see."""
    number = first
    while number <= last:
        yield number
        number += max(1, number // 8)


def _smallest(template: str, seq_len: int) -> int:
    """The smallest number from which on the family can be built."""
    for number in range(seq_len + 1):
        try:
            parse_pattern(template.replace("{}", str(number)))
        except UserError as error:
            if number == seq_len:
                raise UserError(f"{template!r} is no family of patterns: {error}") from error
        else:
            return number
    raise AssertionError("the loop ends by returning or raising")
