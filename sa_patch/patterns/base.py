"""What every pattern is: a frozen set of parameters that says which keys a query may see."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sa_patch.errors import UserError

# Rows of a visibility mask that are built at once when counting: bounds the memory of
# `count_visible` to this many rows of seq_len booleans.
_COUNT_ROWS = 1024


def whole_number(value: Any, field: str, minimum: int) -> int:
    """Return `value` if it is an integer of at least `minimum`.

    Raises:
        UserError: for anything else (booleans, floats, strings, smaller integers).
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UserError(f"{field} must be a whole number of at least {minimum}, got {value!r}")
    return value


Rule = Callable[[Tensor, Tensor], Tensor]
"""``rule(i, j)``: whether query i sees key j, elementwise, for ``j <= i``.

i and j are int64 and broadcast against each other; their first dimension is the heads' (or 1). The
result has as many heads as the pattern or the arguments tell apart.
"""

View = Callable[[int, int], Tensor]
"""``view(low, high)``: what the queries ``low .. high - 1`` of one sequence see of the keys
``0 .. high - 1``, bool ``[heads or 1, high - low, high]``; later keys they do not see."""


class Profile(NamedTuple):
    """What a query sees, as far as it can be said without drawing or reading anything.

    Query i sees the first `sinks` keys and the nearest `window`, and each other earlier key with
    probability ``chance[i]``, independently of other patterns.
    """

    sinks: int
    window: int
    chance: Tensor
    """float64 ``[seq_len]``"""


@dataclass(frozen=True)
class Pattern(ABC):
    """Which keys each query of one sequence sees, causal by original position.

    A pattern is index mathematics only: it knows nothing of models or of the softmax. Instances
    are immutable and hashable, validate their parameters when built, and print as a text form
    (``sa:window=128,seed=0``) that `sa_patch.patterns.parse_pattern` reads back. ``A | B`` is the
    pattern of the keys that A or B sees.
    """

    name: ClassVar[str]
    """The method's short name, used in text forms, YAML and on the command line."""
    summary: ClassVar[str]
    """One line for listings: what a query sees, and the source."""
    prefix_stable: ClassVar[bool] = True
    """Whether the visible set of query i does not depend on how many tokens follow it."""
    reads_content: ClassVar[bool] = False
    """Whether `visible` needs the queries and keys themselves (block choice)."""
    looks_ahead: ClassVar[bool] = False
    """Whether choices read queries and keys behind the query that they are made for: a prompt is
    needed whole, and what its earlier tokens see changes with the later ones."""
    scores_all: ClassVar[bool] = False
    """Whether the choice computes every score, those of visible keys among them."""
    _unite: ClassVar[Callable[[Pattern, Pattern], Pattern]]
    """What ``|`` does. Set by `union`, which knows every kind of pattern; none knows it."""

    def __or__(self, other: Pattern) -> Pattern:
        """The pattern of the keys that either sees, each counted once."""
        return type(self)._unite(self, other) if isinstance(other, Pattern) else NotImplemented

    @abstractmethod
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
        """The definition: a mask of the keys that enter each query's softmax.

        Args:
            query_positions: int64 ``[nq]``, original positions in ``0..seq_len-1``.
            seq_len: number of real tokens of the sequence.
            layer: index of the layer, for patterns drawn anew in each layer.
            heads: number of query heads.
            q: ``[q_heads, nq, head_dim]``, only read where `reads_content`; where `looks_ahead`
                all queries of the sequence, whichever are asked about: ``[q_heads, seq_len, ..]``.
            k: ``[kv_heads, seq_len, head_dim]``, only read where `reads_content`.

        Returns:
            bool ``[heads or 1, nq, seq_len]``; one head where all heads share the mask.
        """

    def view(
        self,
        seq_len: int,
        *,
        layer: int = 0,
        heads: int = 1,
        q: Tensor | None = None,
        k: Tensor | None = None,
        start: int = 0,
        device: torch.device | None = None,
    ) -> View:
        """`visible` for ranges of one sequence; what is chosen for all of it is chosen once.

        Args:
            q: ``[q_heads, nq, head_dim]``, of all queries from position `start` on.
        """

        def seen(low: int, high: int) -> Tensor:
            positions = torch.arange(low, high, device=device)
            own = q[:, low - start : high - start] if q is not None else None
            length = high if self.prefix_stable else seq_len
            so_far = k[:, :length] if k is not None else None
            seen = self.visible(positions, length, layer=layer, heads=heads, q=own, k=so_far)
            return seen[..., :high]

        return seen

    def queries_read(self, q: Tensor, positions: Tensor) -> Tensor:
        """What `visible` takes as `q` to tell of some positions.

        Args:
            q: ``[q_heads, seq_len, head_dim]``.
        """
        return q if self.looks_ahead else q[:, positions]

    @abstractmethod
    def keys_per_query(self, seq_len: int) -> Tensor:
        """Expected number of visible keys of each query, in closed form: float64 ``[seq_len]``."""

    @abstractmethod
    def saturated(self, seq_len: int) -> bool:
        """Whether every query of a sequence of this length sees every ``j <= i``."""

    @property
    @abstractmethod
    def effective_window(self) -> int | None:
        """Nominal number of keys a query sees, the x axis of sweeps; None where unlimited."""

    def count_visible(self, seq_len: int, *, layer: int = 0, heads: int = 1) -> Tensor:
        """Measured number of visible keys of each query: int64 ``[heads or 1, seq_len]``."""
        return self.count_visible_except(None, seq_len, layer=layer, heads=heads)

    def count_visible_except(
        self, unless: Rule | None, seq_len: int, *, layer: int = 0, heads: int = 1
    ) -> Tensor:
        """As `count_visible`, without the pairs that `unless` names."""
        rows = []
        keys = torch.arange(seq_len)
        for start in range(0, seq_len, _COUNT_ROWS):
            positions = torch.arange(start, min(start + _COUNT_ROWS, seq_len))
            seen = self.visible(positions, seq_len, layer=layer, heads=heads)
            if unless is not None:
                seen = seen & ~unless(positions[None, :, None], keys[None, None])
            rows.append(seen.sum(-1))
        return torch.cat(rows, dim=-1) if rows else torch.zeros(1, 0, dtype=torch.int64)

    @property
    def counts_need_content(self) -> bool:
        """Whether `count_visible` cannot say what is seen, because chosen keys may coincide."""
        return False

    @property
    def keys_are_bounds(self) -> bool:
        """Whether `keys_per_query` tells only the most that may be seen, as the text decides."""
        return False

    @property
    def weighs_scores(self) -> bool:
        """Whether a choice depends on the scale of scores, not on their order alone."""
        return self.looks_ahead

    @property
    def shared_queries(self) -> int:
        """Queries that share their choices, in tiles from multiples of this number on; 1 for none.

        What is asked of a pattern then begins with a tile: of fewer queries the first ones.
        """
        return 1

    @property
    def computed_as(self) -> Pattern:
        """The pattern that shows the very same keys, in the terms that kernels know."""
        return self

    @property
    def has_rule(self) -> bool:
        """Whether `rule` tells what is seen."""
        return type(self).rule is not Pattern.rule

    @property
    def bounded_reach(self) -> tuple[int, int] | None:
        """(sinks, window) if no query ever sees more than the first and the nearest keys."""
        return None

    def profile(self, seq_len: int) -> Profile:
        """What is known of the visible keys in advance; how unions state their budget.

        By default as if the keys before a query's own were drawn at random.
        """
        earlier = torch.arange(seq_len, dtype=torch.float64)
        return Profile(0, 1, (self.keys_per_query(seq_len) - 1) / earlier.clamp(min=1))

    def rule(
        self, seq_len: int, *, layer: int = 0, heads: int = 1, device: torch.device | None = None
    ) -> Rule:
        """Membership of single pairs, for patterns that do not read content.

        A pattern may do without it: unions then count its keys by its mask.

        Raises:
            TypeError: for a pattern that chooses by content, or that does without.
        """
        why = "chooses keys by content" if self.reads_content else "has no rule of single pairs"
        raise TypeError(f"{self.name} {why}")

    def selection_dots(self, seq_len: int, group: int = 1) -> Tensor:
        """Dot products of length head_dim spent per query on choosing keys: float64 ``[seq_len]``.

        They count towards a pattern's attention FLOPs beside the visible keys.

        Args:
            group: query heads that share a KV head; a choice they share costs each its part.
        """
        return torch.zeros(seq_len, dtype=torch.float64)

    def dense_end(self, seq_len: int) -> int:
        """Queries at the end of a prompt that see every key, because they are the last."""
        return 0

    def means_read(self, positions: Tensor) -> int:
        """Mean keys of blocks that queries at these positions read together to choose, at most."""
        return 0

    def __str__(self) -> str:
        shown = [
            f"{field.name}={_text(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if field.metadata.get("always") or getattr(self, field.name) != field.default
        ]
        return f"{self.name}:{','.join(shown)}" if shown else self.name


def _text(value: Any) -> str:
    # A plus joins the parts of a union.
    return str(value).lower() if isinstance(value, bool) else str(value).replace("e+", "e")


class Composed(Pattern):
    """A pattern made of others, with what follows from what these are."""

    @property
    @abstractmethod
    def members(self) -> tuple[Pattern, ...]:
        """The others."""

    @property
    def prefix_stable(self) -> bool:  # type: ignore[override]
        """Whether all members are."""
        return all(own.prefix_stable for own in self.members)

    @property
    def reads_content(self) -> bool:  # type: ignore[override]
        """Whether a member does."""
        return any(own.reads_content for own in self.members)

    @property
    def looks_ahead(self) -> bool:  # type: ignore[override]
        """Whether a member does."""
        return any(own.looks_ahead for own in self.members)

    @property
    def keys_are_bounds(self) -> bool:
        return any(own.keys_are_bounds for own in self.members)

    @property
    def weighs_scores(self) -> bool:
        return any(own.weighs_scores for own in self.members)

    @property
    def shared_queries(self) -> int:
        return math.lcm(*(own.shared_queries for own in self.members))

    @property
    def bounded_reach(self) -> tuple[int, int] | None:
        reaches = [own.bounded_reach for own in self.members]
        known = [reach for reach in reaches if reach is not None]
        if len(known) < len(reaches):
            return None
        return max(sinks for sinks, _ in known), max(window for _, window in known)
