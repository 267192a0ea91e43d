"""Attention FLOPs of a prefill against its length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sa_patch.errors import UserError
from sa_patch.patterns import Pattern
from sa_patch.patterns.base import whole_number
from sa_patch.patterns.budget import require_known_keys


@dataclass(frozen=True)
class Cost:
    """Attention FLOPs of one layer with one head against the number of tokens.

    Of a pattern for each head the mean over these.

    Args:
        lengths: int ``[k]``, numbers of tokens.
        expected: float64 ``[k]``, by closed form: ``4 * head_dim`` for a visible key (its score and
            its part of the result), ``2 * head_dim`` for a candidate of a choice.
        counted: the same with visible keys counted in one draw; NaN where the pattern chooses by
            content or the count was not asked for.
    """

    pattern: Pattern
    head_dim: int
    lengths: np.ndarray
    expected: np.ndarray
    counted: np.ndarray

    def exponent(self) -> float | None:
        """Growth between the two longest lengths: ``d log FLOPs / d log n``; None of one length."""
        if len(self.lengths) < 2:
            return None
        rise = np.log(self.expected[-1] / self.expected[-2])
        return float(rise / np.log(self.lengths[-1] / self.lengths[-2]))


def check_lengths(lengths: Sequence[int], head_dim: int, group: int) -> None:
    """Refuse numbers out of range.

    Raises:
        UserError: unless lengths rise from at least 1, and head_dim and group are at least 1.
    """
    whole_number(head_dim, "head_dim", 1)
    whole_number(group, "group", 1)
    for length in lengths:
        whole_number(length, "n", 1)
    if not lengths or list(lengths) != sorted(set(lengths)):
        raise UserError(f"lengths must rise, such as 1024,2048,4096; got {list(lengths)}")


def measure_cost(
    pattern: Pattern,
    lengths: Sequence[int],
    *,
    head_dim: int = 64,
    group: int = 1,
    count_up_to: int = 8192,
) -> Cost:
    """FLOPs at each length, expected and counted.

    Args:
        lengths: numbers of tokens, rising.
        head_dim: width of a head.
        group: query heads that share a KV head; a choice that they share costs each its part.
        count_up_to: longest length at which visible keys are counted as well.

    Raises:
        UserError: for numbers out of range, or a pattern whose keys only the text decides.
    """
    check_lengths(lengths, head_dim, group)
    require_known_keys(pattern)
    expected, counted = [], []
    for length in lengths:
        choosing = 2 * head_dim * float(pattern.selection_dots(length, group).sum())
        expected.append(4 * head_dim * float(pattern.keys_per_query(length).sum()) + choosing)
        if length > count_up_to or pattern.reads_content:
            counted.append(np.nan)
        else:
            seen = float(pattern.count_visible(length).double().sum(-1).mean())
            counted.append(4 * head_dim * seen + choosing)
    return Cost(pattern, head_dim, np.array(lengths), np.array(expected), np.array(counted))
