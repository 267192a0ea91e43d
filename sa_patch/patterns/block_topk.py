"""Small blocks chosen by content, coarse to fine, beside sinks and the neighbourhood."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.patterns.base import Pattern, Profile, whole_number
from sa_patch.patterns.block_selection.parameters import check_parameters
from sa_patch.patterns.block_selection.shared_choice import chosen_so_far, expected_choices
from sa_patch.patterns.block_selection.tree import best_blocks, read_nodes, scored_nodes
from sa_patch.patterns.block_selection.worth_reading import blocks_worth_reading

Positions = TypeVar("Positions", int, Tensor)


@dataclass(frozen=True)
class BlockTopK(Pattern):
    """Query i sees the sinks, its neighbourhood, and the `topk` earlier blocks that fit it best.

    Tokens from `sinks` on are cut into blocks of `block_size`. In view are the first `sinks`
    tokens; of the query's own block what came so far, and the `local` tokens before that block;
    and of all earlier blocks the `topk` whose mean key has the largest fp32 dot product with the
    query, chosen for each query head (MoBA's rule, arXiv 2502.13189, in blocks small enough to
    spend no budget on keys that merely stand beside a wanted one).

    With ``branch = 0`` every earlier block is scored. Otherwise blocks are the lowest level of a
    tree whose nodes join `branch` complete neighbours, and a beam search walks it from the top: on
    every level the `beam` best nodes stay, and their children are scored on the next. So a choice
    costs ``O(beam * branch * log n)`` dot products. The choice never depends on later tokens.

    With `shared` above 1 a tile of so many queries, by position, shares its choices: query i sees
    the blocks that the queries of its tile up to i chose. What a tile of queries reads is what
    hardware pays for. With `segment` the neighbourhood is all that came so far of the query's
    segment of so many tokens, so that neighbours agree more in what is left to choose. With
    `percent` a query chooses that part of the blocks it may choose from, where this is more. With
    `threshold` it chooses at most `topk`, and of these only what is thought to get that share of
    the attention of all that it sees unchosen: none where its neighbourhood is enough, so that as
    much reading is left for others (FlashPrefill's idea, arXiv 2603.06199, of each query alone).

    Args:
        block_size: tokens in a block, at least 1.
        topk: chosen blocks in view, the query's own not counted; at least 0.
        sinks: first tokens in view, at least 0.
        local: tokens before the query's own block in view, a multiple of `block_size`; two blocks
            unless given.
        branch: children of a node, at least 2; 0 for a flat choice.
        beam: nodes that stay on each level; ``beam * branch`` is at least `topk`.
        grouped: one choice for the query heads that share a KV head, by the sum of their queries.
        shared: queries that share their choices; 1 for none.
        segment: tokens of a segment, a multiple of `block_size` and `shared`, of which `sinks` must
            be a multiple of `block_size` as well, and `local` 0; 0 for none.
        percent: of the blocks that a query may choose from, rounded down, at most 99; above 0 only
            with ``branch = 0`` and `topk` of at least 1.
        threshold: at least 0, and above 1 where only blocks count that get more than all that is
            unchosen; above 0 only with ``branch = 0``, without `percent` and with `topk` of at
            least 1. Scores are scaled by ``head_dim ** -0.5``; for a layer with another scale
            queries are scaled before.

    Raises:
        UserError: if a parameter is not of these kinds.
    """

    block_size: int = field(default=4, metadata={"always": True})
    topk: int = field(default=8, metadata={"always": True})
    sinks: int = field(default=4, metadata={"always": True})
    local: int = field(default=-1, metadata={"always": True})
    branch: int = 4
    beam: int = 32
    grouped: bool = True
    shared: int = 1
    segment: int = 0
    percent: int = 0
    threshold: float = 0.0

    name: ClassVar[str] = "block_topk"
    summary: ClassVar[str] = "sinks, neighbourhood and the best small blocks, found coarse to fine"
    reads_content: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole_number(self.block_size, "block_size", 1)
        if self.local == -1:
            object.__setattr__(self, "local", 0 if self.segment else 2 * self.block_size)
        check_parameters(**vars(self))

    @classmethod
    def from_window(
        cls,
        window: int,
        block_size: int = 4,
        sinks: int = 4,
        branch: int = 4,
        beam: int = 32,
        grouped: bool = True,
    ) -> BlockTopK:
        """The pattern that shows at most `window` keys: a quarter near, the rest chosen.

        Raises:
            UserError: if `window` leaves no room for one chosen block.
        """
        whole_number(window, "window", 1)
        whole_number(block_size, "block_size", 1)
        whole_number(sinks, "sinks", 0)
        whole_number(branch, "branch", 0)
        whole_number(beam, "beam", 1)
        local = window // 4 // block_size * block_size
        topk = (window - sinks - block_size - local) // block_size
        if topk < 1:
            raise UserError(
                f"window={window} leaves no room for a chosen block beside {sinks} sinks and blocks"
                f" of {block_size}; take a larger window or smaller blocks"
            )
        if branch and beam * branch < topk:
            beam = -(-topk // branch)
        return cls(block_size, topk, sinks, local, branch, beam, grouped)

    def own_block(self, positions: Positions) -> Positions:
        """The block of each position, counted from token `sinks`; negative in the sinks."""
        return (positions - self.sinks) // self.block_size

    def _first_unchosen(self, positions: Positions) -> Positions:
        """The block that the neighbourhood of each query begins with, negative if there is none."""
        begins = positions // self.segment * self.segment if self.segment else positions
        return self.own_block(begins) - self.local // self.block_size

    def eligible(self, positions: Tensor) -> Tensor:
        """How many blocks each query may choose from: those before its neighbourhood."""
        return self._first_unchosen(positions).clamp(min=0)

    def eligible_at(self, position: int) -> int:
        """`eligible` for one query, without a tensor."""
        return max(0, self._first_unchosen(position))

    def picks_of(self, eligible: Positions) -> Positions:
        """How many blocks a query chooses that may choose from so many; `topk` also of fewer."""
        if isinstance(eligible, int):
            return max(self.topk, eligible * self.percent // 100)
        return (eligible * self.percent // 100).clamp(min=self.topk)

    def most_picks(self, seq_len: int) -> int:
        """How many blocks any query of a sequence chooses for itself, at most."""
        return self.picks_of(self.eligible_at(seq_len - 1)) if seq_len else self.topk

    def own_choices(self, q: Tensor, k: Tensor, positions: Tensor | range) -> Tensor:
        """The blocks that every query chooses for itself.

        Args:
            q: ``[q_heads, nq, head_dim]``.
            k: ``[kv_heads, n, head_dim]``, all keys of the sequence.
            positions: int64 ``[nq]``, of the queries; a range where they follow each other, so
                that nothing is asked of the device.

        Returns:
            int64 ``[choosers, nq, m]``, m what the last query chooses, -1 where others choose
            fewer, each block once; a chooser is a query head, or with `grouped` a KV head.
        """
        per_kv_head = q.float().unflatten(0, (len(k), -1))
        if self.threshold:
            worth = blocks_worth_reading(
                per_kv_head,
                k,
                positions,
                self.eligible,
                self.eligible_at,
                sinks=self.sinks,
                block_size=self.block_size,
                topk=self.topk,
                threshold=self.threshold,
                grouped=self.grouped,
            )
            return worth.flatten(0, 1)
        most_of = None
        if isinstance(positions, range):
            known = positions
            positions = torch.arange(known.start, known.stop, device=q.device)

            def most_of(count: int) -> int:
                return self.eligible_at(known[count - 1])

        if self.grouped:
            per_kv_head = per_kv_head.sum(1, keepdim=True)
        finest_blocks = best_blocks(
            per_kv_head,
            k[:, self.sinks :],
            self.eligible(positions),
            block_size=self.block_size,
            topk=self.topk,
            branch=self.branch,
            beam=self.beam,
            most_of=most_of,
            picks_of=self.picks_of if self.percent else None,
        )
        return finest_blocks.flatten(0, 1)

    def picks(self, q: Tensor, k: Tensor, positions: Tensor | range) -> Tensor:
        """The blocks that every query sees by choice: its own, and with `shared` its tile's so far.

        Args:
            q, k, positions: as of `own_choices`; with `shared` these follow each other and begin a
                tile.

        Returns:
            int64 ``[choosers, nq, shared * m]``, as `own_choices`, each block once, -1 for none.
        """
        own = self.own_choices(q, k, positions)
        return own if self.shared == 1 else chosen_so_far(own, self.shared)

    def unchosen(self, query_positions: Tensor, seq_len: int) -> Tensor:
        """What is in view unchosen, sinks and neighbourhood: bool ``[nq, seq_len]``."""
        i = query_positions[:, None]
        keys = torch.arange(seq_len, device=i.device)
        neighbourhood = self.sinks + self.eligible(i) * self.block_size
        return ((keys < self.sinks) | (keys >= neighbourhood)) & (keys <= i)

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
        if q is None or k is None:
            raise UserError("block_topk chooses blocks by content: visible() needs q and k")
        if len(query_positions) and int(query_positions[0]) % self.shared:
            raise UserError(
                f"{self} shares choices in tiles of {self.shared} queries: give whole tiles, from "
                f"a multiple of {self.shared} on; got queries from {int(query_positions[0])} on"
            )
        picks = self.picks(q, k, query_positions)
        picks = picks.repeat_interleave(len(q) // len(picks), dim=0)
        unchosen = self.unchosen(query_positions, seq_len)
        # The first column takes the marks of those that have fewer blocks to choose from.
        blocks = -(-max(0, seq_len - self.sinks) // self.block_size)
        marks = torch.zeros(*picks.shape[:2], blocks + 1, dtype=torch.bool, device=q.device)
        chosen = marks.scatter_(-1, picks + 1, True)[..., 1:]
        keys = torch.arange(seq_len, device=q.device)
        of_key = self.own_block(keys)
        if not blocks:
            return unchosen.expand(len(q), -1, -1)
        return unchosen | (chosen[..., of_key.clamp(min=0)] & (of_key >= 0))

    @property
    def shared_queries(self) -> int:
        return self.shared

    @property
    def counts_need_content(self) -> bool:
        return self.shared > 1 or self.keys_are_bounds

    @property
    def keys_are_bounds(self) -> bool:
        return self.threshold > 0

    @property
    def weighs_scores(self) -> bool:
        return self.threshold > 0

    def profile(self, seq_len: int) -> Profile:
        i = torch.arange(seq_len, dtype=torch.float64)
        seen = (self.sinks + self.local + 1 + torch.zeros_like(i)).minimum(i + 1)
        rest = (self.keys_per_query(seq_len) - seen).clamp(min=0)
        return Profile(self.sinks, self.local + 1, rest / (i + 1 - seen).clamp(min=1))

    def keys_per_query(self, seq_len: int) -> Tensor:
        """Visible keys, with `threshold` at most; with `shared` as if a tile chose at random."""
        positions = torch.arange(seq_len)
        eligible = self.eligible(positions)
        chosen = expected_choices(eligible, self.picks_of(eligible), self.shared)
        return (positions + 1 - (eligible - chosen) * self.block_size).double()

    def saturated(self, seq_len: int) -> bool:
        return self.eligible_at(seq_len - 1) <= (0 if self.threshold else self.topk)

    @property
    def effective_window(self) -> int | None:
        """What a query's own choices show it; none where they grow with its position."""
        nearby = self.segment or self.local + self.block_size
        return None if self.percent else self.sinks + nearby + self.block_size * self.topk

    def count_visible(self, seq_len: int, *, layer: int = 0, heads: int = 1) -> Tensor:
        if self.counts_need_content:
            raise UserError(f"what {self} sees can only be counted where its blocks are chosen")
        # How many keys are seen does not depend on which blocks are chosen.
        return self.keys_per_query(seq_len).round().long()[None]

    def selection_dots(self, seq_len: int, group: int = 1) -> Tensor:
        if self.threshold:
            # Each head weighs every block, and what it sees unchosen.
            i = torch.arange(seq_len)
            eligible = self.eligible(i)
            unchosen = i + 1 - eligible * self.block_size
            return (eligible + unchosen).where(eligible > 0, 0).double()
        dots = scored_nodes(
            self.eligible(torch.arange(seq_len)),
            topk=self.topk,
            branch=self.branch,
            beam=self.beam,
        )
        return dots.double() / (group if self.grouped else 1)

    def means_read(self, positions: Tensor) -> int:
        if self.threshold:
            first, last = int(positions.min()), int(positions.max())
            unchosen = last + 1 - self.eligible_at(first) * self.block_size
            most = self.eligible_at(last)
            return most + unchosen if most else 0
        search = {"topk": self.topk, "branch": self.branch, "beam": self.beam}
        return read_nodes(self.eligible(positions), **search)
